// Block masks with 32-key blocks -> blocks of FACTOR * 32 keys: each bit is the OR of FACTOR bits.
//
// fine [num_rows, fine_words], coarse [num_rows, coarse_words]: uint32 words, bits little-endian along keys.
// Grid: ceil(num_rows * coarse_words / 256) CTAs of 256 threads, a coarse word each.
#include "tile/types.cuh"

// ORs neighbouring bits and packs the 16 results into the low half.
__device__ __forceinline__ uint32_t or_pairs(uint32_t x) {
  x = (x | x >> 1) & 0x55555555u;
  x = (x | x >> 1) & 0x33333333u;
  x = (x | x >> 2) & 0x0f0f0f0fu;
  x = (x | x >> 4) & 0x00ff00ffu;
  return (x | x >> 8) & 0x0000ffffu;
}

template <int FACTOR>
__global__ void __launch_bounds__(256)
    coarsen_mask(const uint32_t* fine_gmem, uint32_t* coarse_gmem, int64_t num_rows, int fine_words, int coarse_words) {
  static_assert(FACTOR == 2 || FACTOR == 4, "coarse blocks are 64 or 128 keys");
  const int64_t index = int64_t(blockIdx.x) * 256 + threadIdx.x;
  if (index >= num_rows * coarse_words) return;
  const int64_t row = index / coarse_words;
  const int word = int(index % coarse_words);
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < FACTOR; ++i) {
    if (word * FACTOR + i >= fine_words) break;
    uint32_t part = or_pairs(fine_gmem[row * fine_words + word * FACTOR + i]);
    if (FACTOR == 4) part = or_pairs(part);
    bits |= part << (i * (32 / FACTOR));
  }
  coarse_gmem[index] = bits;
}
