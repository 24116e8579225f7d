// Lists the selected, visible 32-key blocks of one mask row, from the last to the first, for all threads of a CTA.
//
// A mask bit stands for 32 << expand_log2 keys; its blocks are listed one by one, so that a kernel sees 32-key blocks
// whatever the mask's own block is. The list lies in shared memory, covers WALKER_WORDS * 32 blocks and is refilled
// when it runs out.
#pragma once
#include "tile/shape.cuh"

constexpr int WALKER_WORDS = 22;  // at most one a lane of the warp that fills the list; as many as fit in 3 KB

struct BlockList {
  static constexpr int SIZE = WALKER_WORDS * 32 + 2;  // room for a block that the filling before left over
  int blocks[SIZE];  // the last `count` are in use
  int count;
  int word;         // the first word, of 32 blocks, that is not listed yet; they go down; negative: there is none
  int num_visible;  // blocks; those from here on are never listed
  int first;        // nor are those before this one; a window's alone
  const uint32_t* mask_row;  // null: every visible block is selected
};

// Copies every bit of part `part` of `bits` 1 << expand_log2 times, to 32 bits.
__device__ __forceinline__ uint32_t expand_bits(uint32_t bits, int part, int expand_log2) {
  const int width = 32 >> expand_log2;
  const uint32_t ones = (1u << (1 << expand_log2)) - 1;
  uint32_t expanded = 0;
  for (int i = 0; i < width; ++i)
    if (bits >> (part * width + i) & 1) expanded |= ones << (i << expand_log2);
  return expanded;
}

// What is needed only when the list runs out lives in shared memory: kernels that use this have no registers to spare.
template <bool WINDOWED = false>
class BlockWalker {
  BlockList& list_;
  int expand_log2_;
  int left_ = 0;  // blocks listed and not yet taken, at the end of the list

  __device__ __forceinline__ int first_word() const { return WINDOWED ? list_.first / 32 : 0; }

  __device__ __forceinline__ uint32_t load(int word) const {
    if (word < first_word()) return 0;
    uint32_t bits = ~0u;
    if (list_.mask_row != nullptr) {
      bits = list_.mask_row[word >> expand_log2_];
      if (expand_log2_ != 0) bits = expand_bits(bits, word & ((1 << expand_log2_) - 1), expand_log2_);
    }
    if (WINDOWED && word == first_word()) bits &= ~0u << list_.first % 32;
    const int below = list_.num_visible - 32 * word;  // > 0: visible blocks from this word's first on
    return below >= 32 ? bits : bits & ((1u << below) - 1);
  }

  __device__ __forceinline__ void fill() {
    __syncthreads();  // every thread has read its blocks and the count
    if (threadIdx.x < 32) {
      const int lane = threadIdx.x;
      const int left_over = list_.blocks[BlockList::SIZE - 1];  // there is at most one
      const int word = list_.word;
      uint32_t bits = lane < WALKER_WORDS ? load(word - lane) : 0;
      const int mine = __popc(bits);
      int end = mine;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const int before = __shfl_up_sync(~0u, end, step);
        if (lane >= step) end += before;
      }
      const int count = left_ + __shfl_sync(~0u, end, 31);
      const int begin = BlockList::SIZE - count;
      __syncwarp();
      if (lane == 0 && left_ > 0) list_.blocks[begin] = left_over;
      for (int i = begin + left_ + end - mine; bits != 0; ++i) {
        const int bit = 31 - __clz(bits);
        list_.blocks[i] = (word - lane) * 32 + bit;
        bits ^= 1u << bit;
      }
      if (lane == 0) {
        list_.count = count;
        list_.word = word - WALKER_WORDS < first_word() ? -1 : word - WALKER_WORDS;
      }
    }
    __syncthreads();
    left_ = list_.count;
  }

 public:
  // The row begins at mask_row; blocks [first, num_visible) may be listed. All threads together.
  __device__ BlockWalker(BlockList& list, const uint32_t* mask_row, int expand_log2, int first, int num_visible)
      : list_(list), expand_log2_(expand_log2) {
    if (threadIdx.x == 0) {
      list.word = num_visible > 0 ? (num_visible - 1) / 32 : -1;
      list.num_visible = num_visible;
      if (WINDOWED) list.first = first;
      list.mask_row = mask_row;
    }
    __syncthreads();
  }

  // The next two blocks, the later one first; -1: there is none. All threads call it together (it may synchronise).
  __device__ __forceinline__ int2 next() {
    while (left_ < 2 && list_.word >= 0) fill();
    int2 blocks = make_int2(-1, -1);
    if (left_ > 0) blocks.x = list_.blocks[BlockList::SIZE - left_];
    if (left_ > 1) blocks.y = list_.blocks[BlockList::SIZE - left_ + 1];
    left_ -= 2;
    return blocks;
  }
};
