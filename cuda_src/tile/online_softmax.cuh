// Running softmax over the score tiles of mma.sync m16n8k16 (Milakov and Gimelshein, arXiv 1805.02867).
// A lane holds, of each 16-row tile, rows lane / 4 (r = 0) and lane / 4 + 8 (r = 1), shared with the rest of its quad.
#pragma once
#include "ptx/ex2.cuh"
#include "tile/types.cuh"

template <int ROW_TILES>
struct OnlineSoftmax {
  float max[ROW_TILES][2];  // of raw scores, over the quad
  float sum[ROW_TILES][2];  // of this lane's columns alone, until total()

  __device__ __forceinline__ OnlineSoftmax() {
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) max[m][r] = -INFINITY, sum[m][r] = 0;
  }

  // Scores of row tile m become 2^(scale_log2 * (score - max)); what was accumulated before is to be multiplied by
  // rescale. Returns whether the maximum of one of its rows has moved; if not, rescale is 1, or the row empty or NaN.
  // fmaxf drops NaNs; they and +inf scores turn into NaN below, as in dense attention.
  template <int COLUMN_TILES>
  __device__ __forceinline__ bool update(int m, float (&scores)[COLUMN_TILES][4], float scale_log2,
                                         float (&rescale)[2]) {
    bool moved = false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float top = fmaxf(scores[0][2 * r], scores[0][2 * r + 1]);
#pragma unroll
      for (int j = 1; j < COLUMN_TILES; ++j) top = fmaxf(top, fmaxf(scores[j][2 * r], scores[j][2 * r + 1]));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
      top = fmaxf(max[m][r], fmaxf(top, __shfl_xor_sync(~0u, top, 2)));
      moved |= top != max[m][r];
      // -inf: nothing seen yet, and all of it stays zero. Rounded up: no score exceeds 1 then, however large it is.
      const float base = top == -INFINITY ? 0.f : __fmul_ru(top, scale_log2);
      rescale[r] = ex2(__fmul_ru(max[m][r], scale_log2) - base);
      max[m][r] = top;
      float even = 0, odd = 0;
#pragma unroll
      for (int j = 0; j < COLUMN_TILES; ++j) {
        scores[j][2 * r] = ex2(fmaf(scores[j][2 * r], scale_log2, -base));
        scores[j][2 * r + 1] = ex2(fmaf(scores[j][2 * r + 1], scale_log2, -base));
        even += scores[j][2 * r];
        odd += scores[j][2 * r + 1];
      }
      sum[m][r] = fmaf(sum[m][r], rescale[r], even + odd);
    }
    return moved;
  }

  // The whole row's sum, in every lane of the quad.
  __device__ __forceinline__ float total(int m, int r) const {
    float x = sum[m][r];
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
  }
};
