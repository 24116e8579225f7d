// The shape of a call, its causal limits and its anchors. Mirrors salekit/plans.py (SHAPE_RECORD and the methods).
#pragma once
#include "tile/types.cuh"

constexpr int TILE_ROWS = 64;        // anchors are defined per 64-row query tile
constexpr int KEY_BLOCK = 32;        // votes and anchors are taken per 32 keys
constexpr int CODE_TILE_ROWS = 128;  // codes are stored in 128-row tiles
constexpr int SELECT_ALL = -2147483647 - 1;  // integer threshold of a row that selects every visible block
constexpr int SELECT_NONE = 2147483647;      // integer threshold of a row that never votes

// Dims of a row of codes, or of a row in shared memory: a power of two, so that offsets can be XORed.
__host__ __device__ constexpr int padded_dim(int head_dim) {
  return head_dim <= 64 ? 64 : head_dim <= 128 ? 128 : 256;
}

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

struct Range {
  int begin, end;
};

struct Shape {
  int batch, seqlen_q, seqlen_k, num_heads, num_kv_heads, causal, sink_end, local, query_stride, full_rows;

  // Calls with a window are compiled apart (KernelSpec.window in salekit/jit.py).
#ifdef KEY_WINDOW
  static constexpr bool HAS_WINDOW = true;
  int window_left, window_right;  // keys before and after a row's position that it sees; -1: no limit
#else
  static constexpr bool HAS_WINDOW = false;
  static constexpr int window_left = -1, window_right = -1;
#endif

  // Calls whose sequences have lengths of their own are compiled apart (KernelSpec.lengths in salekit/jit.py). Arrays
  // then have seqlen_q and seqlen_k rows for each sequence, which say where things lie; what is there is said by
  // of_sequence.
#ifdef SEQUENCE_LENGTHS
  static constexpr bool HAS_LENGTHS = true;
  const int* lengths;  // [2, batch]: rows of q and of k, at most seqlen_q and seqlen_k

  __device__ __forceinline__ Shape of_sequence(int index) const {
    Shape sequence = *this;
    sequence.seqlen_q = lengths[index];
    sequence.seqlen_k = lengths[batch + index];
    sequence.sink_end = min(sink_end, sequence.seqlen_k);
    return sequence;
  }
#else
  static constexpr bool HAS_LENGTHS = false;
  __device__ __forceinline__ Shape of_sequence(int) const { return *this; }
#endif

  __device__ int offset() const { return seqlen_k - seqlen_q; }
  __device__ int group_size() const { return num_heads / num_kv_heads; }
  __device__ int padded_q() const { return ceil_div(seqlen_q, CODE_TILE_ROWS) * CODE_TILE_ROWS; }
  __device__ int padded_k() const { return ceil_div(seqlen_k, CODE_TILE_ROWS) * CODE_TILE_ROWS; }
  __device__ int num_words() const { return ceil_div(seqlen_k, 32 * KEY_BLOCK); }  // of a mask with 32-key blocks

  // Keys that row `row` sees: [0, visible_keys(row)).
  __device__ int visible_keys(int row) const {
    if (!causal) return seqlen_k;
    int end = min(row, seqlen_q - 1) + offset() + 1;
    return max(0, min(seqlen_k, end));
  }

  // With a window a row sees [visible_begin(row), visible_end(row)). WINDOWED false: there is none, and no code for it.
  template <bool WINDOWED>
  __device__ int visible_begin(int row) const {
    if (!WINDOWED || window_left < 0) return 0;
    return max(0, min(seqlen_k, min(row, seqlen_q - 1) + offset() - window_left));
  }
  template <bool WINDOWED>
  __device__ int visible_end(int row) const {
    if (!WINDOWED || causal || window_right < 0) return visible_keys(row);
    return max(0, min(seqlen_k, min(row, seqlen_q - 1) + offset() + 1 + window_right));
  }

  __device__ bool sees_a_key(int row) const {
    if constexpr (!HAS_WINDOW) return visible_keys(row) > 0;
    return visible_begin<HAS_WINDOW>(row) < visible_end<HAS_WINDOW>(row);
  }

  // Keys of the local anchors of a 64-row tile; in causal calls `end` is the last row's limit + 1.
  __device__ Range local_range(int tile) const {
    int position = tile * TILE_ROWS + offset();
    int begin = max(0, position - local) / KEY_BLOCK * KEY_BLOCK;
    int end;
    if (causal) {
      end = position + min(TILE_ROWS, seqlen_q - tile * TILE_ROWS);
    } else {
      int reach = position + TILE_ROWS + local;
      end = reach <= 0 ? 0 : ceil_div(reach, KEY_BLOCK) * KEY_BLOCK;
    }
    end = max(0, min(seqlen_k, end));
    return {min(begin, end), end};
  }
};
