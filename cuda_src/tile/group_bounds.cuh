// Bounds that decide nearly all int4 votes without a division (tile/votes.cuh has the exact decision, GroupVote).
//
// A pair of row and key votes when acc + C > T, C = rint(c / (sq * sk)) and T = floor(y / (softmax_scale * sq * sk)).
// Both quotients are nearly products of a factor of the row pair and one of the key: (1 / sq) * (c / sk) and
// (y / (softmax_scale * sq)) * (1 / sk). Those products differ from the rounded quotients by less than 5 units of
// 2^-24, relatively; factors moved by 2^-21 (8 units, less one for the move's own rounding) bound them, and rint and
// floor, being monotone, keep the bounds. While quotients stay below 2^19 a bound is off by one at most, and hardly
// ever.
// Integers are made by adding 1.5 * 2^23: the sum's bits are BOUND_BITS + rint(x), or + floor(x) when it rounds down.
#pragma once
#include "tile/divide.cuh"
#include "tile/votes.cuh"

constexpr float BOUND_MAGIC = 12582912.f;     // 1.5 * 2^23
constexpr float BOUND_REACH = 524288.f;       // 2^19
constexpr float BOUND_DOWN = 1.f - 1.f / 2097152.f, BOUND_UP = 1.f + 1.f / 2097152.f;    // 1 -+ 2^-21
constexpr float BOUND_DOWN_2 = 1.f - 1.f / 1048576.f, BOUND_UP_2 = 1.f + 1.f / 1048576.f;  // 1 -+ 2^-20
constexpr float BOUND_LARGEST = 1099511627776.f;  // 2^40: no factor and no product of factors leaves the normal numbers
constexpr float BOUND_SMALLEST = 1.f / 1099511627776.f;

__device__ __forceinline__ bool bound_in_range(float x) { return x >= BOUND_SMALLEST && x <= BOUND_LARGEST; }

// Upper bound of x * (1 -+ 5 * 2^-24), as a factor; infinities stay.
__device__ __forceinline__ float moved_up(float x) { return __fmul_rn(x, x > 0 ? BOUND_UP : BOUND_DOWN); }
__device__ __forceinline__ float moved_down(float x) { return __fmul_rn(x, x > 0 ? BOUND_DOWN : BOUND_UP); }

// The key side of the bounds, of one query head and 128 keys; written by prepare_int4_bounds.
struct KeyBounds {
  float corrections[4][4][8];  // [32-key block][group][column]: c / sk, moved up; -inf for absent keys
  float reciprocals[4][4];     // [group][32-key block]: 1 / sk
  float largest_correction;    // |c / sk|
  float largest_reciprocal;    // infinite when a scale is out of range
  float unused[2];
};
static_assert(sizeof(KeyBounds) % 16 == 0, "bulk copies take multiples of 16 bytes");

// The row side, of rows r and r + 8, which share a scale.
struct RowBounds {
  float reciprocal;        // 1 / sq
  float low[2], high[2];   // y / (softmax_scale * sq), moved down and up
  float largest;           // |y / (softmax_scale * sq)|, 0 for infinities; infinite when the bounds do not hold

  // One of two, selected value by value so that both stay in registers.
  __device__ __forceinline__ RowBounds(bool first, const RowBounds& a, const RowBounds& b)
      : reciprocal(first ? a.reciprocal : b.reciprocal), largest(first ? a.largest : b.largest) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      low[r] = first ? a.low[r] : b.low[r];
      high[r] = first ? a.high[r] : b.high[r];
    }
  }

  __device__ __forceinline__ explicit RowBounds(const GroupVote& of) {
    const float q_scale = of.q_scale, scaled_q = of.scaled_q;
    const float(&y)[2] = of.y;
    const bool in_range = bound_in_range(q_scale) && bound_in_range(scaled_q);
    reciprocal = in_range ? __frcp_rn(q_scale) : 1.f;
    largest = 0.f;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (y[r] == INFINITY) {
        low[r] = high[r] = INFINITY;
      } else if (y[r] == -INFINITY || isnan(y[r]) || isnan(scaled_q)) {
        low[r] = high[r] = -INFINITY;
      } else {
        const bool holds = in_range && (y[r] == 0.f || bound_in_range(fabsf(y[r])));
        const float x = holds ? __fdiv_rn(y[r], scaled_q) : 0.f;
        low[r] = moved_down(x);
        high[r] = moved_up(x);
        largest = fmaxf(largest, holds ? fabsf(x) : INFINITY);
      }
    }
  }

  // Whether the bounds hold for keys whose largest factors these are.
  __device__ __forceinline__ bool hold(float largest_correction, float largest_reciprocal) const {
    return (reciprocal * largest_correction < BOUND_REACH) & (largest * largest_reciprocal < BOUND_REACH);
  }
};

// One lane and 32 keys: e as in votes.cuh. Returns votes that are certain (CERTAIN_VOTE) and possible (POSSIBLE_VOTE).
constexpr uint32_t CERTAIN_VOTE = 1, POSSIBLE_VOTE = 1u << 16;

__device__ __forceinline__ uint32_t bounded_vote(const int* e, const float (&corrections)[8], float k_reciprocal,
                                                 const RowBounds& rows) {
  int rounded[8];
#pragma unroll
  for (int column = 0; column < 8; ++column)
    rounded[column] = __float_as_int(__fmaf_rn(corrections[column], rows.reciprocal, BOUND_MAGIC));
  bool certain[2], possible[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    int top = e[2 * r] + rounded[0];
#pragma unroll
    for (int column = 1; column < 8; ++column)
      top = __viaddmax_s32(e[column / 2 * 4 + 2 * r + column % 2], rounded[column], top);
    // The largest sum is top or top - 1.
    possible[r] = top > __float_as_int(__fmaf_rd(rows.low[r], k_reciprocal, BOUND_MAGIC));
    certain[r] = top > __float_as_int(__fmaf_rd(rows.high[r], k_reciprocal, BOUND_MAGIC + 1.f));
  }
  uint32_t votes = 0;
  if (possible[0] | possible[1]) votes |= POSSIBLE_VOTE;
  if (certain[0] | certain[1]) votes |= CERTAIN_VOTE;
  return votes;
}

// Whether a score passes by the lower bounds of the corrections: settles nearly all that is possible and not certain.
__device__ __forceinline__ bool certain_vote(const int* e, const float (&corrections)[8], float k_reciprocal,
                                             const RowBounds& rows) {
  int rounded[8];
#pragma unroll
  for (int column = 0; column < 8; ++column)  // corrections are moved up: twice as far down
    rounded[column] = min(
        __float_as_int(__fmaf_rn(corrections[column], __fmul_rn(rows.reciprocal, BOUND_DOWN_2), BOUND_MAGIC)),
        __float_as_int(__fmaf_rn(corrections[column], __fmul_rn(rows.reciprocal, BOUND_UP_2), BOUND_MAGIC)));
  bool vote = false;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    int top = e[2 * r] + rounded[0];
#pragma unroll
    for (int column = 1; column < 8; ++column)
      top = __viaddmax_s32(e[column / 2 * 4 + 2 * r + column % 2], rounded[column], top);
    vote |= top > __float_as_int(__fmaf_rd(rows.high[r], k_reciprocal, BOUND_MAGIC));
  }
  return vote;
}
