// What a call does to scores beside the causal limit: flags of a kernel's template, so that plain calls have no code
// for it. Mirrors salekit/plans.py.
#pragma once
#include "ptx/ex2.cuh"
#include "ptx/rcp.cuh"
#include "tile/types.cuh"

constexpr int SOFTCAP = 1, WINDOW = 2, SINKS = 4;
constexpr float LOG2_E = 1.4426950408889634f;

// tanh(x) = 1 - 2 / (1 + e^2x) of x = softmax_scale * q.k / softcap, within 2^-22: tanh.approx is off by up to 2^-11,
// which softcap, some 50, would make .02 of a score.
struct SoftCap {
  float factor;  // 2 log2(e) softmax_scale / softcap

  __device__ __forceinline__ float operator()(float product) const {
    return fmaf(-2.f, rcp(1.f + ex2(product * factor)), 1.f);
  }
};

// One more logit of a row, without a value: takes part in a maximum and a sum relative to it, in natural units. Returns
// what the row's outputs are to be multiplied by.
__device__ __forceinline__ float add_sink(float& top, float& sum, float sink) {
  const float raised = fmaxf(top, sink);
  if (raised == -INFINITY) return 1.f;
  const float factor = ex2((top - raised) * LOG2_E);
  sum = fmaf(sum, factor, ex2((sink - raised) * LOG2_E));
  top = raised;
  return factor;
}
