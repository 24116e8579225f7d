"""Cases that ``salekit fuzz`` found to fail once, as it shrank them, each with what was wrong."""

import pytest

pytestmark = pytest.mark.gpu
pytest.importorskip("cupy")

from salekit.fuzz.cases import Case, Spot
from salekit.fuzz.checking import check_case

ONE = ((1, 1),)
FOUND = {
    # A group of 128 keys with an infinite one: 0 times it was the key of pools that nothing is in.
    "pool beside an infinite key": Case(
        seed=64417229987919, lengths=ONE, skipped="pool", spots=(Spot("k", "inf", 1028829, 212387, 1042462, 212365),)
    ),
    "pool beside a NaN key": Case(
        seed=78264230432903, lengths=((2, 3),), skipped="pool",
        spots=(Spot("k", "nan", 211147, 447560, 156214, 347205),)
    ),
    # An infinite row of q times the key 0 of a pool that nothing is in.
    "infinite query and an empty pool": Case(
        seed=90962189398769, lengths=ONE, skipped="pool", spots=(Spot("q", "inf", 117043, 290907, 259005, 6127),)
    ),
    # A call without query rows looked at sink logits that are on the GPU.
    "no rows, sinks on the GPU": Case(seed=236153473019032, lengths=((0, 1),), on_device=True, sink_logits=(3.5,)),
    "nothing, sinks on the GPU": Case(seed=213288004942196, lengths=((0, 0),), on_device=True, sink_logits=(-0.03,)),
    # Codes of nothing but 0 had scale 1, and a rounding of 1.5 * 2^23 times the other side's scale.
    "low-bit rows of zeros": Case(
        seed=87968548820641, lengths=ONE, softmax_scale=0.25, attend="int8-fp8", zero_rows=True
    ),
    "low-bit keys that are their mean": Case(
        seed=120851497294193, lengths=ONE, attend="int8-fp8", scales=(60000.0, 1.0, 1.0)
    ),
    # exp(score - maximum) beyond the largest float: the maximum, scaled, is rounded by more than 2^7 from 2^31 on.
    "scores of 1e10": Case(seed=72092453761258, lengths=((9, 1),), scales=(60000.0, 1000.0, 1.0), outliers=4),
    "scores of 1e9": Case(seed=9360635741878, lengths=((201, 71),), scales=(1000.0, 1000.0, 1.0), outliers=1),
}


@pytest.mark.parametrize("name", FOUND)
def test_case(name):
    assert not check_case(FOUND[name], on_gpu=True).failed
