// Codes from floats: amax as bits (so that NaN counts), scales, rounding, and where a thread's eight codes are stored.
#pragma once
#include "ptx/ld_global.cuh"
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

// Of four values a lane, the maxima over LANES neighbouring lanes: lane l gets that of value l % 4.
template <int LANES>
__device__ __forceinline__ uint32_t max_transposed(const uint32_t (&value)[4]) {
  const bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
  const uint32_t low_pair = max(odd ? value[1] : value[0], __shfl_xor_sync(~0u, odd ? value[0] : value[1], 1));
  const uint32_t high_pair = max(odd ? value[3] : value[2], __shfl_xor_sync(~0u, odd ? value[2] : value[3], 1));
  uint32_t most = max(high ? high_pair : low_pair, __shfl_xor_sync(~0u, high ? low_pair : high_pair, 2));
#pragma unroll
  for (int step = 4; step < LANES; step *= 2) most = max(most, __shfl_xor_sync(~0u, most, step));
  return most;
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

// Four int8 codes x * factor, half to even, a byte each. |x * factor| <= 127; of NaN it makes garbage.
__device__ __forceinline__ uint32_t encode_four(const float* x, float factor) {
  constexpr float ROUND = 12582912.f;  // 1.5 * 2^23: the sum's last bits are an integer
  uint32_t bits[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) bits[i] = __float_as_uint(__fadd_rn(__fmul_rn(x[i], factor), ROUND));
  return __byte_perm(__byte_perm(bits[0], bits[1], 0x0040), __byte_perm(bits[2], bits[3], 0x0040), 0x5410);
}

// Eight of them; a factor of 0 gives 0 whatever x is.
__device__ __forceinline__ uint2 encode_eight(const float (&x)[8], float factor) {
  uint2 codes = {encode_four(x, factor), encode_four(x + 4, factor)};
  if (factor == 0.f) codes = {0, 0};
  return codes;
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
  unpack_eight<Element>(x, ld_global_16(gmem, true));
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

// Which two of four dims are kept: those with the largest weights; of equal ones the lower. No weight is NaN.
struct KeptPair {
  bool left_first, right_first, both_left, both_right;

  __device__ __forceinline__ explicit KeptPair(const float* weight) {
    left_first = weight[0] >= weight[1];
    right_first = weight[2] >= weight[3];
    both_left = fminf(weight[0], weight[1]) >= fmaxf(weight[2], weight[3]);
    both_right = fminf(weight[2], weight[3]) > fmaxf(weight[0], weight[1]);
  }

  __device__ __forceinline__ float first(const float* x) const {
    return both_right ? x[2] : both_left || left_first ? x[0] : x[1];
  }
  __device__ __forceinline__ float second(const float* x) const {
    return both_left ? x[1] : both_right || !right_first ? x[3] : x[2];
  }
  // Their positions, two bits each.
  __device__ __forceinline__ uint32_t places() const {
    return both_left ? 0 | 1 << 2 : both_right ? 2 | 3 << 2 : (left_first ? 0 : 1) | (right_first ? 2 : 3) << 2;
  }
};
