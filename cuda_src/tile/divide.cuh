// Many correctly rounded quotients by one divisor. One reciprocal and two Newton corrections give the same bits as an
// IEEE division (Markstein, "Computation of elementary functions on the IBM RISC System/6000", 1990, theorem 8.3)
// while nothing overflows or underflows; the caller takes __fdiv_rn for the rest.
#pragma once

constexpr float DIVIDE_LARGEST = 1152921504606846976.f;       // 2^60: quotients stay inside 2^-120 .. 2^120
constexpr float DIVIDE_SMALLEST = 1.f / 1152921504606846976.f;

struct Divider {
  float divisor, reciprocal;

  __device__ __forceinline__ explicit Divider(float x) : divisor(x), reciprocal(__frcp_rn(x)) {}

  // Whether x may be the divisor, or a dividend whose quotient matters however small; false for NaN.
  __device__ static __forceinline__ bool in_range(float x) {
    return fabsf(x) >= DIVIDE_SMALLEST && fabsf(x) <= DIVIDE_LARGEST;
  }

  __device__ __forceinline__ float quotient(float dividend) const {
    float estimate = __fmul_rn(dividend, reciprocal);
    float faithful = __fmaf_rn(__fmaf_rn(-estimate, divisor, dividend), reciprocal, estimate);
    return __fmaf_rn(__fmaf_rn(-faithful, divisor, dividend), reciprocal, faithful);
  }
};
