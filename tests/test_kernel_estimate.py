"""The estimation kernels against their twin: the same codes, scales, corrections and limits give the same words."""

from __future__ import annotations

import numpy as np
import pytest

from salekit import jit, reference
from salekit.codes import Quantized, rows_to_sparse, rows_to_tiles
from salekit.estimate import estimate
from salekit.plans import NATIVE_INT4_ARCHS, SELECT_ALL, SELECT_NONE, Plan, ceil_div

pytestmark = pytest.mark.gpu

PATHS = [  # estimator, kernel, bits of a stored code
    pytest.param(("int8", "mma", 8), id="int8-mma"),
    pytest.param(("int8", "wgmma", 8), id="int8-wgmma"),
    pytest.param(("int8-sp24", "auto", 8), id="sp24-auto"),
    pytest.param(("int4", "mma", 4), id="int4-packed"),
    pytest.param(("int4", "mma", 8), id="int4-bytes"),
    pytest.param(("int4", "wgmma", 8), id="int4-wgmma"),
]
INT4_PATHS = [path for path in PATHS if path.values[0][0] == "int4"]


def make_plan(estimator, seqlen_q, seqlen_k, *, batch=1, heads=2, kv_heads=1, head_dim=128, **options) -> Plan:
    return Plan(
        batch=batch, seqlen_q=seqlen_q, seqlen_k=seqlen_k, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim,
        dtype="bfloat16", softmax_scale=head_dim**-0.5, estimator=estimator, dense_below=0, **options,
    )


def make_inputs(plan: Plan, seed: int = 0) -> tuple[Quantized, np.ndarray]:
    """Random full-range codes in rows, and limits that some of the blocks pass, with the special values."""
    rng = np.random.default_rng(seed)
    largest = 7 if plan.estimator == "int4" else 127
    q_shape = (plan.batch, plan.num_heads, plan.seqlen_q)
    k_shape = (plan.batch, plan.num_kv_heads, plan.seqlen_k)
    q_codes = rng.integers(-largest, largest + 1, (*q_shape, plan.head_dim)).astype(np.int8)
    k_codes = rng.integers(-largest, largest + 1, (*k_shape, plan.head_dim)).astype(np.int8)
    if plan.estimator == "int8-sp24":  # of every four at most two are not zero
        order = rng.permuted(np.broadcast_to(np.arange(4), (*q_codes.shape[:-1], plan.head_dim // 4, 4)), axis=-1)
        q_codes *= (order < 2).reshape(q_codes.shape)
    # The largest of the 64 * 32 scores of a block is near 3.4 standard deviations, and rows differ in their limit.
    deviation = float(largest * (largest + 1) / 3 * plan.head_dim**0.5)
    limits = rng.normal(4.0 * deviation, 0.3 * deviation, q_shape)
    special = rng.random(q_shape)
    special[:, -1] = np.where(special[:, -1] < 0.01, 0, 1)  # the last head alone has rows that select everything
    if plan.estimator != "int4":
        limits = np.floor(limits).astype(np.int32)
        limits[special == 0] = SELECT_ALL
        limits[(special > 0.2) & (special < 0.3)] = SELECT_NONE
        return Quantized(plan.estimator, 8, q_codes, k_codes, None, None, None), limits

    q_scale = rng.uniform(0.01, 0.02, (*q_shape[:2], 8 * ceil_div(plan.seqlen_q, 16))).astype(np.float32)
    k_scale = rng.uniform(0.01, 0.02, (*k_shape[:2], 4 * ceil_div(plan.seqlen_k, 32))).astype(np.float32)
    unit = 0.015**2
    correction = (rng.normal(0, deviation * unit, (*q_shape[:2], plan.seqlen_k))).astype(np.float32)
    # Scores with a correction spread by sqrt(2) more. Half-integer quotients, ties, come from equal scales.
    q_scale[:, 0, :8] = k_scale[:, 0, :4] = 0.015625
    correction[:, 0, :32] = np.round(correction[:, 0, :32] * 8192) / 8192
    y = (limits * np.sqrt(2) * unit * plan.softmax_scale).astype(np.float32)
    y[special == 0] = -np.inf
    y[(special > 0.2) & (special < 0.3)] = np.inf
    return Quantized("int4", 8, q_codes, k_codes, q_scale, k_scale, None, None, correction), y


def poison_odd_groups(quantized: Quantized, limits: np.ndarray) -> None:
    """Scales, corrections and limits that leave the fast path, in place."""
    for array, period, values in (
        (quantized.q_scale, 149, (np.nan, 1e-30, 1e30, np.inf)),
        (quantized.k_scale, 53, (np.nan, 1e-25, 1e25, 1e-38)),
        (quantized.correction, 89, (np.nan, 1e30, -1e30, np.inf, -np.inf, 1e-44, 0.0, 1e5, -1e5)),
        (limits, 211, (1e30, np.nan, 0.0, -0.0, -1e30, 1e-44, -1e-44)),
    ):
        spots = array.reshape(-1)[::period]
        spots[:] = np.resize(np.array(values, np.float32), spots.size)


def _pad(array: np.ndarray, length: int, value) -> np.ndarray:
    padded = np.full((*array.shape[:2], length), value, array.dtype)
    padded[..., : array.shape[2]] = array
    return padded


def to_gpu(quantized: Quantized, limits: np.ndarray, plan: Plan, code_bits: int):
    """The GPU's copy: tiles, and padding that must not count poisoned with NaN."""
    import cupy

    int4 = plan.estimator == "int4"
    fields = {}
    if int4:
        fields = {
            "q_scale": cupy.asarray(_pad(quantized.q_scale, plan.padded_q // 2, np.nan)),
            "k_scale": cupy.asarray(_pad(quantized.k_scale, plan.padded_k // 8, np.nan)),
            "correction": cupy.asarray(_pad(quantized.correction, plan.padded_k, np.nan)),
        }
    q_codes = by_position(quantized.q_codes, plan, 0)
    tiles = Quantized(
        plan.estimator, code_bits,
        cupy.asarray(rows_to_sparse(q_codes) if plan.q_is_sparse else rows_to_tiles(q_codes, code_bits)),
        cupy.asarray(rows_to_tiles(quantized.k_codes, code_bits)),
        fields.pop("q_scale", None), fields.pop("k_scale", None), None, **fields,
    )
    return tiles, cupy.asarray(by_position(limits, plan, np.inf if int4 else SELECT_NONE))


def by_position(rows: np.ndarray, plan: Plan, fill) -> np.ndarray:
    """[batch, heads, seqlen_q, ...] as the GPU holds it: at the positions of the tested rows."""
    held = np.full((*rows.shape[:2], plan.num_positions, *rows.shape[3:]), fill, rows.dtype)
    present = plan.row_of_position >= 0
    held[:, :, present] = rows[:, :, plan.row_of_position[present]]
    return held


def run(tiles: Quantized, limits, plan: Plan, kernel: str) -> np.ndarray:
    """The kernel's words; whatever memory it gets is poisoned."""
    import cupy

    num_words = plan.num_words if plan.block_k == 32 else ceil_div(plan.seqlen_k, 1024)
    for words in {plan.num_words, num_words}:
        size = plan.batch * plan.num_heads * plan.num_q_blocks * words * 4
        poison = cupy.empty(size, np.uint8)
        poison.data.memset(0xA5, size)
        del poison
    return estimate(tiles, limits, plan, kernel=kernel).words.get()


def check(plan: Plan, path, seed: int = 0, inputs=None) -> np.ndarray:
    _, kernel, code_bits = path
    plan = plan.replace(arch=jit.device_arch())
    if kernel == "wgmma" and plan.arch != "sm_90a":
        pytest.skip("wgmma needs sm_90a")
    if code_bits == 4 and plan.arch not in (*NATIVE_INT4_ARCHS, "sm_90a"):
        pytest.skip("packed int4 codes are not used on this GPU")
    if kernel == "mma":
        plan = plan.replace(arch="sm_80")  # codes of all rows in tiles, which is what this kernel reads
    quantized, limits = inputs or make_inputs(plan, seed)
    expected = reference.estimate(quantized, limits, plan).words
    tiles, gpu_limits = to_gpu(quantized, limits, plan, code_bits)
    got = run(tiles, gpu_limits, plan, kernel)
    assert got.dtype == expected.dtype and got.shape == expected.shape
    wrong = np.argwhere(got != expected)
    assert not wrong.size, (
        f"{len(wrong)} of {got.size} words differ; first at {wrong[0]}: "
        f"got {got[tuple(wrong[0])]:08x}, expected {expected[tuple(wrong[0])]:08x}"
    )
    assert np.array_equal(run(tiles, gpu_limits, plan, kernel), got), "two runs differ"
    return got


@pytest.mark.parametrize("block_q", [64, 128])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("path", PATHS)
def test_shapes(path, head_dim, block_q):
    lengths = [1, 31, 32, 33, 63, 65, 127, 128, 129, 255, 257, 1000, 2049]
    for index, seqlen in enumerate(lengths):
        for causal in (True, False):
            plan = make_plan(path[0], seqlen, seqlen, head_dim=head_dim, block_q=block_q, causal=causal)
            check(plan, path, seed=index)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "lengths", [(1, 2049), (64, 1000), (200, 3000), (129, 1023), (1000, 31), (2049, 129), (700, 690)]
)
@pytest.mark.parametrize("path", PATHS)
def test_cached_and_short_keys(path, lengths, causal):
    for block_q in (64, 128):
        check(make_plan(path[0], *lengths, block_q=block_q, causal=causal), path)


@pytest.mark.parametrize("block", [(q, k) for q in (64, 128) for k in (32, 64, 128)])
@pytest.mark.parametrize("path", PATHS)
def test_blocks(path, block):
    for lengths in ((1000, 1000), (130, 4200), (1, 1), (65, 2081)):
        for causal in (True, False):
            check(make_plan(path[0], *lengths, block_q=block[0], block_k=block[1], causal=causal), path)


@pytest.mark.parametrize("heads", [(2, 2), (4, 1), (8, 1), (8, 2)])
@pytest.mark.parametrize("path", PATHS)
def test_batch_and_groups(path, heads):
    for head_dim in (64, 128):
        check(make_plan(path[0], 515, 777, batch=2, heads=heads[0], kv_heads=heads[1], head_dim=head_dim), path)


@pytest.mark.parametrize("stride, full_rows", [(2, 0), (4, 0), (2, 100), (4, 300), (4, 1024), (2, 10_000)])
@pytest.mark.parametrize("path", [path for path in PATHS if path.id != "int4-packed"])
def test_query_stride(path, stride, full_rows):
    for block_q in (64, 128):
        for index, lengths in enumerate(((1000, 1000), (1, 300), (129, 2100), (2500, 700), (515, 515))):
            options = dict(query_stride=stride, full_rows=full_rows, block_q=block_q, causal=index % 2 == 0)
            plan = make_plan(path[0], *lengths, **options)
            quantized, limits = make_inputs(plan)
            row = np.arange(plan.seqlen_q)
            block_end = np.minimum((row // block_q + 1) * block_q, plan.seqlen_q)
            untested = (row % block_q % stride != 0) & (block_end <= plan.seqlen_q - full_rows)
            limits[..., untested] = np.inf if path[0] == "int4" else SELECT_NONE
            check(plan, path, inputs=(quantized, limits))


@pytest.mark.parametrize("anchors", [(0, 0), (1, 0), (100, 64), (33, 1000), (5000, 16), (32, 5000)])
@pytest.mark.parametrize("path", PATHS)
def test_anchors(path, anchors):
    for causal in (True, False):
        for lengths in ((1000, 1000), (500, 1500), (900, 300)):
            check(make_plan(path[0], *lengths, sink=anchors[0], local=anchors[1], causal=causal), path)


@pytest.mark.parametrize("path", PATHS)
def test_long_rows(path):
    """More words than the wgmma kernel keeps between two stores."""
    for block_q in (64, 128):
        check(make_plan(path[0], 300, 70_001, heads=1, block_q=block_q), path)
        check(make_plan(path[0], 100, 33_000, heads=1, block_q=block_q, causal=False), path)


@pytest.mark.parametrize("seqlen_k", [1, 33, 95, 127, 1000, 1023, 2049])
@pytest.mark.parametrize("path", PATHS)
def test_absent_keys_do_not_vote(path, seqlen_k):
    """Every score is below its negative limit; the zero scores of absent keys are not."""
    plan = make_plan(path[0], 200, seqlen_k, causal=False, sink=0, local=0, head_dim=64)
    quantized, limits = make_inputs(plan)
    quantized.q_codes[:] = np.maximum(np.abs(quantized.q_codes), 1)
    if path[0] == "int8-sp24":
        quantized.q_codes.reshape(-1, 4)[:, 2:] = 0
    quantized.k_codes[:] = -np.maximum(np.abs(quantized.k_codes), 1)
    if path[0] == "int4":
        quantized.correction[:] = 0
    limits[:] = -1e-7 if path[0] == "int4" else -1
    words = check(plan, path, inputs=(quantized, limits))
    none = plan.replace(arch=None)
    limits[:] = np.inf if path[0] == "int4" else SELECT_NONE
    assert np.array_equal(words, reference.estimate(quantized, limits, none).words), "an absent key voted"


@pytest.mark.parametrize("seqlen_k", [700, 704, 2048])
@pytest.mark.parametrize("path", [path for path in PATHS if path not in INT4_PATHS])
def test_equal_scores_do_not_vote(path, seqlen_k):
    """Thresholds that the largest score of a row equals, or passes by one."""
    plan = make_plan(path[0], 300, seqlen_k, causal=False, sink=0, local=0)
    quantized, limits = make_inputs(plan)
    for codes in (quantized.q_codes, quantized.k_codes):
        codes[:] = codes.clip(-1, 1)
    keys = np.repeat(quantized.k_codes, plan.group_size, axis=1).astype(np.int32)
    limits[:] = (quantized.q_codes.astype(np.int32) @ keys.transpose(0, 1, 3, 2)).max(axis=-1)
    equal = check(plan, path, inputs=(quantized, limits))
    none = reference.estimate(quantized, np.full_like(limits, SELECT_NONE), plan.replace(arch=None)).words
    assert np.array_equal(equal, none)
    limits[:, :, ::50] -= 1
    assert not np.array_equal(check(plan, path, inputs=(quantized, limits)), none)


@pytest.mark.parametrize("path", PATHS)
def test_all_and_none(path):
    for limit in (-np.inf, np.inf):
        for causal in (True, False):
            plan = make_plan(path[0], 777, 1111, causal=causal)
            quantized, limits = make_inputs(plan)
            limits[:] = limit if path[0] == "int4" else {-np.inf: SELECT_ALL, np.inf: SELECT_NONE}[limit]
            words = check(plan, path, inputs=(quantized, limits))
            if limit < 0:
                counts = np.unpackbits(words.view(np.uint8), axis=-1).sum(axis=-1)
                assert (counts == plan.visible_blocks).all()


@pytest.mark.parametrize("path", INT4_PATHS)
def test_int4_odd_groups(path):
    """Groups outside the range of the fast division: NaN and infinite scales, quotients that overflow or vanish."""
    for causal in (True, False):
        for lengths in ((300, 1300), (1000, 1000)):
            plan = make_plan("int4", *lengths, heads=3, causal=causal, full_rows=0)
            quantized, limits = make_inputs(plan)
            # Row tiles in the middle alone, so that not every block is selected.
            part = slice(64, 128)
            odd = Quantized(
                "int4", 8, quantized.q_codes, quantized.k_codes, quantized.q_scale.copy(), quantized.k_scale.copy(),
                None, None, quantized.correction.copy(),
            )
            odd_limits = limits.copy()
            poison_odd_groups(odd, odd_limits)
            check(plan, path, inputs=(odd, odd_limits))
            mixed = limits.copy()
            mixed[..., part] = odd_limits[..., part]
            check(plan, path, inputs=(quantized, mixed))


def _nudged(x: np.ndarray, rng) -> np.ndarray:
    """x, or a float32 next to it."""
    towards = np.array([-np.inf, 0, np.inf], np.float32)[rng.integers(0, 3, x.shape)]
    return np.where(towards == 0, x, np.nextafter(x, towards)).astype(np.float32)


@pytest.mark.parametrize("exact_quotients", [True, False])
@pytest.mark.parametrize("head_dim, block_q", [(128, 64), (64, 64), (128, 128)])
@pytest.mark.parametrize("path", INT4_PATHS)
def test_int4_close_calls(path, head_dim, block_q, exact_quotients):
    """Corrections on and next to ties, limits on and next to integers, few rows that vote and few different sums."""
    plan = make_plan("int4", 700, 1500, heads=4, kv_heads=2, head_dim=head_dim, block_q=block_q, full_rows=0)
    quantized, limits = make_inputs(plan)
    rng = np.random.default_rng(head_dim + block_q)
    quantized.q_codes[:] = quantized.q_codes.clip(-1, 1)
    quantized.k_codes[:] = quantized.k_codes.clip(-1, 1)
    if exact_quotients:
        quantized.q_scale[:] = np.exp2(rng.integers(-7, -5, quantized.q_scale.shape))
        quantized.k_scale[:] = np.exp2(rng.integers(-7, -5, quantized.k_scale.shape))
    rows, keys = np.arange(plan.seqlen_q), np.arange(plan.seqlen_k)
    q_scale = quantized.q_scale[..., 8 * (rows // 16) + rows % 8]
    k_scale = np.repeat(quantized.k_scale[..., 4 * (keys // 32) + keys % 8 // 2], plan.group_size, axis=1)
    # Halves of a key's scale times some row's, and the floats next to them.
    unit = q_scale[..., rng.integers(0, plan.seqlen_q, plan.seqlen_k)] * k_scale
    halves = np.float32(0.5) * rng.integers(-20, 21, unit.shape).astype(np.float32)
    quantized.correction[:] = _nudged(halves * unit, rng)
    unit = np.float32(plan.softmax_scale) * q_scale * k_scale[..., rng.integers(0, plan.seqlen_k, plan.seqlen_q)]
    low = 45 if exact_quotients else 33  # about the largest sums of a block
    limits[:] = _nudged(rng.integers(low, low + 30, unit.shape).astype(np.float32) * unit, rng)
    limits[rng.random(limits.shape) < 0.95] = np.inf
    check(plan, path, inputs=(quantized, limits))


@pytest.mark.parametrize("path", INT4_PATHS)
def test_int4_ties_of_corrections(path):
    """Scores are corrections alone; in each block one on a tie, or a float next to it, decides by how it is rounded."""
    plan = make_plan("int4", 128, 8192, heads=6, kv_heads=2, causal=False, sink=0, local=0)
    quantized, limits = make_inputs(plan)
    rng = np.random.default_rng(0)
    quantized.q_codes[:] = 0
    quantized.q_scale[:] = rng.uniform(0.01, 0.02, (1, 6, 1))
    quantized.k_scale[:] = rng.uniform(0.01, 0.02, (1, 2, 1)) * rng.uniform(0.999, 1, quantized.k_scale.shape)
    keys = np.arange(plan.seqlen_k)
    k_scale = np.repeat(quantized.k_scale[..., 4 * (keys // 32) + keys % 8 // 2], plan.group_size, axis=1)
    unit = quantized.q_scale[..., :1] * k_scale
    whole = np.arange(20, 26, dtype=np.float32)[None, :, None]
    quantized.correction[:] = whole * unit
    tied = 32 * np.arange(plan.seqlen_k // 32) + rng.integers(0, 32, plan.seqlen_k // 32)
    quantized.correction[:, :, tied] = _nudged((whole + np.float32(0.5)) * unit[:, :, tied], rng)
    limits[:] = (whole + np.float32(0.5)) * unit[..., :1] * np.float32(plan.softmax_scale)
    words = check(plan, path, inputs=(quantized, limits))
    selected = np.unpackbits(words.view(np.uint8), axis=-1).mean(axis=(0, 2, 3))
    assert ((0.1 < selected) & (selected < 0.9)).all()


@pytest.mark.parametrize("factor", [1e3, 1e4, 1e6, 1e12])
@pytest.mark.parametrize("path", INT4_PATHS)
def test_int4_large_corrections(path, factor):
    """Corrections and limits near and beyond the reach of bounds, magic number and clamp."""
    for causal in (True, False):
        plan = make_plan("int4", 300, 1500, heads=3, causal=causal, full_rows=0)
        quantized, limits = make_inputs(plan)
        spread = 10 ** np.random.default_rng(7).uniform(-2, 0, quantized.correction.shape)
        quantized.correction[:] *= (factor * spread).astype(np.float32)
        grown = np.isfinite(limits)
        grown[:, 1] = False
        limits[grown] *= np.float32(factor * 0.3)
        # Far below what the magic number holds, and yet selected: by a limit of -inf all are, whatever its neighbours'.
        quantized.correction[:, 1] = -np.abs(quantized.correction[:, 1])
        limits[:, 1, 70::128] = -np.inf
        check(plan, path, inputs=(quantized, limits))


@pytest.mark.parametrize("path", INT4_PATHS)
def test_int4_zero_and_broken_groups(path):
    """Zero groups (scale 1, codes 0), a query head and a KV head of NaN scales, NaN limits, beside sound heads."""
    for causal in (True, False):
        plan = make_plan("int4", 400, 1100, heads=6, kv_heads=3, causal=causal, full_rows=0)
        quantized, limits = make_inputs(plan)
        rows, keys = np.arange(plan.seqlen_q), np.arange(plan.seqlen_k)
        for scale, codes, group in (
            (quantized.q_scale, quantized.q_codes, 8 * (rows // 16) + rows % 8),
            (quantized.k_scale, quantized.k_codes, 4 * (keys // 32) + keys % 8 // 2),
        ):
            scale[..., 5::11] = 1
            codes[:, :, group % 11 == 5] = 0
        quantized.q_scale[:, 2] = np.nan
        quantized.q_codes[:, 2] = 0
        limits[:, 2, 64:] = np.inf
        quantized.k_scale[:, 2, ::2] = np.nan
        limits[:, 4:6] = np.where(np.arange(plan.seqlen_q) % 64 == 7, limits[:, 4:6], np.inf)
        limits[:, 3, 5] = np.nan
        check(plan, path, inputs=(quantized, limits))
