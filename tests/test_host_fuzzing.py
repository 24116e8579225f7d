"""The fuzzer on the twin: properties, how sharp its checks are, shrinking, files and what runs many cases."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
from collections import Counter

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from salekit.cli.main import cli

import salekit
from salekit import reference
from salekit.block_mask import BlockMask
from salekit.errors import FileFormatError
from salekit.fuzz import calls, cases, checking, oracle, running, shrinking
from salekit.fuzz.cases import Case, Spot
from salekit.plans import BLOCKS, DTYPES, ESTIMATORS, HEAD_DIMS, Plan

MOST = 420  # keys: some query blocks, some words of a mask
SETTINGS = dict(suppress_health_check=list(HealthCheck))
SHARP = Case(seed=5, lengths=((300, 333),), num_heads=4, num_kv_heads=2, dtype="bfloat16", thresholds=(0.05,))


# --- properties ----------------------------------------------------------------------------------------------------
def lengths():
    edges = st.builds(
        lambda edge, off: max(0, edge + off), st.sampled_from((32, 64, 128, 256, 384)), st.integers(-1, 1)
    )
    return st.one_of(edges, st.integers(0, MOST))


def taus():
    return st.one_of(st.sampled_from((0.0, math.inf, 1e-30, 1e30)), st.floats(2.0**-13, 3.0, width=32))


@st.composite
def some_cases(draw, kinds=("call", "dense"), pool=True):
    kind = draw(st.sampled_from(kinds))
    packed = kind in ("varlen", "paged")
    kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    heads, head_dim = kv_heads * group, draw(st.sampled_from(HEAD_DIMS))
    dtype = draw(st.sampled_from(DTYPES))
    pairs = draw(st.lists(st.tuples(lengths(), lengths()), min_size=1, max_size=4 if packed else 1))
    exact = dict(
        softcap=draw(st.sampled_from((0.0, 0.0, 1.0, 30.0))),
        window_size=draw(st.sampled_from(((), (), (1,), (64,), (200, 90), (33, -1), (-1, 5), (0, 0)))),
        sink_logits=tuple(
            draw(
                st.one_of(
                    st.just([]), st.lists(st.sampled_from((-math.inf, -3.0, 0.0, 5.0)), min_size=heads, max_size=heads)
                )
            )
        ),
    )
    low = dict(attend="int8-fp8") if head_dim in (64, 128) else {}
    pooled = dict(skipped="pool") if pool and kind == "call" and head_dim in (64, 128) else {}
    more = draw(st.sampled_from(({}, exact, low, pooled))) if not packed else draw(st.sampled_from(({}, low)))
    cuts = ()
    if kind == "chunked":
        rows = pairs[0][0]
        pairs = [(rows, max(pairs[0]))]
        cuts = tuple(
            sorted(min(rows, cut) for cut in draw(st.lists(st.sampled_from((1, 64, 128, 129, 256)), max_size=3)))
        )
    tiny = 2.0**-24 if dtype == "float16" else 1e-39
    scale = st.sampled_from((1.0, 1.0, 1.0, tiny, 1e-3, 30.0, 6e4))
    spot = st.builds(Spot, st.sampled_from("qkv"), st.sampled_from(cases.BAD_VALUES), *(st.integers(0, 2**20),) * 4)
    return Case(
        seed=draw(st.integers(0, 2**32)),
        kind=kind,
        lengths=tuple(pairs),
        batch=draw(st.integers(1, 2)),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        layout=draw(st.sampled_from(("bshd", "bhsd"))),
        strides=draw(st.sampled_from(("contiguous", "padded") if packed else cases.STRIDES)),
        out=draw(st.sampled_from(cases.OUTS)),
        causal=kind == "chunked" or draw(st.booleans()),
        estimator=draw(st.sampled_from(ESTIMATORS)),
        block=draw(st.sampled_from(BLOCKS)),
        query_stride=draw(st.sampled_from((1, 2, 4))),
        full_rows=draw(st.sampled_from((0, 1, 100, 1024))),
        sink=draw(st.sampled_from((0, 1, 32, 100))),
        local=draw(st.sampled_from((0, 16, 128, 300))),
        dense_below=draw(st.sampled_from((0, 0, 0, 128))),
        thresholds=tuple(
            draw(st.one_of(st.lists(taus(), min_size=1, max_size=1), st.lists(taus(), min_size=heads, max_size=heads)))
        ),
        page_size=draw(st.sampled_from((16, 64, 256))),
        cuts=cuts,
        statistics=kind == "chunked" and draw(st.booleans()),
        distribution=draw(st.sampled_from(cases.DISTRIBUTIONS)),
        scales=tuple(draw(scale) for _ in range(3)),
        offset=draw(st.sampled_from((0.0, 1.0, 20.0))),
        outliers=draw(st.sampled_from((0, 0, 2))),
        constant_rows=draw(st.booleans()),
        duplicated_keys=draw(st.booleans()),
        zero_rows=draw(st.booleans()),
        spots=tuple(draw(st.one_of(st.just([]), st.just([]), st.lists(spot, max_size=3)))),
        **more,
    )


def assert_passes(case: Case) -> None:
    failed = checking.check_case(case, False).failed
    assert not failed, (case.describe(), failed)


@settings(max_examples=60, **SETTINGS)
@given(some_cases())
def test_calls_are_what_float64_says(case):
    assert_passes(case)


@settings(max_examples=20, **SETTINGS)
@given(some_cases(("varlen", "paged")))
def test_packed_and_paged_calls_are_what_float64_says(case):
    assert_passes(case)


@settings(max_examples=20, **SETTINGS)
@given(some_cases(("chunked",)))
def test_chunks_are_what_float64_says(case):
    assert_passes(case)


@settings(max_examples=60, **SETTINGS)
@given(some_cases(("call", "dense", "varlen", "paged", "chunked")))
def test_cases_survive_json_and_are_what_is_drawn(case):
    text = json.dumps(case.to_json(), allow_nan=False)
    assert Case.from_json(json.loads(text)) == case
    for smaller in list(shrinking.steps(case))[:40]:
        assert smaller != case and Case.from_json(json.loads(json.dumps(smaller.to_json()))) == smaller


# --- drawing -------------------------------------------------------------------------------------------------------
def test_cases_follow_from_seed_and_index_alone():
    drawn = [cases.draw(3, index) for index in range(40)]
    code = "from salekit.fuzz import draw; print([hash(draw(3, i).describe()) for i in range(39, -1, -1)])"
    environment = {**os.environ, "PYTHONHASHSEED": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    first, second = (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment).stdout
        for _ in range(2)
    )
    assert first == second and first.startswith("[")
    assert len({case.seed for case in drawn}) == 40 and cases.draw(4, 0) != drawn[0]
    for case in drawn[:8]:
        for a, b in zip(cases.make_arrays(case)["k"], cases.make_arrays(case)["k"]):
            assert a.tobytes() == b.tobytes()


def test_everything_is_drawn():
    drawn = [cases.draw(1, index) for index in range(1500)]
    for name, choices in cases._CHOICES.items():
        assert {getattr(case, name) for case in drawn} == set(choices), name
    for holds in (
        lambda c: c.softcap,
        lambda c: len(c.window_size) == 1,
        lambda c: len(c.window_size) == 2,
        lambda c: c.sink_logits,
        lambda c: len(c.thresholds) > 1,
        lambda c: math.inf in c.thresholds,
        lambda c: 0.0 in c.thresholds,
        lambda c: 0 in c.lengths[0],
        lambda c: 1 in c.lengths[0],
        lambda c: max(c.lengths[0]) > 4500,
        lambda c: c.lengths[0][0] > c.lengths[0][1] > 0,
        lambda c: c.batch > 1,
        lambda c: c.num_heads >= 16,
        lambda c: min(c.scales) < 1e-6,
        lambda c: max(c.scales) == cases.LARGEST,
        lambda c: c.outliers,
        lambda c: c.constant_rows,
        lambda c: c.duplicated_keys,
        lambda c: c.dense_below,
        lambda c: c.statistics,
        lambda c: any(spot.tensor == "v" for spot in c.spots),
        lambda c: c.pairs > cases.MAX_PAIRS,
    ):
        assert 3 <= sum(map(bool, map(holds, drawn))) < 1400
    assert max(max(map(max, case.lengths)) for case in drawn) <= cases.MAX_LENGTH
    assert sum(any(n % 32 in (31, 0, 1) for n in case.lengths[0]) for case in drawn) > 700


def test_smaller_cases_have_the_beginning_of_larger_ones():
    large = SHARP.replace(batch=2, spots=())
    small = large.replace(lengths=((70, 90),), batch=1)
    for name in "qkv":
        a, b = cases.make_arrays(large)[name][0], cases.make_arrays(small)[name][0]
        assert a[:1, : b.shape[1]].tobytes() == b.tobytes()


# --- how sharp the checks are --------------------------------------------------------------------------------------
def answer_of(case: Case) -> calls.Answer:
    (answer,), _ = calls.make_calls(case, cases.make_arrays(case), False)
    return answer


def rerun(case: Case, answer: calls.Answer, q=None, k=None, v=None, mask=None, plan=None) -> calls.Answer:
    """The answer with outputs of something else."""
    q, k, v = (mine if mine is not None else theirs for mine, theirs in ((q, answer.q), (k, answer.k), (v, answer.v)))
    out, lse = reference.attend(q, k, v, mask or answer.mask, plan or answer.plan, checking.sinks_of(case))
    out = out.astype(answer.out.dtype)
    return dataclasses.replace(answer, out=out, lse=lse, again=out)


def failed(case: Case, answer: calls.Answer, on_gpu: bool) -> set[str]:
    return {check.compared.split()[0] for check in checking.check_answers(case, [answer], None, on_gpu).failed}


def json_of(result):
    """What a command printed with --json; in Click 8.1 ``stdout`` has its progress before that."""
    return json.loads(result.stdout[result.stdout.index("{") :])


def scaled_key(answer, key, factor):
    """k in float32, one key's scores times ``factor`` in all rows."""
    k = answer.k.astype(np.float32)
    k[:, key] *= np.float32(factor)
    return k


@pytest.mark.parametrize("on_gpu", (False, True), ids=("twin's bounds", "kernels' bounds"))
@pytest.mark.parametrize(
    "options",
    (
        {},
        {"dtype": "float16", "causal": False},
        {"softcap": 20.0, "window_size": (200, 90)},
        {"sink_logits": (0.0, 1.0, -math.inf, 2.0)},
        {"head_dim": 256, "estimator": "int4"},
    ),
)
def test_wrong_outputs_are_found(options, on_gpu):
    case = SHARP.replace(**options)
    answer = answer_of(case)
    assert not failed(case, answer, on_gpu)
    for key in (0, 100, 250):
        wrong = rerun(case, answer, k=scaled_key(answer, key, 1.01))
        assert "lse" in failed(case, wrong, on_gpu), f"the scores of key {key} are off by 1%"
    keys = answer.plan.seqlen_k - 1
    shorter = np.concatenate((answer.k.astype(np.float32)[:, :keys], np.full_like(answer.k[:, :1], -np.inf)), axis=1)
    assert failed(
        case, rerun(case, answer, k=np.where(np.isinf(shorter), -1e4 * np.sign(answer.q.sum()), shorter)), on_gpu
    )
    assert {"out", "lse"} <= failed(case, rerun(case, answer, k=np.roll(answer.k, 1, 2)), on_gpu), "another head's keys"
    assert "out" in failed(case, rerun(case, answer, v=np.roll(answer.v, 1, 2)), on_gpu), "another head's values"
    value = answer.v.copy()
    value[:, 100] = 0
    assert "out" in failed(case, rerun(case, answer, v=value), on_gpu), "a value that is lost"
    rows = np.roll(answer.out, 1, axis=1)
    assert "out" in failed(case, dataclasses.replace(answer, out=rows, again=rows), on_gpu)
    assert "lse" in failed(case, dataclasses.replace(answer, lse=answer.lse + np.float32(1e-3)), on_gpu)
    assert "output" in failed(case, dataclasses.replace(answer, again=rows), on_gpu)
    assert "elements" in failed(case, dataclasses.replace(answer, untouched=False), on_gpu)


@pytest.mark.parametrize("kind", ("varlen", "paged"))
@pytest.mark.parametrize("out", cases.OUTS)
def test_packed_calls_are_made_twice(kind, out, monkeypatch):
    """A second call that gives other bits is found."""
    case = SHARP.replace(kind=kind, lengths=((70, 90), (33, 200)), out=out)
    real, made = salekit.sparse_attention_varlen, []

    def varlen(*inputs, return_lse=False, **options):
        result = real(*inputs, return_lse=return_lse, **options)
        made.append(return_lse)
        if not return_lse:
            result[5, 0, 0] += 1
        return result

    assert not checking.check_case(case, False).failed
    monkeypatch.setattr(salekit, "sparse_attention_varlen", varlen)
    (check,) = checking.check_case(case, False).failed
    assert (check.stage, check.compared) == ("call", checking.TWO_CALLS) and made == [True, False]


@pytest.mark.parametrize("on_gpu", (False, True))
def test_a_lost_last_key_is_found(on_gpu):
    """Each row without its own key, as an off-by-one in the causal limit makes it."""
    answer = answer_of(SHARP)
    keys = answer.plan.seqlen_k - 1
    bits = answer.mask.to_dense()[..., : -(-keys // 32)]
    mask = BlockMask.from_dense(bits, 128, 32, answer.plan.seqlen_q, keys, True)
    wrong = rerun(
        SHARP, answer, k=answer.k[:, :-1], v=answer.v[:, :-1], mask=mask, plan=answer.plan.replace(seqlen_k=keys)
    )
    assert {"out", "lse"} <= failed(SHARP, wrong, on_gpu)


def put(mask: BlockMask, place: tuple, bit: bool) -> BlockMask:
    assert mask.to_dense()[place] != bit
    words = mask.words.copy()
    words[(*place[:3], place[3] // 32)] ^= np.uint32(1 << place[3] % 32)
    return dataclasses.replace(mask, words=words)


@pytest.mark.parametrize("on_gpu", (False, True))
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_wrong_bits_are_found(estimator, on_gpu):
    case = SHARP.replace(estimator=estimator, lengths=((500, 500),), block=(64, 32), thresholds=(0.3,))
    answer = answer_of(case)
    bits, visible = answer.mask.to_dense(), answer.mask.visible()
    for bit in (False, True):
        places = np.argwhere((bits != bit) & visible)
        for place in places[:: max(1, len(places) // 5)]:
            # The twin's checker looks at some query blocks of a head.
            if not on_gpu and place[2] not in np.linspace(0, bits.shape[2] - 1, 4).round():
                continue
            mask = put(answer.mask, tuple(place), bit)
            wrong = dataclasses.replace(answer, mask=mask)
            assert {"bits", "distance"} & failed(case, rerun(case, wrong), on_gpu), (bit, place)
    hidden = put(answer.mask, (0, 0, 0, bits.shape[3] - 1), True)
    assert "bits" in failed(case, dataclasses.replace(answer, mask=hidden), on_gpu)


def test_what_is_not_finite_has_to_be_where_it_belongs():
    case = SHARP.replace(
        thresholds=(0.0,),
        spots=(Spot("v", "nan", 0, 32, 1, 5), Spot("k", "inf", 0, 200, 0, 3), Spot("q", "nan", 0, 77, 3, 1)),
    )
    answer = answer_of(case)
    assert not failed(case, answer, True) and np.isnan(answer.out).any()
    bad = np.argwhere(np.isnan(answer.out))
    good = np.argwhere(np.isfinite(answer.out))
    for place, value in [(tuple(x), 0.5) for x in bad[:: len(bad) // 7]] + [
        (tuple(x), np.nan) for x in good[:: len(good) // 7]
    ]:
        out = answer.out.copy()
        out[place] = value
        assert "elements" in failed(case, dataclasses.replace(answer, out=out, again=out), True), place


# --- arithmetic as the kernels have it -----------------------------------------------------------------------------
def kernel_means(share: float):
    """Means that are off by ``share`` of what the kernels' may be."""

    def channel_means(x):
        rows = np.moveaxis(x, 1, 2).astype(np.float64)
        off = 104 * 2.0**-24 * (np.abs(rows).mean(axis=2) + np.abs(rows).max(axis=2))
        sign = np.random.default_rng(1).choice([-1, 1], off.shape)
        return (rows.mean(axis=2) + share * sign * off).astype(np.float32)

    return channel_means


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_other_roundings_are_told_from_mistakes(estimator, monkeypatch):
    """A mean within its bound changes bits that are in doubt alone; a limit of another tau, others."""
    case = SHARP.replace(
        estimator=estimator,
        lengths=((1000, 1000),),
        head_dim=128,
        dtype="float16",
        block=(64, 32),
        thresholds=(0.05, 0.1, 0.2, 0.4),
        distribution="clustered",
    )
    given, real = cases.make_arrays(case), reference.row_limits
    mistakes = {
        "means": kernel_means(0.9),
        "limits": lambda m, l, tau, plan, shift=None: real(m, l, np.asarray(tau) * np.float32(1.05), plan, shift),
    }
    stages = {}
    for what, name in (("means", "channel_means"), ("limits", "row_limits")):
        with monkeypatch.context() as patch:
            patch.setattr(reference, name, mistakes[what])
            answers, _ = calls.make_calls(case, given, False)
        stages[what] = {check.stage for check in checking.check_answers(case, answers, None, True).failed}
    assert stages == {"means": set(), "limits": {"mask"}}


def test_decisions_agree_with_block_scores():
    """Another way to the same numbers: the twin's block scores less ln(tau) lie between low and high."""
    import salekit
    from salekit.anchors import anchor_statistics
    from salekit.fuzz.decisions import Decisions

    case = SHARP.replace(lengths=((400, 450),), thresholds=(0.1,))
    answer = answer_of(case)
    for estimator in ESTIMATORS:
        plan = answer.plan.replace(estimator=estimator)
        quantized = reference.quantize(answer.q, answer.k, plan)
        m, l = anchor_statistics(answer.q, answer.k, quantized.k_mean, plan)
        scores = salekit.block_scores(quantized, m, l, plan).astype(np.float64) - math.log(0.1)
        decisions = Decisions(answer.q, answer.k, plan, np.full(4, 0.1))
        for head, block in ((0, 0), (1, 2), (3, 3)):
            low, own, high = decisions.of_block(0, head, block)
            some = np.isfinite(scores[0, head, block])
            assert some.any() or block == 0
            assert (np.isposinf(low) == np.isposinf(scores[0, head, block]))[~some].all()
            for x in (own, scores[0, head, block]):
                assert ((low <= x) & (x <= high))[some].all()
            if some.any():  # a code of the best pair may be on a tie, an int4 correction may be
                assert np.median(high[some] - low[some]) < 0.02


# --- shrinking, files, replay --------------------------------------------------------------------------------------
def lose_a_key(monkeypatch):
    """Attention that does not see key 70 when there are 100 keys or more, in heads with a group."""
    real = reference.attend

    def attend(q, k, v, mask, plan, sink_logits=None):
        if plan.seqlen_k >= 100 and plan.group_size > 1:
            k = k.copy()
            k[:, 70] = 0
        return real(q, k, v, mask, plan, sink_logits)

    monkeypatch.setattr(reference, "attend", attend)


@pytest.fixture(autouse=True)
def nothing_written(monkeypatch):
    monkeypatch.setattr(running, "_written", Counter())


@pytest.fixture
def failing(tmp_path, monkeypatch):
    """A file of a case that failed because of a planted mistake, and the result."""
    with monkeypatch.context() as patch:
        lose_a_key(patch)
        result = next(
            result
            for result in (running.run_case(11, index, False, str(tmp_path)) for index in range(40))
            if result.failed and result.case.kind == "call"
        )
    return result


def test_a_failing_case_shrinks_and_is_replayed(failing, monkeypatch):
    small = failing.shrunk
    assert (
        small.lengths[0][1] in range(100, 140) and small.num_heads <= 3 and small.num_kv_heads == 1 and small.batch == 1
    )
    assert small.pairs < failing.case.pairs and small.head_dim == 64 and small.layout == "bshd" and not small.spots
    arguments = ["validate", "--input", failing.file, "--backend", "numpy"]
    good = CliRunner().invoke(cli, arguments)
    assert good.exit_code == 0, good.output
    assert "all verdicts ok" in good.output and "a fuzz case" in good.output
    lose_a_key(monkeypatch)
    bad = CliRunner().invoke(cli, [*arguments, "--json"])
    assert bad.exit_code == 5
    report = json_of(bad)
    assert not report["passed"] and Case.from_json(report["case"]) == small
    assert any(not check["passed"] and check["stage"] == "attend" for check in report["checks"])


def test_nan_is_replayed(tmp_path):
    case = SHARP.replace(lengths=((70, 70),), spots=(Spot("k", "nan", 0, 3, 0, 0), Spot("v", "inf", 0, 9, 0, 1)))
    cases.save(tmp_path / "case.npz", case, cases.make_arrays(case), "")
    result = CliRunner().invoke(cli, ["validate", "--input", str(tmp_path / "case.npz"), "--backend", "numpy"])
    assert result.exit_code == 0, result.output
    loaded, arrays, _ = cases.load(tmp_path / "case.npz")
    assert loaded == case and np.isnan(arrays["k"][0][0, 3, 0, 0]) and arrays["k"][0].dtype == ml_dtypes.bfloat16
    refused = CliRunner().invoke(cli, ["validate", "--input", str(tmp_path / "case.npz"), "--seqlen", "32"])
    assert refused.exit_code == 2 and "--seqlen" in refused.output


def test_a_case_that_is_refused_fails(tmp_path):
    """The fuzzer draws what has to work: a refusal is what it looks for."""
    case = SHARP.replace(lengths=((70, 70),), thresholds=(-1.0,))
    cases.save(tmp_path / "case.npz", case, cases.make_arrays(case), "")
    result = CliRunner().invoke(cli, ["validate", "--input", str(tmp_path / "case.npz"), "--backend", "numpy"])
    assert result.exit_code == 5 and "runs (ArgumentError: thresholds: got -1;" in " ".join(result.output.split())


def edited(path, edit_meta=None, **entries):
    with np.load(path) as file:
        content = {name: file[name] for name in file.files}
    if edit_meta:
        meta = json.loads(str(content["__meta__"]))
        edit_meta(meta)
        content["__meta__"] = np.array(json.dumps(meta))
    content.update(entries)
    np.savez(path, **{name: x for name, x in content.items() if x is not None})


@pytest.mark.parametrize(
    "edit, entries, words",
    (
        (lambda meta: meta["case"].pop("kind"), {}, "kind: missing"),
        (lambda meta: meta["case"].update(colour=3), {}, "colour: not known"),
        (lambda meta: meta["case"].update(schema=9), {}, "schema 9"),
        (lambda meta: meta.update(case=[1]), {}, "schema"),
        (lambda meta: meta["case"].update(block=[64, 33]), {}, "block: got"),
        (lambda meta: meta["case"].update(batch=-1), {}, "batch: got"),
        (lambda meta: meta["case"].update(batch=True), {}, "batch: got"),
        (lambda meta: meta["case"].update(causal=1), {}, "causal: got"),
        (lambda meta: meta["case"].update(thresholds=0.5), {}, "thresholds: got"),
        (lambda meta: meta["case"].update(thresholds=["nan"]), {}, "thresholds: got"),
        (lambda meta: meta["case"].update(thresholds=[10**400]), {}, "thresholds: got"),
        (lambda meta: meta["case"].update(softmax_scale=-(10**400)), {}, "softmax_scale: got"),
        (lambda meta: meta["case"].update(thresholds=[1, 2]), {}, "thresholds: wants one, or one a head"),
        (lambda meta: meta["case"].update(num_kv_heads=3), {}, "num_heads"),
        (lambda meta: meta["case"].update(lengths=[[1, 2, 3]]), {}, "lengths: got"),
        (lambda meta: meta["case"].update(lengths=[]), {}, "lengths: wants"),
        (lambda meta: meta["case"].update(lengths=[[70, 71]]), {}, "k0: got uint16"),
        (lambda meta: meta["case"].update(spots=[["x", "nan", 0, 0, 0, 0]]), {}, "spots: got"),
        (lambda meta: meta["case"].update(cuts=[5, 3]), {}, "cuts"),
        (None, {"v0": None}, "v0: got none"),
        (None, {"k0": np.zeros((1, 70, 2, 64), np.float16)}, "k0: got float16"),
    ),
)
def test_malformed_files_are_refused(edit, entries, words, tmp_path):
    case, path = SHARP.replace(lengths=((70, 70),)), tmp_path / "case.npz"
    cases.save(path, case, cases.make_arrays(case), "")
    edited(path, edit, **entries)
    with pytest.raises(FileFormatError, match="case.npz") as error:
        cases.load(path)
    assert words in str(error.value)


def test_other_files_are_no_cases(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"PK\x03\x04 nothing")
    np.savez(tmp_path / "b.npz", __meta__=np.array("[1, 2]"))
    for name in ("a.npz", "b.npz", "absent.npz"):
        assert not cases.is_case_file(tmp_path / name)
        with pytest.raises(FileFormatError, match=name):
            cases.load(tmp_path / name)


def test_shrinking_ends():
    case = cases.draw(0, 17)
    tries = []

    def fails(smaller):
        tries.append(smaller)
        return smaller.num_heads >= 2 or smaller.lengths[0][1] > 40

    small = shrinking.shrink(case.replace(num_heads=6, num_kv_heads=2), fails)
    assert (small.num_heads >= 2) != (small.lengths[0][1] > 40) and len(tries) <= shrinking.MOST_TRIES
    assert shrinking.shrink(case, lambda smaller: False) == case


# --- many cases ----------------------------------------------------------------------------------------------------
def test_the_command(tmp_path, monkeypatch):
    runner = CliRunner()
    good = runner.invoke(cli, ["fuzz", "--cases", "4", "--seed", "6", "--backend", "numpy", "-o", str(tmp_path / "x")])
    assert good.exit_code == 0, good.output
    assert "seed 6" in good.output and "all cases ok" in good.output and not (tmp_path / "x").exists()
    lose_a_key(monkeypatch)
    monkeypatch.setattr(running, "SHRINK_SECONDS", 0.0)
    bad = runner.invoke(
        cli, ["fuzz", "--cases", "6", "--seed", "11", "--backend", "numpy", "-o", str(tmp_path), "--json"]
    )
    report = json_of(bad)
    assert bad.exit_code == 5 and not report["passed"] and report["cases"] == 6 and report["seed"] == 11
    assert report["failures"] == len(report["failed_cases"]) >= 1
    for case in report["failed_cases"]:
        assert cases.load(case["file"])[0].kind and case["checks"] and case["shrunk"]
    assert sum(counts["cases"] for counts in report["groups"]["kind"].values()) == 6
    monkeypatch.setattr(running, "MOST_WRITTEN", 0)
    arguments = ["fuzz", "--cases", "5", "--seed", "11", "--backend", "numpy", "-o", str(tmp_path / "none")]
    more = runner.invoke(cli, arguments)
    assert more.exit_code == 5 and "not written" in more.output and not (tmp_path / "none").exists()
    assert runner.invoke(cli, ["fuzz", "--cases", "3", "--minutes", "1"]).exit_code == 2


@pytest.mark.parametrize("workers", [1, 2])
def test_failures_that_cannot_be_written_are_reported(tmp_path, monkeypatch, workers):
    """A full disk: the run goes on, and what was drawn is in the report; of a case that ends its process, too."""
    real = running.check_case

    def check_case(case, on_gpu, given=None):
        if case == dies:
            raise RuntimeError("the GPU is lost")
        return real(case, on_gpu, given)

    def full(path, *_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    lose_a_key(monkeypatch)
    dies = cases.draw(11, 5)
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: fork)
    monkeypatch.setattr(running, "check_case", check_case)
    monkeypatch.setattr(running, "save", full)
    monkeypatch.setattr(running, "SHRINK_SECONDS", 0.0)
    arguments = f"fuzz --cases 6 --seed 11 --backend numpy --workers {workers} -o {tmp_path}".split()
    as_json = CliRunner().invoke(cli, [*arguments, "--json"])
    report = json_of(as_json)
    assert as_json.exit_code == 2 and report["cases"] == 6 and not list(tmp_path.iterdir())
    failed = {case["case"]: case for case in report["failed_cases"]}
    assert len(failed) >= 2 and "the GPU is lost" in failed[5]["checks"][0]["compared"]
    for index, case in failed.items():
        assert case["file"] is None and case["drawn"] == cases.draw(11, index).describe() and case["shrunk"]
        assert case["not_written"] == f"{tmp_path}/fuzz-11-{index}.npz: No space left on device"
    running._written.clear()
    text = CliRunner().invoke(cli, arguments)
    assert text.exit_code == 2 and text.output.count("could not be written") == len(failed), text.output


def test_a_soak_ends_in_time():
    result = CliRunner().invoke(cli, ["fuzz", "--minutes", "0.02", "--seed", "1", "--backend", "numpy", "--json"])
    report = json_of(result)
    assert result.exit_code == 0 and report["cases"] >= 1 and report["minutes"] == 0.02 and report["memory"] is None


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_what_was_checked_is_reported_when_it_is_ended(tmp_path, ending, workers):
    code = "from salekit.cli import fuzz, main; fuzz.PROGRESS_SECONDS = 0; main.main()"
    arguments = ["fuzz", "--minutes", "10", "--backend", "numpy", "--seed", "3", "--workers", str(workers), "--json"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], **pipes)
    try:
        for line in process.stderr:
            if " 2 cases" in line:
                process.send_signal(ending)
                break
        out, problems = process.communicate(timeout=60)
    finally:
        process.kill()
    report = json.loads(out)
    assert process.returncode == 130 and report["interrupted"] and report["passed"] and report["cases"] >= 2, problems
    assert "Traceback" not in problems


def test_processes_give_the_same_results_and_may_die(monkeypatch, tmp_path):
    real = running.run_case

    def run_case(seed, index, *arguments):
        if index == 2:
            os._exit(7)
        if index == 3:
            raise RuntimeError("the GPU is lost")
        return real(seed, index, *arguments)

    def draw(seed, index, long=False):
        return SHARP.replace(seed=100 * seed + index, lengths=((100, 100),))

    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(running, "draw", draw)
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: fork)
    monkeypatch.setattr(running, "run_case", run_case)
    report = running.run_many(9, on_gpu=False, cases=6, workers=2, folder=str(tmp_path))
    assert report.cases == 6
    lost = {result.index: result.failed[0].compared for result in report.failures}
    assert set(lost) == {2, 3} and "code 7" in lost[2] and "the GPU is lost" in lost[3]
    assert all(cases.load(result.file)[0] == draw(9, result.index) for result in report.failures)
    monkeypatch.setattr(running, "run_case", real)
    alone = running.run_many(9, on_gpu=False, cases=2).to_json()
    shared = running.run_many(9, on_gpu=False, cases=2, workers=2).to_json()
    assert {key: x for key, x in alone.items() if key != "seconds"} == {
        key: x for key, x in shared.items() if key != "seconds"
    }


@pytest.mark.parametrize("seconds, want", [(900.0, 120), (30.0, 11), (0.0, 1), (-50.0, 1)])
def test_memory_passes_end_in_time(monkeypatch, seconds, want):
    """Each case takes a second in the first pass, which decides how many the others take."""
    from types import SimpleNamespace

    from salekit import arrays

    clock, made, free = itertools.count(), [], iter((70, 60, 60))
    runtime = SimpleNamespace(memGetInfo=lambda: (next(free), 100))
    cuda = SimpleNamespace(runtime=runtime, Device=lambda: SimpleNamespace(synchronize=lambda: None))
    pool = SimpleNamespace(used_bytes=lambda: 0, free_all_blocks=lambda: None)
    monkeypatch.setattr(arrays, "import_cupy", lambda: SimpleNamespace(cuda=cuda, get_default_memory_pool=lambda: pool))
    monkeypatch.setattr(running, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    lengths = [((5000, 5000),)] * 2 + [((100, 100),)] * 200
    monkeypatch.setattr(running, "draw", lambda seed, index: SHARP.replace(seed=index, lengths=lengths[index]))
    monkeypatch.setattr(running.calls, "make_calls", lambda case, given, on_gpu: made.append(case.seed))
    assert running.memory_passes(1, seconds) == (want, [30, 40, 40])
    assert made == 3 * list(range(2, 2 + want))  # the first two are too large


def test_memory_verdicts():
    from salekit.cli.fuzz import memory_verdict

    assert memory_verdict([], 0, []) is None
    for live, used in (([0, 0], [100, 120, 120]), ([0], [100, 120, 119]), ([0], [])):
        assert memory_verdict(live, 9, used)["passed"]
    for live, used in (([0, 5], [100, 120, 120]), ([0], [100, 120, 122]), ([5], [])):
        assert not memory_verdict(live, 9, used)["passed"]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_failure_that_is_being_shrunk_is_reported(tmp_path, workers):
    """Ended meanwhile, in this process or in another, the report has it, as it was drawn."""
    (tmp_path / "slow.py").write_text(
        "import time\n"
        "from salekit.fuzz import checking, running\n"
        "from salekit.fuzz.checking import Outcome\n"
        "from salekit.checks import Check\n"
        "running.check_case = lambda *_: Outcome([Check('call', 'made up', 1.0, 0.0, False)])\n"
        "def shrink(*_):\n"
        "    print('shrinking', flush=True)\n"
        "    time.sleep(60)\n"
        "running.shrink = shrink\n"
    )
    arguments = ["fuzz", "--cases", "9", "--backend", "numpy", "--workers", str(workers), "-o", str(tmp_path), "--json"]
    program = tmp_path / "program.py"
    program.write_text("import slow\nfrom salekit.cli import main\nif __name__ == '__main__':\n    main.main()\n")
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen([sys.executable, str(program), *arguments], **pipes)
    try:
        for _ in range(workers):
            assert process.stdout.readline() == "shrinking\n"
        process.send_signal(signal.SIGTERM)
        out, problems = process.communicate(timeout=60)
    finally:
        process.kill()
    report = json.loads(out)
    assert process.returncode == 130 and report["interrupted"] and not report["passed"], problems
    assert report["failures"] == workers and all(case["file"] is None for case in report["failed_cases"])


def test_rows_are_sampled():
    plan = Plan(1, 1000, 1000, 1, 1, 64, "float16", 0.125)
    rows = [checking.sampled(plan, 16, block) for block in range(plan.num_q_blocks)]
    assert len(np.concatenate(rows)) == 16 and rows[0][0] == 0 and rows[-1][-1] == 999
    assert checking.sampled(plan, 0, 3) is None
    case = SHARP.replace(sampled_rows=5)
    answer = answer_of(case)
    out = answer.out.copy()
    out[0, 0] += 1
    assert "out" in failed(case, dataclasses.replace(answer, out=out, again=out), False)
    assert oracle.seen_range(plan, np.array([0, 999]))[1].tolist() == [1, 1000]
