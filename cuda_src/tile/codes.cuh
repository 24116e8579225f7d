// Codes from floats: amax as bits (so that NaN counts), scales, rounding, and where a thread's eight codes are stored.
#pragma once
#include "tile/element.cuh"
#include "tile/shape.cuh"
#include "tile/swizzle.cuh"

constexpr uint32_t INFINITE_BITS = 0x7F800000;  // |x| as bits from here on: infinity and NaN
constexpr float ZERO_GROUP = 7.8886090522101181e-31f;  // 2^-100: a group whose amax is below has codes 0, scale 1

__device__ __forceinline__ uint32_t magnitude_bits(float x) { return __float_as_uint(x) & 0x7FFFFFFF; }

// Largest of a power-of-two number of neighbouring lanes.
template <int LANES>
__device__ __forceinline__ uint32_t max_over_lanes(uint32_t bits) {
#pragma unroll
  for (int step = LANES / 2; step > 0; step /= 2) bits = max(bits, __shfl_xor_sync(~0u, bits, step));
  return bits;
}

// How a group is quantised: code = rint(x * factor), factor 0 for zero and non-finite groups.
struct GroupScale {
  float factor, scale;

  __device__ __forceinline__ GroupScale(uint32_t amax_bits, float limit) {
    float amax = __uint_as_float(amax_bits);
    bool finite = amax_bits < INFINITE_BITS, zero = amax < ZERO_GROUP;
    factor = finite && !zero ? __fdiv_rn(limit, amax) : 0.f;
    scale = zero ? 1.f : finite ? __fdiv_rn(amax, limit) : __uint_as_float(0x7FC00000);
  }
};

// Half to even, clamped; a factor of 0 gives 0 whatever x is.
__device__ __forceinline__ int encode(float x, float factor, int limit) {
  int code = factor == 0.f ? 0 : __float2int_rn(__fmul_rn(x, factor));
  return max(-limit, min(limit, code));
}

template <typename Element>
__device__ __forceinline__ void unpack_eight(float (&x)[8], const uint4& words) {
  const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float2 pair = unpack<Element>(word[i]);
    x[2 * i] = pair.x;
    x[2 * i + 1] = pair.y;
  }
}

template <typename Element>
__device__ __forceinline__ void load_eight(float (&x)[8], const uint16_t* gmem) {
  unpack_eight<Element>(x, *reinterpret_cast<const uint4*>(gmem));
}

// Stores eight codes, dims [8 * chunk, + 8) of row `row`, into the head's tiles (salekit/codes.py).
template <int HEAD_DIM, int CODE_BITS>
__device__ __forceinline__ void store_eight(uint8_t* tiles, int row, int chunk, const int (&code)[8]) {
  constexpr int ROW_BYTES = HEAD_DIM * CODE_BITS / 8;
  uint8_t* tile = tiles + int64_t(row / CODE_TILE_ROWS) * (CODE_TILE_ROWS * ROW_BYTES);
  uint8_t* target = tile + swizzle<ROW_BYTES>(row % CODE_TILE_ROWS * ROW_BYTES + chunk * CODE_BITS);
  if constexpr (CODE_BITS == 8) {
    uint2 packed = {0, 0};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      packed.x |= uint32_t(code[i] & 255) << (8 * i);
      packed.y |= uint32_t(code[4 + i] & 255) << (8 * i);
    }
    *reinterpret_cast<uint2*>(target) = packed;
  } else {
    uint32_t packed = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) packed |= uint32_t(code[i] & 15) << (4 * i);
    *reinterpret_cast<uint32_t*>(target) = packed;
  }
}

// Stores eight codes of a row pruned 2:4, dims [8 * chunk, + 8), as the tensor cores take them from registers: words
// [64-row tile][64-dim step][4 of codes, 1 of metadata][thread of a warpgroup] (salekit/codes.py, wgmma_sp.cuh).
// keep: which dims are held, two of every four. All lanes of a warp call it; those of one row's chunks are neighbours.
template <int HEAD_DIM>
__device__ __forceinline__ void store_eight_sparse(uint32_t* words, int row, int chunk, const int (&code)[8],
                                                   uint32_t keep) {
  constexpr int STEP_WORDS = 5 * 128;
  uint32_t codes = 0, positions = 0;
  int num_kept = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (keep >> i & 1) {
      codes |= uint32_t(code[i] & 255) << (8 * num_kept);
      positions |= uint32_t(i % 4) << (2 * num_kept);
      ++num_kept;
    }
  }
  positions <<= 8 * (chunk % 4);  // four chunks make a word of metadata
  positions |= __shfl_xor_sync(~0u, positions, 1);
  positions |= __shfl_xor_sync(~0u, positions, 2);
  const int in_tile = row % 64, high = in_tile / 8 % 2, part = chunk % 8 / 4;
  const int quad = in_tile / 16 * 32 + in_tile % 8 * 4;  // the first of the four threads that hold the row
  words += (int64_t(row / 64) * (HEAD_DIM / 64) + chunk / 8) * STEP_WORDS;
  words[(high + 2 * part) * 128 + quad + chunk % 4] = codes;
  if (chunk % 4 == 0) words[4 * 128 + quad + high + 2 * part] = positions;
}
