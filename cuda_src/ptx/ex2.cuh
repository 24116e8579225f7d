// 2^x, approximate, flushing denormals (PTX ISA, "ex2": maximum relative error 2^-22).
#pragma once

__device__ __forceinline__ float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
