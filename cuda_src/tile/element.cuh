// The two 16-bit element types as tags: conversions and the names that mma wants. No CUDA headers are needed.
#pragma once
#include "tile/types.cuh"

struct Half {
  static constexpr uint32_t INFINITE = 0x7C00;  // the bits of infinity; those of NaN are larger
  __device__ static float to_float(uint16_t bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
  }
  // Round two floats to nearest even; `low` goes to the low half.
  __device__ static uint32_t pack(float low, float high) {
    uint32_t packed;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
  }
};

struct BFloat16 {
  static constexpr uint32_t INFINITE = 0x7F80;
  __device__ static float to_float(uint16_t bits) { return __uint_as_float(uint32_t(bits) << 16); }
  __device__ static uint32_t pack(float low, float high) {
    uint32_t packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
  }
};

// The two elements of a 32-bit word.
template <typename Element>
__device__ __forceinline__ float2 unpack(uint32_t word) {
  return {Element::to_float(uint16_t(word)), Element::to_float(uint16_t(word >> 16))};
}
