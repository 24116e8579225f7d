"""salekit profile on a GPU: every launch timed, ceilings measured and kept, the trace, occupancy, NVTX."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

pytest.importorskip("cupy")

from salekit.cli.main import cli  # noqa: E402

from salekit import ceilings, jit, occupancy, timing, work  # noqa: E402
from salekit.block_mask import BlockMask  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.alone]
SMALL = ("--seqlen", "4k", "--heads", "8", "--kv-heads", "2")
LEAST_SHARE_OF_DATA_SHEET = 0.4  # what a kernel of nothing but products reaches, by far, at any clock a test meets
MOST_SHARE_OF_DATA_SHEET = 1.15  # data sheets count a boost clock that a short run may exceed


def run(*arguments):
    result = CliRunner().invoke(cli, ["profile", *map(str, arguments)])
    assert result.exit_code == 0, (result.output, result.exception)
    return result


def profiled(*arguments):
    return json.loads(run("--json", *arguments).stdout)


def on_hopper():
    return jit.device_arch() == "sm_90a"


@pytest.mark.parametrize(
    "arguments",
    (
        (),
        ("--estimator", "int4"),
        ("--estimator", "int8-sp24", "--query-stride", "2"),
        ("--head-dim", "64", "--dtype", "fp16", "--block", "64x64"),
        ("--attend", "int8-fp8"),
        ("--skipped", "pool"),
    ),
)
def test_every_launch_is_timed_and_compared(arguments):
    if "int8-fp8" in arguments and not on_hopper():
        pytest.skip("int8-fp8 runs on Hopper")
    report = profiled(*SMALL, *arguments)
    assert report["predicted"] is False and report["gpu"]["name"] and 0 < report["density"] <= 1
    pool = {"pool"} if "pool" in arguments else set()
    assert {one["stage"] for one in report["kernels"]} == {"quantize", "anchors", "estimate", "attend"} | pool
    assert {one["stage"] for one in report["dense"]} == {"dense"}
    for one in [*report["kernels"], *report["dense"]]:
        assert 0 < one["min_ms"] <= one["ms"] <= one["max_ms"] and one["spread"] >= 0 and one["samples"] >= 2
        assert one["bytes"] > 0 and 0 < one["share"] < 1.3, one
        assert one["share"] == pytest.approx(one["floor_ms"] / one["ms"])
        if one["kernel"] == "fill":
            assert one["bytes"] == 4 and one["registers"] is None
        else:
            assert 8 <= one["registers"] <= 255 and one["spill_bytes"] == 0 and one["blocks_per_multiprocessor"] >= 1
            assert 0 < one["occupancy"] <= 1
    names = [one["expression"] for one in report["kernels"] if one["expression"]]
    assert len(names) == len({(one["stage"], one["kernel"]) for one in report["kernels"] if one["expression"]})
    # Launched one by one, each from a cold cache and from an idle GPU, they take longer than the call's graph.
    assert 0 < report["call"]["median_ms"] <= 3 * report["kernels_ms"] + 1
    assert report["kernels_ms"] <= 10 * report["call"]["median_ms"]
    products = [one for one in report["kernels"] if one["stage"] == "attend" and one["num_operations"]]
    assert products and products[-1]["operations_per_s"] > 1e12


def test_the_table_of_a_run():
    text = run(*SMALL).stdout
    for word in ("share", "±", "estimate", "occupancy", "whole calls", "measured on this GPU"):
        assert word in text
    assert "prediction" not in text


def test_given_masks_are_attended_through(tmp_path):
    n = 4096
    everything = BlockMask.from_dense(np.zeros((1, 8, 32, 128), bool), 128, 32, n, n, True)
    BlockMask.from_dense(np.broadcast_to(everything.visible(), (1, 8, 32, 128)), 128, 32, n, n, True).save_npz(
        tmp_path / "all.npz"
    )
    report = profiled("--masks", tmp_path / "all.npz", "--kv-heads", "2")
    assert report["density"] == 1.0 and report["settings"]["heads"] == 8
    assert report["kernels"][-1]["num_operations"] == report["dense"][-1]["num_operations"]
    # All blocks through a mask, and without one: the same work.
    assert report["kernels"][-1]["ms"] == pytest.approx(report["dense"][-1]["ms"], rel=0.5)


def test_trace(tmp_path):
    path, picture = tmp_path / "trace.json", tmp_path / "roof.svg"
    report = json.loads(run(*SMALL, "--trace", path, "--roofline", picture, "--json").stdout)
    assert picture.read_text().startswith("<svg") and "prediction" not in picture.read_text()
    trace = json.loads(path.read_text())
    events = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    kernels = [event for event in events if (event["pid"], event["tid"]) == (2, 0)]
    assert [event["name"] for event in kernels] == [one["kernel"] for one in report["kernels"]]
    assert all(event["dur"] > 0 and event["args"]["stage"] for event in kernels)
    for event, after in zip(kernels, kernels[1:]):
        assert round((event["ts"] + event["dur"]) * 1000) <= round(after["ts"] * 1000)
    by_name = {event["name"]: event for event in events if event["pid"] == 1}
    assert set(by_name) == {"sparse_attention", "quantize", "anchors", "estimate", "attend"}
    whole = by_name["sparse_attention"]
    for event in by_name.values():
        assert event["dur"] > 0 and whole["ts"] <= event["ts"]
        assert event["ts"] + event["dur"] <= whole["ts"] + whole["dur"] + 1e-3
    # Nothing is flushed, and nothing waits for the host: about as long as the call itself, events included.
    busy_ms = (kernels[-1]["ts"] + kernels[-1]["dur"] - kernels[0]["ts"]) / 1e3
    assert 0.3 * report["call"]["median_ms"] <= busy_ms <= 5 * report["call"]["median_ms"] + 1
    assert CliRunner().invoke(cli, ["profile", *SMALL, "--trace", str(path)]).exit_code == 2


def test_ceilings_are_measured_once(tmp_path, monkeypatch):
    monkeypatch.setenv("SALEKIT_CACHE_DIR", str(tmp_path / "cache"))
    calls = []
    measure = ceilings.measure
    monkeypatch.setattr(ceilings, "measure", lambda info: calls.append(1) or measure(info))
    first = ceilings.of_this_gpu()
    assert ceilings.of_this_gpu() == first and len(calls) == 1
    assert set(first.operations_per_s) == set(ceilings._products(jit.device_arch())) and first.arch == jit.device_arch()
    again = ceilings.of_this_gpu(remeasure=True)
    assert len(calls) == 2 and ceilings.of_this_gpu() == again
    assert again.bytes_per_s == pytest.approx(first.bytes_per_s, rel=0.2)
    for unit, rate in again.operations_per_s.items():
        assert rate == pytest.approx(first.operations_per_s[unit], rel=0.2), unit


def test_ceilings_are_plausible():
    """Not above what the chip can do, not below what any real kernel reaches."""
    limits = ceilings.of_this_gpu()
    chip = timing.chip_rates(limits.gpu)
    sheet = {work.BF16: chip["half"], work.FP16: chip["half"], work.S8: chip["int8"], work.S4: chip["int4"]}
    if on_hopper() and chip["int8"]:
        sheet |= {work.E4M3: chip["int8"], work.SPARSE_S8: 2 * chip["int8"]}
    for unit, rate in limits.operations_per_s.items():
        if sheet.get(unit):
            share = rate / 1e12 / sheet[unit]
            assert LEAST_SHARE_OF_DATA_SHEET <= share <= MOST_SHARE_OF_DATA_SHEET, (unit, rate)
    if on_hopper():
        assert limits.operations_per_s[work.S8] > 1.5 * limits.operations_per_s[work.BF16]
        assert limits.operations_per_s[work.SPARSE_S8] > 1.3 * limits.operations_per_s[work.S8]
    assert 2e11 < limits.bytes_per_s < 1e13


def test_products_are_done_and_take_time():
    """Twice the rounds take twice as long, and the checksums follow the rounds: nothing was left out."""
    import cupy

    for unit, measured in ceilings._products(jit.device_arch()).items():
        kernel = jit.get_kernel(measured.spec)
        sums = [cupy.zeros((measured.blocks, measured.threads), np.uint32) for _ in range(3)]

        def launch(rounds, into):
            kernel((measured.blocks,), (measured.threads,), (into, np.int32(rounds)))

        launch(3, sums[0])
        launch(3, sums[1])
        launch(4, sums[2])
        few, more, none = (array.get() for array in (sums[0], sums[2], sums[1]))
        assert (few == none).all() and (few != more).mean() > 0.5, unit
        times = [timing.time_call(lambda n=n: launch(n, sums[0]), cuda=True).median_ms for n in (2000, 4000)]
        assert times[1] == pytest.approx(2 * times[0], rel=0.25), unit


def test_occupancy_is_the_drivers():
    """What is computed for predictions is what the driver says of the kernels that are loaded."""
    for arguments in ((), ("--estimator", "int4")):
        report = profiled(*SMALL, *arguments)
        for one in [*report["kernels"], *report["dense"]]:
            if one["expression"]:
                info = next(
                    kernel.info
                    for spec, kernel in jit.loaded_kernels().values()
                    if spec.expression == one["expression"]
                )
                mine = occupancy.blocks_per_multiprocessor(info, one["threads"], jit.device_arch())
                assert one["blocks_per_multiprocessor"] == mine, one["expression"]


def test_the_model_knows_the_launches_of_every_kind_of_call():
    from salekit import call_checks, launches
    from salekit.workloads import llm_like_qkv

    for estimator in ("int4", "int8", "int8-sp24"):
        for attend in ("exact", "int8-fp8") if on_hopper() else ("exact",):
            for block in ((64, 32), (128, 128)):
                for seqlen_q, seqlen_k in ((1000, 1000), (300, 1500)):
                    q, k, v = llm_like_qkv(seqlen_k, 4, 2, 64, seqlen_q=seqlen_q, cuda=True)
                    plan = call_checks.make_plan(
                        q, k, v, estimator=estimator, attend=attend, block=block, query_stride=2, dense_below=0
                    )
                    call = launches.launch_sparse(q, k, v, 0.008, plan)
                    model = work.sparse_work(plan, 10**6)
                    launched = [one for one in call.launches if one.spec is not None]
                    assert [(x.stage, x.spec, x.threads) for x in launched] == [
                        (x.stage, x.spec, x.threads) for x in model
                    ]
                    call.run()


def test_pools_in_turns(monkeypatch, tmp_path):
    """Each kernel is a row with the time of all its turns; the trace has them apart."""
    from salekit import call_checks, launches, skipped_mass
    from salekit.workloads import llm_like_qkv

    monkeypatch.setattr(skipped_mass, "POOL_BYTES", 1)
    for head_dim, attend in ((64, "exact"), (128, "int8-fp8" if on_hopper() else "exact")):
        q, k, v = llm_like_qkv(1500, 4, 2, head_dim, cuda=True)
        plan = call_checks.make_plan(q, k, v, attend=attend, dense_below=0, skipped="pool")
        turns = len(skipped_mass.turns(plan, 128))
        call = launches.launch_sparse(q, k, v, 0.05, plan)
        launched = [one for one in call.launches if one.spec is not None]
        assert [(x.stage, x.spec, x.threads) for x in launched] == [
            (x.stage, x.spec, x.threads) for x in work.sparse_work(plan, 10**6)
        ]
        assert turns == 2 and len(call.trace().launches) == len(call.launches) + 2 * (turns - 1)
        assert len(call.time_each(0.2)) == len(call.launches)
    path = tmp_path / "trace.json"
    report = json.loads(run(*SMALL, "--skipped", "pool", "--trace", path, "--json").stdout)
    events = [event for event in json.loads(path.read_text())["traceEvents"] if event["ph"] == "X"]
    kernels = [event["name"] for event in events if (event["pid"], event["tid"]) == (2, 0)]
    assert kernels[-4:] == 2 * [one["kernel"] for one in report["kernels"][-2:]]
    assert kernels[:-2] == [one["kernel"] for one in report["kernels"]]


def test_launches_one_by_one_give_what_the_call_gives(monkeypatch):
    """With ranges for Nsight (SALEKIT_NVTX=1) a call launches its kernels by itself: the same bits."""
    from salekit import attention_plan, sparse_attention
    from salekit.workloads import llm_like_qkv

    q, k, v = llm_like_qkv(2048, 8, 2, 128, cuda=True)
    want = sparse_attention(q, k, v, dense_below=0).get().view(np.uint16)
    attention_plan._plans.clear()
    monkeypatch.setenv("SALEKIT_NVTX", "1")
    try:
        for _ in range(2):
            got = sparse_attention(q, k, v, dense_below=0).get().view(np.uint16)
            assert (got == want).all()
        [program] = attention_plan._plans.values()[0]._programs.values()
        assert program._ranges is not None and not program._graphs
    finally:
        attention_plan._plans.clear()
