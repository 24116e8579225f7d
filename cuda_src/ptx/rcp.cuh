// 1 / x, to one unit in the last place; 0 for infinity (PTX ISA, "rcp.approx.ftz").
#pragma once

__device__ __forceinline__ float rcp(float x) {
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(x));
  return inverse;
}
