// Words of a block mask with 32-key blocks: which bits are visible, which are anchors, and how votes become a word.
// Bit i of word w stands for keys [32 * (32 * w + i), + 32).
#pragma once
#include "tile/shape.cuh"

// The bits of word `word` whose blocks hold keys of [begin, end); begin is a multiple of 32, or the range is empty.
__device__ __forceinline__ uint32_t key_bits(int begin, int end, int word) {
  int low = max(ceil_div(begin, KEY_BLOCK) - 32 * word, 0);
  int high = min(ceil_div(end, KEY_BLOCK) - 32 * word, 32);
  return low >= high ? 0 : ~0u >> (32 - (high - low)) << low;
}

// Blocks that some row of [first_row, first_row + num_rows) sees.
template <bool WINDOWED = false>
__device__ __forceinline__ uint32_t visible_bits(const Shape& shape, int first_row, int num_rows, int word) {
  if constexpr (!WINDOWED) return key_bits(0, shape.visible_keys(first_row + num_rows - 1), word);
  const int begin = shape.visible_begin<WINDOWED>(first_row) / KEY_BLOCK * KEY_BLOCK;
  return key_bits(begin, shape.visible_end<WINDOWED>(first_row + num_rows - 1), word);
}

// The visible anchors of one 64-row tile; none when the tile lies past the last row.
template <bool WINDOWED = false>
__device__ __forceinline__ uint32_t anchor_bits(const Shape& shape, int tile, int word) {
  if (tile * TILE_ROWS >= shape.seqlen_q) return 0;
  Range local = shape.local_range(tile);
  uint32_t anchors = key_bits(0, shape.sink_end, word) | key_bits(local.begin, local.end, word);
  return anchors & visible_bits<WINDOWED>(shape, tile * TILE_ROWS, TILE_ROWS, word);
}

// A mask word of a block of BLOCK_Q rows. Votes need no causal test of single pairs: a 32-key block that only part of a
// 64-row tile sees is an anchor of that tile; what the first tile of 128 rows does not see is an anchor of the second.
// With a window they need it: only visible pairs may have voted.
template <int BLOCK_Q, bool WINDOWED = false>
__device__ __forceinline__ uint32_t finish_word(const Shape& shape, int q_block, int word, uint32_t votes) {
  constexpr int TILES = BLOCK_Q / TILE_ROWS;
  uint32_t bits = votes & visible_bits<WINDOWED>(shape, q_block * BLOCK_Q, BLOCK_Q, word);
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile) bits |= anchor_bits<WINDOWED>(shape, q_block * TILES + tile, word);
  return bits;
}
