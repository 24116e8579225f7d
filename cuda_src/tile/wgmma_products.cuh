// The two matrix products of attention for one warpgroup: 64 rows, tiles of 64 elements a swizzled row.
#pragma once
#include "ptx/wgmma.cuh"
#include "ptx/wgmma_f16.cuh"

constexpr int HALF_BYTES = 128;  // a swizzled row: 64 elements

// Shared-memory matrix descriptors, 128-byte swizzle: 8-row groups are 1024 bytes apart (PTX ISA, "matrix descriptor").
__device__ __forceinline__ uint64_t descriptor(uint32_t smem_address, uint32_t leading_bytes) {
  constexpr uint64_t SWIZZLE_128B = 1ull << 62, GROUP = uint64_t(1024 >> 4) << 32;
  return uint64_t((smem_address & 0x3FFFF) >> 4) | uint64_t(leading_bytes >> 4) << 16 | GROUP | SWIZZLE_128B;
}

// s of 2 * NUM_SCORES keys. Q_ROWS: rows of 64 elements of q's tile.
template <int HEAD_DIM, typename Element, int Q_ROWS, int NUM_SCORES>
__device__ __forceinline__ void multiply_qk(float (&s)[NUM_SCORES], uint64_t q_desc, uint64_t k_desc) {
#pragma unroll
  for (int step = 0; step < HEAD_DIM / 16; ++step) {
    const uint64_t in_row = uint64_t(step % 4) * (32 >> 4);
    wgmma_m64k16_ss<Element>(s, q_desc + (step / 4) * (Q_ROWS * HALF_BYTES >> 4) + in_row,
                             k_desc + (step / 4) * (2 * NUM_SCORES * HALF_BYTES >> 4) + in_row, step != 0);
  }
}

// o = or += p . values, of 16 * STEPS keys.
template <int HEAD_DIM, typename Element, bool ACCUMULATE = false, int STEPS>
__device__ __forceinline__ void multiply_pv(float (&o)[HEAD_DIM / 2], const uint32_t (&p)[STEPS][4], uint64_t v_desc) {
#pragma unroll
  for (int step = 0; step < STEPS; ++step) {
    const uint64_t desc = v_desc + uint64_t(step * (16 * HALF_BYTES >> 4));
    if constexpr (ACCUMULATE)
      wgmma_m64k16_rs<Element, HEAD_DIM / 2>(o, p[step], desc);
    else
      wgmma_m64k16_rs<Element, HEAD_DIM / 2>(o, p[step], desc, step != 0);
  }
}

template <typename Element, int STEPS, int NUM_SCORES>
__device__ __forceinline__ void round_p(uint32_t (&p)[STEPS][4], const float (&s)[NUM_SCORES]) {
  static_assert(NUM_SCORES == 8 * STEPS, "a step has 16 keys");
#pragma unroll
  for (int i = 0; i < NUM_SCORES / 2; ++i) p[i / 4][i % 4] = Element::pack(s[2 * i], s[2 * i + 1]);
}
