"""Ways to choose blocks on CuPy arrays against NumPy ones, and salekit compare on a GPU."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from salekit.cli.main import cli

from salekit import arrays, call_checks, selectors

pytestmark = pytest.mark.gpu


def make(seqlen, head_dim=64, seed=0):
    rng = np.random.default_rng(seed)
    return [
        rng.standard_normal((1, seqlen, heads, head_dim), dtype=np.float32).astype(arrays.BFLOAT16)
        for heads in (4, 2, 2)
    ]


@pytest.mark.parametrize("name", selectors.SELECTORS)
@pytest.mark.parametrize("seqlen, block", ((777, (128, 32)), (1030, (64, 64))))
def test_levels_are_those_of_numpy(name, seqlen, block):
    import cupy

    q, k, _ = make(seqlen)
    on_host, on_gpu = (q, k), tuple(cupy.asarray(x) for x in (q, k))
    plans = (call_checks.make_plan(*qk, qk[1], block=block, dense_below=0) for qk in (on_host, on_gpu))
    want, got = (
        selectors.levels_of(selectors.SELECTORS[name], *qk, plan) for qk, plan in zip((on_host, on_gpu), plans)
    )
    got = got.get()
    # float32 sums in another order may put a block, or what a budget cuts off, on the other side.
    same = np.isclose(got, want, rtol=1e-3, atol=1e-3) | (got == want)
    assert same.mean() >= 0.99


@pytest.mark.parametrize("skipped", ("drop", "pool"))
def test_compare_on_the_gpu(skipped):
    arguments = ["compare", "--sample", "--densities", "0.2", "--json", "--skipped", skipped, "--backend"]
    results = []
    for backend in ("cuda", "numpy"):
        result = CliRunner().invoke(cli, [*arguments, backend, "--methods", "exact,int8,int8-sp24/4,xattention-16"])
        assert result.exit_code == 0, (result.output, result.exception)
        results.append(json.loads(result.stdout)["methods"])
    for name, of_gpu in results[0].items():
        (on_gpu,), (on_host,) = of_gpu["points"], results[1][name]["points"]
        for value in ("recall", "relative_error", "density"):
            assert np.allclose(on_gpu["heads"][value], on_host["heads"][value], rtol=0.02, atol=1e-3), (name, value)
