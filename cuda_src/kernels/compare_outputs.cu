// How far an attention's output is from a dense one, and how much of its mass it kept: sums over rows, per head.
//
// out, dense [batch, seqlen_q, num_heads, head_dim] views; lse, dense_lse float32, rows contiguous, heads and batches
// apart by lse_strides; sums float64 [batch, num_heads, chunks, 4]: over 256 rows the squared difference, the absolute
// difference, the squared dense output, and the mass kept, exp(lse - dense_lse), at most 1, 1 for rows that see nothing.
// Grid: (ceil(seqlen_q / 256), num_heads, batch) CTAs of 256 threads; a thread has 8 neighbouring channels of a row.
#include "tile/codes.cuh"
#include "tile/tensor_view.cuh"

constexpr int COMPARE_THREADS = 256;
constexpr int COMPARE_ROWS = 256;

template <int HEAD_DIM, typename Element>
__global__ void __launch_bounds__(COMPARE_THREADS)
    compare_outputs(TensorView out, TensorView dense, const float* lse_gmem, const float* dense_lse_gmem,
                    int64_t lse_batch_stride, int64_t dense_lse_batch_stride, double* sums_gmem, int seqlen_q) {
  constexpr int CHUNKS = HEAD_DIM / 8;
  __shared__ double sums_smem[COMPARE_THREADS / 32][4];
  const int batch = blockIdx.z, head = blockIdx.y;
  const int first = blockIdx.x * COMPARE_ROWS, end = min(first + COMPARE_ROWS, seqlen_q);
  double sums[4] = {};
  constexpr int GROUPS = COMPARE_THREADS / CHUNKS;  // rows at a time
  const int group = threadIdx.x / CHUNKS;
  for (int row = group < GROUPS ? first + group : end; row < end; row += GROUPS) {
    const int channel = threadIdx.x % CHUNKS * 8;
    float ours[8], theirs[8], squares = 0, distance = 0, norm = 0;
    load_eight<Element>(ours, out.row<const uint16_t>(batch, row, head) + channel);
    load_eight<Element>(theirs, dense.row<const uint16_t>(batch, row, head) + channel);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float difference = ours[i] - theirs[i];
      squares = fmaf(difference, difference, squares);
      distance += fabsf(difference);
      norm = fmaf(theirs[i], theirs[i], norm);
    }
    sums[0] += squares;
    sums[1] += distance;
    sums[2] += norm;
  }
  const int row = first + threadIdx.x;
  if (row < end) {
    const float of_all = dense_lse_gmem[batch * dense_lse_batch_stride + int64_t(head) * seqlen_q + row];
    const double kept = exp(double(lse_gmem[batch * lse_batch_stride + int64_t(head) * seqlen_q + row]) - of_all);
    sums[3] = of_all == -INFINITY || kept > 1 ? 1 : kept;
  }

#pragma unroll
  for (int i = 0; i < 4; ++i) {
    for (int lanes = 16; lanes > 0; lanes /= 2) sums[i] += __shfl_xor_sync(~0u, sums[i], lanes);
    if (threadIdx.x % 32 == 0) sums_smem[threadIdx.x / 32][i] = sums[i];
  }
  __syncthreads();
  if (threadIdx.x >= 4) return;
  double total = 0;
#pragma unroll
  for (int warp = 0; warp < COMPARE_THREADS / 32; ++warp) total += sums_smem[warp][threadIdx.x];
  sums_gmem[((int64_t(batch) * gridDim.y + head) * gridDim.x + blockIdx.x) * 4 + threadIdx.x] = total;
}
