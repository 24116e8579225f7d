// Combines the partials of reduce_channels: means, root mean squares about the mean, and the largest deviation of a
// head.
//
// partials float32 [batch, heads, num_chunks, 4, HEAD_DIM]; mean, rms float32 [batch, heads, HEAD_DIM]; amax, scale
// float32 [batch, heads]: the largest |x - mean| as float32 subtraction gives it, and the int8 scale amax / 127 (rms,
// amax and scale may be null). Sums in float64; per_row = 1 / seqlen, per_chunk_row and per_last_row likewise come from
// the host, as a float64 division here would be a function call; lengths: rows of each batch, where they have their
// own (tile/shape.cuh; 0 rows have mean 0). Grid: (heads, batch) CTAs of 4 * HEAD_DIM threads, a
// quarter of the chunks each.
#include "tile/codes.cuh"

template <int HEAD_DIM>
__global__ void __launch_bounds__(4 * HEAD_DIM)
    finish_channels(const float* partials_gmem, float* mean_gmem, float* rms_gmem, float* amax_gmem, float* scale_gmem,
                    int num_chunks, int chunk_rows, int seqlen, double per_row, double per_chunk_row,
                    double per_last_row, const int* lengths_gmem) {
  __shared__ double sums_smem[4][HEAD_DIM];
  __shared__ float extremes_smem[2][4][HEAD_DIM];
  __shared__ uint32_t amax_smem[4 * HEAD_DIM / 32];
  const int channel = threadIdx.x % HEAD_DIM, quarter = threadIdx.x / HEAD_DIM;
  const int64_t head = int64_t(blockIdx.y) * gridDim.x + blockIdx.x;
  const float* partials = partials_gmem + head * num_chunks * 4 * HEAD_DIM + channel;
  if constexpr (Shape::HAS_LENGTHS) {
    seqlen = lengths_gmem[blockIdx.y];
    num_chunks = (seqlen + chunk_rows - 1) / chunk_rows;
    per_row = seqlen == 0 ? 0. : __drcp_rn(seqlen);
    per_last_row = seqlen == 0 ? 0. : __drcp_rn(seqlen - (num_chunks - 1) * chunk_rows);
  }

  double sum = 0;
  float low = INFINITY, high = -INFINITY;
#pragma unroll 4
  for (int chunk = quarter; chunk < num_chunks; chunk += 4) {
    sum += partials[(chunk * 4 + 0) * HEAD_DIM];
    low = fminf(low, partials[(chunk * 4 + 1) * HEAD_DIM]);
    high = fmaxf(high, partials[(chunk * 4 + 2) * HEAD_DIM]);
  }
  sums_smem[quarter][channel] = sum;
  extremes_smem[0][quarter][channel] = low;
  extremes_smem[1][quarter][channel] = high;
  __syncthreads();
  sum = (sums_smem[0][channel] + sums_smem[1][channel]) + (sums_smem[2][channel] + sums_smem[3][channel]);
  const float mean = float(sum * per_row);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    low = fminf(low, extremes_smem[0][i][channel]);
    high = fmaxf(high, extremes_smem[1][i][channel]);
  }
  if (quarter == 0) mean_gmem[head * HEAD_DIM + channel] = mean;

  if (amax_gmem != nullptr) {
    if (Shape::HAS_LENGTHS && seqlen == 0) low = high = 0;
    // Rounded subtraction is monotone, so the largest |x - mean| is at an extreme; a NaN anywhere is in the mean.
    uint32_t bits = max(magnitude_bits(__fsub_rn(high, mean)), magnitude_bits(__fsub_rn(low, mean)));
    bits = max_over_lanes<32>(bits);
    if (threadIdx.x % 32 == 0) amax_smem[threadIdx.x / 32] = bits;
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int warp = 1; warp < 4 * HEAD_DIM / 32; ++warp) bits = max(bits, amax_smem[warp]);
      amax_gmem[head] = __uint_as_float(bits);
      scale_gmem[head] = GroupScale(bits, 127.f).scale;
    }
  }
  if (rms_gmem != nullptr) {
    __syncthreads();
    double squares = 0;
#pragma unroll 4
    for (int chunk = quarter; chunk < num_chunks; chunk += 4) {
      const bool last = chunk == num_chunks - 1;
      const int rows = last ? seqlen - chunk * chunk_rows : chunk_rows;
      const double offset = partials[(chunk * 4 + 0) * HEAD_DIM] * (last ? per_last_row : per_chunk_row) - mean;
      squares += partials[(chunk * 4 + 3) * HEAD_DIM] + rows * offset * offset;
    }
    sums_smem[quarter][channel] = squares;
    __syncthreads();
    if (quarter == 0) {
      squares = (sums_smem[0][channel] + sums_smem[1][channel]) + (sums_smem[2][channel] + sums_smem[3][channel]);
      rms_gmem[head * HEAD_DIM + channel] = sqrtf(float(squares * per_row));
    }
  }
}
