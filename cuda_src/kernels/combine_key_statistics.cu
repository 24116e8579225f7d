// Statistics of a KV head's keys so far and of more keys together: what estimation needs to know of all keys.
//
// A state is float32 [batch, heads, 4, HEAD_DIM] as reduce_channels' partials are: sum, min, max, and squared
// deviations from the mean, of num int32 [batch] keys. Combined are state_a (null: no keys) and b: partials [batch,
// heads, num_chunks, 4, HEAD_DIM] of rows_b keys in chunks of chunk_rows, or, with num_b, another state (one chunk).
// mean, rms about it: float32 [batch, heads, HEAD_DIM]; amax, int8 scale: [batch, heads], as finish_channels gives them:
// of b alone the same bits. Grid: (heads, batch) CTAs of 4 * HEAD_DIM threads, a quarter of the chunks each.
#include "tile/codes.cuh"

template <int HEAD_DIM>
__global__ void __launch_bounds__(4 * HEAD_DIM)
    combine_key_statistics(const int* num_a_gmem, const float* state_a_gmem, const int* num_b_gmem,
                           const float* partials_gmem, int num_chunks, int chunk_rows, int rows_b, int* num_gmem,
                           float* state_gmem, float* mean_gmem, float* rms_gmem, float* amax_gmem,
                           float* scale_gmem) {
  __shared__ double sums_smem[4][HEAD_DIM];
  __shared__ float extremes_smem[2][4][HEAD_DIM];
  __shared__ uint32_t amax_smem[4 * HEAD_DIM / 32];
  const int channel = threadIdx.x % HEAD_DIM, quarter = threadIdx.x / HEAD_DIM, batch = blockIdx.y;
  const int64_t head = int64_t(batch) * gridDim.x + blockIdx.x;
  const float* partials = partials_gmem + head * num_chunks * 4 * HEAD_DIM + channel;
  const int rows_a = num_a_gmem != nullptr ? num_a_gmem[batch] : 0;
  if (num_b_gmem != nullptr) chunk_rows = rows_b = num_b_gmem[batch];
  if (rows_b == 0) num_chunks = 0;
  auto of_a = [&](int i) { return rows_a > 0 ? state_a_gmem[(head * 4 + i) * HEAD_DIM + channel] : 0.f; };

  double sum = 0;
  float low = INFINITY, high = -INFINITY;
#pragma unroll 1
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
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    low = fminf(low, extremes_smem[0][i][channel]);
    high = fmaxf(high, extremes_smem[1][i][channel]);
  }
  if (rows_a > 0) {
    sum += of_a(0);
    low = fminf(low, of_a(1));
    high = fmaxf(high, of_a(2));
  }
  const int rows = rows_a + rows_b;
  const double per_row = rows == 0 ? 0. : __drcp_rn(rows);
  const float mean = float(sum * per_row);
  if (rows == 0) low = high = 0;

  // As in finish_channels: the largest |x - mean| is at an extreme; a NaN anywhere is in the mean.
  uint32_t bits = max(magnitude_bits(__fsub_rn(high, mean)), magnitude_bits(__fsub_rn(low, mean)));
  bits = max_over_lanes<32>(bits);
  if (threadIdx.x % 32 == 0) amax_smem[threadIdx.x / 32] = bits;
  __syncthreads();  // and the sums are read

  double squares = 0;
  const double per_chunk_row = num_chunks == 0 ? 0. : __drcp_rn(chunk_rows);
  const int last_rows = rows_b - (num_chunks - 1) * chunk_rows;
  const double per_last_row = num_chunks == 0 ? 0. : __drcp_rn(last_rows);
#pragma unroll 1
  for (int chunk = quarter; chunk < num_chunks; chunk += 4) {
    const bool last = chunk == num_chunks - 1;
    const double offset = partials[(chunk * 4 + 0) * HEAD_DIM] * (last ? per_last_row : per_chunk_row) - mean;
    squares += partials[(chunk * 4 + 3) * HEAD_DIM] + (last ? last_rows : chunk_rows) * offset * offset;
  }
  sums_smem[quarter][channel] = squares;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < 4 * HEAD_DIM / 32; ++warp) bits = max(bits, amax_smem[warp]);
    amax_gmem[head] = __uint_as_float(bits);
    scale_gmem[head] = GroupScale(bits, 127.f).scale;
    if (blockIdx.x == 0) num_gmem[batch] = rows;
  }
  if (quarter != 0) return;
  squares = (sums_smem[0][channel] + sums_smem[1][channel]) + (sums_smem[2][channel] + sums_smem[3][channel]);
  if (rows_a > 0) {
    const double offset = of_a(0) * __drcp_rn(rows_a) - mean;
    squares += of_a(3) + rows_a * offset * offset;
  }
  float* state = state_gmem + head * 4 * HEAD_DIM + channel;
  state[0] = float(sum);
  state[HEAD_DIM] = low;
  state[2 * HEAD_DIM] = high;
  state[3 * HEAD_DIM] = float(squares);
  mean_gmem[head * HEAD_DIM + channel] = mean;
  rms_gmem[head * HEAD_DIM + channel] = sqrtf(float(squares * per_row));
}
