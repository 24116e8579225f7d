// Larger of two pairs of unsigned 16-bit integers (PTX ISA, "max"); sm_90 and newer.
#pragma once
#include "tile/types.cuh"

__device__ __forceinline__ uint32_t max_u16x2(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("max.u16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
