"""The fuzzer on the GPU: 150 cases of a fixed seed, of few kinds of kernels. ``salekit fuzz`` runs them all."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from salekit.fuzz import cases, checking

pytestmark = pytest.mark.gpu

SEED, CASES, PARTS = 20261126, 150, 5
MOST_PAIRS = 800_000


def some_cases():
    """Cases that few kernels serve, so that it is not compilation that takes the time."""
    for index in itertools.count():
        case = cases.draw(SEED, index)
        case = case.replace(head_dim=128, dtype="bfloat16", softcap=0.0, window_size=(), sink_logits=())
        if case.pairs <= MOST_PAIRS:
            yield index, case


@pytest.mark.parametrize("part", range(PARTS))
def test_cases(part):
    in_doubt = 0
    for index, case in itertools.islice(some_cases(), part, CASES, PARTS):
        outcome = checking.check_case(case, True)
        assert not outcome.failed, (index, case.describe(), outcome.failed)
        in_doubt += outcome.in_doubt
    assert in_doubt <= 20  # of some thousand blocks: roundings seldom decide


def test_a_wrong_answer_is_found(monkeypatch):
    """The checks on the GPU compare something: another key, another bit, a lost value."""
    import dataclasses

    from salekit.fuzz import calls

    case = cases.Case(
        seed=5, lengths=((300, 333),), num_heads=4, num_kv_heads=2, head_dim=128, dtype="bfloat16", thresholds=(0.05,)
    )
    (answer,), _ = calls.make_calls(case, cases.make_arrays(case), True)
    assert not checking.check_answers(case, [answer], None, True).failed
    lse = answer.lse + np.float32(1e-3)
    out = np.roll(answer.out, 1, axis=1)
    words = answer.mask.words.copy()
    words[0, 1, 2, 0] ^= 0xE
    for changes, name in (
        (dict(lse=lse), "lse"),
        (dict(out=out, again=out), "out"),
        (dict(mask=dataclasses.replace(answer.mask, words=words)), "bits"),
    ):
        failed = checking.check_answers(case, [dataclasses.replace(answer, **changes)], None, True).failed
        assert name in {check.compared.split()[0] for check in failed}
