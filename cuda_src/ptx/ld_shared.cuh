// Loads from shared memory by its 32-bit address (PTX ISA, "ld"): a pointer whose origin the compiler has lost would be
// loaded from through the generic address space.
#pragma once
#include "tile/types.cuh"

__device__ __forceinline__ float4 ld_shared_f32x4(uint32_t address) {
  float4 x;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w) : "r"(address) : "memory");
  return x;
}

__device__ __forceinline__ float2 ld_shared_f32x2(uint32_t address) {
  float2 x;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(address) : "memory");
  return x;
}

__device__ __forceinline__ float ld_shared_f32(uint32_t address) {
  float x;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(address) : "memory");
  return x;
}
