"""What is compared of a case: named checks, each with the error that came closest to its bound."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable

import numpy as np

from .. import reference
from ..block_mask import BlockMask
from ..checks import Check, equal, within
from ..plans import Plan
from . import calls
from .cases import Case, make_arrays
from .decisions import Decisions
from .oracle import Attention, with_pools

BLOCKS_ON_TWIN = 4  # query blocks of a head whose bits are decided in float64 when the twin is what is checked
CALLED = "runs"  # the check that a call raises nothing
TWO_CALLS = "output bits of two calls"


@dataclass(frozen=True)
class Outcome:
    """Of a case. in_doubt: blocks whose bit differs from the twin's and may, by roundings."""

    checks: list[Check]
    in_doubt: int = 0

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if not check.passed]


def check_case(case: Case, on_gpu: bool, given: dict[str, list[np.ndarray]] | None = None) -> Outcome:
    """Make the case's calls and compare. given: its arrays, when they are not those that the case draws."""
    case = calls.adapted(case, on_gpu)
    given = make_arrays(case) if given is None else given
    try:
        answers, packed = calls.make_calls(case, given, on_gpu)
    except Exception as error:  # whatever a call raises: no case is to raise anything
        if _is_lost(error):
            raise
        return Outcome([Check("call", f"{CALLED} ({type(error).__name__}: {str(error)[:300]})", 1.0, 0.0, False)])
    return check_answers(case, answers, packed, on_gpu)


def _is_lost(error: Exception) -> bool:
    """Whether the GPU cannot be used any more by this process."""
    text = str(error)
    return any(
        name in text
        for name in (
            "IllegalAddress",
            "illegal memory access",
            "LaunchFailure",
            "CUDA_ERROR_ILLEGAL",
            "unspecified launch failure",
            "IllegalInstruction",
            "MisalignedAddress",
        )
    )


def check_answers(case: Case, answers: list[calls.Answer], packed: calls.Packed | None, on_gpu: bool) -> Outcome:
    collected: dict[tuple[str, str], list] = {}
    in_doubt = 0

    def add(check: Check) -> None:
        collected.setdefault((check.stage, check.compared), []).append(check)

    add(Check("call", CALLED, 0.0, 0.0, True))
    for index, answer in enumerate(answers):
        in_doubt += _check_answer(case, answer, on_gpu, add)
        if packed is not None:
            _check_packed(case, index, answer, packed, on_gpu, add)
    if packed is not None:
        add(equal("call", TWO_CALLS, packed.again.view(np.uint16), packed.out.view(np.uint16)))
        add(equal("packed", "elements around out that were written", not packed.untouched, False))
    if case.kind == "chunked" and case.statistics and case.estimator != "int4":
        _check_chunks(case, answers, add)
    return Outcome([_worst(checks) for checks in collected.values()], in_doubt)


def ratio(check: Check) -> float:
    """Error in units of its bound; infinite for what fails without a bound."""
    if check.passed and check.error == 0:
        return 0.0
    if not check.error <= np.inf or check.bound <= 0:
        return np.inf
    return check.error / check.bound


def _worst(checks: list[Check]) -> Check:
    return max(checks, key=lambda check: (not check.passed, ratio(check)))


# --- one call ------------------------------------------------------------------------------------------------------
def thresholds_of(case: Case) -> np.ndarray:
    values = np.array(case.thresholds, np.float32)
    return np.broadcast_to(values, (case.num_heads,))


def sinks_of(case: Case) -> np.ndarray | None:
    return np.array(case.sink_logits, np.float32) if case.sink_logits else None


def _check_answer(case: Case, answer: calls.Answer, on_gpu: bool, add: Callable[[Check], None]) -> int:
    """Checks of a call on its own; how many bits are the other than the twin's, by roundings."""
    if answer.again is not None:
        add(equal("call", TWO_CALLS, answer.again.view(np.uint16), answer.out.view(np.uint16)))
    add(equal("call", "elements around out that were written", not answer.untouched, False))
    in_doubt = 0
    if answer.mask is not None:
        add(check_structure(answer.mask, answer.plan))
        plan = answer.plan
        if not plan.is_empty and not (plan.is_dense or is_zero(case)):
            wrong, in_doubt = check_mask(case, answer, on_gpu)
            for check in wrong:
                add(check)
        else:
            add(
                equal(
                    "mask",
                    "bits of a dense call with what is visible",
                    answer.mask.to_dense(),
                    np.broadcast_to(answer.mask.visible(), answer.mask.to_dense().shape),
                )
            )
    for check in check_attention(case, answer, on_gpu):
        add(check)
    return in_doubt


def is_zero(case: Case) -> bool:
    return len(case.thresholds) == 1 and case.thresholds[0] == 0 and not case.on_device


def check_structure(mask: BlockMask, plan: Plan) -> Check:
    """No bit outside the visible blocks, none past the last block; words of the shape that the plan says."""
    words = np.ascontiguousarray(mask.words)
    if words.shape != plan.words_shape:
        return Check("mask", f"shape of the words ({words.shape})", float("nan"), 0.0, False)
    bits = np.unpackbits(words.view(np.uint8), axis=-1, bitorder="little").reshape(
        *words.shape[:3], 32 * words.shape[3]
    )
    allowed = np.zeros(bits.shape[2:], bool)
    allowed[:, : mask.num_k_blocks] = mask.visible()
    return equal("mask", "bits outside the visible blocks", (bits.astype(bool) & ~allowed).sum(), 0)


def check_mask(case: Case, answer: calls.Answer, on_gpu: bool) -> tuple[list[Check], int]:
    """(checks, bits that differ from the twin's and may).

    On a GPU every bit is compared with the twin's, and a query block with a difference is decided in float64; on the
    twin, and of calls too long for it, some query blocks of each head are.
    """
    plan, got = answer.plan, answer.mask.to_dense()
    decisions = Decisions(answer.q, answer.k, plan, thresholds_of(case), sinks_of(case), answer.k_statistics, on_gpu)
    visible = np.broadcast_to(answer.mask.visible(), got.shape)
    has_twin = on_gpu and not case.sampled_rows  # which takes too long otherwise
    if has_twin:
        different = (got != twin_mask(case, answer)) & visible
        places = np.argwhere(different.any(axis=-1))
    else:
        different = np.zeros_like(got)
        blocks = np.unique(np.linspace(0, plan.num_q_blocks - 1, BLOCKS_ON_TWIN).round().astype(int))
        places = [(b, head, block) for b, head in np.ndindex(*got.shape[:2]) for block in blocks]
    worst, wrong = 0.0, 0
    for b, head, block in places:
        far, amount = beyond(*decisions.of_block(b, head, block), got[b, head, block], visible[b, head, block])
        worst, wrong = max(worst, far), wrong + amount
    same = [
        equal("mask", "bits that no rounding explains", wrong, 0),
        Check("mask", "distance of a differing score from its limit, in its roundings", worst, 1.0, worst <= 1),
    ]
    return same, int(different.sum()) - wrong if has_twin else 0


def beyond(low, own, high, bits, visible) -> tuple[float, int]:
    """Of the bits that are not float64's own: the largest distance from the limit, as a share of what roundings
    explain; and how many they do not."""
    with np.errstate(all="ignore"):
        wrong = np.where(bits, high <= 0, low > 0) & visible
        other = (bits != (own > 0)) & visible
        share = np.where(own > 0, own / (own - low), -own / (high - own))
    return float(np.nan_to_num(share[other], nan=0.0).max(initial=0.0)), int(wrong.sum())


def twin_mask(case: Case, answer: calls.Answer) -> np.ndarray:
    """bool [batch, heads, query blocks, key blocks]: what the twin selects of the same arrays."""
    from ..anchors import anchor_statistics, row_limits

    plan = answer.plan.replace(arch=None)
    quantized = reference.quantize(answer.q, answer.k, plan, answer.k_statistics)
    m, l, *shift = anchor_statistics(answer.q, answer.k, quantized.k_mean, plan, sinks_of(case))
    limits = row_limits(m, l, quantized, thresholds_of(case), plan, *shift)
    return reference.estimate(quantized, limits, plan).to_dense()


def sampled(plan: Plan, count: int, block: int) -> np.ndarray | None:
    """Rows of the query block among ``count`` evenly spaced ones, the first and the last among them; 0: None, all."""
    if not count or plan.seqlen_q <= count:
        return None
    rows = np.unique(np.linspace(0, plan.seqlen_q - 1, count).round().astype(np.int64))
    return rows[rows // plan.block_q == block]


def check_attention(
    case: Case,
    answer: calls.Answer,
    on_gpu: bool,
    out: np.ndarray | None = None,
    lse: np.ndarray | None = None,
    compared: str = "float64, same mask",
    skip: Any = None,
) -> list[Check]:
    """out and lse against float64 over the call's own mask. skip(b, head, block): query blocks to leave out."""
    plan = answer.plan
    out, lse = answer.out if out is None else out, answer.lse if lse is None else lse
    bits = None if answer.mask is None else answer.mask.to_dense()
    oracle = Attention(answer.q, answer.k, answer.v, plan, sinks_of(case), on_gpu)
    shape = (plan.batch, plan.seqlen_q, plan.num_heads, plan.head_dim)
    if out.shape != shape or lse.shape != (plan.batch, plan.num_heads, plan.seqlen_q) or lse.dtype != np.float32:
        return [Check("attend", f"shapes of out and lse ({out.shape}, {lse.shape})", float("nan"), 0.0, False)]
    if plan.is_empty:
        sinks = np.full(plan.num_heads, -np.inf) if sinks_of(case) is None else sinks_of(case)
        return [
            equal("attend", "out of a call without keys", out.astype(np.float32), np.zeros(shape)),
            equal("attend", "lse of a call without keys", lse, np.broadcast_to(sinks[:, None], lse.shape)),
        ]
    parts: dict[str, list] = {"out": [], "lse": []}
    bad = 0
    for b, head, block in np.ndindex(plan.batch, plan.num_heads, plan.num_q_blocks):
        rows = sampled(plan, case.sampled_rows, block)
        rows = oracle.rows_of(block) if rows is None else rows
        if rows.size == 0:
            continue
        of_block = None if bits is None else bits[b, head, block]
        want = oracle.expect(b, head, block, None if bits is None else bits[b, head], rows)
        if plan.skipped == "pool" and of_block is not None and not plan.is_dense:
            want = with_pools(want, oracle, b, head, block, of_block, rows)
        got, got_lse = out[b, rows, head].astype(np.float64), lse[b, head, rows].astype(np.float64)
        parts_of_block = _compare_rows(got, got_lse, want)
        if skip is not None and _fails(parts_of_block) and skip(b, head, block):
            continue
        bad += parts_of_block[2]
        parts["out"].append(parts_of_block[0])
        parts["lse"].append(parts_of_block[1])
    checks = [equal("attend", f"elements of out that are finite or not unlike {compared}", bad, 0)]
    for name, found in parts.items():
        if found:
            checks.append(_worst([within("attend", f"{name} with {compared}", *part) for part in found]))
    return checks


def _compare_rows(got, got_lse, want) -> tuple[tuple, tuple, int]:
    """((out, wanted, bound), (lse, wanted, bound), elements that are wrongly finite or not)."""
    finite = np.isfinite(got)
    bad = int((finite & want.must_be_bad).sum() + (~finite & ~want.may_be_bad).sum())
    compared = finite & ~want.may_be_bad | finite & ~want.must_be_bad
    with np.errstate(all="ignore"):
        of_out = tuple(np.where(compared, x, 0) for x in (got, want.out, want.out_bound))
    return of_out, (got_lse, want.lse, want.lse_bound), bad


def _fails(parts: tuple) -> bool:
    return parts[2] > 0 or not all(within("", "", *part).passed for part in parts[:2])


# --- several calls -------------------------------------------------------------------------------------------------
def _check_packed(
    case: Case, index: int, answer: calls.Answer, packed: calls.Packed, on_gpu: bool, add: Callable
) -> None:
    """A packed sequence next to its call alone: over the same mask but where a rounding may have chosen otherwise."""
    first, last = packed.first_rows[index : index + 2]
    out, lse = packed.out[None, first:last], packed.lse[None, :, first:last]
    if not on_gpu and not _dense_by_length_differs(case, answer):
        add(
            equal(
                "packed",
                "output bits with the sequence's own call",
                out.view(np.uint16),
                np.ascontiguousarray(answer.out).view(np.uint16),
            )
        )
    if _dense_by_length_differs(case, answer):  # the packed call is sparse where this sequence alone is dense
        return
    decisions = Decisions(answer.q, answer.k, answer.plan, thresholds_of(case), None, None, on_gpu)

    def in_doubt(b: int, head: int, block: int) -> bool:
        if answer.mask is None or answer.plan.is_dense:
            return False
        low, _, high = decisions.of_block(b, head, block)
        return bool(((low <= 0) & (high > 0) & answer.mask.visible()[block]).any())

    for check in check_attention(case, answer, on_gpu, out, lse, "float64, mask of the sequence alone", in_doubt):
        add(Check("packed", *(getattr(check, name) for name in ("compared", "error", "bound", "passed"))))


def _dense_by_length_differs(case: Case, answer: calls.Answer) -> bool:
    longest = max(keys for _, keys in case.lengths)
    return answer.plan.is_dense != (longest <= case.dense_below)


def _check_chunks(case: Case, answers: list[calls.Answer], add: Callable) -> None:
    """Bits of chunks that begin at a multiple of the mask's block are those of the one call."""
    *chunks, whole = answers
    bits, block_q = whole.mask.to_dense(), case.block[0]
    wrong = 0
    for chunk in chunks:
        first = chunk.rows.start
        if first % block_q or chunk.plan.is_dense or whole.plan.is_dense or chunk.mask is None:
            continue
        of_chunk = chunk.mask.to_dense()
        for block in range(chunk.plan.num_q_blocks):
            last = first + min((block + 1) * block_q, chunk.plan.seqlen_q)
            whole_block = (last - first) % block_q == 0 or last == whole.plan.seqlen_q
            tested_alike = case.query_stride == 1 or last <= whole.plan.seqlen_q - case.full_rows or chunk is chunks[-1]
            if whole_block and tested_alike:
                ours, theirs = of_chunk[:, :, block], bits[:, :, first // block_q + block]
                wrong += int((ours != theirs[..., : ours.shape[-1]]).sum() + theirs[..., ours.shape[-1] :].sum())
    add(equal("chunks", "mask bits with those of one call, from the same statistics", wrong, 0))
