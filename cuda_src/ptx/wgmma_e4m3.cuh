// Warpgroup products of e4m3 elements with float32 accumulation, A from registers (PTX ISA, "wgmma.mma_async"), and the
// conversion to e4m3 (PTX ISA, "cvt"). The tensor cores add with some 13 bits: long sums belong elsewhere, now and
// then.
// Asynchronous like those of wgmma.cuh.
#pragma once
#include "ptx/wgmma_f16.cuh"

// Four floats to bytes, the first lowest; half to even, at most 448 in size; NaN stays NaN.
__device__ __forceinline__ uint32_t pack_e4m3(float a, float b, float c, float d) {
  uint32_t packed;
  asm("{\n.reg .b16 low, high;\n"
      "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
      "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
      "mov.b32 %0, {low, high};\n}"
      : "=r"(packed) : "f"(a), "f"(b), "f"(c), "f"(d));
  return packed;
}

// d (64 x N) += A (64 x 32, registers) * B (N x 32, shared memory, K-major); N is 136 or 72. Lane l of warp w has rows
// 16w + l/4 and + 8 of d and of A: columns 8j + 2*(l%4) and + 1 in d[4j .. 4j+3], bytes 4*(l%4) .. + 3 of A's row in
// a[0] (row + 8: a[1]), 16 further in a[2] (a[3]).
__device__ __forceinline__ void wgmma_m64k32_rs_e4m3(float (&d)[68], const uint32_t (&a)[4], uint64_t b_desc) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n136k32.f32.e4m3.e4m3 {" SALEKIT_D64_TEXT
               ", %64, %65, %66, %67}, {%68, %69, %70, %71}, %72, 1, 1, 1;"
               : SALEKIT_D64_OUT, "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_desc));
}

__device__ __forceinline__ void wgmma_m64k32_rs_e4m3(float (&d)[36], const uint32_t (&a)[4], uint64_t b_desc) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n72k32.f32.e4m3.e4m3 {" SALEKIT_D32_TEXT
               ", %32, %33, %34, %35}, {%36, %37, %38, %39}, %40, 1, 1, 1;"
               : SALEKIT_D32_OUT, "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_desc));
}
