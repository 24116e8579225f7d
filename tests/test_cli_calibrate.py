"""salekit calibrate: files in, a versioned file out, and what load_thresholds makes of it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import save_file
from test_cli import salekit as run

import salekit
from salekit.data_files import iter_layers, load_layers
from salekit.errors import ArgumentError, FileFormatError


def tensors(seqlen, seed=0, prefix=""):
    rng = np.random.default_rng(seed)
    return {
        prefix + name: (scale * rng.standard_normal((1, seqlen, heads, 64))).astype(np.float16)
        for name, heads, scale in (("q", 2, 0.5), ("k", 1, 1), ("v", 1, 1))
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dumps")
    np.savez(folder / "one.npz", **tensors(320))
    np.savez(folder / "longer.npz", **tensors(640))
    save_file(tensors(256, 1, "model.layers.3.") | tensors(256, 2, "model.layers.12."), folder / "many.safetensors")
    return folder


def calibrate(*args, ok=True):
    result = run("calibrate", *args, "--backend", "numpy", "--estimator", "int8", NO_COLOR="1")
    assert (result.returncode == 0) == ok and "Traceback" not in result.stderr, result.stderr
    return result


def test_one_file(folder, tmp_path):
    target = tmp_path / "t.json"
    printed = json.loads(calibrate(folder / "one.npz", "--min-recall", 0.9, "-o", target, "--json").stdout)
    content = json.loads(target.read_text())
    assert content["schema"] == 3 and content["block"] == [128, 32] and content["target"] == {"recall": 0.9}
    assert content["inputs"][0]["name"] == "one.npz" and len(content["inputs"][0]["sha256"]) == 64
    assert content["measured"] == printed["measured"] and all(row["recall"] >= 0.9 for row in content["measured"])
    tau = salekit.load_thresholds(target)
    assert tau.dtype == np.float32 and tau.tolist() == content["layers"]["0"]["320"]
    data = np.load(folder / "one.npz")
    mask = salekit.sparse_attention(
        data["q"], data["k"], data["v"], thresholds=tau, estimator="int8", dense_below=0, return_mask=True
    )[1]
    np.testing.assert_allclose(mask.density()[0], [row["density"] for row in content["measured"]])
    assert list(tmp_path.iterdir()) == [target]


def test_with_pools(folder, tmp_path):
    """Errors are those of a call with pools; the file says so, and is refused for calls without."""
    target = tmp_path / "t.json"
    result = calibrate(folder / "longer.npz", "--skipped", "pool", "--max-relative-error", 0.1, "-o", target)
    assert "relative error 0.1, skipped blocks pooled" in result.stdout
    content = json.loads(target.read_text())
    assert content["schema"] == 3 and content["skipped"] == "pool"
    load = salekit.load_thresholds
    tau = load(target, skipped="pool")
    with pytest.raises(ArgumentError, match="skipped: .* 'pool', not with 'drop'"):
        load(target, skipped="drop")
    q, k, v = (np.load(folder / "longer.npz")[name] for name in "qkv")
    options = dict(thresholds=tau, estimator="int8", dense_below=0)
    out = salekit.sparse_attention(q, k, v, skipped="pool", **options).astype(np.float64)
    dense = salekit.dense_attention(q, k, v).astype(np.float64)
    error = [np.linalg.norm((out - dense)[:, :, h]) / np.linalg.norm(dense[:, :, h]) for h in range(2)]
    np.testing.assert_allclose([row["relative_error"] for row in content["measured"]], error, rtol=1e-5)
    assert max(error) <= 0.1
    dropped = json.loads(calibrate(
        folder / "longer.npz", "--max-relative-error", 0.1, "-o", tmp_path / "u.json", "--json"
    ).stdout)
    assert dropped["skipped"] == "drop" and load(tmp_path / "u.json", skipped="drop").shape == (2,)
    pairs = list(zip(content["measured"], dropped["measured"]))
    assert all(a["tau"] > b["tau"] and a["density"] < b["density"] for a, b in pairs)


def test_many_layers_and_the_table(folder, tmp_path):
    result = calibrate(folder / "many.safetensors", "--density", 0.9, "-o", tmp_path / "t.json")
    assert "mean density" in result.stdout and "recall" in result.stdout
    content = json.loads((tmp_path / "t.json").read_text())
    assert list(content["layers"]) == ["3", "12"]
    a, b = (salekit.load_thresholds(tmp_path / "t.json", layer=layer) for layer in (3, "12"))
    assert a.shape == b.shape == (2,)
    with pytest.raises(ArgumentError, match="layer: .* holds layers 3, 12"):
        salekit.load_thresholds(tmp_path / "t.json")
    with pytest.raises(ArgumentError, match="layer: got 7"):
        salekit.load_thresholds(tmp_path / "t.json", layer=7)


def test_lengths(folder, tmp_path):
    target = tmp_path / "t.json"
    result = calibrate(folder / "one.npz", folder / "longer.npz", "--max-error", 5, "-o", target)
    assert "layer 0: 2 heads, 320 tokens, " in result.stderr and " 640 tokens, " in result.stderr
    content = json.loads(target.read_text())
    assert "slope" in result.stdout and "residual" in result.stdout
    short, long = (np.array(content["layers"]["0"][n]) for n in ("320", "640"))
    assert set(content["fits"]["0"]) == {"slope", "intercept", "residual"}
    load = salekit.load_thresholds
    np.testing.assert_allclose(load(target, seqlen=320), short, rtol=1e-6)
    np.testing.assert_allclose(load(target), long, rtol=1e-6)
    np.testing.assert_allclose(load(target, seqlen=round((320 * 640) ** 0.5)), np.sqrt(short * long), rtol=1e-2)


ABOUT = {"estimator": "int8", "block": [128, 32], "query_stride": 1}


def test_fit_over_lengths(tmp_path):
    """A head whose tau falls as seqlen ** -0.5, one with noise, one that needs everything at one length."""
    path, load = tmp_path / "t.json", salekit.load_thresholds
    lengths = (1000, 2000, 4000, 8000)
    noise = (1.1, 0.9, 0.9, 1.1)
    found = {n: [0.3 * n**-0.5, 0.02 * x, 0.0 if n == 2000 else 0.5] for n, x in zip(lengths, noise)}
    salekit.save_thresholds(path, {"0": found}, ABOUT)
    fit = json.loads(path.read_text())["fits"]["0"]
    assert fit["slope"][0] == pytest.approx(-0.5) and fit["residual"][0] == pytest.approx(0, abs=1e-9)
    assert fit["slope"][2] is None and fit["residual"][1] > 0.05
    for length in lengths:  # exactly what was measured
        assert load(path, seqlen=length).tolist() == np.float32(found[length]).tolist()
    for length in (1200, 5000, 9999, 600):
        tau = load(path, seqlen=length)
        assert tau.dtype == np.float32 and tau[0] == pytest.approx(0.3 * length**-0.5, rel=1e-5)
        assert tau[1] == pytest.approx(np.exp(fit["intercept"][1] + fit["slope"][1] * np.log(length)), rel=1e-5)
    assert [load(path, seqlen=n)[2] for n in (500, 1500, 3000, 5000, 9000)] == [0.5, 0, 0, 0.5, 0.5]
    # No farther than four times the longest and a quarter of the shortest.
    assert load(path, seqlen=10**6)[0] == load(path, seqlen=32_000)[0] == pytest.approx(0.3 * 32_000**-0.5, rel=1e-5)
    assert load(path, seqlen=1)[0] == load(path, seqlen=250)[0] == pytest.approx(0.3 * 250**-0.5, rel=1e-5)


def test_close_lengths_are_not_extrapolated(tmp_path):
    salekit.save_thresholds(tmp_path / "t.json", {"0": {1000: [0.01], 1100: [0.02]}}, ABOUT)
    far = salekit.load_thresholds(tmp_path / "t.json", seqlen=100_000)
    assert far == pytest.approx(0.04, rel=1e-4)  # as far beyond as they are apart
    salekit.save_thresholds(tmp_path / "u.json", {"0": {1000: [1e-6], 4000: [1e3]}}, ABOUT)
    assert salekit.load_thresholds(tmp_path / "u.json", seqlen=100_000) == 2.0**12


def test_files_without_fits(tmp_path):
    """The version before, which held no fit, follows from the same rule."""
    salekit.save_thresholds(tmp_path / "t.json", {"0": {1000: [0.01, 0.0], 4000: [0.02, 1.0]}}, ABOUT)
    content = json.loads((tmp_path / "t.json").read_text())
    del content["fits"]
    (tmp_path / "old.json").write_text(json.dumps(content | {"schema": 2}))
    for seqlen in (None, 100, 1000, 2345, 4000, 10**6):
        got, want = (salekit.load_thresholds(tmp_path / name, seqlen=seqlen) for name in ("old.json", "t.json"))
        assert np.array_equal(got, want)


@pytest.mark.parametrize(
    "fits", [None, {}, {"0": {}}, {"0": {"slope": [0.5], "intercept": [1]}},
             {"0": {"slope": [0.5, None], "intercept": [1.0, 2.0]}}, {"0": {"slope": [0.5, "x"], "intercept": [1, 2]}},
             {"0": {"slope": [float("nan"), 1], "intercept": [1, 2]}}],
)
def test_damaged_fits(tmp_path, fits):
    path = tmp_path / "t.json"
    layers = {"0": {"1000": [0.01, 0.1], "4000": [0.02, 0.2]}}
    path.write_text(json.dumps({"schema": 3, "layers": layers, "fits": fits}))
    assert salekit.load_thresholds(path).tolist() == np.float32([0.02, 0.2]).tolist()
    with pytest.raises(FileFormatError, match="t.json: layer 0: fits"):
        salekit.load_thresholds(path, seqlen=2000)


def test_thresholds_are_for_what_they_were_found_with(tmp_path):
    path = tmp_path / "t.json"
    salekit.save_thresholds(path, {"0": {100: [0.0, 0.5], 400: [0.25, 0.5]}}, ABOUT)
    load = salekit.load_thresholds
    assert load(path, estimator="int8", block=(128, 32), seqlen=400).tolist() == [0.25, 0.5]
    assert load(path, seqlen=200).tolist() == [0, 0.5]  # what needs everything at one length needs it on the way there
    with pytest.raises(ArgumentError, match="estimator: .* 'int8', not with 'int4'"):
        load(path, estimator="int4")
    with pytest.raises(ArgumentError, match="block: "):
        load(path, block=(64, 32))
    assert "skipped" not in ABOUT and load(path, skipped="drop", seqlen=400).tolist() == [0.25, 0.5]  # an older file
    with pytest.raises(ArgumentError, match="skipped: .* 'drop', not with 'pool'"):
        load(path, skipped="pool")
    (tmp_path / "own.json").write_text("[0.5, 0.25]")  # nothing is known of these
    assert load(tmp_path / "own.json", skipped="pool", estimator="int4").tolist() == [0.5, 0.25]


@pytest.mark.parametrize(
    "layers", [None, {}, [], {"0": {}}, {"0": {"x": [1.0]}}, {"0": {"1": [1.0], "2": [1.0, 2.0]}}, {"0": {"1": ["a"]}},
               {"0": {"1": [-1.0]}}, {"0": {"1": []}}, {"0": {"-5": [1.0]}}, {"0": 3}],
)
def test_damaged_files(tmp_path, layers):
    path = tmp_path / "t.json"
    path.write_text(json.dumps({"schema": 3, "layers": layers}))
    with pytest.raises(FileFormatError, match="t.json"):
        salekit.load_thresholds(path)


def test_layers_of_files(folder, tmp_path):
    layers = load_layers(folder / "many.safetensors")
    assert list(layers) == ["3", "12"]
    assert np.array_equal(layers["12"][0], tensors(256, 2)["q"]) and layers["3"][1].shape == (1, 256, 1, 64)
    assert list(load_layers(folder / "one.npz")) == ["0"]
    np.savez(tmp_path / "short.npz", **{"layers.1.q": tensors(8)["q"]})
    with pytest.raises(FileFormatError, match="layer 1: has no tensor 'k'"):
        load_layers(tmp_path / "short.npz")
    np.savez(tmp_path / "none.npz", x=np.zeros(3))
    with pytest.raises(FileFormatError, match="has no tensors named q, k and v"):
        load_layers(tmp_path / "none.npz")
    np.savez(tmp_path / "twice.npz", **{"a.1.q": tensors(8)["q"], "b.1.q": tensors(8)["q"]})
    with pytest.raises(FileFormatError, match="twice"):
        load_layers(tmp_path / "twice.npz")


def test_layers_come_one_by_one(tmp_path):
    """A layer that lacks a tensor is found before the first is handed out; what is wrong in one waits for its turn."""
    whole = tensors(8, prefix="layers.0.")
    save_file(whole | {"layers.1.q": tensors(8)["q"]}, tmp_path / "lacks.safetensors")
    with pytest.raises(FileFormatError, match="layer 1: has no tensor 'k'"):
        next(iter_layers(tmp_path / "lacks.safetensors"))
    odd = tensors(8, prefix="layers.1.") | {"layers.1.v": np.zeros((1, 9, 1, 64), np.float16)}
    save_file(whole | odd, tmp_path / "odd.safetensors")
    np.savez(tmp_path / "odd.npz", **whole, **odd)
    for name in ("odd.safetensors", "odd.npz"):
        layers = iter_layers(tmp_path / name)
        layer, (q, *_) = next(layers)
        assert layer == "0" and np.array_equal(q, whole["layers.0.q"])
        with pytest.raises(FileFormatError, match="layer 1"):
            next(layers)
    data = (tmp_path / "odd.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(data[:-1])
    with pytest.raises(FileFormatError, match="cut.safetensors: is not a whole"):
        next(iter_layers(tmp_path / "cut.safetensors"))


def test_usage(folder, tmp_path):
    target = tmp_path / "t.json"
    for args, said in (
        ((folder / "one.npz",), "-o"),
        ((folder / "one.npz", "--density", 0.5, "--min-recall", 0.5, "-o", target), "give one of"),
        ((folder / "one.npz", "--min-recall", 1.5, "-o", target), "min-recall"),
        ((folder / "one.npz", folder / "one.npz", "-o", target), "was in a file before"),
        (("missing.npz", "-o", target), "does not exist"),
        ((folder / "one.npz", "--skipped", "keep", "-o", target), "--skipped"),
    ):
        result = calibrate(*args, ok=False)
        assert result.returncode == 2 and said in " ".join(result.stderr.split()) and not target.exists()
        assert "tokens, " not in result.stderr  # nothing was computed
    fewer = {name: x[:, :, :1] for name, x in tensors(320).items()}
    np.savez(tmp_path / "fewer.npz", **fewer)
    result = calibrate(folder / "longer.npz", tmp_path / "fewer.npz", "-o", target, ok=False)
    assert result.returncode == 2 and "has 1 heads here and others" in " ".join(result.stderr.split())
    assert "tokens, " not in result.stderr
    target.write_text("mine")
    assert calibrate(folder / "one.npz", "-o", target, ok=False).returncode == 2 and target.read_text() == "mine"
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 cut")
    result = calibrate(tmp_path / "bad.npz", "-o", tmp_path / "u.json", ok=False)
    assert result.returncode == 1 and result.stderr.count("salekit: error: ") == 1
    assert not (tmp_path / "u.json").exists()


def test_interrupted_calibration_leaves_nothing(tmp_path):
    rng = np.random.default_rng(0)
    shapes = {"q": (1, 16000, 2, 64), "k": (1, 16000, 1, 64), "v": (1, 16000, 1, 64)}
    arrays = {name: rng.standard_normal(shape).astype(np.float16) for name, shape in shapes.items()}
    np.savez(tmp_path / "in.npz", **arrays)
    command = [sys.executable, "-m", "salekit", "calibrate", tmp_path / "in.npz", "--backend", "numpy"]
    command += ["-o", tmp_path / "t.json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        time.sleep(3)
        assert process.poll() is None  # at work: it takes much longer
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and "Traceback" not in errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.npz"]


def test_narrow_terminal(folder, tmp_path):
    result = run("calibrate", folder / "one.npz", "--backend", "numpy", "-o", tmp_path / "t.json", COLUMNS="20")
    assert result.returncode == 0 and "relative error" in result.stdout
