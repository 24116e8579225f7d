"""What commands refuse, say and keep at the edges: options that would be ignored, extreme numbers, empty inputs,
provenance, chosen heads."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner
from salekit.cli import bench as bench_module
from salekit.cli import validate as validate_module
from salekit.cli.main import cli
from test_host_validate import SETTINGS, failed, kernels  # noqa: F401  a fixture

import salekit
from salekit import calibration, reference
from salekit.block_mask import BlockMask
from salekit.errors import ArgumentError, FileFormatError


def run(*arguments, code=0):
    """In this process; code: None, an error of the library."""
    result = CliRunner().invoke(cli, [*map(str, arguments)])
    if code is None:
        assert isinstance(result.exception, ArgumentError), (result.output, result.exception)
    else:
        assert result.exit_code == code and (code or not result.exception), (result.output, result.exception)
    return result


def said(result):
    return " ".join(result.stderr.split())


def save(path, seqlen_q=300, seqlen_k=300, batch=1, heads=2, head_dim=64, dtype=np.float16, **scales):
    rng = np.random.default_rng(0)
    sizes = (("q", seqlen_q, heads), ("k", seqlen_k, 1), ("v", seqlen_k, 1))
    shapes = {name: (batch, seqlen, of, head_dim) for name, seqlen, of in sizes}
    tensors = {name: scales.get(name, 1) * rng.standard_normal(shape) for name, shape in shapes.items()}
    np.savez(path, **{name: x.astype(dtype) for name, x in tensors.items()})
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Inputs: two heads, what has no elements, what is not finite, a head_dim without pools."""
    folder = tmp_path_factory.mktemp("inputs")
    save(folder / "two.npz")
    save(folder / "batches.npz", batch=2)
    save(folder / "d96.npz", head_dim=96)
    save(folder / "no-keys.npz", seqlen_k=0)
    save(folder / "no-rows.npz", seqlen_q=0)
    save(folder / "no-batch.npz", batch=0)
    tensors = dict(np.load(folder / "two.npz"))
    tensors["q"][0, 5, 1] = np.nan
    np.savez(folder / "nan.npz", **tensors)
    return folder


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(bench_module, "_has_gpu", lambda: False)


@pytest.fixture
def no_compiler(monkeypatch):
    pytest.importorskip("cupy")
    from salekit.jit import KernelInfo

    info = KernelInfo(64, 1024, 32768, 0, 0, 0, (), 0.0)
    monkeypatch.setattr("salekit.jit.compile_kernel", lambda spec, arch: type("Compiled", (), {"info": info}))


# --- bench ---------------------------------------------------------------------------------------------------------
ABOUT = {"estimator": "int8", "block": [128, 32], "query_stride": 1, "skipped": "drop"}
BY_LENGTH = {512: [0.0, 0.0], 1024: [4096.0, 4096.0]}


def bench(*arguments, **options):
    return run("bench", "--json", *arguments, **options)


def test_bench_takes_the_thresholds_of_each_length_and_layer(no_gpu, tmp_path):
    file = tmp_path / "t.json"
    salekit.save_thresholds(file, {"3": BY_LENGTH, "4": {1024: [0.0, 0.0]}}, ABOUT)
    report = json.loads(bench("--thresholds", file, "--layer", 3, "--seqlen", "512,1k").stdout)
    short, long = (result["density"] for result in report["results"])
    assert short == 1.0 and long < 0.7
    settings = report["settings"]
    assert (settings["tau"], settings["thresholds"], settings["layer"]) == (None, "t.json", 3)
    assert "wants one of them" in str(bench("--thresholds", file, "--seqlen", "512", code=None).exception)
    assert "--tau" in said(bench("--thresholds", file, "--layer", 3, "--tau", 0.5, code=2))
    assert "--layer" in said(bench("--layer", 3, "--seqlen", "512", code=2))
    assert json.loads(bench("--seqlen", 512).stdout)["settings"]["tau"] == 0.008


def test_the_layer_of_an_input(no_gpu, tmp_path, folder):
    """A dump of several layers is timed and validated a layer at a time; of what the thresholds are, too."""
    plain = dict(np.load(folder / "two.npz"))
    np.savez(tmp_path / "dump.npz", **{f"layers.{i}.{name}": x for i in (3, 12) for name, x in plain.items()})
    salekit.save_thresholds(tmp_path / "t.json", {"3": {300: [0.0, 0.0]}, "4": {300: [1.0, 1.0]}}, ABOUT)
    for arguments in (("--input", tmp_path / "dump.npz"), ("--input", folder / "two.npz")):
        report = json.loads(bench(*arguments, "--thresholds", tmp_path / "t.json", "--layer", 3).stdout)
        assert report["results"][0]["density"] == 1.0
    assert json.loads(bench("--input", tmp_path / "dump.npz", "--layer", 12).stdout)["settings"]["layer"] == 12
    report = json.loads(run("validate", "--json", "--input", tmp_path / "dump.npz", "--layer", 12).stdout)
    assert report["passed"] and report["input"] == "dump.npz, layer 12"
    for command in ("bench", "validate"):
        for file, layer, words in (
            ("dump.npz", (), "holds layers, 3, 12; wants the one to load"),
            ("dump.npz", ("--layer", 4), "has no layer 4; holds 3, 12"),
            (folder / "two.npz", ("--layer", 4), "has no layer 4; holds 0"),
        ):
            result = CliRunner().invoke(cli, [command, "--input", str(tmp_path / file), *map(str, layer)])
            assert isinstance(result.exception, FileFormatError) and words in str(result.exception)
    assert "there is none" in said(run("validate", "--layer", 3, code=2))


@pytest.mark.parametrize(
    "name, found_with", [("estimator", "int4"), ("block", [64, 64]), ("skipped", "pool")]
)
def test_bench_refuses_thresholds_of_other_calls(no_gpu, tmp_path, name, found_with):
    salekit.save_thresholds(tmp_path / "t.json", {"0": {512: [0.0, 0.0]}}, {**ABOUT, name: found_with})
    result = bench("--thresholds", tmp_path / "t.json", "--seqlen", 512, "--estimator", "int8", code=None)
    assert str(result.exception).startswith(f"{name}: ")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--head-dim", 128), "--head-dim: got 128; "),
        (("--dtype", "bf16"), "--dtype: got bf16; "),
        (("--seed", 4), "--seed: "),
        (("--heads", 4), "--heads: got 4; "),
        (("--seqlen", ""), "Invalid value for '--seqlen': '' is not a length"),
        (("--seqlen", "1k,2000m"), "Invalid value for '--seqlen': '2000m' is out of range"),
    ],
)
def test_bench_of_a_file_ignores_no_option(no_gpu, folder, arguments, words):
    assert words in said(bench("--input", folder / "two.npz", *arguments, code=2))


def test_bench_of_a_file_takes_what_the_file_has(no_gpu, folder):
    report = json.loads(bench("--input", folder / "two.npz", "--head-dim", 64, "--dtype", "fp16", "--heads", 2).stdout)
    assert [result["dtype"] for result in report["results"]] == ["float16"]


def test_heads_have_their_defaults_beside_kv_heads(no_gpu, no_compiler):
    [result] = json.loads(bench("--seqlen", 256, "--kv-heads", 2).stdout)["results"]
    assert (result["heads"], result["kv_heads"]) == (2, 2)
    assert "divides --heads, 2" in said(bench("--seqlen", 256, "--kv-heads", 4, code=2))
    for arguments, heads in ((("--kv-heads", 4), (32, 4)), ((), (32, 8)), (("--heads", 6), (6, 1))):
        report = json.loads(run("profile", "--gpu", "h100", "--seqlen", "4k", *arguments, "--json").stdout)
        assert (report["settings"]["heads"], report["settings"]["kv_heads"]) == heads


def test_masks_that_no_timed_call_has(no_gpu, no_compiler, tmp_path):
    for sizes, window, words in (((300, 0), (-1, -1), "nothing to time"), ((300, 300), (64, -1), "with a window")):
        bits = np.ones((1, 2, 3, -(-sizes[1] // 32)), bool)
        BlockMask.from_dense(bits, 128, 32, *sizes, True, *window).save_npz(tmp_path / "m.npz")
        assert words in said(bench("--masks", tmp_path / "m.npz", code=2))
        assert words in said(predict("--masks", tmp_path / "m.npz", code=2))


# --- validate ------------------------------------------------------------------------------------------------------
EXTREME = ("1e39", "1e38", "3.4e38", "1e-38", "1e-44", "1.4e-45", "1e-46")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("estimator", ("int8", "int4"))
@pytest.mark.parametrize("tau", EXTREME)
def test_taus_at_the_ends_of_float32_pass(tau, estimator):
    report = validate_module.run_validate(**{**SETTINGS, "tau": float(tau)}, seqlen="256", estimator=estimator)
    assert report["passed"], report["checks"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("tau", ("1e39", "1e38", "1e-44"))
def test_kernels_pass_at_the_ends_of_float32(kernels, tau):  # noqa: F811
    report = validate_module.run_validate(
        **{**SETTINGS, "tau": float(tau)}, seqlen="256", estimator="int8", skipped="pool"
    )
    assert report["passed"], report["checks"]


@pytest.mark.parametrize(
    "tau, change",
    [
        (1e38, lambda y: y + 0.01),
        (1e38, lambda y: np.full_like(y, np.inf)),  # early rows have no more than one anchor: their product is finite
        (1e-44, lambda y: y + 0.1),
        (1e-44, lambda y: np.full_like(y, -np.inf)),
    ],
)
def test_wrong_limits_are_found_at_the_ends_of_float32(monkeypatch, tau, change):
    real = reference.row_limits
    monkeypatch.setattr(reference, "row_limits", lambda *args: change(real(*args)))
    report = validate_module.run_validate(**{**SETTINGS, "tau": tau}, seqlen="256", estimator="int8")
    assert "limits" in failed(report)


def test_validate_refuses_what_a_call_refuses(folder):
    for arguments in (("--skipped", "pool"), ("--attend", "int8-fp8")):
        result = run("validate", "--backend", "numpy", "--input", folder / "d96.npz", *arguments, code=2)
        assert f"Error: {arguments[0]}: " in said(result) and "head_dim" in said(result)
        assert "quantise" not in result.stderr  # said before any work


def test_an_option_that_a_call_refuses_is_named(folder, no_gpu, tmp_path):
    pooled = ("--skipped", "pool")
    for arguments in (
        ("bench", "--seqlen", 64, "--head-dim", 96, *pooled),
        ("bench", "--input", folder / "d96.npz", *pooled),
        ("calibrate", folder / "d96.npz", "--backend", "numpy", "-o", tmp_path / "t.json", *pooled),
        ("compare", folder / "d96.npz", "--backend", "numpy", *pooled),
    ):
        assert "Error: --skipped: " in said(run(*arguments, code=2))
    result = run("bench", "--seqlen", 64, "--head-dim", 256, "--attend", "int8-fp8", code=2)
    assert "Error: --attend: " in said(result)


def test_validate_ignores_no_option(folder, monkeypatch):
    assert "Invalid value for '--seqlen': '' is not a length" in said(run("validate", "--seqlen", "", code=2))
    monkeypatch.setattr("salekit.fuzz.cases.is_case_file", lambda path: True)
    for arguments in (("--tau", 0.5), ("--estimator", "int8"), ("--block", "64x32"), ("--seqlen", "")):
        result = run("validate", "--backend", "numpy", "--input", folder / "two.npz", *arguments, code=2)
        assert f"{arguments[0]}: --input is a fuzz case" in said(result)


# --- mask-dump -----------------------------------------------------------------------------------------------------
def dump(*arguments, **options):
    return run("mask-dump", *arguments, **options)


MADE_WITH = ("--tau", 0.5, "--estimator", "int8", "--query-stride", 2, "--backend", "numpy")


def test_a_mask_file_says_what_it_was_made_with(folder, tmp_path):
    first, second = tmp_path / "first.npz", tmp_path / "second.npz"
    dump(folder / "two.npz", *MADE_WITH, "-o", first)
    summary = json.loads(dump(first, "--json").stdout)
    assert {name: summary[name] for name in ("source", "tau", "estimator", "query_stride")} == {
        "source": "two.npz", "tau": 0.5, "estimator": "int8", "query_stride": 2,
    }
    dump(first, "-o", second)
    metas = [json.loads(str(np.load(file)["__meta__"])) for file in (first, second)]
    assert metas[0] == metas[1] and metas[1]["tau"] == 0.5
    BlockMask.load_npz(first).save_npz(tmp_path / "bare.npz", {"tau": float("nan"), "estimator": [1], "kind": "mine"})
    summary = json.loads(dump(tmp_path / "bare.npz", "--json").stdout)
    assert [summary[name] for name in ("kind", "source", "tau", "estimator", "query_stride")] == [
        "salekit-mask", "bare.npz", None, None, None,
    ]
    for option, value in zip(MADE_WITH[::2], MADE_WITH[1::2]):
        assert f"{option}: " in said(dump(first, option, value, code=2))
    assert "--block: " in said(dump(first, "--block", "128x32", "-o", tmp_path / "x.npz", code=2))


@pytest.mark.parametrize("form", ("term", "png", "svg", "html", "npz", "csr", "flex", "fa4", "flashinfer"))
@pytest.mark.parametrize("name", ("no-keys", "no-rows", "no-batch"))
def test_nothing_to_draw(folder, tmp_path, name, form):
    output = () if form == "term" else ("-o", tmp_path / "x")
    result = dump(folder / f"{name}.npz", "--format", form, *output, code=2)
    assert "nothing to draw" in said(result) and not (tmp_path / "x").exists()


def test_nothing_to_draw_in_a_mask(tmp_path):
    bits = np.zeros((1, 2, 3, 0), bool)
    BlockMask.from_dense(bits, 128, 32, 300, 0, True).save_npz(tmp_path / "m.npz")
    assert "0 keys: there is nothing to draw" in said(dump(tmp_path / "m.npz", code=2))


def test_what_is_saved_are_the_chosen_heads(folder, tmp_path):
    one = ("--tau", 30, "--backend", "numpy")
    whole, part = tmp_path / "whole.npz", tmp_path / "part.npz"
    dump(folder / "batches.npz", *one, "-o", whole)
    mask = BlockMask.load_npz(whole)
    for source, arguments in ((folder / "batches.npz", one), (whole, ())):
        result = dump(source, *arguments, "--head", 3, "--head", 0, "-o", part, "--force", "--json")
        assert json.loads(result.stdout)["heads"] == [3, 0]
        got = BlockMask.load_npz(part)
        assert got.words.shape[:2] == (1, 2) and np.array_equal(got.words[0], mask.words.reshape(4, 3, -1)[[3, 0]])
        assert json.loads(str(np.load(part)["__meta__"]))["heads"] == [3, 0]
    dump(part, "--head", 0, "-o", tmp_path / "again.npz")
    assert json.loads(str(np.load(tmp_path / "again.npz")["__meta__"]))["heads"] == [3]
    for form, name in (("csr", "indptr"), ("flex", "kv_num_blocks"), ("fa4", "mask_block_cnt")):
        dump(folder / "batches.npz", *one, "--head", 1, "--format", form, "-o", tmp_path / form)
        assert np.load(tmp_path / form)[name].shape[:2] == (1, 1)
    dump(folder / "batches.npz", *one, "--head", 1, "--format", "flashinfer", "-o", tmp_path / "bsr")
    assert {name.partition("_")[0] for name in np.load(tmp_path / "bsr").files} == {"block", "h0"}


@pytest.mark.parametrize(
    "name, start", [("a.png", b"\x89PNG"), ("a.SVG", b"<svg"), ("a.html", b"<!"), ("a.npz", b"PK")]
)
def test_the_suffix_says_the_format(folder, tmp_path, name, start):
    dump(folder / "two.npz", "--backend", "numpy", "-o", tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(start)


def test_an_unknown_suffix_wants_a_format(folder, tmp_path):
    for name in ("pic.txt", "pic"):
        assert "--format" in said(dump(folder / "two.npz", "-o", tmp_path / name, code=2))
        dump(folder / "two.npz", "--backend", "numpy", "--format", "svg", "-o", tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(b"<svg")
    assert "--format term" in said(dump(folder / "two.npz", "--format", "term", "-o", tmp_path / "a.png", code=2))


def test_names_with_commas_are_whole_in_the_heading(tmp_path):
    rows = np.array([[1], [3], [7]], np.uint8)
    np.savez(tmp_path / "m.npz", **{f"layer 1, head {head}": rows for head in (2, 5)})
    lines = dump(tmp_path / "m.npz").stdout.splitlines()
    assert "layer 1, head 2: 192 x 192 tokens, blocks 64x32, density 0.5000" in lines


def test_heads_of_a_file_in_another_order_keep_their_names(tmp_path):
    mask = BlockMask.from_dense(np.ones((1, 2, 2, 4), bool), 64, 32, 128, 128, True)
    mask.save_npz(tmp_path / "m.npz")
    with np.load(tmp_path / "m.npz") as archive:
        np.savez(tmp_path / "turned.npz", **{name: archive[name] for name in ("h1", "h0", "__meta__")})
    headings = [line for line in dump(tmp_path / "turned.npz").stdout.splitlines() if "tokens" in line]
    assert [line.partition(":")[0] for line in headings] == ["head 0", "head 1"]


@pytest.mark.filterwarnings("error")
def test_an_overlay_beyond_float32(folder):
    data = json.loads(
        dump(folder / "two.npz", "--tau", "1e38", "--overlay", "tau", "--backend", "numpy", "--json").stdout
    )
    assert data["tau"] == 1e38 and len(data["blocks"]) == 5


# --- calibrate, compare --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("value", ("inf", "nan"))
@pytest.mark.parametrize("option", ("--max-error", "--max-relative-error", "--min-recall", "--density"))
def test_targets_are_finite(folder, tmp_path, option, value):
    result = run("calibrate", folder / "two.npz", option, value, "-o", tmp_path / "t.json", code=2)
    assert option in said(result) and not (tmp_path / "t.json").exists()


@pytest.mark.parametrize(
    "name, words",
    [("no-keys", "nothing to measure"), ("no-rows", "nothing to measure"), ("nan", "holds NaN or infinity")],
)
def test_inputs_without_a_measure_are_named(folder, tmp_path, name, words):
    result = run("calibrate", folder / f"{name}.npz", "--backend", "numpy", "-o", tmp_path / "t.json", code=2)
    assert f"{name}.npz, layer 0: " in said(result) and words in said(result) and not (tmp_path / "t.json").exists()
    result = run("compare", folder / f"{name}.npz", "--backend", "numpy", code=2)
    assert f"{name}.npz, layer 0: " in said(result) and words in said(result)


def test_a_head_beside_one_that_is_not_finite_is_compared(folder):
    few = ("--methods", "oracle-mass", "--densities", 0.9, "--backend", "numpy")
    assert "not finite" not in run("compare", folder / "nan.npz", *few, "--head", 0).output


def test_what_overflows_is_not_taken_for_a_missing_mask(tmp_path):
    from salekit.arrays import BFLOAT16

    save(tmp_path / "large.npz", dtype=BFLOAT16, q=100, k=1e37)
    few = ("--methods", "oracle-mass", "--densities", 1, "--backend", "numpy")
    output = run("compare", tmp_path / "large.npz", *few).stdout
    assert " NaN" in output and "leave float32" in output and "-: on some head" not in output


def test_layers_say_what_they_want():
    q, k, v = (np.zeros((1, 64, 1, 64), np.float16) for _ in range(3))
    for options, tensors, words in (
        ({}, (q, k, v), "dense_below: got 8192"),
        ({"dense_below": 0, "attend": "int8-fp8"}, (q, k, v), "attend: got 'int8-fp8'"),
        ({"dense_below": 0}, (q, k[:, :0], v[:, :0]), r"q, k: got shapes \(1, 64, 1, 64\) and \(1, 0, 1, 64\)"),
    ):
        with pytest.raises(ArgumentError, match=words):
            calibration.Layer(*tensors, salekit.make_plan(*tensors, **options))


# --- profile -------------------------------------------------------------------------------------------------------
def predict(*arguments, **options):
    return run("profile", "--gpu", "h100", *arguments, **options)


def test_a_prediction_refuses_what_a_call_refuses(no_compiler, monkeypatch):
    monkeypatch.setattr("salekit.jit.compile_kernel", lambda spec, arch: pytest.fail("compiled"))
    for arguments in (("--attend", "int8-fp8", "--head-dim", 256), ("--skipped", "pool", "--head-dim", 96)):
        assert f"Error: {arguments[0]}: " in said(predict("--seqlen", "1k", *arguments, code=2))
    assert "--heads: got 65536; " in said(predict("--heads", 65536, code=2))


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--density", "nan"), "--density"),
        (("--tau", 0.5), "--tau: "),
        (("--seed", 0), "--seed: "),
        (("--seqlen", ""), "Invalid value for '--seqlen': '' is not a length"),
        (("--seqlen", "256m"), "--seqlen: got 256m; wants at most 16m"),
        (("--seqlen", "1024m"), "--seqlen: got 1024m; wants at most 16m"),
    ],
)
def test_a_prediction_ignores_no_option(no_compiler, arguments, words):
    assert words in said(predict(*arguments, code=2))


def test_the_longest_prediction(no_compiler):
    report = json.loads(predict("--seqlen", "16m", "--query-stride", 4, "--skipped", "pool", "--json").stdout)
    assert report["settings"]["seqlen_k"] == 2**24
    assert report["dense"][0]["num_operations"] == 4 * 128 * 32 * 2**24 * (2**24 + 1) // 2
