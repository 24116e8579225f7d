"""Options at the edges of what Python has: numbers beyond a float, internal names, files that could not be read."""

from __future__ import annotations

import inspect
import json
import typing
import warnings
from fractions import Fraction
from itertools import product

import numpy as np
import pytest

import salekit
from salekit import options, xla_attention
from salekit.errors import ArgumentError, DtypeError
from salekit.thresholds import check_thresholds, host_thresholds

RNG = np.random.default_rng(0)
Q, K, V = (RNG.standard_normal((1, 256, heads, 64)).astype(np.float16) for heads in (2, 1, 1))
HUGE = 10**400
ABOUT = {"estimator": "int8", "block": [128, 32], "query_stride": 1, "skipped": "drop"}


# --- numbers that no float holds -----------------------------------------------------------------------------------
@pytest.mark.parametrize("value", [HUGE, -HUGE, Fraction(HUGE, 3), Fraction(10**5000)], ids=lambda x: type(x).__name__)
@pytest.mark.parametrize("name", ["thresholds", "softmax_scale", "softcap"])
def test_beyond_a_float(name, value):
    with pytest.raises(ArgumentError, match=f"^{name}: got .*; wants "):
        salekit.sparse_attention(Q, K, V, **{name: value})


@pytest.mark.parametrize("name", ["block", "causal", "estimator", "full_rows", "window_size"])
def test_a_number_without_a_repr(name):
    with pytest.raises(ArgumentError, match=f"^{name}: got int of too many digits; wants "):
        salekit.make_plan(Q, K, V, **{name: -(10**5000)})


def test_a_softcap_below_a_float_is_not_off():
    with pytest.raises(ArgumentError, match="^softcap: got Fraction"):
        salekit.make_plan(Q, K, V, softcap=Fraction(1, HUGE))
    assert salekit.make_plan(Q, K, V, softcap=Fraction(0)).softcap == 0


@pytest.mark.parametrize("beyond", [1e300, 3.4028235677973366e38, 10**39, [1e300, 1e39],
                                    np.full(2, 1e39), np.array(1e39), np.full(2, 10, np.longdouble) ** 39])
def test_thresholds_beyond_float32_are_infinite(beyond):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        given = dict(dense_below=0, local=0, return_mask=True)
        got, mask = salekit.sparse_attention(Q, K, V, thresholds=beyond, **given)
        want, of_inf = salekit.sparse_attention(Q, K, V, thresholds=np.inf, **given)
        assert np.isinf(check_thresholds(beyond, 2, Q)).all() and np.isinf(host_thresholds(beyond, 2)).all()
    assert got.tobytes() == want.tobytes() and (mask.words == of_inf.words).all() and mask.density().min() < 1


def test_thresholds_up_to_float32_stay():
    largest = float(np.finfo(np.float32).max)
    for value in (largest, 3.402823567797336e38, 0.3, Fraction(1, 4)):
        assert check_thresholds(value, 2, Q) == float(value) and type(check_thresholds(value, 2, Q)) is float
    assert check_thresholds([largest, 0.5], 2, Q).tolist() == [largest, 0.5]


def test_thresholds_in_lists():
    with pytest.raises(DtypeError, match="thresholds: got dtype object"):
        check_thresholds([HUGE, 0.5], 2, Q)
    with pytest.raises(ArgumentError, match="got -inf for head 1"):
        check_thresholds([0.5, -1e300], 2, Q)


def test_a_file_with_thresholds_beyond_float32(tmp_path):
    (tmp_path / "t.json").write_text("[1e39, 1e300, 0.5]")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert salekit.load_thresholds(tmp_path / "t.json").tolist() == [np.inf, np.inf, 0.5]


# --- names ---------------------------------------------------------------------------------------------------------
def test_only_options_are_names_of_options():
    options.check_names("plan", dict.fromkeys(options.OPTIONS))
    assert {"block", "window_size"} < options.OPTIONS and not options.OPTIONS & {"q", "k", "longest", "layout"}
    with pytest.raises(TypeError, match=r"^f\(\) got an unexpected keyword argument 'longest'$"):
        options.check_names("f", {"block": (64, 32), "longest": (10, 10)})


@pytest.mark.parametrize("name", ["longest", "blocks", "thresholds"])
@pytest.mark.parametrize("function", ["plan", "make_plan"])
def test_internal_and_unknown_names(function, name):
    with pytest.raises(TypeError, match=rf"^{function}\(\) got an unexpected keyword argument '{name}'$"):
        getattr(salekit, function)(Q, K, V, **{name: (10, 10)})


def test_the_options_are_those_of_the_calls():
    """What type checkers are told, and ``plan`` and ``salekit.jax`` take, is what the other calls have."""
    def of(function):
        parameters = inspect.signature(function).parameters.items()
        return {name: x.annotation for name, x in parameters if name in options.OPTIONS}

    def of_types(kind):
        return {name: x.__forward_arg__ for name, x in kind.__annotations__.items()}

    views = inspect.signature(options.plan_of_views).parameters
    assert options.OPTIONS == views.keys() - {"q", "k", "longest"} and options.DENSE_OPTIONS < options.OPTIONS
    assert of(salekit.sparse_attention) == of_types(options.Options) == of(salekit.sparse_attention_varlen)
    assert of(salekit.dense_attention) == of_types(options.DenseOptions)
    assert "options" in typing.get_type_hints(salekit.plan)


@pytest.mark.parametrize("given", [{"longest": [10, 10]}, {"out": None}, 5, None])
def test_a_config_has_options_alone(given):
    text = json.dumps({"thresholds": 0.5, "options": given})
    with pytest.raises(ArgumentError, match="config: got options"):
        xla_attention.Config.decode(text)


WINDOWS = [None, 90, np.int64(300), (70, 20), [np.int32(70), -1], (-1, 3), (255, 255), (254, 254), (10**30, 10**30)]


@pytest.mark.parametrize("causal, window", list(product([True, np.False_], WINDOWS)))
def test_checked_options_make_the_same_plan(causal, window):
    given = dict(causal=causal, window_size=window, softmax_scale=Fraction(1, 7), block=[np.int64(64), 32],
                 softcap=np.float32(0.3), query_stride=np.array(2), sink=10**30, local=np.uint8(7), dense_below=0,
                 estimator="auto", skipped="drop")
    plan = salekit.make_plan(Q, K, V, **given)
    plain = options.checked_options(given, plan)
    assert salekit.make_plan(Q, K, V, **plain) == plan and list(plain) == list(given) and plain["estimator"] == "auto"
    config = xla_attention.Config(0.5, options=plain)
    assert xla_attention.Config.decode(config.encode()) == config
    assert options.checked_options({}, plan) == {}
    assert options.checked_options({"softmax_scale": None}, plan) == {"softmax_scale": None}


# --- files of thresholds -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seqlen", [-5, 0, True, np.True_, float("nan"), 8192.0, "8192", 10**30, 2**30 + 1, (8192,)])
@pytest.mark.parametrize("content", [{"0": {1000: [0.5], 4000: [0.25]}}, {"0": {1000: [0.5]}}, None])
def test_a_seqlen_that_is_none(tmp_path, content, seqlen):
    path = tmp_path / "t.json"
    path.write_text("[0.5]") if content is None else salekit.save_thresholds(path, content, ABOUT)
    with pytest.raises(ArgumentError, match="^seqlen: got .*; wants an integer from 1 to 1073741824$"):
        salekit.load_thresholds(path, seqlen=seqlen)


def test_seqlens_that_are(tmp_path):
    salekit.save_thresholds(tmp_path / "t.json", {"0": {1000: [0.5], 4000: [0.25]}}, ABOUT)
    for seqlen in (np.int64(1000), np.array(1000, np.int32)):
        assert salekit.load_thresholds(tmp_path / "t.json", seqlen=seqlen) == 0.5
    assert salekit.load_thresholds(tmp_path / "t.json", seqlen=2**30) == pytest.approx(0.125)


def test_a_block_that_is_none(tmp_path):
    path = tmp_path / "t.json"
    salekit.save_thresholds(path, {"0": {1000: [0.5]}}, ABOUT)
    for block in (5, "ab", (128,), (128.0, 32), (1, 1)):
        with pytest.raises(ArgumentError, match="^block: got .*; wants one of"):
            salekit.load_thresholds(path, block=block)
    for block in ((128, 32), [128, 32], np.array([128, 32])):
        assert salekit.load_thresholds(path, block=block) == 0.5


@pytest.mark.parametrize("layers, error, match", [
    ({}, ArgumentError, "^layers: got {}; wants a dict"),
    ([], ArgumentError, "^layers: got .*; wants a dict"),
    ({"0": {}}, ArgumentError, "^layers: layer 0: got {}; wants a dict"),
    ({"0": [0.5]}, ArgumentError, "^layers: layer 0: got .*; wants a dict"),
    ({"0": {1000: [0.5, float("nan")]}}, ArgumentError, "^layers: layer 0 at 1000: thresholds: got nan for head 1"),
    ({"0": {1000: [-0.5]}}, ArgumentError, "layer 0 at 1000: thresholds: got -0.5 for head 0"),
    ({"0": {1000: []}}, ArgumentError, "layer 0 at 1000: got .*; wants numbers, one a head"),
    ({"0": {1000: 0.5}}, ArgumentError, "layer 0 at 1000: got 0.5; wants numbers, one a head"),
    ({"0": {1000: np.array(0.5)}}, ArgumentError, "layer 0 at 1000: got array.*; wants numbers, one a head"),
    ({"0": {1000: [[0.5]]}}, ArgumentError, r"layer 0 at 1000: thresholds: got shape \(1, 1\)"),
    ({"0": {1000: ["a"]}}, DtypeError, "layer 0 at 1000: thresholds: got dtype"),
    ({"0": {1000: "a"}}, DtypeError, "layer 0 at 1000: thresholds: got str"),
    ({"0": {1000: [0.5], 2000: [0.5, 0.25]}}, ArgumentError, "layer 0: got {1000: 1, 2000: 2} heads"),
    ({"0": {-5: [0.5]}}, ArgumentError, "layer 0: seqlen: got -5; wants an integer"),
    ({"0": {True: [0.5]}}, ArgumentError, "layer 0: seqlen: got True"),
    ({"0": {"1000": [0.5]}}, ArgumentError, "layer 0: seqlen: got '1000'"),
    ({"0": {10**30: [0.5]}}, ArgumentError, "layer 0: seqlen: got 1000"),
    ({3: {1000: [0.5]}, "3": {1000: [0.5]}}, ArgumentError, "got layer '3'; wants names, each of them once"),
    ({None: {1000: [0.5]}}, ArgumentError, "got layer None; wants names"),
])
def test_what_is_not_saved(tmp_path, layers, error, match):
    (tmp_path / "t.json").write_text("as it was")
    with pytest.raises(error, match=match):
        salekit.save_thresholds(tmp_path / "t.json", layers, ABOUT)
    assert [(x.name, x.read_text()) for x in tmp_path.iterdir()] == [("t.json", "as it was")]


@pytest.mark.parametrize("about, match", [
    ({"schema": 7}, "^about: got 'schema'; wants other names"),
    ({"kind": "x", "fits": {}, "layers": {}}, "^about: got 'fits', 'kind', 'layers'; wants"),
    (None, "^about: got None; wants a dict"),
    ({"x": object()}, "^about: cannot be written as JSON"),
    ({"x": {1: 2, "1": 3}}, "^about: cannot be written as JSON: .*'1' twice"),
    ({1: 2, "1": 3}, "^about: cannot be written as JSON: .*'1' twice"),
    ({"x": 10**5000}, "^about: cannot be written as JSON"),
])
def test_what_is_not_saved_with_them(tmp_path, about, match):
    with pytest.raises(ArgumentError, match=match):
        salekit.save_thresholds(tmp_path / "t.json", {"0": {1000: [0.5]}}, about)
    assert not list(tmp_path.iterdir())


def test_a_file_too_large_to_be_read(tmp_path, monkeypatch):
    monkeypatch.setattr("salekit.thresholds.MAX_JSON_BYTES", 1000)
    with pytest.raises(ArgumentError, match="^about: makes a file of .* bytes; wants at most 1000"):
        salekit.save_thresholds(tmp_path / "t.json", {"0": {1000: [0.5]}}, {"x": "y" * 1000})
    assert not list(tmp_path.iterdir())


def test_whatever_is_saved_is_read(tmp_path):
    """Whatever the numbers: a fit too steep for a file is none."""
    path, taus = tmp_path / "t.json", (0.0, 1e-300, 1e-45, 2.0**-20, 0.5, 2.0**12, 1e38, 1e300, np.inf)
    pairs = np.array(list(product(taus, taus)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for lengths in ((1, 2), (1000, 1001), (2**30 - 1, 2**30), (131_072, np.int64(1000))):
            found = dict(zip(lengths, pairs.T))
            salekit.save_thresholds(path, {3: found, "x": {1: [0.5]}, np.int64(4): {5: (1, 2)}}, ABOUT)
            for length in lengths:
                with np.errstate(over="ignore"):
                    want = found[length].astype(np.float32)
                assert np.array_equal(salekit.load_thresholds(path, layer=3, seqlen=length), want)
            for seqlen in (1, 1500, 2**30):
                got = salekit.load_thresholds(path, layer=3, seqlen=seqlen, block=(128, 32), estimator="int8")
                assert got.shape == (81,) and (got >= 0).all()
            assert salekit.load_thresholds(path, layer="x") == 0.5
            assert salekit.load_thresholds(path, layer=4).tolist() == [1, 2]


# --- merging -------------------------------------------------------------------------------------------------------
def test_packed_states_have_a_layout_that_exists():
    out, lse = np.ones((5, 2, 64), np.float16), np.zeros((2, 5), np.float32)
    for layout in ("junk", None, ["bshd"]):
        for states in ((out, lse), (out[None], lse[None])):
            with pytest.raises(ArgumentError, match="^layout: got .*; wants one of 'bshd', 'bhsd'"):
                salekit.merge_attention_states(*states, *states, layout=layout)
    assert salekit.merge_attention_states(out, lse, out, lse)[0].shape == out.shape


def test_return_lse_is_looked_at_before_anything_is_written():
    out, lse = np.ones((1, 5, 2, 64), np.float16), np.zeros((1, 2, 5), np.float32)
    for flag in ("no", 1, None, np.array([1, 0])):
        target = np.zeros_like(out)
        with pytest.raises(ArgumentError, match="^return_lse: got .*; wants True or False"):
            salekit.merge_attention_states(out, lse, out, lse, out=target, return_lse=flag)
        assert not target.any()
    assert salekit.merge_attention_states(out, lse, out, lse, return_lse=np.False_).shape == out.shape


def test_thresholds_know_their_query_stride(tmp_path):
    about = dict(estimator="int8", block=[128, 32], query_stride=2, skipped="drop")
    salekit.save_thresholds(tmp_path / "t.json", {"0": {1024: np.ones(2)}}, about)
    assert salekit.load_thresholds(tmp_path / "t.json", query_stride=2).tolist() == [1, 1]
    with pytest.raises(ArgumentError, match="query_stride: .* was calibrated with 2, not with 4"):
        salekit.load_thresholds(tmp_path / "t.json", query_stride=4)
