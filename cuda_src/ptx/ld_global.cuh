// 16-byte loads that stay above the next __syncwarp, so that several are in flight (PTX ISA, "ld.global").
#pragma once
#include "tile/types.cuh"

// Zeros when `valid` is false (the source is then not read).
__device__ __forceinline__ uint4 ld_global_16(const void* gmem, bool valid) {
  uint4 d;
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %5, 0;\n"
      "mov.b32 %0, 0;\nmov.b32 %1, 0;\nmov.b32 %2, 0;\nmov.b32 %3, 0;\n"
      "@p ld.global.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
      : "=&r"(d.x), "=&r"(d.y), "=&r"(d.z), "=&r"(d.w) : "l"(gmem), "r"(int(valid)) : "memory");
  return d;
}
