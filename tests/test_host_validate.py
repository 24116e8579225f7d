"""salekit validate without a GPU: the twin passes, and an error planted in any stage is found."""

import importlib
import json
import sys

import numpy as np
import pytest
from click.testing import CliRunner

from salekit import reference, skipped_mass, workloads
from salekit.block_mask import BlockMask
from salekit.codes import Quantized, rows_to_tiles

validate_module = pytest.importorskip("salekit.cli.validate")
SETTINGS = dict(input_file=None, backend="numpy", query_stride=1, tau=0.008, block=(128, 32))


def failed(report):
    return [check["stage"] for check in report["checks"] if not check["passed"]]


@pytest.mark.parametrize("estimator", ["int4", "int8", "int8-sp24"])
def test_the_twin_passes(estimator):
    report = validate_module.run_validate(**SETTINGS, seqlen="3000", estimator=estimator)
    assert report["passed"], report["checks"]
    assert report["backend"] == "numpy" and report["plan"]["estimator"] == estimator
    assert {"quantise", "anchors", "limits", "estimate", "attend", "pipeline"} == {c["stage"] for c in report["checks"]}
    # Real activations at 3,000 tokens: sparse in part, and most of the attention mass is kept.
    assert all(head["density"] < 0.9 and head["recall"] > 0.9 for head in report["heads"])
    json.dumps(report, allow_nan=False)


def test_low_bit_attention_is_reported():
    report = validate_module.run_validate(**SETTINGS, seqlen="1000", estimator="int8", attend="int8-fp8")
    assert report["passed"] and all(0.005 < head["low_bit_error"] < 0.03 for head in report["heads"])
    exact = validate_module.run_validate(**SETTINGS, seqlen="300", estimator="int8")
    assert all(head["low_bit_error"] is None for head in exact["heads"])


@pytest.mark.parametrize("tau", [0.0, float("inf")])
def test_extreme_thresholds_pass(tau):
    report = validate_module.run_validate(**{**SETTINGS, "tau": tau}, seqlen="500", estimator="int8")
    assert not failed(report)
    if tau == 0:
        assert all(head["density"] == 1 and head["recall"] == 1 for head in report["heads"])


# --- an error in one stage -----------------------------------------------------------------------------------------
class Device(np.ndarray):
    """An array that stands for one on a GPU."""

    def get(self):
        return np.array(self)


def put(x):
    return np.ascontiguousarray(x).view(Device)


@pytest.fixture
def kernels(monkeypatch):
    """The stages as the kernels would answer, from the twin; ``broken[stage]`` spoils what a stage returns."""
    broken = {}

    def spoil(stage, x):
        return broken[stage](x) if stage in broken else x

    def quantize(q, k, plan):
        codes = reference.quantize(q, k, plan)
        fields = {name: getattr(codes, name) for name in ("q_scale", "k_scale", "k_mean", "q_mean", "correction")}
        fields = {name: None if x is None else put(spoil(name, x)) for name, x in fields.items()}
        rows = (spoil("q_codes", codes.q_codes), spoil("k_codes", codes.k_codes))
        return Quantized(codes.estimator, 8, *(put(rows_to_tiles(x, 8)) for x in rows), **fields)

    def anchor_statistics(q, k, k_mean, plan):
        m, l = reference.anchor_statistics(q, k, k_mean, plan)
        return put(spoil("m", m)), put(spoil("l", l))

    def row_limits(m, l, codes, tau, plan):
        y = reference.row_limits(np.asarray(m), np.asarray(l), tau, plan)
        if plan.estimator != "int4":
            k_scale = np.asarray(codes.k_scale).repeat(plan.group_size, axis=1)[..., None]
            y = reference.integer_thresholds(y, np.asarray(codes.q_scale), k_scale, plan)
        return put(spoil("limits", y))

    def estimate(codes, limits, plan):
        host = validate_module._codes_on_host(codes, plan)
        mask = reference.estimate(host, np.asarray(limits), plan)
        dense = spoil("mask", mask.to_dense())
        mask = BlockMask.from_dense(dense, mask.block_q, mask.block_k, mask.seqlen_q, mask.seqlen_k, mask.causal)
        return BlockMask(put(mask.words), mask.block_q, mask.block_k, mask.seqlen_q, mask.seqlen_k, mask.causal)

    def attend(q, k, v, mask, plan, out=None, return_lse=False):
        if plan.skipped == "pool":
            out, lse = pooled_as_on_a_gpu(q, k, v, mask.to_numpy(), plan, broken.get("pools", lambda pools: pools))
            return put(spoil("pooled", out)), put(spoil("pooled_lse", lse))
        out, lse = reference.attend(q, k, v, mask, plan)
        return put(spoil("out", out)), put(spoil("lse", lse))

    def sparse_attention(q, k, v, *, thresholds, return_lse=False, return_mask=False, **options):
        from salekit.call_checks import make_plan

        plan = make_plan(q, k, v, **options)
        codes = quantize(q, k, plan)
        limits = row_limits(*anchor_statistics(q, k, codes.k_mean, plan), codes, thresholds, plan)
        mask = estimate(codes, limits, plan)
        out, lse = attend(q, k, v, mask, plan)
        if plan.skipped == "pool":
            out = put(spoil("pooled_call", out))
        return (out, lse, mask) if return_lse else out

    for name in ("quantize", "anchors", "estimate", "attend", "attention", "cli.bench"):
        importlib.import_module(f"salekit.{name}")
    replaced = {
        "quantize": [quantize],
        "anchors": [anchor_statistics, row_limits],
        "estimate": [estimate],
        "attend": [attend],
        "attention": [sparse_attention],
    }
    for module, functions in replaced.items():
        for function in functions:
            monkeypatch.setattr(sys.modules[f"salekit.{module}"], function.__name__, function)
    monkeypatch.setattr(sys.modules["salekit.cli.bench"], "to_device", lambda x: x)
    monkeypatch.setattr(validate_module.backends, "use_gpu", lambda backend: True)
    monkeypatch.setattr("salekit.timing.gpu_info", lambda: {"name": "stand-in"})
    return broken


def pooled_as_on_a_gpu(q, k, v, mask, plan, change):
    """The twin with the roundings that kernels add: weights, pooled keys and values in 16 bits, the bias of the rounded
    key. change: of each block's pools."""
    def half(x):
        return x.astype(q.dtype).astype(np.float32)

    def pool(mean, keys, values, blocks, block_k, blocks_each):
        exact = real(mean, keys, values, blocks, block_k, blocks_each)
        rng = np.random.default_rng(len(blocks))
        u = validate_module.UNIT_ROUNDOFF[plan.dtype]
        # Weights that are off by u / 2 or so each, as if there were a handful of keys.
        off = [1 + u / 3 * rng.standard_normal(x.shape).astype(np.float32) for x in (exact.key, exact.value)]
        key, value = half(exact.key * off[0]), half(exact.value * off[1])
        return change(exact._replace(key=key, value=value, bias=exact.bias + (exact.key - key) @ mean))

    real = skipped_mass.pool
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(skipped_mass, "pool", pool)
        return skipped_mass.attend_with_pools(q, k, v, mask, plan, skipped_mass.blocks_of_a_pool(mask))


def run_pools(seqlen="1500", **settings):
    settings = {**SETTINGS, "tau": 0.05, "estimator": "int8", "skipped": "pool", "seqlen": seqlen, **settings}
    return validate_module.run_validate(**settings)


@pytest.mark.parametrize("block", [(128, 32), (64, 64)])
def test_pools_of_faultless_kernels_pass(kernels, block):
    report = run_pools(block=block)
    assert report["passed"], report["checks"]
    pools = [check for check in report["checks"] if check["stage"] == "pool"]
    assert len(pools) == 3 and pools[1]["error"] > 0 and pools[2]["error"] > 0
    assert report["skipped"] == "pool"
    for head in report["heads"]:
        assert head["pooled_output_error"] < 0.8 * head["relative_output_error"] and head["density"] < 0.6


@pytest.mark.parametrize(
    "what, change",
    [
        ("pooled", lambda x: _changed(x, lambda value: np.nan)),
        ("pooled_call", lambda x: _changed(x, lambda value: value + 1)),
        ("pooled_lse", lambda x: x + 0.05),
        ("pools", lambda pools: pools._replace(bias=pools.bias + np.float32(0.3))),  # too much mass
        ("pools", lambda pools: pools._replace(bias=pools.bias - np.float32(1e9))),  # nothing is pooled
        ("pools", lambda pools: pools._replace(value=pools.value * np.float32(1.3))),
        ("pools", lambda pools: pools._replace(value=pools.value[::-1])),  # of other keys
        ("pools", lambda pools: pools._replace(key=0 * pools.key)),
    ],
)
def test_a_planted_error_in_pools_is_found(kernels, what, change):
    kernels[what] = change
    report = run_pools()
    assert set(failed(report)) == {"pool"}, report["checks"]


@pytest.mark.parametrize("estimator, block", [("int4", (64, 32)), ("int8", (128, 64))])
def test_the_twins_pools_pass(estimator, block):
    report = run_pools("2000", estimator=estimator, block=block)
    assert report["passed"], report["checks"]
    assert [check["stage"] for check in report["checks"]].count("pool") == 3
    assert all(head["pooled_output_error"] < head["relative_output_error"] for head in report["heads"])
    json.dumps(report, allow_nan=False)
    plain = validate_module.run_validate(**SETTINGS, seqlen="300", estimator="int8")
    assert plain["skipped"] == "drop" and all(head["pooled_output_error"] is None for head in plain["heads"])


@pytest.mark.parametrize(
    "change",
    [
        lambda pools: pools._replace(bias=pools.bias + np.float32(0.05)),
        lambda pools: pools._replace(value=pools.value[::-1]),
        lambda pools: pools._replace(spread=0 * pools.spread),
    ],
)
def test_an_error_in_the_twins_pools_is_found(monkeypatch, change):
    real = skipped_mass.pool
    monkeypatch.setattr(skipped_mass, "pool", lambda *args: change(real(*args)))
    assert set(failed(run_pools())) == {"pool"}


def test_pools_in_the_table():
    result = CliRunner().invoke(
        validate_module.validate, ["--seqlen", "1k", "--backend", "numpy", "--skipped", "pool", "--attend", "int8-fp8"]
    )
    assert result.exit_code == 0, result.output
    words = " ".join(result.stdout.split())
    for said in ("skipped blocks pooled", "mean queries with float64", "output error with pools low-bit error"):
        assert said in words


def run(estimator="int8"):
    return validate_module.run_validate(**SETTINGS, seqlen="700", estimator=estimator)


@pytest.mark.parametrize("estimator", ["int4", "int8", "int8-sp24"])
def test_faultless_kernels_pass(kernels, estimator):
    report = run(estimator)
    assert report["passed"], report["checks"]


def _changed(x, change):
    x = np.array(x)
    x.reshape(-1)[x.size // 2] = change(x.reshape(-1)[x.size // 2])
    return x


@pytest.mark.parametrize(
    "what, change, stage",
    [
        ("q_codes", lambda c: c - 1 if c > 0 else c + 1, "quantise"),
        ("k_codes", lambda c: c - 2 if c > 0 else c + 2, "quantise"),
        ("q_scale", lambda s: np.nextafter(s, np.float32(9)), "quantise"),
        ("k_mean", lambda x: x + 0.1, "quantise"),
        ("k_mean", lambda x: np.nan, "quantise"),
        ("m", lambda m: m + 0.5, "anchors"),
        ("l", lambda l: l * 1.2, "anchors"),
        ("l", lambda l: np.nan, "anchors"),
        ("limits", lambda t: t + 3, "limits"),
        ("mask", lambda bit: not bit, "estimate"),
        ("out", lambda x: np.nan, "attend"),
        ("lse", lambda x: x + 0.05, "attend"),
    ],
)
def test_a_planted_error_is_found(kernels, monkeypatch, what, change, stage):
    monkeypatch.setattr(validate_module, "MAX_ROWS", 700)  # every row, so that the spoilt one is among them
    kernels[what] = lambda x: _changed(x, change)
    assert stage in failed(run())


def test_exit_code_5(kernels):
    kernels["out"] = lambda x: x * np.asarray(1.5, x.dtype)
    result = CliRunner().invoke(validate_module.validate, ["--seqlen", "300", "--json"])
    assert result.exit_code == 5, result.output


def test_a_file_and_its_json(tmp_path):
    q, k, v = workloads.llm_like_qkv(600, 2, 1, 64, dtype="float16")
    np.savez(tmp_path / "x.npz", q=q, k=k, v=v)
    target = tmp_path / "report.json"
    arguments = ["--input", str(tmp_path / "x.npz"), "--backend", "numpy", "-o", str(target)]
    result = CliRunner().invoke(validate_module.validate, arguments)
    assert result.exit_code == 0, result.output
    report = json.loads(target.read_text())
    assert report["schema"] == 1 and report["passed"] and report["plan"]["dtype"] == "float16"


@pytest.mark.parametrize(
    "arguments", [["--tau", "nan"], ["--tau", "-1"], ["--seqlen", "1k,2k"], ["--input", "missing.npz"]]
)
def test_usage_errors(arguments):
    result = CliRunner().invoke(validate_module.validate, arguments)
    assert result.exit_code == 2


@pytest.mark.parametrize("spoil", [lambda x: x[:, :0], lambda x: x * np.float16(np.nan)])
def test_nothing_to_measure_is_a_usage_error(tmp_path, spoil):
    arrays = dict(zip("qkv", workloads.llm_like_qkv(100, 2, 1, 64, dtype="float16")))
    np.savez(tmp_path / "x.npz", **{name: spoil(x) for name, x in arrays.items()})
    result = CliRunner().invoke(validate_module.validate, ["--input", str(tmp_path / "x.npz"), "--backend", "numpy"])
    assert result.exit_code == 2, result.output
