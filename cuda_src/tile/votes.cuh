// The decision per 32-key block: does any of a lane's scores pass its row's threshold?
// A lane's 16 scores of a 64- or 16-row product and 32 keys lie in e[4n + 2r + i]: row r of its two (8 apart), columns
// 8n + 2*(lane%4) + i. Integers throughout; corrections are rounded as the NumPy twin rounds them.
#pragma once
#include "tile/divide.cuh"
#include "tile/shape.cuh"

constexpr float VOTE_CLAMP = 1073741824.f;  // 2^30: thresholds and corrections stay inside, so sums do not overflow

// Largest of row r's eight scores.
__device__ __forceinline__ int row_max(const int* e, int r) {
  int top = __vimax3_s32(e[2 * r], e[2 * r + 1], e[2 * r + 4]);
  top = __vimax3_s32(top, e[2 * r + 5], e[2 * r + 8]);
  top = __vimax3_s32(top, e[2 * r + 9], e[2 * r + 12]);
  return max(top, e[2 * r + 13]);
}

// The same over the block's first num_present keys; SELECT_ALL, which passes no threshold, when the lane has none.
__device__ __forceinline__ int row_max_present(const int* e, int r, int num_present) {
  int top = SELECT_ALL;
#pragma unroll
  for (int column = 0; column < 8; ++column) {
    bool present = column / 2 * 8 + threadIdx.x % 4 * 2 + column % 2 < num_present;
    if (present) top = max(top, e[column / 2 * 4 + 2 * r + column % 2]);
  }
  return top;
}

// The same over the block's keys [begin, end).
__device__ __forceinline__ int row_max_within(const int* e, int r, int begin, int end) {
  int top = SELECT_ALL;
#pragma unroll
  for (int column = 0; column < 8; ++column) {
    const int key = column / 2 * 8 + threadIdx.x % 4 * 2 + column % 2;
    if (key >= begin && key < end) top = max(top, e[column / 2 * 4 + 2 * r + column % 2]);
  }
  return top;
}

// floor(y / divisor), clamped; y is the score that a row's pairs have to exceed (salekit.reference.integer_thresholds).
__device__ __forceinline__ int integer_threshold(float y, const Divider& by, bool divisor_in_range) {
  if (y == INFINITY) return SELECT_NONE;
  if (y == -INFINITY) return SELECT_ALL;
  float x = divisor_in_range && Divider::in_range(y) ? by.quotient(y) : __fdiv_rn(y, by.divisor);
  if (isnan(x)) return SELECT_ALL;
  return __float2int_rd(fmaxf(-VOTE_CLAMP, fminf(VOTE_CLAMP, x)));
}

// Largest corrected score of each of the lane's two rows, with the scales of int4's groups: top[r]; SELECT_ALL when the
// lane has no present key. corrections: c_j of the lane's eight columns. whole: every key of the block is present for
// every row; if not, is_present(key, r) says which are for row r.
template <typename IsPresent>
__device__ __forceinline__ void corrected_tops(int (&top)[2], const int* e, const float (&corrections)[8],
                                               float q_scale, float k_scale, bool whole, IsPresent is_present) {
  // Adding 1.5 * 2^23 to |x| < 2^22 rounds x to an integer, half to even, in the sum's low bits.
  constexpr float MAGIC = 12582912.f;
  constexpr int MAGIC_BITS = 0x4B400000;
  constexpr float MAGIC_REACH = 4194304.f;

  const Divider by_scales(__fmul_rn(q_scale, k_scale));
  bool fast = whole && Divider::in_range(by_scales.divisor);
  int rounded[8];
#pragma unroll
  for (int column = 0; column < 8; ++column) {
    float x = by_scales.quotient(corrections[column]);
    fast = fast && fabsf(x) < MAGIC_REACH;
    rounded[column] = __float_as_int(__fadd_rn(x, MAGIC));
  }
  if (fast) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      top[r] = e[2 * r] + rounded[0];
#pragma unroll
      for (int column = 1; column < 8; ++column)
        top[r] = __viaddmax_s32(e[column / 2 * 4 + 2 * r + column % 2], rounded[column], top[r]);
      top[r] -= MAGIC_BITS;
    }
  } else {
    top[0] = top[1] = SELECT_ALL;
#pragma unroll
    for (int column = 0; column < 8; ++column) {
      const int key = column / 2 * 8 + threadIdx.x % 4 * 2 + column % 2;
      float x = rintf(__fdiv_rn(corrections[column], by_scales.divisor));
      int correction = __float2int_rn(fmaxf(-VOTE_CLAMP, fminf(VOTE_CLAMP, x)));  // NaN: + 2^30
#pragma unroll
      for (int r = 0; r < 2; ++r)
        if (is_present(key, r)) top[r] = max(top[r], e[column / 2 * 4 + 2 * r + column % 2] + correction);
    }
  }
}

// num_present: keys of the block inside the matrix.
__device__ __forceinline__ void corrected_tops(int (&top)[2], const int* e, const float (&corrections)[8],
                                               float q_scale, float k_scale, int num_present) {
  corrected_tops(top, e, corrections, q_scale, k_scale, num_present >= KEY_BLOCK,
                 [&](int key, int) { return key < num_present; });
}

// Votes of int4 codes with a scale per group of rows and keys: a lane's 16 scores share one pair of scales.
struct GroupVote {
  float q_scale, scaled_q;  // scaled_q = softmax_scale * q_scale
  float y[2];               // per row

  __device__ __forceinline__ bool operator()(const int* e, const float (&corrections)[8], float k_scale,
                                             int num_present) const {
    int top[2];
    corrected_tops(top, e, corrections, q_scale, k_scale, num_present);
    return passes(top, k_scale);
  }

  // Of the keys [begin[r], end[r]) of the block for row r.
  __device__ __forceinline__ bool within(const int* e, const float (&corrections)[8], float k_scale,
                                         const int (&begin)[2], const int (&end)[2]) const {
    int top[2];
    corrected_tops(top, e, corrections, q_scale, k_scale, false,
                   [&](int key, int r) { return key >= begin[r] && key < end[r]; });
    return passes(top, k_scale);
  }

  __device__ __forceinline__ bool passes(const int (&top)[2], float k_scale) const {
    const Divider by_unit(__fmul_rn(scaled_q, k_scale));
    const bool in_range = Divider::in_range(by_unit.divisor);
    const int limits[2] = {integer_threshold(y[0], by_unit, in_range), integer_threshold(y[1], by_unit, in_range)};
    return top[0] > limits[0] || top[1] > limits[1];
  }
};
