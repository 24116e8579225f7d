// Walks the selected, visible 32-key blocks of a mask from the last to the first, up to four at a time: a tile's slots.
#pragma once
#include "tile/shape.cuh"

// Four 32-key blocks, keys rising; in tiles of fewer slots the first are always absent.
struct SlotTile {
  int4 first_key;     // -1: absent; the last slot is absent only when the walk has ended
  uint32_t selected;  // bit 4*g + s: slot s is there and selected by the rows of warpgroup g, 64 rows each

  __device__ uint32_t selected_by(int warpgroup) const { return selected >> (4 * warpgroup) & 15; }
};

// The first block that a windowed walk visits.
template <bool WINDOWED>
struct WalkBegin {
  static constexpr int begin_block = 0;
  __device__ explicit WalkBegin(int) {}
};
template <>
struct WalkBegin<true> {
  int begin_block;
  __device__ explicit WalkBegin(int begin) : begin_block(begin) {}
};

// MASK_ROWS: query rows of a mask block, 128 or 64; 128 query rows then have one or two rows of mask bits, and what is
// walked is their union. All lanes of a warp act together; each holds one word of the bits.
template <int MASK_ROWS, bool WINDOWED = false>
struct SlotWalker : WalkBegin<WINDOWED> {
  static constexpr int NUM_ROWS = 128 / MASK_ROWS;

  // rows: each row's first word; null: every block is selected (one row), or none is (two rows, past the matrix).
  // expand_log2: a mask bit stands for 2 ** expand_log2 blocks. The walk stays in blocks [first_block, end_block);
  // first_block is a multiple of 1024, the bits that a warp holds; a windowed walk leaves out those before begin_block.
  __device__ SlotWalker(const uint32_t* const (&rows)[NUM_ROWS], int expand_log2, int first_block, int end_block,
                        int begin_block = 0)
      : WalkBegin<WINDOWED>(begin_block),
        expand_log2(expand_log2),
        first_word(first_block / 32),
        end_block(end_block),
        lane(threadIdx.x % 32) {
#pragma unroll
    for (int r = 0; r < NUM_ROWS; ++r) words[r] = rows[r];
    base_word = end_block <= first_block ? first_word : (end_block - 1) / 1024 * 32;
    load_mine();
  }

  // How many blocks the whole walk visits; changes nothing.
  __device__ int count() const {
    int total = 0;
    for (int word = first_word + lane; word * 32 < end_block; word += 32) {
      uint32_t bits = 0;
#pragma unroll
      for (int r = 0; r < NUM_ROWS; ++r) bits |= load(r, word);
      total += __popc(bits);
    }
    return __reduce_add_sync(~0u, total);
  }

  // The next SLOTS blocks.
  template <int SLOTS = 4>
  __device__ SlotTile next() {
    SlotTile tile;
    tile.selected = 0;
    if constexpr (SLOTS < 4) tile.first_key.x = -1;
    if constexpr (SLOTS < 3) tile.first_key.y = -1;
    int owner = last_owner();
    if (owner >= 0) {
      uint32_t bits[NUM_ROWS];
#pragma unroll
      for (int r = 0; r < NUM_ROWS; ++r) bits[r] = __shfl_sync(~0u, mine[r], owner);
      if (__popc(all(bits)) >= SLOTS) {  // the usual case: all from one word
        const int first = (base_word + owner) * 32;
        tile.first_key.w = (first + take_highest(bits, 3, tile.selected)) * KEY_BLOCK;
        tile.first_key.z = (first + take_highest(bits, 2, tile.selected)) * KEY_BLOCK;
        if constexpr (SLOTS >= 3) tile.first_key.y = (first + take_highest(bits, 1, tile.selected)) * KEY_BLOCK;
        if constexpr (SLOTS >= 4) tile.first_key.x = (first + take_highest(bits, 0, tile.selected)) * KEY_BLOCK;
#pragma unroll
        for (int r = 0; r < NUM_ROWS; ++r) mine[r] = lane == owner ? bits[r] : mine[r];
        return tile;
      }
    }
    tile.first_key.w = next_key(3, tile.selected);
    tile.first_key.z = next_key(2, tile.selected);
    if constexpr (SLOTS >= 3) tile.first_key.y = next_key(1, tile.selected);
    if constexpr (SLOTS >= 4) tile.first_key.x = next_key(0, tile.selected);
    return tile;
  }

 private:
  const uint32_t* words[NUM_ROWS];
  int expand_log2, first_word, end_block, base_word, lane;
  uint32_t mine[NUM_ROWS];

  static __device__ uint32_t all(const uint32_t (&bits)[NUM_ROWS]) { return bits[0] | bits[NUM_ROWS - 1]; }

  __device__ uint32_t load(int row, int word) const {
    int below = end_block - 32 * word;  // blocks of the walk in this word and after
    if (below <= 0) return 0;
    uint32_t bits = NUM_ROWS == 1 ? ~0u : 0;
    if (words[row] != nullptr) {
      bits = words[row][word >> expand_log2];
      if (expand_log2 != 0) {  // a coarse bit stands for 2 or 4 blocks
        int width = 32 >> expand_log2;
        uint32_t part = bits >> ((word & ((1 << expand_log2) - 1)) * width);
        uint32_t ones = (1u << (1 << expand_log2)) - 1;
        bits = 0;
        for (int i = 0; i < width; ++i) bits |= ((part >> i) & 1) ? ones << (i << expand_log2) : 0;
      }
    }
    if constexpr (WINDOWED) {
      const int before = this->begin_block - 32 * word;
      if (before > 0) bits = before >= 32 ? 0 : bits & ~0u << before;
    }
    return below >= 32 ? bits : bits & ((1u << below) - 1);
  }

  __device__ void load_mine() {
#pragma unroll
    for (int r = 0; r < NUM_ROWS; ++r) mine[r] = load(r, base_word + lane);
  }

  // The last lane whose word has a bit left, or -1.
  __device__ int last_owner() const { return 31 - __clz(__ballot_sync(~0u, all(mine) != 0)); }

  static __device__ int take_highest(uint32_t (&bits)[NUM_ROWS], int slot, uint32_t& selected) {
    const int bit = 31 - __clz(all(bits));
#pragma unroll
    for (int r = 0; r < NUM_ROWS; ++r) {
      selected |= (bits[r] >> bit & 1) << (4 * r + slot);
      if (NUM_ROWS == 1) selected |= 1u << (4 + slot);
      bits[r] &= ~(1u << bit);
    }
    return bit;
  }

  // The next block's first key, or -1.
  __device__ int next_key(int slot, uint32_t& selected) {
    while (true) {
      const int owner = last_owner();
      if (owner >= 0) {
        uint32_t bits[NUM_ROWS];
#pragma unroll
        for (int r = 0; r < NUM_ROWS; ++r) bits[r] = __shfl_sync(~0u, mine[r], owner);
        const int bit = take_highest(bits, slot, selected);
#pragma unroll
        for (int r = 0; r < NUM_ROWS; ++r) mine[r] = lane == owner ? bits[r] : mine[r];
        return ((base_word + owner) * 32 + bit) * KEY_BLOCK;
      }
      if (base_word == first_word) return -1;
      base_word -= 32;
      load_mine();
    }
  }
};
