// Warpgroup products of 16-bit elements with float32 accumulation (PTX ISA, "wgmma.mma_async").
// A warpgroup holds 64 rows: lane l of warp w has rows 16w + l/4 and + 8, columns 8j + 2*(l%4) and + 1 in d[4j ..
// 4j+3].
// All are asynchronous: wgmma_fence before the first, wgmma_commit after the last, wgmma_wait before d is read.
#pragma once
#include "tile/element.cuh"

#define SALEKIT_D32_TEXT \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define SALEKIT_D32_OUT \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
  "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), \
  "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), \
  "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define SALEKIT_D64_TEXT \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define SALEKIT_D64_OUT \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
  "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), \
  "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), \
  "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), \
  "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), \
  "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), \
  "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), \
  "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])

// d (64 x 128) = or += A (64 x 16, shared memory, K-major) * B (128 x 16, shared memory, K-major).
template <typename Element>
__device__ __forceinline__ void wgmma_m64n128k16_ss(float (&d)[64], uint64_t a_desc, uint64_t b_desc, bool accumulate);

// d (64 x N) += A (64 x 16, registers) * B (16 x N, shared memory, N-major); N is 2 * NUM_REGS.
template <typename Element, int NUM_REGS>
__device__ __forceinline__ void wgmma_m64k16_rs(float (&d)[NUM_REGS], const uint32_t (&a)[4], uint64_t b_desc);

// The same, d = or += A * B.
template <typename Element, int NUM_REGS>
__device__ __forceinline__ void wgmma_m64k16_rs(float (&d)[NUM_REGS], const uint32_t (&a)[4], uint64_t b_desc,
                                                bool accumulate);

// d (64 x 64) = or += A (64 x 16, registers) * B (64 x 16, shared memory, K-major).
template <typename Element>
__device__ __forceinline__ void wgmma_m64n64k16_rs(float (&d)[32], const uint32_t (&a)[4], uint64_t b_desc,
                                                   bool accumulate);

#define SALEKIT_WGMMA(ELEMENT, NAME) \
  template <> \
  __device__ __forceinline__ void wgmma_m64n128k16_ss<ELEMENT>(float (&d)[64], uint64_t a_desc, uint64_t b_desc, \
                                                              bool accumulate) { \
    asm volatile( \
        "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n" \
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." NAME "." NAME " {" SALEKIT_D64_TEXT \
        "}, %64, %65, p, 1, 1, 0, 0;\n}" \
        : SALEKIT_D64_OUT \
        : "l"(a_desc), "l"(b_desc), "r"(int(accumulate))); \
  } \
  template <> \
  __device__ __forceinline__ void wgmma_m64k16_rs<ELEMENT, 64>(float (&d)[64], const uint32_t (&a)[4], \
                                                              uint64_t b_desc) { \
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." NAME "." NAME " {" SALEKIT_D64_TEXT \
                 "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;" \
                 : SALEKIT_D64_OUT \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_desc)); \
  } \
  template <> \
  __device__ __forceinline__ void wgmma_m64k16_rs<ELEMENT, 32>(float (&d)[32], const uint32_t (&a)[4], \
                                                              uint64_t b_desc) { \
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." NAME "." NAME " {" SALEKIT_D32_TEXT \
                 "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;" \
                 : SALEKIT_D32_OUT \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_desc)); \
  } \
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
