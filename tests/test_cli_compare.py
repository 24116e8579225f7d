"""salekit compare: tables, JSON and plots, and what it says of bad input."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest
from safetensors.numpy import save_file
from salekit.cli import plots
from test_cli import salekit as run

from salekit import frontier, make_plan
from salekit.selectors import SELECTORS

FEW = ("--methods", "oracle-mass,int8,sink-local,blasst", "--densities", "0.6,0.8", "--backend", "numpy")
needs_matplotlib = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is missing")


def tensors(seqlen, seed, prefix=""):
    rng = np.random.default_rng(seed)
    return {
        prefix + name: (scale * rng.standard_normal((1, seqlen, heads, 64))).astype(np.float16)
        for name, heads, scale in (("q", 4, 2.0), ("k", 2, 1), ("v", 2, 1))
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dumps")
    np.savez(folder / "one.npz", **tensors(400, 0))
    save_file(tensors(256, 1, "layers.3.") | tensors(256, 2, "layers.12."), folder / "many.safetensors")
    (folder / "bad.npz").write_bytes(b"PK\x03\x04 cut")
    return folder


def compare(*args, code=0, **environment):
    result = run("compare", *args, **{"NO_COLOR": "1", "OPENBLAS_NUM_THREADS": "1", **environment})
    assert result.returncode == code and "Traceback" not in result.stderr, result.stderr
    return result


def test_json_says_what_the_api_measures(folder):
    heads = ("--head", 3, "--head", 0)
    result = json.loads(compare(folder / "one.npz", *FEW, *heads, "--json").stdout)
    assert result["kind"] == "salekit-comparison" and result["heads"] == [3, 0] and result["block"] == [128, 32]
    data = tensors(400, 0)
    q, k, v = data["q"][:, :, [3, 0]], data["k"][:, :, [1, 0]], data["v"][:, :, [1, 0]]
    plan = make_plan(q, k, v, estimator="int8", dense_below=0)
    comparison = frontier.Comparison(q, k, v, plan)
    assert list(result["methods"]) == ["oracle-mass", "int8", "sink-local", "blasst"]
    for name, of in result["methods"].items():
        points, sparsest = comparison.points(SELECTORS[name], [0.6, 0.8])
        assert of["sparsest"] == sparsest.tolist() and of["checked_against"] == SELECTORS[name].checked_against
        assert [point["wanted"] for point in of["points"]] == [0.6, 0.8]
        for got, want in zip(of["points"], points):
            for value in ("density", "recall", "relative_error", "knob"):
                # The command's process has one BLAS thread, this one more: float32 sums in another order.
                np.testing.assert_allclose(np.array(got["heads"][value], float), getattr(want, value), rtol=1e-5)
            assert got["work"] == SELECTORS[name].work(plan, got["wanted"])
    recalls = [point["mean"]["recall"] for point in result["methods"]["oracle-mass"]["points"]]
    assert 0.5 < recalls[0] < recalls[1] < 1


def test_pools(folder):
    """Masks, recall and cost are the same; errors are with pools, and work has what they multiply."""
    plain, pooled = (
        json.loads(compare(folder / "one.npz", *FEW, "--json", *more).stdout) for more in ((), ("--skipped", "pool"))
    )
    assert (plain["skipped"], plain["pools"], pooled["skipped"]) == ("drop", None, "pool")
    # 400 causal rows and keys: blocks of 128, 128, 128 and 16 rows, whose first rows see 1, 129, 257 and 385 keys.
    pairs = 400 * 401 / 2
    cost = 3 * (1 + 129 + 257 + 385) / pairs + 2 * (128 * 1 + 128 * 2 + 128 * 3 + 16 * 4) / pairs
    assert pooled["pools"]["cost"] == pytest.approx(cost)
    assert sum(product["operations"] for product in pooled["pools"]["products"]) == pytest.approx(cost)
    measured = 0
    for name, of in pooled["methods"].items():
        other = plain["methods"][name]
        assert (of["cost"], of["sparsest"]) == (other["cost"], other["sparsest"])
        for got, dropped in zip(of["points"], other["points"]):
            for value in ("density", "recall", "knob"):
                assert got["heads"][value] == dropped["heads"][value], name
            assert got["work"] == pytest.approx(dropped["work"] + cost / 2)
            error = dropped["mean"]["relative_error"]
            assert (got["mean"]["relative_error"] is None) == (error is None)  # no mask of the method is as sparse
            measured += error is not None
            assert error is None or got["mean"]["relative_error"] < error
    assert measured >= 4
    words = " ".join(compare(folder / "one.npz", *FEW, "--skipped", "pool", "--per-head").stdout.split())
    assert f"errors with pools of what is skipped, which cost every method {cost:.3f} more" in words
    assert "relative error, skipped blocks pooled, mean of the heads" in words
    assert "relative error, skipped blocks pooled, head 0" in words and "recall, mean of the heads" in words


def test_tables_and_the_terminal_plot(folder):
    result = compare(folder / "one.npz", *FEW, "--shared", "--anchors", "--per-head", COLUMNS="100")
    words = " ".join(result.stdout.split())
    for said in ("one setting for all heads, SALE's anchors kept by all", "recall, mean of the heads", "sparsest",
                 "relative error, head 3", "recall over density", "a oracle-mass b int8 c sink-local"):
        assert said in words
    assert "numpy" not in result.stderr.lower()


def test_sparsest_explains_what_is_missing(folder):
    """A density below it has no mask of the method: on the head where it is most, or, shared, by the mean."""
    def of_blasst(*more):
        rows = [line.split() for line in compare(folder / "one.npz", *few, *more).stdout.splitlines()]
        return [row[2:] for row in rows if row[:1] == ["blasst"] and len(row) == 5]

    few = ("--methods", "blasst", "--densities", "0.6,0.8", "--backend", "numpy")
    sparsest = json.loads(compare(folder / "one.npz", *few, "--json").stdout)["methods"]["blasst"]["sparsest"]
    assert max(sparsest) > min(sparsest)
    between = f"{(max(sparsest) + np.mean(sparsest)) / 2:.6f}"
    few = ("--methods", "blasst", "--densities", f"{between},1", "--backend", "numpy")
    recall, error, *each = of_blasst("--per-head")
    assert recall[:2] == error[:2] == [f"{max(sparsest):.3f}", "-"]
    assert [row[0] for row in each[::2]] == [f"{x:.3f}" for x in sparsest]
    assert [row[1] == "-" for row in each[::2]] == [x > float(between) for x in sparsest]
    shared = of_blasst("--shared")
    assert {row[0] for row in shared} == {f"{np.mean(sparsest):.3f}"} and "-" not in shared[0]
    assert "-: on some head no mask" in compare(folder / "one.npz", *few).stdout
    few = ("--methods", "blasst", "--densities", "0.001,1", "--backend", "numpy")
    assert "-: no mask" in compare(folder / "one.npz", *few, "--shared").stdout


def test_narrow_terminal(folder):
    result = compare(folder / "one.npz", *FEW, COLUMNS="20")
    assert "oracle-mass" in result.stdout and "recall over density" not in result.stdout


def test_layers(folder):
    many = folder / "many.safetensors"
    assert json.loads(compare(many, "--layer", 12, *FEW, "--json").stdout)["layer"] == "12"
    for args, said in (((), "holds layers 3, 12; --layer"), (("--layer", 4), "--layer 4: ")):
        result = compare(many, *args, *FEW, code=2)
        assert said in " ".join(result.stderr.split()) and result.stdout == ""


@pytest.mark.parametrize(
    "args, said",
    [
        ((), "give either FILE or --sample"),
        (("one.npz", "--sample"), "give either FILE or --sample"),
        (("missing.npz",), "does not exist"),
        (("one.npz", "--methods", "int8,int9"), "'int9' is not a method"),
        (("one.npz", "--densities", "0.1,2"), "list of densities"),
        (("one.npz", "--head", 4), "there are heads 0 to 3"),
        (("--sample", "--layer", 7), "the sample is layer 0"),
        (("one.npz", "--plot", "x.pdf"), "ends in .svg or .png"),
    ],
)
def test_usage(folder, args, said):
    args = [folder / arg if str(arg).endswith(".npz") else arg for arg in args]
    result = compare(*args, code=2)
    assert said in " ".join(result.stderr.split()) and result.stdout == ""


def test_failures(folder, tmp_path):
    assert compare(folder / "bad.npz", code=1).stderr.count("salekit: error: ") == 1
    from conftest import gpu_problem

    if gpu_problem():
        assert compare(folder / "one.npz", *FEW[:4], "--backend", "cuda", code=3).stderr.count("\n") == 1
    (tmp_path / "matplotlib.py").write_text("raise ImportError('no module named matplotlib')")
    result = compare(folder / "one.npz", *FEW, "--plot", tmp_path / "x.svg", code=1, PYTHONPATH=str(tmp_path))
    assert "pip install 'salekit[plot]'" in result.stderr and not (tmp_path / "x.svg").exists()


@needs_matplotlib
def test_plots(folder, tmp_path):
    svg = tmp_path / "x.svg"
    drawn = compare(folder / "one.npz", *FEW, "--plot", svg, "--json")
    assert "wrote" in drawn.stderr
    text = svg.read_text()
    assert text.startswith("<?xml") and all(word in text for word in ("sink-local", "relative error", "one.npz"))
    svg.write_text("mine")
    assert "--force" in compare(folder / "one.npz", *FEW, "--plot", svg, code=2).stderr and svg.read_text() == "mine"
    result = json.loads(drawn.stdout)
    plots.save(str(svg), result)
    assert svg.read_text() == text  # nothing in it but what was measured
    plots.save(str(tmp_path / "x.png"), result)
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"


def test_every_method_has_its_own_style():
    styles = [tuple(plots._style(name).items()) for name in SELECTORS]
    assert len(set(styles)) == len(styles) and all(style[0][1] for style in styles)
