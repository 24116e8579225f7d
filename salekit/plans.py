"""Plan: everything about a call that is known before any data is seen. Pure and frozen; needs no GPU."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

TILE_ROWS = 64  # anchors are defined per 64-row query tile, whatever the mask's block (docs/algorithm.md)
KEY_BLOCK = 32  # the finest key granularity: anchors and votes are taken per 32 keys
CODE_TILE_ROWS = 128  # codes are stored in tiles of 128 rows, in the shared-memory order of the tensor cores
BLOCKS = tuple((q, k) for q in (64, 128) for k in (32, 64, 128))
ESTIMATORS = ("int4", "int8", "int8-sp24")
HEAD_DIMS = (64, 96, 128, 192, 256)
WGMMA_HEAD_DIMS = (64, 128)  # of Hopper's kernels for anchors and int4; of the others those of mma.sync run
LOW_BIT_HEAD_DIMS = (64, 128)  # of attend="int8-fp8"
POOLED_HEAD_DIMS = (64, 128)  # of skipped="pool"
DTYPES = ("float16", "bfloat16")
QUERY_STRIDES = (1, 2, 4)
MAX_SEQLEN = 2**30  # positions, and sums of two of them, are int32 in the kernels
MAX_GRID = 65535  # batch and heads are the y and z of a CUDA grid
SKIPPED = ("drop", "pool")  # what becomes of skipped blocks
# Up to this many keys a call is dense unless it says otherwise: on an H100 sparse calls overtake dense ones between 4K
# and 6K keys with 32 and 8 heads, between 8K and 12K with 8 and 2.
DENSE_BELOW = 8192

# What a call does to scores beside the causal limit: flags of kernel templates (cuda_src/tile/score_features.cuh).
SOFTCAP, WINDOW, SINKS = 1, 2, 4

SELECT_ALL = -(2**31)  # integer threshold of a row that selects every visible block
SELECT_NONE = 2**31 - 1  # integer threshold of a row that never votes
CLAMP = 2**30  # finite thresholds and corrections are clamped to +-CLAMP

SHAPE_RECORD = np.dtype(
    [
        (name, "<i4")
        for name in (
            "batch",
            "seqlen_q",
            "seqlen_k",
            "num_heads",
            "num_kv_heads",
            "causal",
            "sink_end",
            "local",
            "query_stride",
            "full_rows",
        )
    ]
)

# The same of a call with a window (KEY_WINDOW of cuda_src/tile/shape.cuh), and what follows in a call whose sequences
# have lengths of their own (SEQUENCE_LENGTHS there).
WINDOW_RECORD = np.dtype([*SHAPE_RECORD.descr, ("window_left", "<i4"), ("window_right", "<i4")])
_LENGTHS = ("lengths", "<u8")
LENGTHS_RECORD = np.dtype([*SHAPE_RECORD.descr, _LENGTHS])


# The RowMap struct of cuda_src/tile/row_map.cuh.
ROW_MAP = np.dtype(
    [(name, "<i4") for name in ("stride", "first_full_row", "first_full_position", "num_rows", "num_positions")]
)


def row_map_record(*values: int) -> np.ndarray:
    """A size-1 ``ROW_MAP`` record that CuPy passes by value."""
    return np.array([values], dtype=ROW_MAP)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def padded_dim(head_dim: int) -> int:
    """Dims of a row of codes: a power of two from 64 on; what is past head_dim is zero (cuda_src/tile/shape.cuh)."""
    return max(64, 1 << (head_dim - 1).bit_length())


@dataclass(frozen=True)
class Plan:
    """Shapes and options of one call. Build it with ``call_checks.make_plan``, which validates; this class does not."""

    batch: int
    seqlen_q: int
    seqlen_k: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str  # "float16" | "bfloat16"
    softmax_scale: float
    causal: bool = True
    estimator: str = "int8"  # resolved, never "auto"
    attend: str = "exact"
    block_q: int = 128
    block_k: int = 32
    query_stride: int = 1
    full_rows: int = 1024
    sink: int = 32
    local: int = 128
    dense_below: int = DENSE_BELOW
    skipped: str = "drop"
    arch: str | None = None  # "sm_90a", ...; None on the NumPy twin
    softcap: float = 0.0  # scores are softcap * tanh(score / softcap); 0: they are not capped
    window_left: int = -1  # keys before a row's position that it sees; -1: all
    window_right: int = -1  # keys after it; -1: all, or none in causal calls
    # Whether each sequence has a length of its own, up to seqlen_q and seqlen_k, and where they are: int32 [5, batch]
    # on the GPU, as cuda_src/kernels/locate_sequences.cu lays them out.
    has_lengths: bool = False
    lengths: Any = field(default=None, compare=False, repr=False)

    # --- sizes -------------------------------------------------------------------------------------------------
    @property
    def num_q_blocks(self) -> int:
        return ceil_div(self.seqlen_q, self.block_q)

    @property
    def num_k_blocks(self) -> int:
        return ceil_div(self.seqlen_k, self.block_k)

    @property
    def num_words(self) -> int:
        """uint32 words in one mask row."""
        return ceil_div(self.num_k_blocks, 32)

    @property
    def words_shape(self) -> tuple[int, int, int, int]:
        """Of a BlockMask's words."""
        return self.batch, self.num_heads, self.num_q_blocks, self.num_words

    @property
    def num_q_tiles(self) -> int:
        """64-row query tiles."""
        return ceil_div(self.seqlen_q, TILE_ROWS)

    @property
    def padded_q(self) -> int:
        """seqlen_q rounded up to whole code tiles of 128 rows."""
        return ceil_div(self.seqlen_q, CODE_TILE_ROWS) * CODE_TILE_ROWS

    @property
    def padded_k(self) -> int:
        return ceil_div(self.seqlen_k, CODE_TILE_ROWS) * CODE_TILE_ROWS

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def is_dense(self) -> bool:
        """Dense by how many keys a row sees at most (docs/algorithm.md, step 6)."""
        keys = self.seqlen_k
        if self.window_left >= 0:
            right = 0 if self.causal else self.window_right if self.window_right >= 0 else self.seqlen_q - 1
            keys = min(keys, self.window_left + 1 + right)
        return keys <= self.dense_below

    @property
    def is_empty(self) -> bool:
        """Without a query row or without a key."""
        return 0 in (self.batch, self.seqlen_q, self.seqlen_k)

    @property
    def offset(self) -> int:
        """Position of query row 0: causal row i sees keys j <= i + offset."""
        return self.seqlen_k - self.seqlen_q

    # --- anchors, per 64-row tile ------------------------------------------------------------------------------
    @property
    def sink_end(self) -> int:
        """Anchor keys [0, sink_end): the 32-key blocks that hold the first ``sink`` keys."""
        return min(self.seqlen_k, ceil_div(self.sink, KEY_BLOCK) * KEY_BLOCK)

    def local_range(self, tile: int) -> tuple[int, int]:
        """Keys [begin, end) of the local anchors of 64-row tile ``tile``; end is past the last row's causal limit."""
        position = tile * TILE_ROWS + self.offset
        begin = max(0, position - self.local) // KEY_BLOCK * KEY_BLOCK
        if self.causal:
            end = position + min(TILE_ROWS, self.seqlen_q - tile * TILE_ROWS)
        else:
            end = ceil_div(position + TILE_ROWS + self.local, KEY_BLOCK) * KEY_BLOCK
        end = max(0, min(self.seqlen_k, end))
        return min(begin, end), end

    @property
    def has_window(self) -> bool:
        """Whether a sliding window hides keys that ``causal`` does not."""
        return self.window_left >= 0 or self.window_right >= 0

    @property
    def cap_factor(self) -> float:
        """What kernels multiply q.k by for the exponent of tanh (SoftCap of cuda_src/tile/score_features.cuh)."""
        return 2 * math.log2(math.e) * self.softmax_scale / self.softcap if self.softcap else 0.0

    def score_features(self, has_sinks: bool) -> int:
        """The flags SOFTCAP, WINDOW and SINKS of a call."""
        return SOFTCAP * (self.softcap != 0) | WINDOW * self.has_window | SINKS * has_sinks

    def visible_keys(self, row_end: int) -> int:
        """One past the last key that the rows before ``row_end`` see (the last of them sees farthest)."""
        if not self.causal and self.window_right < 0:
            return self.seqlen_k
        right = 0 if self.causal else self.window_right
        return max(0, min(self.seqlen_k, min(row_end, self.seqlen_q) + self.offset + right))

    def first_visible_key(self, row: int) -> int:
        """The first key that row ``row`` and those after it see; all of them start here or later."""
        if self.window_left < 0:
            return 0
        return max(0, min(self.seqlen_k, row + self.offset - self.window_left))

    @cached_property
    def first_visible_blocks(self) -> np.ndarray:
        """int64 [num_q_blocks]: the first block with a visible pair, per query block."""
        first = [self.first_visible_key(i * self.block_q) // self.block_k for i in range(self.num_q_blocks)]
        return np.array(first, dtype=np.int64)

    @cached_property
    def visible_blocks(self) -> np.ndarray:
        """int64 [num_q_blocks]: how many blocks have a visible pair, per query block."""
        ends = [ceil_div(self.visible_keys((i + 1) * self.block_q), self.block_k) for i in range(self.num_q_blocks)]
        return np.maximum(np.array(ends, dtype=np.int64) - self.first_visible_blocks, 0)

    # --- work, per head ----------------------------------------------------------------------------------------
    @property
    def visible_pairs(self) -> int:
        """Pairs of a query row and a key that it sees."""
        if self.has_window:
            position = np.arange(self.seqlen_q, dtype=np.int64) + self.offset
            first = position - self.window_left if self.window_left >= 0 else np.zeros_like(position)
            right = 0 if self.causal else self.window_right
            end = position + right + 1 if right >= 0 else np.full_like(position, self.seqlen_k)
            return int((end.clip(0, self.seqlen_k) - first.clip(0, self.seqlen_k)).sum())
        if not self.causal:
            return self.seqlen_q * self.seqlen_k
        last = self.visible_keys(self.seqlen_q)
        rows = min(self.seqlen_q, last)  # rows that see a key, each one more than the last
        return rows * (2 * last - rows + 1) // 2

    def selected_pairs(self, selected_blocks: int) -> int:
        """Visible pairs in that many set blocks of a mask of this plan's blocks.

        Blocks on the diagonal reach past it; they are anchors, so every mask has them all. A ragged last row is counted
        whole. Not for windows, whose edges are no anchors.
        """
        size = self.block_q * self.block_k
        beyond = int(self.visible_blocks.sum()) * size - self.visible_pairs
        return max(0, selected_blocks * size - beyond)

    # --- tested rows, as the GPU holds their codes, scales and limits -------------------------------------------
    @property
    def holds_tested_rows(self) -> bool:
        """Whether codes, scales and limits are held for the tested rows alone (tile/row_map.cuh)."""
        # Where they are would differ from sequence to sequence.
        return self.uses_wgmma_estimate and self.estimator != "int4" and self.query_stride > 1 and not self.has_lengths

    @property
    def uses_wgmma_estimate(self) -> bool:
        """Whether Hopper's estimation kernels run; those of ``mma.sync`` know windows and int4 in every head_dim."""
        is_known = self.estimator != "int4" or self.head_dim in WGMMA_HEAD_DIMS
        return self.arch == "sm_90a" and not self.has_window and is_known

    @cached_property
    def q_row_map(self) -> np.ndarray:
        """The ``ROW_MAP`` record of q: position of each tested row among codes, scales and limits."""
        if not self.holds_tested_rows:
            return row_map_record(1, 0, 0, self.seqlen_q, self.padded_q)
        tested_whole = min(self.full_rows, self.seqlen_q)
        first_full = (self.seqlen_q - tested_whole) // self.block_q if tested_whole else self.num_q_blocks
        strided_rows = min(first_full * self.block_q, self.seqlen_q)
        first_position = ceil_div(ceil_div(strided_rows, self.query_stride), CODE_TILE_ROWS) * CODE_TILE_ROWS
        positions = first_position + ceil_div(self.seqlen_q - strided_rows, CODE_TILE_ROWS) * CODE_TILE_ROWS
        return row_map_record(
            self.query_stride, first_full * self.block_q, first_position, self.seqlen_q, positions
        )

    @property
    def num_positions(self) -> int:
        """Rows of q's codes, scales (int8) and limits on the GPU: whole tiles of 128."""
        return int(self.q_row_map["num_positions"][0])

    @cached_property
    def row_of_position(self) -> np.ndarray:
        """int64 [num_positions]: the query row at each position, -1 for padding."""
        stride, first_full_row, first_full_position, num_rows, num_positions = (int(x) for x in self.q_row_map[0])
        position = np.arange(num_positions)
        strided = position < first_full_position
        row = np.where(strided, position * stride, first_full_row + position - first_full_position)
        return np.where((row < num_rows) & ((row < first_full_row) | ~strided), row, -1)

    @property
    def q_is_sparse(self) -> bool:
        """Whether q's codes are held pruned, in the order of the sparse tensor cores (codes.py)."""
        return self.uses_wgmma_estimate and self.estimator == "int8-sp24"

    # --- for kernels -------------------------------------------------------------------------------------------
    @cached_property
    def shape_record(self) -> np.ndarray:
        """The ``Shape`` struct of cuda_src/tile/shape.cuh, as a size-1 record that CuPy passes by value."""
        values = (
            self.batch,
            self.seqlen_q,
            self.seqlen_k,
            self.num_heads,
            self.num_kv_heads,
            int(self.causal),
            self.sink_end,
            min(self.local, self.seqlen_q + self.seqlen_k + TILE_ROWS),  # farther is as far
            self.query_stride,
            self.full_rows,
        )
        record = SHAPE_RECORD
        if self.has_window:
            values, record = (*values, self.window_left, self.window_right), WINDOW_RECORD
        if self.has_lengths:
            values, record = (*values, self.lengths.data.ptr), np.dtype([*record.descr, _LENGTHS])
        return np.array([values], record)

    def lengths_of(self, side: str) -> Any:
        """Rows of "q", of "k", or "sampled" rows of q of each sequence, as a kernel's argument; a null pointer
        when they are the call's."""
        if not self.has_lengths:
            return np.uint64(0)
        return self.lengths[{"q": 0, "k": 1, "sampled": 4}[side]]

    @property
    def element(self) -> str:
        """The element type's name in the CUDA sources."""
        return {"float16": "Half", "bfloat16": "BFloat16"}[self.dtype]

    @property
    def code_bits(self) -> int:
        """Bits a stored code takes: int4 codes are packed where the tensor cores multiply them, else held in bytes."""
        return 4 if self.estimator == "int4" and self.arch in NATIVE_INT4_ARCHS else 8

    @property
    def code_row_bytes(self) -> int:
        return padded_dim(self.head_dim) * self.code_bits // 8

    def replace(self, **changes) -> "Plan":
        return replace(self, **changes)


LOW_BIT_ARCHS = ("sm_90a",)  # where attend="int8-fp8" has kernels
NATIVE_INT4_ARCHS = ("sm_80", "sm_86", "sm_87", "sm_89")
SUPPORTED_ARCHS = ("sm_80", "sm_86", "sm_87", "sm_89", "sm_90a", "sm_100a", "sm_103a", "sm_120a", "sm_121a")


def arch_of(major: int, minor: int) -> str | None:
    """The -arch that salekit compiles for on a GPU of this compute capability, or None when there is none."""
    plain = f"sm_{major}{minor}"
    return next((arch for arch in SUPPORTED_ARCHS if arch in (plain, plain + "a")), None)


def resolve_estimator(estimator: str, arch: str | None) -> str:
    """ "auto" is int8 wherever it is not slower than the paper's int4; it depends on the GPU alone."""
    if estimator != "auto":
        return estimator
    return "int4" if arch in NATIVE_INT4_ARCHS else "int8"


def default_softmax_scale(head_dim: int) -> float:
    return 1.0 / math.sqrt(head_dim)
