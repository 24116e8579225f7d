"""salekit bench, the timing and the workload kernel on a GPU; and what bench says without one."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

bench_module = pytest.importorskip("salekit.cli.bench")

from salekit import workloads  # noqa: E402
from salekit.block_mask import BlockMask  # noqa: E402

STAGES = {"dense", "quantize", "anchors", "estimate", "attend", "total"}


def run(*arguments):
    result = CliRunner().invoke(bench_module.bench, [*arguments])
    assert result.exit_code == 0, result.output
    return result


def load(tmp_path, *arguments):
    target = tmp_path / "report.json"
    run(*arguments, "--force", "-o", str(target))
    return json.loads(target.read_text())


# --- without a GPU -------------------------------------------------------------------------------------------------
@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(bench_module, "_has_gpu", lambda: False)


def test_twin_bench(no_gpu, tmp_path):
    report = load(tmp_path, "--seqlen", "512,1k")
    assert report["schema"] == 1 and report["backend"] == "numpy" and report["gpu"] is None
    assert [result["seqlen_q"] for result in report["results"]] == [512, 1024]
    for result in report["results"]:
        assert set(result["times"]) == STAGES
        assert all(time["median_ms"] > 0 for time in result["times"].values())
        assert len(result["density_per_head"]) == 2 and 0 < result["density"] <= 1


def test_twin_bench_with_pools(no_gpu, tmp_path):
    arguments = ("--seqlen", "1k", "--tau", "0.1")
    plain, report = (load(tmp_path, *arguments, *more) for more in ((), ("--skipped", "pool")))
    assert plain["settings"]["skipped"] == "drop" and report["settings"]["skipped"] == "pool"
    [result], [without] = report["results"], plain["results"]
    assert set(result["times"]) == STAGES | {"attend-selected"} and result["density"] == without["density"] < 0.9
    # The rate is of the selected blocks' attention: the same pairs, without the time of the pools. A report rounds
    # times to 10 ns and the twin takes a millisecond and more, so the products agree to about 1e-5.
    flops = [
        r["rates"]["attend_tflops"] * r["times"][name]["median_ms"]
        for r, name in ((result, "attend-selected"), (without, "attend"))
    ]
    assert flops[0] == pytest.approx(flops[1], rel=1e-4)
    text = run(*arguments, "--skipped", "pool").stdout
    assert "skipped blocks pooled" in text and "no pools" in text


def test_long_inputs_are_refused_with_a_next_step(no_gpu):
    from salekit.errors import GpuError

    result = CliRunner().invoke(bench_module.bench, ["--seqlen", "128k"])
    assert isinstance(result.exception, GpuError)
    assert "minutes" in str(result.exception) and "--seqlen 1k,2k" in str(result.exception)


def test_given_masks_are_attended_through(no_gpu, tmp_path):
    n = 1024
    empty = BlockMask.from_dense(np.zeros((1, 2, 16, 32), bool), 64, 32, n, n, True)
    blocks = np.random.default_rng(0).random((1, 2, 16, 32)) < 0.3
    diagonal = np.arange(32)[None] // 2 == np.arange(16)[:, None]
    given = BlockMask.from_dense((blocks | diagonal) & empty.visible(), 64, 32, n, n, True)
    given.save_npz(tmp_path / "masks.npz")
    report = load(tmp_path, "--masks", str(tmp_path / "masks.npz"))
    [result] = report["results"]
    np.testing.assert_allclose(result["density_per_head"], given.coarsen(128, 32).density()[0], atol=1e-5)
    assert result["heads"] == 2 and "estimated_density" in result
    # Selected pairs are counted from the bits: as many as the bits spell out.
    dense = given.coarsen(128, 32).to_dense()[0]
    pairs = np.kron(dense, np.ones((1, 128, 32), bool))[:, :n, :n] & np.tri(n, dtype=bool)
    flop = result["rates"]["attend_tflops"] * 1e12 * result["times"]["attend"]["median_ms"] * 1e-3
    assert flop == pytest.approx(4 * 128 * pairs.sum(), rel=1e-3)


@pytest.mark.parametrize(
    "arguments",
    [["--tau", "nan"], ["--heads", "3", "--kv-heads", "2"], ["--masks", "missing.npz"], ["--head-dim", "80"]],
)
def test_usage_errors(no_gpu, arguments):
    assert CliRunner().invoke(bench_module.bench, ["--seqlen", "512", *arguments]).exit_code == 2


def test_host_timing_follows_the_stop_rule():
    from salekit import timing

    calls = []
    result = timing.time_call(lambda: calls.append(1), cuda=False, warmup=2, min_samples=3, max_samples=4)
    assert 3 <= result.samples <= 4 and len(calls) == result.samples + 2
    assert 0 <= result.min_ms <= result.median_ms <= result.max_ms
    assert timing.Timing.of([1.0, 2.0, 3.0, 4.0, 5.0]).spread == pytest.approx(2 / 3)
    assert timing.chip_rates("NVIDIA H100 80GB HBM3")["int8"] == 1979 and timing.chip_rates("unknown")["half"] is None


# --- with one ------------------------------------------------------------------------------------------------------
@pytest.mark.gpu
@pytest.mark.parametrize("estimator", ["int8", "int4", "int8-sp24"])
def test_gpu_bench(tmp_path, estimator):
    report = load(tmp_path, "--seqlen", "4k,8k", "--heads", "8", "--estimator", estimator)
    assert report["gpu"]["name"] and report["copy_bytes_per_s"] > 0
    for result in report["results"]:
        assert set(result["times"]) == STAGES and result["density"] < 0.9
        parts = sum(result["times"][name]["median_ms"] for name in ("quantize", "anchors", "estimate", "attend"))
        # The whole call is one launch of all kernels without an L2 flush; the parts wait for the host between theirs.
        assert 0 < result["times"]["total"]["median_ms"] <= 2 * parts + 1


@pytest.mark.gpu
@pytest.mark.alone
def test_gpu_bench_with_pools(tmp_path):
    [result] = load(tmp_path, "--seqlen", "16k", "--heads", "8", "--skipped", "pool")["results"]
    times = {name: time["median_ms"] for name, time in result["times"].items()}
    assert set(times) == STAGES | {"attend-selected"} and times["attend"] > times["attend-selected"] > 0
    assert times["total"] <= 2 * sum(times[name] for name in ("quantize", "anchors", "estimate", "attend")) + 1


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim, dtype", [(64, "float16"), (128, "bfloat16")])
def test_workload_kernel_writes_the_twins_distribution(head_dim, dtype):
    shape = dict(num_heads=4, num_kv_heads=2, head_dim=head_dim, dtype=dtype, batch=2, seqlen_q=1000, seed=3)
    twin, gpu = (workloads.llm_like_qkv(3001, **shape, cuda=cuda) for cuda in (False, True))
    again = workloads.llm_like_qkv(3001, **shape, cuda=True)
    for want, got, same in zip(twin, gpu, again):
        got, same = got.get(), same.get()
        assert got.dtype == want.dtype and (got.view(np.uint16) == same.view(np.uint16)).all()
        got, want = got.astype(np.float64), want.astype(np.float64)
        assert np.isfinite(got).all()
        # The block vectors and the sink channel are the same; the noise is another draw of the same size.
        np.testing.assert_array_equal(got[..., workloads.SINK_CHANNEL], want[..., workloads.SINK_CHANNEL])
        rest = [d for d in range(head_dim) if d != workloads.SINK_CHANNEL and (d % 4 or d >= 64)]
        count = got[..., rest].size
        assert abs(got[..., rest].std() / want[..., rest].std() - 1) <= 5 / np.sqrt(count)
        assert abs(got[..., rest].mean()) <= 5 * want[..., rest].std() / np.sqrt(count)
        inner = slice(0, 64, 4)
        difference = got[..., inner] - want[..., inner]
        difference /= difference.std(axis=(0, 1, 3))[:, None]  # heads differ in their noise
        blocks = difference[:, :960].reshape(2, 30, 32, got.shape[2], 16)
        # Two independent draws around one block vector: means over 32 rows scatter by sqrt(1 / 32).
        assert abs(blocks.mean(axis=2)).max() <= 6 / np.sqrt(32)
        neighbours = np.corrcoef(difference[:, :-1].ravel(), difference[:, 1:].ravel())[0, 1]
        assert abs(neighbours) <= 5 / np.sqrt(difference.size)


@pytest.mark.gpu
def test_gpu_workload_densities_follow_the_targets():
    from salekit import sparse_attention

    q, k, v = workloads.llm_like_qkv(32768, 32, 8, 128, cuda=True)
    _, mask = sparse_attention(q, k, v, thresholds=workloads.TAU, estimator="int8", return_mask=True)
    share = workloads.anchor_share(32768)
    measured = (mask.density()[0] - share) / (1 - share)
    target = np.array(workloads.target_densities())
    # A head's own direction makes its 1,024 key blocks, rather than single blocks, the independent draws.
    tolerance = 4 * np.sqrt(target * (1 - target) / 1024) + 0.1 * target
    assert (np.abs(measured - target) <= tolerance).all(), (measured, target)
    assert abs(measured.mean() / target.mean() - 1) <= 0.1


@pytest.mark.gpu
@pytest.mark.alone
def test_timing_sees_the_work():
    import cupy

    from salekit import timing

    small, large = (cupy.empty(size, "u1") for size in (2**20, 2**30))

    def fill(x):
        return lambda: x.data.memset_async(1, x.nbytes, cupy.cuda.get_current_stream())

    slow = timing.time_call(fill(large), cuda=True)
    assert slow.samples >= 5 and slow.spread <= 0.2
    assert slow.median_ms > 4 * timing.time_call(fill(small), cuda=True).median_ms
    with timing.ClockSampler() as sampler:
        timing.time_call(fill(large), cuda=True)
    assert set(sampler.result) == {"sm_mhz", "memory_mhz", "power_w", "temperature_c", "throttle", "samples"}
