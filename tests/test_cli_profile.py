"""salekit profile without a GPU: predictions, pictures, refusals; the trace's and the tables' form."""

import json
import re
import sys
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner

pytest.importorskip("cupy")

from salekit.cli import profile as module  # noqa: E402
from salekit.cli import roofline  # noqa: E402
from salekit.cli.main import cli  # noqa: E402

from salekit import work  # noqa: E402
from salekit.block_mask import BlockMask  # noqa: E402
from salekit.errors import CompileError, GpuError, SalekitError  # noqa: E402
from salekit.jit import KernelInfo  # noqa: E402
from salekit.launches import Launch, Span, Trace  # noqa: E402
from salekit.plans import Plan  # noqa: E402


def run(*arguments, **environment):
    return CliRunner().invoke(cli, ["profile", *map(str, arguments)], env=environment)


@pytest.fixture
def no_compiler(monkeypatch):
    """What the compiler would say, without its seconds."""
    monkeypatch.setattr(
        "salekit.jit.compile_kernel",
        lambda spec, arch: type("Compiled", (), {"info": KernelInfo(64, 1024, 32768, 0, 0, 0, (), 0.0)}),
    )


@pytest.fixture
def no_gpu(monkeypatch):
    def refuse():
        raise GpuError("no usable GPU (a test)")

    monkeypatch.setattr("salekit.jit.device_arch", refuse)


def predicted(*arguments):
    result = run("--gpu", "h100", "--json", *arguments)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize("attend", ("exact", "int8-fp8"))
@pytest.mark.parametrize("estimator", ("int8", "int8-sp24", "int4"))
def test_a_prediction_is_the_slowest_bound_of_each_kernel(no_compiler, no_gpu, estimator, attend):
    report = predicted("--seqlen", "8k", "--estimator", estimator, "--attend", attend, "--density", "0.3")
    assert report["predicted"] is True and report["gpu"] == {"name": "h100"}
    assert report["density"] == pytest.approx(0.3, abs=1e-3)
    assert report["call"] is report["dense_call"] is None
    ceilings = report["ceilings"]
    assert "measured" in ceilings["source"] and ceilings["date"]
    plan = Plan(
        1, 8192, 8192, 32, 8, 128, "bfloat16", 1.0, estimator=estimator, attend=attend, arch="sm_90a", dense_below=0
    )
    model = work.sparse_work(plan, work.pairs_at(plan, 0.3)[0])
    assert [(one["stage"], one["kernel"]) for one in report["kernels"]] == [(one.stage, one.name) for one in model]
    for one in [*report["kernels"], *report["dense"]]:
        products = sum(count / ceilings["operations_per_s"][unit] for unit, count in one["operations"].items())
        memory = one["bytes"] / ceilings["bytes_per_s"]
        assert one["ms"] == one["floor_ms"] == pytest.approx(1e3 * max(products, memory))
        assert one["bound"] == ("memory" if memory >= products else " + ".join(one["operations"]))
        assert one["share"] is None and one["bytes"] == one["read_bytes"] + one["written_bytes"] > 0
        assert one["operations_per_s"] == pytest.approx(one["num_operations"] / one["ms"] * 1e3)
        assert (one["registers"], one["shared_bytes"], one["spill_bytes"]) == (64, 33792, 0) and one["occupancy"] > 0
    assert report["kernels_ms"] == pytest.approx(sum(one["ms"] for one in report["kernels"]))
    assert report["dense"][0]["num_operations"] == 4 * 128 * 32 * 8192 * 8193 // 2


@pytest.mark.parametrize("attend", ("exact", "int8-fp8"))
def test_a_prediction_with_pools(no_compiler, no_gpu, tmp_path, attend):
    report = predicted("--seqlen", "8k", "--attend", attend, "--skipped", "pool")
    pools = [one for one in report["kernels"] if one["stage"] == "pool"]
    assert [one["kernel"] for one in pools] == ["mean_queries", "measure_keys", "pool_skipped_sm90", "attend_pools"]
    assert report["settings"]["skipped"] == "pool" and report["title"].endswith("skipped blocks pooled")
    assert report["stages_ms"]["pool"] == pytest.approx(sum(one["ms"] for one in pools)) and all(
        one["ms"] == one["floor_ms"] > 0 for one in pools
    )
    plain = predicted("--seqlen", "8k", "--attend", attend)
    assert [one["kernel"] for one in plain["kernels"]] == [one["kernel"] for one in report["kernels"][:-4]]
    attending, without = report["kernels"][-5], plain["kernels"][-1]
    assert attending["written_bytes"] == without["written_bytes"] + 4 * 32 * 8192  # lse
    assert report["dense"] == plain["dense"]
    result = run("--gpu", "h100", "--skipped", "pool", "--roofline", tmp_path / "roof.svg")
    assert result.exit_code == 0 and "pool_skipped_sm90" in result.stdout
    assert "attend_pools" in (tmp_path / "roof.svg").read_text()
    assert run("--gpu", "h100", "--skipped", "some").exit_code == 2


def test_the_compiler_is_asked_where_there_is_no_gpu(no_gpu):
    report = predicted("--seqlen", "4k", "--head-dim", "64")
    for one in report["kernels"]:
        assert 16 <= one["registers"] <= 255 and one["spill_bytes"] == 0 and one["stack_bytes"] == 0
    assert all(one["shared_bytes"] > 100_000 for one in report["kernels"] if one["kernel"].startswith("attend"))


def test_what_the_table_says(no_compiler, no_gpu):
    result = run("--gpu", "H100", "--seqlen", "8k")
    assert result.exit_code == 0
    first = result.stdout.splitlines()[0]
    assert first.startswith("prediction") and "h100" in first and "8k tokens, 32/8 heads" in first
    for text in ("estimate_int8_sm90", "attend_sm90", "reduce_channels (k)", "s8", "memory", "registers", "occupancy"):
        assert text in result.stdout
    assert "±" not in result.stdout and "a prediction:" in result.stdout and "ceilings from: measured" in result.stdout


def test_density_and_stride_decide_the_work(no_compiler, no_gpu):
    def of(stage, *arguments):
        report = predicted("--seqlen", "16k", *arguments)
        return sum(one["num_operations"] for one in report["kernels"] if one["stage"] == stage)

    assert of("attend", "--density", "0.4") == pytest.approx(2 * of("attend", "--density", "0.2"), rel=0.03)
    assert of("attend", "--density", "0") > 0  # the anchors
    whole = of("estimate")
    # The last 1024 rows of 16,384 are tested whole: they see 12% of the pairs.
    assert of("estimate", "--query-stride", "4") / whole == pytest.approx(0.25 * 0.879 + 0.121, abs=0.01)


def test_masks_give_the_density(no_compiler, no_gpu, tmp_path):
    plan = Plan(1, 2048, 2048, 2, 1, 128, "bfloat16", 1.0)
    import numpy as np

    bits = np.tri(16, 64, dtype=bool)[None, None] | (np.arange(64)[None] // 4 == np.arange(16)[:, None])
    mask = BlockMask.from_dense(np.broadcast_to(bits, (1, 2, 16, 64)), 128, 32, 2048, 2048, True)
    mask.save_npz(tmp_path / "masks.npz")
    report = predicted("--masks", tmp_path / "masks.npz")
    assert report["settings"]["heads"] == 2 and report["settings"]["seqlen_k"] == 2048
    assert report["density"] == pytest.approx(mask.density().mean())
    last = report["kernels"][-1]
    assert last["num_operations"] == 4 * 128 * work.pairs_of(plan, mask.selected_blocks().flat)
    assert run("--gpu", "h100", "--masks", tmp_path / "masks.npz", "--density", ".1").exit_code == 2
    assert run("--gpu", "h100", "--masks", tmp_path / "masks.npz", "--seqlen", "4k").exit_code == 2


@pytest.mark.parametrize(
    "arguments, code, words",
    (
        ([], 3, "--gpu h100"),
        (["--trace", "t.json"], 3, "--gpu h100"),
        (["--gpu", "a100"], 2, "wants one of h100"),
        (["--gpu", "h100", "--trace", "t.json"], 2, "--trace"),
        (["--gpu", "h100", "--remeasure"], 2, "--remeasure"),
        (["--gpu", "h100", "--density", "1.5"], 2, "--density"),
        (["--gpu", "h100", "--seqlen", "8k,16k"], 2, "not a length"),
        (["--gpu", "h100", "--heads", "3", "--kv-heads", "2"], 2, "--kv-heads"),
        (["--gpu", "h100", "--roofline", "roof.gif"], 2, "wants .svg or .png"),
        (["--gpu", "h100", "--roofline", "roof"], 2, "wants .svg or .png"),
        (["--gpu", "h100", "--roofline", "there.svg"], 2, "--force"),
        (["--trace", "there.svg"], 2, "--force"),
    ),
)
def test_refusals_are_one_line_before_any_work(no_gpu, monkeypatch, tmp_path, arguments, code, words):
    from salekit.cli import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.svg").write_text("kept")
    monkeypatch.setattr("salekit.jit.compile_kernel", lambda spec, arch: pytest.fail("compiled"))
    result = CliRunner().invoke(_Main(main), ["profile", *arguments])
    assert result.exit_code == code and words in result.stderr and "Traceback" not in result.stderr
    assert not result.stdout and (tmp_path / "there.svg").read_text() == "kept"
    assert len([line for line in result.stderr.splitlines() if "rror" in line]) == 1


class _Main:
    """``main`` for the runner, with its exit codes."""

    name = "salekit"

    def __init__(self, module):
        self.main = lambda args, prog_name, **_: module.main(args)


def test_a_png_without_matplotlib_is_refused(no_compiler, no_gpu, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run("--gpu", "h100", "--roofline", tmp_path / "roof.png")
    assert isinstance(result.exception, SalekitError) and "salekit[plot]" in str(result.exception)
    assert run("--gpu", "h100", "--roofline", tmp_path / "roof.svg").exit_code == 0


def test_a_compile_error_is_one(no_gpu, monkeypatch):
    def fail(spec, arch):
        raise CompileError("broken")

    monkeypatch.setattr("salekit.jit.compile_kernel", fail)
    assert isinstance(run("--gpu", "h100").exception, CompileError)


def test_without_a_compiler_the_rest_is_predicted(no_gpu, monkeypatch):
    def fail(spec, arch):
        raise GpuError("no NVRTC")

    monkeypatch.setattr("salekit.jit.compile_kernel", fail)
    report = predicted("--seqlen", "8k")
    assert all(one["registers"] is None and one["ms"] > 0 for one in report["kernels"])
    result = run("--gpu", "h100", "--seqlen", "8k")
    assert result.exit_code == 0 and "no NVRTC" in result.stderr and "occupancy" not in result.stdout


def test_a_narrow_terminal_cuts_nothing(no_compiler, no_gpu):
    """Lines may wrap, numbers and names stay whole."""
    wide = run("--gpu", "h100", "--seqlen", "8k").stdout
    narrow = run("--gpu", "h100", "--seqlen", "8k", COLUMNS="30", FORCE_COLOR="1").stdout
    narrow = re.sub(r"\x1b\[[0-9;]*m", "", narrow)
    assert "…" not in narrow
    for word in wide.split():
        if not set(word) <= set("─"):
            assert word in narrow, word


# --- pictures ------------------------------------------------------------------------------------------------------
def dots_and_texts(path):
    root = ElementTree.fromstring(path.read_text(encoding="utf-8"))
    space = "{http://www.w3.org/2000/svg}"
    return (
        [(float(dot.get("cx")), float(dot.get("cy"))) for dot in root.iter(space + "circle")],
        [text.text for text in root.iter(space + "text") if text.get("fill") != "#ffffff"],
        [text.text for text in root.iter(space + "text") if text.get("fill") == "#ffffff"],
        root,
    )


@pytest.mark.parametrize("attend", ("exact", "int8-fp8"))
def test_the_picture_has_a_dot_and_a_name_for_each_kernel(no_compiler, no_gpu, tmp_path, attend):
    path = tmp_path / "roof.svg"
    result = run("--gpu", "h100", "--attend", attend, "--roofline", path, "--json")
    assert result.exit_code == 0 and "wrote" in result.stderr
    report = json.loads(result.stdout)
    kernels = [*report["kernels"], *report["dense"]]
    dots, texts, numbers, root = dots_and_texts(path)
    assert len(dots) == 2 * len(kernels)  # in a panel and in the legend
    for number, one in enumerate(kernels, 1):
        assert numbers.count(str(number)) == 2 and one["kernel"] in texts
    assert any("prediction" in text for text in texts) and "h100" in texts[0]
    for unit in report["ceilings"]["operations_per_s"]:
        assert any(text.startswith(f"{unit} ") for text in texts)
    in_panels = [dot for dot in dots if dot[0] < roofline._LEGEND]
    assert len(in_panels) == len(kernels)
    for i, (x, y) in enumerate(in_panels):
        assert 0 < x < roofline._LEGEND and 0 < y < float(root.get("height"))
        assert all((x - a) ** 2 + (y - b) ** 2 >= 13**2 for a, b in in_panels[:i])  # none hides another
    assert run("--gpu", "h100", "--roofline", path).exit_code == 2
    before = path.read_text()
    assert run("--gpu", "h100", "--roofline", path, "--force", "--seqlen", "8k").exit_code == 0
    assert path.read_text() != before


def test_dots_lie_where_their_numbers_say(no_compiler, no_gpu):
    report = predicted("--seqlen", "32k")
    scene = roofline.layout(report)
    panel = [x for x in scene.items if isinstance(x, roofline.Dot) and roofline._RIGHT <= x.x < roofline._LEGEND]
    [dense] = [x for x in panel if x.colour == roofline._STAGES["dense"]]
    [attend] = [x for x in panel if x.colour == roofline._STAGES["attend"]]
    [anchors] = [x for x in panel if x.colour == roofline._STAGES["anchors"]]
    assert dense.y == pytest.approx(attend.y)  # both on the roof of bf16
    roofs = [x for x in scene.items if isinstance(x, roofline.Line) and len(x.points) == 3 and not x.dashed]
    assert any(line.points[-1][1] == pytest.approx(dense.y) for line in roofs)
    assert anchors.y > dense.y and anchors.x < attend.x < dense.x
    # Four times the operations a byte lie as far to the right, wherever one starts: the axis is logarithmic.
    scale = roofline._Scale(1, 10_000, 0, 400)
    assert scale(10) - scale(1) == pytest.approx(scale(10_000) - scale(1_000)) == pytest.approx(100)
    assert scale.decades() == [1, 10, 100, 1000, 10_000]


def test_png(no_compiler, no_gpu, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "roof.PNG"
    assert run("--gpu", "h100", "--roofline", path).exit_code == 0
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG") and len(data) > 20_000


def test_slow_kernels_and_names_fit(no_compiler, no_gpu, tmp_path):
    """A measured report draws, too: dots below the roofs, shares in the legend, fills left out."""
    report = predicted("--seqlen", "8k")
    report.update(predicted=False, gpu={"name": "<GPU & co>"})
    for one in [*report["kernels"], *report["dense"]]:
        one.update(share=0.5, ms=2 * one["ms"], spread=0.01)
        one["operations_per_s"] /= 2
        one["bytes_per_s"] /= 2
    fill = {**report["kernels"][0], "kernel": "fill", "expression": None, "bytes_per_s": 1.0}
    report["kernels"].insert(7, fill)
    roofline.save(roofline.layout(report), tmp_path / "roof.svg", "title")
    dots, texts, *_ = dots_and_texts(tmp_path / "roof.svg")
    assert len(dots) == 2 * (len(report["kernels"]) - 1 + len(report["dense"])) and "fill" not in texts
    assert texts.count("50%") == len(dots) // 2 and texts[0] == "Roofline: <GPU & co>"


# --- what a GPU's run is made into ------------------------------------------------------------------------------------
def test_a_trace_is_in_the_event_format(no_compiler, no_gpu):
    report = predicted("--seqlen", "8k")
    for one in report["kernels"]:
        one["grid"] = [1, 2, 3]
    starts = [10.0004 + 3.3333 * i for i in range(len(report["kernels"]))]
    times = list(zip(starts, [*starts[1:], starts[-1] + 1]))
    stages = [Span("quantize", 1.0, 2.0), Span("anchors", 2.0, 3.0)]
    taken = Trace(times, list(range(len(times))), stages, Span("", 0.5, 4.0))
    trace = json.loads(json.dumps(module._chrome_trace(report, taken)))
    events = trace["traceEvents"]
    assert {event["ph"] for event in events} == {"X", "M"}
    kernels = [event for event in events if event["ph"] == "X" and (event["pid"], event["tid"]) == (2, 0)]
    assert [event["name"] for event in kernels] == [one["kernel"] for one in report["kernels"]]
    for event, one in zip(kernels, report["kernels"]):
        assert event["args"]["stage"] == one["stage"] and event["args"]["registers"] == 64
        assert event["args"]["bytes"] == one["bytes"] and event["args"]["grid"] == [1, 2, 3]
    for event, after in zip(kernels, kernels[1:]):  # to the nanosecond
        assert event["dur"] > 0 and round((event["ts"] + event["dur"]) * 1000) <= round(after["ts"] * 1000)
    host = [event for event in events if event["ph"] == "X" and event["pid"] == 1]
    assert [event["name"] for event in host] == ["sparse_attention", "quantize", "anchors"]
    assert host[0]["ts"] == 0 and host[0]["dur"] == 3.5
    of_stages = [event for event in events if event["ph"] == "X" and (event["pid"], event["tid"]) == (2, 1)]
    assert [event["name"] for event in of_stages] == ["quantize", "anchors", "estimate", "attend"]
    assert of_stages[0]["ts"] == kernels[0]["ts"]


@pytest.fixture
def fake_gpu(monkeypatch, no_compiler):
    """A GPU of which only the times are made up: each launch takes twice its bound, and the trace a microsecond each.

    Inputs and mask are the twin's.
    """
    from salekit import call_checks, ceilings, launches, timing
    from salekit.staged import StagedCall
    from salekit.workloads import llm_like_qkv

    limits = ceilings.KNOWN["h100"]
    info = KernelInfo(64, 1024, 32768, 0, 0, 0, (), 0.0)

    class Launched:
        def __init__(self, model):
            self.model = model
            self.launches = [Launch(one.stage, one.spec, info, (7, 1, 1), (one.threads, 1, 1), 3) for one in model]
            self.launches.insert(-1, Launch(model[-1].stage, None, None, (0, 0, 0), (0, 0, 0), fill_bytes=4))

        def run(self):
            pass

        def time_each(self):
            floors = [limits.seconds(one)[0] * 2e3 for one in self.model]
            floors.insert(-1, 0.002)
            return [timing.Timing(ms, ms, ms, 0.01, 5) for ms in floors]

        def trace(self):
            times = [(float(i), i + 1.0) for i in range(len(self.launches))]
            return Trace(times, list(range(len(times))), [Span("quantize", 1.0, 2.0)], Span("", 0.0, 3.0))

    def cases(seqlen, heads, kv_heads, head_dim, dtype, *_):
        shape = dict(seqlen_q=1024, seqlen_k=1024, batch=1, heads=2, kv_heads=1, head_dim=64)
        return [dict(shape, make=lambda: llm_like_qkv(1024, 2, 1, 64))]

    make_plan = call_checks.make_plan
    counted = {}

    class LaunchedInTurns(Launched):
        """Pools are made and attended to twice."""

        def trace(self):
            order = [*range(len(self.launches)), len(self.launches) - 3, len(self.launches) - 1]
            times = [(float(i), i + 1.0) for i in range(len(order))]
            return Trace(times, order, [Span("quantize", 1.0, 2.0)], Span("", 0.0, 3.0))

    def sparse(q, k, v, tau, plan, mask):
        blocks = StagedCall(q, k, v, tau, plan).estimated.selected_blocks()
        counted["pairs"] = work.pairs_of(plan, blocks.flat)
        launched = LaunchedInTurns if plan.skipped == "pool" else Launched
        return launched(work.sparse_work(plan, counted["pairs"]))

    monkeypatch.setattr("salekit.jit.device_arch", lambda: "sm_90a")
    monkeypatch.setattr(module.bench, "cases_of", cases)
    monkeypatch.setattr(call_checks, "make_plan", lambda *a, **k: make_plan(*a, **k).replace(arch="sm_90a"))
    monkeypatch.setattr(ceilings, "of_this_gpu", lambda remeasure, note: limits)
    monkeypatch.setattr(launches, "launch_sparse", sparse)
    monkeypatch.setattr(launches, "launch_dense", lambda q, k, v, plan: Launched(work.dense_work(plan)))
    monkeypatch.setattr(timing, "time_call", lambda function, cuda: timing.Timing(1.0, 1.0, 1.0, 0.0, 5))
    monkeypatch.setattr(timing, "gpu_info", lambda: {"name": "a test's GPU"})
    sampler = type("Sampler", (), {"__enter__": lambda s: s, "__exit__": lambda s, *a: None, "result": {"sm_mhz": 1}})
    monkeypatch.setattr(timing, "ClockSampler", sampler)
    return counted


def test_what_is_made_of_a_run(fake_gpu, tmp_path):
    files = [tmp_path / name for name in ("trace.json", "roof.svg")]
    result = run("--trace", files[0], "--roofline", files[1], "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (
        report["predicted"] is False and report["gpu"]["name"] == "a test's GPU" and report["clocks"] == {"sm_mhz": 1}
    )
    assert report["call"]["median_ms"] == 1.0 and 0 < report["density"] < 1
    kernels = [one for one in report["kernels"] if one["expression"]]
    assert kernels[-1]["num_operations"] == 4 * 64 * fake_gpu["pairs"]
    for one in kernels:
        assert one["share"] == pytest.approx(0.5) and one["spread"] == 0.01 and one["grid"] == [7, 1, 1]
        assert one["blocks_per_multiprocessor"] == 3
    fill = report["kernels"][-2]
    assert fill["kernel"] == "fill" and fill["bytes"] == 4 and fill["registers"] is None and 0 < fill["share"] < 1e-5
    assert report["stages_ms"]["attend"] == pytest.approx(fill["ms"] + kernels[-1]["ms"])
    trace = json.loads(files[0].read_text())
    assert len([x for x in trace["traceEvents"] if x["ph"] == "X" and x["pid"] == 2 and x["tid"] == 0]) == 8 + 1
    assert "a test's GPU" in files[1].read_text() and "prediction" not in files[1].read_text()


def test_pools_in_turns_are_a_row_a_kernel_and_apart_in_the_trace(fake_gpu, tmp_path):
    path = tmp_path / "trace.json"
    result = run("--skipped", "pool", "--trace", path, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    pools = [one["kernel"] for one in report["kernels"] if one["stage"] == "pool"]
    assert pools == ["mean_queries", "measure_keys", "pool_skipped_sm90", "fill", "attend_pools"]
    assert all(one["share"] == pytest.approx(0.5) for one in report["kernels"] if one["expression"])
    events = [x for x in json.loads(path.read_text())["traceEvents"] if x["ph"] == "X" and x["pid"] == 2]
    kernels = [x["name"] for x in events if x["tid"] == 0]
    assert kernels[-7:] == [*pools, "pool_skipped_sm90", "attend_pools"] and len(kernels) == len(report["kernels"]) + 2
    [stage] = [x for x in events if x["tid"] == 1 and x["name"] == "pool"]
    assert stage["dur"] == 7 and stage["ts"] + stage["dur"] == len(kernels)


def test_what_the_table_says_of_a_run(fake_gpu):
    text = run().stdout
    assert "prediction" not in text and "50%" in text and "±1.0%" in text and "fill" in text
    assert "whole calls 1.000 ms sparse, 1.000 dense (1.00x)" in text
    result = run("--density", "0.1")
    assert result.exit_code == 2 and "--gpu" in result.stderr


def test_launches_that_the_model_does_not_know_are_refused():
    plan = Plan(1, 4096, 4096, 8, 2, 128, "bfloat16", 1.0, arch="sm_90a")
    model = work.sparse_work(plan, 10**6)
    info = KernelInfo(64, 0, 0, 0, 0, 0, (), 0.0)
    launched = [Launch(one.stage, one.spec, info, (1, 1, 1), (128, 1, 1)) for one in model]
    fill = Launch("attend", None, None, (0, 0, 0), (0, 0, 0), fill_bytes=4)
    assert module._models([*launched[:-1], fill, launched[-1]], model) == [*model[:-1], None, model[-1]]
    with pytest.raises(SalekitError, match="its work is known for"):
        module._models(launched[1:], model)
    with pytest.raises(SalekitError, match="its work is known for"):
        module._models([launched[1], launched[0], *launched[2:]], model)
