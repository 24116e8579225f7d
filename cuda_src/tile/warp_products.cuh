// The two matrix products of attention for one warp, by mma.sync from swizzled rows (tile/swizzled_rows.cuh).
#pragma once
#include "ptx/ldmatrix.cuh"
#include "ptx/mma.cuh"
#include "tile/swizzled_rows.cuh"

// Where this lane points ldmatrix in a tile: 16 rows at two chunks of 8 dims. A later step's chunk is an XOR away. Worked
// out anew by every call: kept, it and the addresses that follow from it would cost registers across a main loop.
template <int HEAD_DIM>
__device__ __forceinline__ uint32_t ldmatrix_offset() {
  int lane = threadIdx.x % 32;
  asm volatile("" : "+r"(lane));
  return chunk_offset<HEAD_DIM>(lane % 16, lane / 16);
}

// s = rows . keys. q_smem: the warp's first row; keys as many as s has columns.
template <int HEAD_DIM, typename Element, int ROW_TILES, int KEY_TILES>
__device__ __forceinline__ void multiply_qk(float (&s)[ROW_TILES][KEY_TILES][4], uint32_t q_smem, uint32_t k_smem) {
  const uint32_t lane_offset = ldmatrix_offset<HEAD_DIM>();
#pragma unroll
  for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
    for (int j = 0; j < KEY_TILES; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) s[m][j][i] = 0;
#pragma unroll
  for (int step = 0; step < HEAD_DIM / 16; ++step) {
    uint32_t a[ROW_TILES][4];
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m)
      ldmatrix_x4(a[m], q_smem + (lane_offset ^ step * 32) + m * 16 * 2 * HEAD_DIM);
#pragma unroll
    for (int j = 0; j < KEY_TILES; j += 2) {
      uint32_t b[4];
      ldmatrix_x4(b, k_smem + (lane_offset ^ step * 32) + j * 8 * 2 * HEAD_DIM);
#pragma unroll
      for (int m = 0; m < ROW_TILES; ++m) {
        mma_m16n8k16<Element>(s[m][j], a[m], b[0], b[2]);
        mma_m16n8k16<Element>(s[m][j + 1], a[m], b[1], b[3]);
      }
    }
  }
}

// An accumulator of scores is, rounded, an A operand as it lies: the operand of 16 keys, those of tiles 2 * step and
// 2 * step + 1.
template <typename Element, int KEY_TILES>
__device__ __forceinline__ void round_p(uint32_t (&p)[4], const float (&s)[KEY_TILES][4], int step) {
#pragma unroll
  for (int i = 0; i < 4; ++i) p[i] = Element::pack(s[2 * step + i / 2][i % 2 * 2], s[2 * step + i / 2][i % 2 * 2 + 1]);
}

// o += p . values, over 16 keys for each step of p.
template <int HEAD_DIM, typename Element, int STEPS, int ROW_TILES>
__device__ __forceinline__ void multiply_pv(float (&o)[ROW_TILES][HEAD_DIM / 8][4],
                                            const uint32_t (&p)[STEPS][ROW_TILES][4], uint32_t v_smem) {
  const uint32_t lane_offset = ldmatrix_offset<HEAD_DIM>();
#pragma unroll
  for (int step = 0; step < STEPS; ++step)
#pragma unroll
    for (int n = 0; n < HEAD_DIM / 8; n += 2) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, v_smem + (lane_offset ^ n * 16) + step * 16 * 2 * HEAD_DIM);
#pragma unroll
      for (int m = 0; m < ROW_TILES; ++m) {
        mma_m16n8k16<Element>(o[m][n], p[step][m], b[0], b[1]);
        mma_m16n8k16<Element>(o[m][n + 1], p[step][m], b[2], b[3]);
      }
    }
}

template <int ROW_TILES, int COLUMN_TILES>
__device__ __forceinline__ void clear(float (&o)[ROW_TILES][COLUMN_TILES][4]) {
#pragma unroll
  for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
    for (int n = 0; n < COLUMN_TILES; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) o[m][n][i] = 0;
}
