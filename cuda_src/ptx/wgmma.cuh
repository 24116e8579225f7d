// Warpgroup products: ordering, operands in shared memory, and the 8-bit product (PTX ISA, "wgmma.mma_async").
// All are asynchronous: wgmma_fence before the first, wgmma_commit after the last, wgmma_wait before d is read.
#pragma once
#include "tile/types.cuh"

// Orders accesses to the accumulators and to shared memory before the products that follow.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most PENDING of the most recent groups are in flight.
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Tells the compiler that the asynchronous products have written these registers.
template <int N>
__device__ __forceinline__ void touch(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
template <int N>
__device__ __forceinline__ void touch(int (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+r"(d[i])::"memory");
}

// The descriptor of a K-major operand whose rows are ROW_BYTES long, in the order of tile/swizzle.cuh (PTX ISA, "matrix
// descriptor"): bits 0-13 address / 16, 32-45 distance of 8-row groups / 16, 62-63 swizzle (1: 128 bytes, 2: 64 bytes).
// Eight-row groups start on multiples of 8 * ROW_BYTES. The operand's next 32 bytes along K: wgmma_step.
template <int ROW_BYTES>
__device__ __forceinline__ uint64_t wgmma_descriptor(uint32_t smem_address) {
  static_assert(ROW_BYTES == 64 || ROW_BYTES == 128 || ROW_BYTES == 256, "rows are 64, 128 or 256 bytes");
  constexpr uint64_t LEADING = 1;  // not used with a swizzle
  constexpr uint64_t GROUP = 8 * ROW_BYTES / 16;
  constexpr uint64_t SWIZZLE = ROW_BYTES == 64 ? 2 : 1;
  return uint64_t((smem_address & 0x3FFFF) >> 4) | LEADING << 16 | GROUP << 32 | SWIZZLE << 62;
}

// What to add to a descriptor for bytes [32 * step, + 32) of its rows; those of 256 bytes have halves 1024 bytes apart.
__device__ __forceinline__ constexpr uint64_t wgmma_step(int step) { return step / 4 * (1024 / 16) + step % 4 * 2; }

// d (64 x 128) = or += A (64 x 32) * B (128 x 32), both in shared memory, K-major. A warpgroup holds 64 rows: lane l of
// warp w has rows 16w + l/4 in d[4j], d[4j+1] and + 8 in d[4j+2], d[4j+3], columns 8j + 2*(l%4) and + 1.
__device__ __forceinline__ void wgmma_m64n128k32_s8(int (&d)[64], uint64_t a_desc, uint64_t b_desc, bool accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
      "}, %64, %65, p;\n}"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]), "+r"(d[4]), "+r"(d[5]), "+r"(d[6]), "+r"(d[7]),
        "+r"(d[8]), "+r"(d[9]), "+r"(d[10]), "+r"(d[11]), "+r"(d[12]), "+r"(d[13]), "+r"(d[14]), "+r"(d[15]),
        "+r"(d[16]), "+r"(d[17]), "+r"(d[18]), "+r"(d[19]), "+r"(d[20]), "+r"(d[21]), "+r"(d[22]), "+r"(d[23]),
        "+r"(d[24]), "+r"(d[25]), "+r"(d[26]), "+r"(d[27]), "+r"(d[28]), "+r"(d[29]), "+r"(d[30]), "+r"(d[31]),
        "+r"(d[32]), "+r"(d[33]), "+r"(d[34]), "+r"(d[35]), "+r"(d[36]), "+r"(d[37]), "+r"(d[38]), "+r"(d[39]),
        "+r"(d[40]), "+r"(d[41]), "+r"(d[42]), "+r"(d[43]), "+r"(d[44]), "+r"(d[45]), "+r"(d[46]), "+r"(d[47]),
        "+r"(d[48]), "+r"(d[49]), "+r"(d[50]), "+r"(d[51]), "+r"(d[52]), "+r"(d[53]), "+r"(d[54]), "+r"(d[55]),
        "+r"(d[56]), "+r"(d[57]), "+r"(d[58]), "+r"(d[59]), "+r"(d[60]), "+r"(d[61]), "+r"(d[62]), "+r"(d[63])
      : "l"(a_desc), "l"(b_desc), "r"(int(accumulate)));
}
