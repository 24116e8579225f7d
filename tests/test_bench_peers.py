"""bench/peers.py without a GPU and without torch: arithmetic, report, options, and a whole run on the twin."""

import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

sys.path.append(str(Path(__file__).resolve().parent.parent))  # bench/ is part of the checkout, not of the package

from bench import peers, rivals  # noqa: E402
from salekit import timing, workloads  # noqa: E402
from salekit.attention import dense_attention  # noqa: E402
from salekit.block_mask import BlockMask  # noqa: E402
from salekit.plans import Plan  # noqa: E402

GPU = {
    "name": "NVIDIA H100 80GB HBM3",
    "driver": "580.1",
    "max_sm_mhz": 1980.0,
    "max_memory_mhz": 2619.0,
    "power_limit_w": 700.0,
}
KEYS = {"gpu", "driver", "versions", "shape", "rows", "stages", "end_to_end", "dtype", "clocks", "power", "commit"}
ROW_KEYS = {"name", "seqlen", "ms", "tflops", "ratio_to_fa3", "spread", "samples", "dropped", "density"}
STAGE_KEYS = {"name", "seqlen", "estimator", "query_stride", "ms", "tops", "spread"}
CALL_KEYS = {"seqlen", "masks", "density", "estimator", "query_stride", "attend", "ms"} | set(peers.BASELINES.values())


def plan_of(seqlen=131072, **changes):
    return Plan(1, seqlen, seqlen, 32, 8, 128, "bfloat16", 128**-0.5).replace(**changes)


def measured(ms, spread=0.0):
    return peers.Measured(timing.Timing(ms, ms, ms, spread, 5))


# --- arithmetic ----------------------------------------------------------------------------------------------------
def test_dense_rows_count_causal_pairs():
    row = peers.row_of("fa3", plan_of(), measured(199.4), None)
    assert row["tflops"] == pytest.approx(4 * 128 * 32 * 131072 * 131073 / 2 / 199.4e-3 / 1e12, abs=0.05)
    assert row["density"] == 1 and row["block"] is None


def test_masked_rows_count_the_visible_pairs_of_set_blocks():
    n, plan = 1024, plan_of(1024, num_heads=2, num_kv_heads=1)
    bits = np.random.default_rng(0).random((1, 2, 8, 32)) < 0.4
    visible = BlockMask.from_dense(bits, 128, 32, n, n, True).visible()
    last = np.arange(32)[None] * 32 >= np.arange(8)[:, None] * 128  # the diagonal's blocks are always set
    mask = BlockMask.from_dense((bits | last) & visible, 128, 32, n, n, True)
    row = peers.row_of("salekit-masks-128x32", plan, measured(1e-6), mask)
    pairs = np.kron(mask.to_dense()[0], np.ones((1, 128, 32), bool))[:, :n, :n] & np.tri(n, dtype=bool)
    assert row["tflops"] * 1e3 == pytest.approx(4 * 128 * pairs.sum(), rel=0.01)
    assert row["density"] == pytest.approx(mask.density().mean(), abs=1e-5)


def test_ratios_are_the_others_time_over_ours():
    rows = [{"name": name, "ms": ms} for name, ms in (("salekit-dense", 8.0), ("fa3", 10.0), ("torch-fa2", 24.0))]
    ours, fa3, fa2 = peers.with_ratios(rows)
    assert ours["ratio_to_fa3"] == 1.25 and ours["ratios"] == {"fa3": 1.25, "torch-fa2": 3.0}
    assert fa3["ratio_to_fa3"] == 1 and fa2["ratio_to_fa3"] == pytest.approx(10 / 24, abs=1e-4)
    assert peers.with_ratios([{"name": "salekit-dense", "ms": 8.0}])[0]["ratio_to_fa3"] is None


def test_stages_and_calls():
    stage = peers.stage_of("estimate", "int8", 2, plan_of(), measured(41.96))
    assert stage["tops"] == pytest.approx(1677, abs=1) and STAGE_KEYS <= set(stage)
    assert peers.stage_of("quantize", "int8", 1, plan_of(), measured(1.0))["tops"] is None
    config = peers.Config("own", 0.008, "int8", 1, "exact")
    entry = peers.end_to_end_of(config, 131072, 0.2, measured(100.0), {"fa3": 200.0, "salekit-dense": None})
    assert CALL_KEYS <= set(entry)
    assert (entry["speedup_fa3"], entry["speedup_fa2"], entry["speedup_own_dense"]) == (2.0, None, None)


def test_crossover_is_where_sparse_stays_faster():
    def row(seqlen, dense, sparse, spread=0.0):
        return peers.crossover_row(seqlen, measured(dense, spread), measured(sparse, spread))

    rows = [row(1024, 1.0, 1.0), row(2048, 2.0, 1.5), row(4096, 4.0, 4.1, 0.02), row(8192, 9.0, 5.0), row(16384, 9, 5)]
    assert peers.crossover_of(rows) == 8192 and not any(row["slower"] for row in rows)
    assert row(4096, 4.0, 4.1)["slower"] and peers.crossover_of(rows[:1]) is None and peers.crossover_of([]) is None
    assert peers.crossover_lengths(4096) == [512, 1024, 2048, 4096]


def test_samples_in_a_slowdown_are_dropped():
    samples = [timing.Sample(ms, ms / 10, start, start + 1) for start, ms in enumerate((5.0, 50.0, 6.0))]
    candidate = timing.Candidate("x", None, samples)
    kept = peers.settle(candidate, lambda start, end: start == 1)
    assert kept.ms == 5.5 and kept.dropped == 1 and kept.timing.samples == 2 and kept.host_ms == pytest.approx(0.55)
    assert peers.settle(candidate, lambda start, end: True).problem.startswith("all 3 samples")
    candidate.error = MemoryError("no room\nat all")
    assert peers.settle(candidate, lambda start, end: False).problem == "MemoryError: no room"


def test_long_lengths_get_fewer_variants():
    settings = {"estimators": ("int8", "int8-sp24", "int4"), "strides": (1, 2, 4)}
    assert len(peers.variants(131072, settings)) == 9 and len(peers.variants(2**20, settings)) == 3


@pytest.mark.parametrize("head_dim, dtype, name", [(128, "bfloat16", ""), (64, "float16", "-d64-float16")])
def test_results_are_named_after_gpu_and_date(head_dim, dtype, name):
    settings = {"heads": 32, "kv_heads": 8, "head_dim": head_dim, "dtype": dtype, "seed": 0, "masks_name": None}
    report = peers.new_report(settings, GPU, "abc")
    path = peers.default_output(report)
    assert path.parent == peers.ROOT / "bench" / "results"
    assert path.name == f"h100-80gb-hbm3{name}-{time.strftime('%Y-%m-%d', time.gmtime())}.json"


# --- the machine ---------------------------------------------------------------------------------------------------
def test_readings_of_nvidia_smi():
    reading = timing.parse_reading("2026/11/24 02:53:14.250, 1545, 2619, 696.41, 61, 0x0000000000000004\n")
    assert reading.values == (1545.0, 2619.0, 696.41, 61.0) and reading.reasons == 4
    assert timing.parse_reading("2026/11/24 02:53:14.250, 1545, [N/A], 696.41, 61").values[1] is None
    assert timing.parse_reading("2026/11/24 02:53:14.250, 15") is None and timing.parse_reading("no devices") is None


def test_a_power_cap_is_recorded_and_a_slowdown_is_seen():
    sampler = timing.ClockSampler()
    reasons = [0x0, 0x4, 0x4, 0x24]
    sampler._readings = [
        timing.Reading(10.0 + i, (1980.0 - i, 2619.0, None, 60.0), bits) for i, bits in enumerate(reasons)
    ]
    summary = sampler.summary()
    assert summary["throttle"] == {"power cap": 1.0, "software thermal slowdown": pytest.approx(1 / 3, abs=1e-3)}
    assert summary["sm_mhz"] == 1978 and summary["power_w"] is None and summary["samples"] == 3
    assert sampler.summary((9.0, 10.5), (12.5, 13.5))["samples"] == 2 and sampler.summary((0.0, 1.0))["samples"] == 0
    assert sampler.slowed(12.8, 12.85) and sampler.slowed(11.0, 14.0) and not sampler.slowed(10.0, 12.5)


def sample(ms):
    return timing.Sample(ms, 0.0, 0.0, 0.0)


def test_candidates_take_turns():
    order = []

    def take(call):
        order.append(call())
        return sample({"a": 1.0, "b": 2.0, "slow": 900.0}[order[-1]]), order[-1]

    functions = {name: lambda name=name: name for name in ("a", "b", "slow")}
    found = timing.time_in_turn(functions, max_seconds=5, max_rounds=4, min_rounds=9, sampler=take)
    assert "".join(name[0] for name in order) == "abs" + "abs" + "bas" + "ab" + "ab"
    assert [len(candidate.samples) for candidate in found.values()] == [4, 4, 2]


def test_rounds_begin_with_another_candidate_and_change_direction():
    orders = [timing.rotated([0, 1, 2], turn) for turn in range(4)]
    assert orders == [[0, 1, 2], [1, 0, 2], [2, 0, 1], [0, 2, 1]] and timing.rotated([], 3) == []


def test_a_candidate_that_fails_is_left_out_and_one_that_is_slow_needs_no_warm_up():
    def refuse(name, result):
        if name == "wrong":
            raise peers.Refused("wrong")

    def take(call):
        return sample(call()), None

    functions = {"good": lambda: 1.0, "wrong": lambda: 1.0, "broken": lambda: 1 / 0, "slow": lambda: 5000.0}
    found = timing.time_in_turn(functions, check=refuse, sampler=take)
    assert isinstance(found["wrong"].error, peers.Refused) and isinstance(found["broken"].error, ZeroDivisionError)
    assert not found["wrong"].samples and not found["broken"].samples
    assert len(found["good"].samples) == 5 and len(found["slow"].samples) == 2


def test_a_first_call_that_compiles_is_no_sample():
    calls = [timing.Sample(5000.0, 4999.0, 0.0, 5.0), *[sample(1.0)] * 5]
    [candidate] = timing.time_in_turn({"x": lambda: None}, sampler=lambda call: (calls.pop(0), None)).values()
    assert [taken.ms for taken in candidate.samples] == [1.0] * 5


def test_a_group_gets_its_share_of_what_is_left():
    session = peers.Session({"notes": []}, None, [], 12.0, ["rows", "rows", "crossover"], 20.0)
    assert session.group_seconds("rows") == pytest.approx(12 * 15 / 31, abs=0.1)
    assert session.group_seconds("crossover") == pytest.approx(12 * 1 / 16, abs=0.1)
    session.started -= 100
    assert session.group_seconds("rows") == 0
    session.seen["rows", "fa3"] = (32768, 12.0)
    assert session.expected_seconds("rows", "fa3", 131072) == pytest.approx(0.192)
    assert session.expected_seconds("rows", "torch-fa2", 131072) == 0


# --- a whole run ---------------------------------------------------------------------------------------------------
class StillSampler(timing.ClockSampler):
    def __enter__(self):
        self._readings = []
        return self

    def __exit__(self, *_):
        pass


@pytest.fixture
def twin(monkeypatch):
    """peers.py on NumPy arrays and the host's clock, with a rival that is salekit's own dense attention."""

    def take(call):
        started, ticks = time.time(), time.perf_counter()
        result = call()
        ms = (time.perf_counter() - ticks) * 1e3
        return timing.Sample(ms, ms, started, time.time()), result

    def find(names):
        def prepare(q, k, v, bits):
            return lambda: dense_attention(q, k, v)

        def wrong(q, k, v, bits):
            return lambda: dense_attention(q, k, v, causal=False)

        def missing(q, k, v, bits):
            raise rivals.NotAvailable("no mask")

        made = {"torch-cudnn": wrong, "flex-128x128": missing}
        found = [rivals.Rival(name, "1", made.get(name, prepare), masked=name.startswith("flex")) for name in names]
        return found, {"torch": "none"}, ["fa3-fp8: not installed"]

    def generate(*shape, cuda, **settings):
        return workloads.llm_like_qkv(*shape, **settings)

    monkeypatch.setattr(timing, "event_sampler", lambda: take)
    monkeypatch.setattr(timing, "ClockSampler", StillSampler)
    monkeypatch.setattr(timing, "gpu_info", lambda: GPU)
    monkeypatch.setattr(timing, "POLL_SECONDS", 0.0)
    monkeypatch.setattr(peers, "precompile", lambda settings: None)
    monkeypatch.setattr(peers, "release_memory", lambda: None)
    monkeypatch.setattr(peers, "SECTION_SECONDS", dict.fromkeys(peers.SECTIONS, 0.1))
    monkeypatch.setattr(peers, "llm_like_qkv", generate)
    monkeypatch.setattr(rivals, "find", find)
    monkeypatch.setattr(rivals, "as_torch", lambda x: x)


def run(tmp_path, *arguments):
    target = tmp_path / "report.json"
    small = ["--heads", "2", "--kv-heads", "1", "--budget-seconds", "60", "--commit", "abc123", "-o", str(target)]
    result = CliRunner().invoke(peers.main, [*small, *arguments])
    assert result.exit_code == 0, result.output + repr(result.exception)
    return json.loads(target.read_text()), result


def test_a_whole_run(twin, tmp_path):
    report, result = run(
        tmp_path, "--seqlen", "512", "--strides", "1,2", "--taus", "0.008", "--estimators", "int8,int4"
    )
    assert KEYS <= set(report) and report["commit"] == "abc123" and report["gpu"] == GPU["name"]
    assert report["shape"]["heads"] == 2 and report["power"]["limit_w"] == 700 and report["versions"]["torch"] == "none"
    rows = {row["name"]: row for row in report["rows"]}
    assert {"salekit-dense", "salekit-masks-128x32", "salekit-masks-64x32", "torch-fa2", "fa3"} <= set(rows)
    assert all(ROW_KEYS <= set(row) and row["ms"] > 0 for row in rows.values())
    assert all(row["relative_error"] < (0.05 if "int8-fp8" in name else 0.01) for name, row in rows.items())
    assert rows["fa3"]["ratio_to_fa3"] == 1 and "torch-cudnn" not in rows and "flex-128x128" not in rows
    notes = "\n".join(report["notes"])
    assert "torch-cudnn: Refused: wrong result" in notes and "flex-128x128: no mask" in notes
    stages = {(entry["name"], entry["estimator"], entry["query_stride"]) for entry in report["stages"]}
    assert {("quantize", "int8", 1), ("estimate", "int4", 2), ("before-attention", "int8", 2)} <= stages
    assert all(STAGE_KEYS <= set(entry) for entry in report["stages"])
    calls = [entry for entry in report["end_to_end"] if entry["attend"] == "exact"]
    assert [(entry["estimator"], entry["query_stride"]) for entry in calls] == [("int8", 1), ("int8", 2)]
    assert all(CALL_KEYS <= set(entry) and 0 < entry["density"] <= 1 and entry["masks"] == "own" for entry in calls)
    assert all(math.isclose(entry["speedup_fa3"], entry["speedup_own_dense"], rel_tol=0.9) for entry in calls)
    assert [row["seqlen"] for row in report["crossover"]["rows"]] == [512]
    assert "end to end" in result.stdout and "salekit-dense" in result.stdout


def test_given_masks_are_attended_through(twin, tmp_path):
    n = 1024
    empty = BlockMask.from_dense(np.zeros((1, 2, 16, 32), bool), 64, 32, n, n, True)
    blocks = np.random.default_rng(0).random((1, 2, 16, 32)) < 0.3
    diagonal = np.arange(32)[None] // 2 == np.arange(16)[:, None]
    given = BlockMask.from_dense((blocks | diagonal) & empty.visible(), 64, 32, n, n, True)
    given.save_npz(tmp_path / "real.npz")
    arguments = ["--seqlen", "512,1k", "--masks", str(tmp_path / "real.npz"), "--sections", "rows,end_to_end"]
    report, _ = run(tmp_path, *arguments, "--strides", "1", "--estimators", "int8", "--rivals", "fa3")
    rows = {(row["name"], row["seqlen"]): row for row in report["rows"]}
    for block in ((128, 32), (64, 32), (128, 128)):
        row = rows[f"salekit-masks-{block[0]}x{block[1]}", n]
        assert row["density"] == pytest.approx(given.coarsen(*block).density().mean(), abs=1e-5)
        assert row["masks"] == "real" and rows[row["name"], 512]["masks"] == "own"
    [call] = [entry for entry in report["end_to_end"] if entry["masks"] == "real" and entry["attend"] == "exact"]
    assert call["seqlen"] == n and call["density"] == pytest.approx(given.coarsen(128, 32).density().mean(), abs=1e-5)
    assert {entry["tau"] for entry in report["end_to_end"] if entry["masks"] == "own"} == {0.008, 0.016}


def test_a_spent_budget_is_said(twin, tmp_path):
    report, _ = run(tmp_path, "--seqlen", "512", "--budget-seconds", "0", "--rivals", "fa3", "--sections", "rows")
    assert report["rows"] == [] and any("the budget is spent" in note for note in report["notes"])


# --- options -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "arguments, text",
    [
        (["--sections", "rows,all"], "'all' is not one of"),
        (["--strides", "3"], "'3' is not one of"),
        (["--taus", "0.008,nan"], "threshold"),
        (["--seqlen", "12q"], "not a length"),
        (["--heads", "3", "--kv-heads", "2"], "wants a divisor"),
    ],
)
def test_usage_errors(arguments, text):
    result = CliRunner().invoke(peers.main, arguments)
    assert result.exit_code == 2 and text in result.output


def test_help_names_the_sections_and_needs_neither_torch_nor_a_gpu():
    result = CliRunner().invoke(peers.main, ["--help"])
    assert result.exit_code == 0 and "--budget-seconds" in result.output and "rows,stages,end_to_end" in result.output
