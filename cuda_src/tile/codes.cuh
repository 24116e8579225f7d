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

// Eight int8 codes x * factor, half to even, a byte each; a factor of 0 gives 0 whatever x is. |x * factor| <= 127.
__device__ __forceinline__ uint2 encode_eight(const float (&x)[8], float factor) {
  constexpr float ROUND = 12582912.f;  // 1.5 * 2^23: the sum's last bits are an integer
  uint32_t bits[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) bits[i] = __float_as_uint(__fadd_rn(__fmul_rn(x[i], factor), ROUND));
  uint32_t words[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t low = __byte_perm(bits[4 * i], bits[4 * i + 1], 0x0040);
    const uint32_t high = __byte_perm(bits[4 * i + 2], bits[4 * i + 3], 0x0040);
    words[i] = factor == 0.f ? 0 : __byte_perm(low, high, 0x5410);
  }
  return {words[0], words[1]};
}

// One code, half to even, clamped; a factor of 0 gives 0 whatever x is.
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

// Where codes of dims [8 * chunk, + 8) of row `row` lie in the head's tiles (salekit/codes.py).
template <int HEAD_DIM, int CODE_BITS>
__device__ __forceinline__ uint8_t* place_of_eight(uint8_t* tiles, int row, int chunk) {
  constexpr int ROW_BYTES = HEAD_DIM * CODE_BITS / 8;
  uint8_t* tile = tiles + int64_t(row / CODE_TILE_ROWS) * (CODE_TILE_ROWS * ROW_BYTES);
  return tile + swizzle<ROW_BYTES>(row % CODE_TILE_ROWS * ROW_BYTES + chunk * CODE_BITS);
}

template <int HEAD_DIM>
__device__ __forceinline__ void store_eight(uint8_t* tiles, int row, int chunk, uint2 codes) {
  *reinterpret_cast<uint2*>(place_of_eight<HEAD_DIM, 8>(tiles, row, chunk)) = codes;
}

// 4-bit codes, in a byte each or packed, by CODE_BITS.
template <int HEAD_DIM, int CODE_BITS>
__device__ __forceinline__ void store_eight(uint8_t* tiles, int row, int chunk, const int (&code)[8]) {
  constexpr int PER_WORD = 32 / CODE_BITS;
  uint32_t words[8 / PER_WORD] = {};
#pragma unroll
  for (int i = 0; i < 8; ++i)
    words[i / PER_WORD] |= uint32_t(code[i] & ((1 << CODE_BITS) - 1)) << (CODE_BITS * (i % PER_WORD));
  uint8_t* target = place_of_eight<HEAD_DIM, CODE_BITS>(tiles, row, chunk);
  if constexpr (CODE_BITS == 8)
    *reinterpret_cast<uint2*>(target) = {words[0], words[1]};
  else
    *reinterpret_cast<uint32_t*>(target) = words[0];
}

// Which two of four dims are kept: the first and the second position.
struct KeptPair {
  uint32_t first, second;

  // The largest two weights; of equal ones the lower. No weight is NaN.
  __device__ __forceinline__ static KeptPair largest(const float* w) {
    const bool b01 = w[0] >= w[1], b02 = w[0] >= w[2], b03 = w[0] >= w[3];  // the former is ahead
    const bool b12 = w[1] >= w[2], b13 = w[1] >= w[3], b23 = w[2] >= w[3];
    const bool keep0 = (b01 & b02) | (b01 & b03) | (b02 & b03);  // ahead of two of the others
    const bool keep1 = (!b01 & b12) | (!b01 & b13) | (b12 & b13);
    const bool keep2 = (!b02 & !b12) | (!b02 & b23) | (!b12 & b23);
    const bool keep3 = (!b03 & !b13) | (!b03 & !b23) | (!b13 & !b23);
    return {keep0 ? 0u : keep1 ? 1u : 2u, keep3 ? 3u : keep2 ? 2u : 1u};
  }

  __device__ __forceinline__ bool has(uint32_t i) const { return (i == first) | (i == second); }
};

// Stores eight codes of a row pruned 2:4, dims [8 * chunk, + 8), as the tensor cores take them from registers: words
// [64-row tile][64-dim step][4 of codes, 1 of metadata][thread of a warpgroup] (salekit/codes.py, wgmma_sp.cuh).
// kept: of the lower and the upper four dims. All lanes of a warp call it; those of one row's chunks are neighbours.
template <int HEAD_DIM>
__device__ __forceinline__ void store_eight_sparse(uint32_t* words, int row, int chunk, uint2 codes,
                                                   const KeptPair (&kept)[2]) {
  constexpr int STEP_WORDS = 5 * 128;
  const uint32_t low = __byte_perm(codes.x, 0, kept[0].first | kept[0].second << 4);
  const uint32_t high = __byte_perm(codes.y, 0, kept[1].first | kept[1].second << 4);
  uint32_t positions = kept[0].first | kept[0].second << 2 | kept[1].first << 4 | kept[1].second << 6;
  positions <<= 8 * (chunk % 4);  // four chunks make a word of metadata
  positions |= __shfl_xor_sync(~0u, positions, 1);
  positions |= __shfl_xor_sync(~0u, positions, 2);
  const int in_tile = row % 64, high_rows = in_tile / 8 % 2, part = chunk % 8 / 4;
  const int quad = in_tile / 16 * 32 + in_tile % 8 * 4;  // the first of the four threads that hold the row
  words += (int64_t(row / 64) * (HEAD_DIM / 64) + chunk / 8) * STEP_WORDS;
  words[(high_rows + 2 * part) * 128 + quad + chunk % 4] = __byte_perm(low, high, 0x5410);
  if (chunk % 4 == 0) words[4 * 128 + quad + high_rows + 2 * part] = positions;
}
