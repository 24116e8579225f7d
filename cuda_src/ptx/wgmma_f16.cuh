// Warpgroup products of 16-bit elements with float32 accumulation (PTX ISA, "wgmma.mma_async").
// A warpgroup holds 64 rows: lane l of warp w has rows 16w + l/4 and + 8, columns 8j + 2*(l%4) and + 1 in d[4j ..
// 4j+3].
// All are asynchronous: wgmma_fence before the first, wgmma_commit after the last, wgmma_wait before d is read.
#pragma once
#include "tile/element.cuh"

// Accumulators as operands of asm, %0 on.
#define SALEKIT_D32_TEXT \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15" \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define SALEKIT_D48_TEXT \
  SALEKIT_D32_TEXT ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define SALEKIT_D64_TEXT \
  SALEKIT_D48_TEXT ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define SALEKIT_D96_TEXT \
  SALEKIT_D64_TEXT ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define SALEKIT_D128_TEXT \
  SALEKIT_D96_TEXT ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define SALEKIT_OUT8(I) \
  "+f"(d[I]), "+f"(d[I + 1]), "+f"(d[I + 2]), "+f"(d[I + 3]), "+f"(d[I + 4]), "+f"(d[I + 5]), "+f"(d[I + 6]), \
      "+f"(d[I + 7])
#define SALEKIT_OUT16(I) SALEKIT_OUT8(I), SALEKIT_OUT8(I + 8)
#define SALEKIT_D32_OUT SALEKIT_OUT16(0), SALEKIT_OUT16(16)
#define SALEKIT_D48_OUT SALEKIT_D32_OUT, SALEKIT_OUT16(32)
#define SALEKIT_D64_OUT SALEKIT_D48_OUT, SALEKIT_OUT16(48)
#define SALEKIT_D96_OUT SALEKIT_D64_OUT, SALEKIT_OUT16(64), SALEKIT_OUT16(80)
#define SALEKIT_D128_OUT SALEKIT_D96_OUT, SALEKIT_OUT16(96), SALEKIT_OUT16(112)

// d (64 x N) = or += A (64 x 16, shared memory, K-major) * B (N x 16, shared memory, K-major); N is 2 * NUM_REGS: 64,
// 96 or 128.
template <typename Element, int NUM_REGS>
__device__ __forceinline__ void wgmma_m64k16_ss(float (&d)[NUM_REGS], uint64_t a_desc, uint64_t b_desc,
                                                bool accumulate);

// d (64 x N) += A (64 x 16, registers) * B (16 x N, shared memory, N-major); N is 2 * NUM_REGS: 64, 96, 128, 192 or
// 256.
template <typename Element, int NUM_REGS>
__device__ __forceinline__ void wgmma_m64k16_rs(float (&d)[NUM_REGS], const uint32_t (&a)[4], uint64_t b_desc);

// The same, d = or += A * B; N is 64 or 128.
template <typename Element, int NUM_REGS>
__device__ __forceinline__ void wgmma_m64k16_rs(float (&d)[NUM_REGS], const uint32_t (&a)[4], uint64_t b_desc,
                                                bool accumulate);

// d (64 x 64) = or += A (64 x 16, registers) * B (64 x 16, shared memory, K-major).
template <typename Element>
__device__ __forceinline__ void wgmma_m64n64k16_rs(float (&d)[32], const uint32_t (&a)[4], uint64_t b_desc,
                                                   bool accumulate);

// COLUMNS: N, 2 * REGS; then the operands behind d, as text.
#define SALEKIT_WGMMA_SS(ELEMENT, NAME, REGS, COLUMNS, A_AND_B, FLAG) \
  template <> \
  __device__ __forceinline__ void wgmma_m64k16_ss<ELEMENT, REGS>(float (&d)[REGS], uint64_t a_desc, uint64_t b_desc, \
                                                                bool accumulate) { \
    asm volatile( \
        "{\n.reg .pred p;\nsetp.ne.b32 p, " FLAG ", 0;\n" \
        "wgmma.mma_async.sync.aligned.m64n" COLUMNS "k16.f32." NAME "." NAME " {" SALEKIT_D##REGS##_TEXT \
        "}, " A_AND_B ", p, 1, 1, 0, 0;\n}" \
        : SALEKIT_D##REGS##_OUT \
        : "l"(a_desc), "l"(b_desc), "r"(int(accumulate))); \
  }

#define SALEKIT_WGMMA_RS(ELEMENT, NAME, REGS, COLUMNS, A, B) \
  template <> \
  __device__ __forceinline__ void wgmma_m64k16_rs<ELEMENT, REGS>(float (&d)[REGS], const uint32_t (&a)[4], \
                                                                uint64_t b_desc) { \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" COLUMNS "k16.f32." NAME "." NAME " {" SALEKIT_D##REGS##_TEXT \
                 "}, {" A "}, " B ", 1, 1, 1, 1;" \
                 : SALEKIT_D##REGS##_OUT \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_desc)); \
  }

#define SALEKIT_WGMMA(ELEMENT, NAME) \
  SALEKIT_WGMMA_SS(ELEMENT, NAME, 32, "64", "%32, %33", "%34") \
  SALEKIT_WGMMA_SS(ELEMENT, NAME, 48, "96", "%48, %49", "%50") \
  SALEKIT_WGMMA_SS(ELEMENT, NAME, 64, "128", "%64, %65", "%66") \
  SALEKIT_WGMMA_RS(ELEMENT, NAME, 32, "64", "%32, %33, %34, %35", "%36") \
  SALEKIT_WGMMA_RS(ELEMENT, NAME, 48, "96", "%48, %49, %50, %51", "%52") \
  SALEKIT_WGMMA_RS(ELEMENT, NAME, 64, "128", "%64, %65, %66, %67", "%68") \
  SALEKIT_WGMMA_RS(ELEMENT, NAME, 96, "192", "%96, %97, %98, %99", "%100") \
  SALEKIT_WGMMA_RS(ELEMENT, NAME, 128, "256", "%128, %129, %130, %131", "%132") \
  template <> \
  __device__ __forceinline__ void wgmma_m64k16_rs<ELEMENT, 64>(float (&d)[64], const uint32_t (&a)[4], \
                                                              uint64_t b_desc, bool accumulate) { \
    asm volatile( \
        "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n" \
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." NAME "." NAME " {" SALEKIT_D64_TEXT \
        "}, {%64, %65, %66, %67}, %68, p, 1, 1, 1;\n}" \
        : SALEKIT_D64_OUT \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_desc), "r"(int(accumulate))); \
  } \
  template <> \
  __device__ __forceinline__ void wgmma_m64k16_rs<ELEMENT, 32>(float (&d)[32], const uint32_t (&a)[4], \
                                                              uint64_t b_desc, bool accumulate) { \
    asm volatile( \
        "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n" \
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." NAME "." NAME " {" SALEKIT_D32_TEXT \
        "}, {%32, %33, %34, %35}, %36, p, 1, 1, 1;\n}" \
        : SALEKIT_D32_OUT \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_desc), "r"(int(accumulate))); \
  } \
  template <> \
  __device__ __forceinline__ void wgmma_m64n64k16_rs<ELEMENT>(float (&d)[32], const uint32_t (&a)[4], uint64_t b_desc, \
                                                             bool accumulate) { \
    asm volatile( \
        "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n" \
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." NAME "." NAME " {" SALEKIT_D32_TEXT \
        "}, {%32, %33, %34, %35}, %36, p, 1, 1, 0;\n}" \
        : SALEKIT_D32_OUT \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_desc), "r"(int(accumulate))); \
  }

SALEKIT_WGMMA(BFloat16, "bf16")
SALEKIT_WGMMA(Half, "f16")
#undef SALEKIT_WGMMA
#undef SALEKIT_WGMMA_SS
#undef SALEKIT_WGMMA_RS
