// Per-channel sum, minimum, maximum and squared deviation of q or k over chunks of 512 rows, in one pass.
//
// x [batch, seqlen, heads, HEAD_DIM]; partials float32 [batch, heads, num_chunks, 4, HEAD_DIM]: sum, min, max and the
// sum of (x - chunk mean)^2. finish_channels combines them. Float32 throughout, in a fixed order, without atomics.
// lengths: rows of each batch, where they have their own (tile/shape.cuh); the partials of a chunk without a row are
// not written.
// Grid: (num_chunks, heads, batch) CTAs of 256 threads; a thread has 8 neighbouring channels of every GROUPS-th row.
#include "tile/codes.cuh"
#include "tile/tensor_view.cuh"

constexpr int REDUCE_ROWS = 512;
constexpr int REDUCE_THREADS = 256;

template <int HEAD_DIM, typename Element>
__global__ void __launch_bounds__(REDUCE_THREADS) reduce_channels(TensorView x, float* partials_gmem, int seqlen,
                                                                const int* lengths_gmem) {
  constexpr int CHUNKS = HEAD_DIM / 8;
  constexpr int GROUPS = REDUCE_THREADS / CHUNKS;  // rows of one step
  __shared__ float parts_smem[4][GROUPS][HEAD_DIM];
  const int chunk = threadIdx.x % CHUNKS, group = threadIdx.x / CHUNKS;
  if constexpr (Shape::HAS_LENGTHS) seqlen = lengths_gmem[blockIdx.z];
  const bool is_idle = REDUCE_THREADS % CHUNKS != 0 && group >= GROUPS;
  const int first_row = blockIdx.x * REDUCE_ROWS, num_rows = min(REDUCE_ROWS, seqlen - first_row);
  if (Shape::HAS_LENGTHS && num_rows <= 0) return;
  const uint16_t* gmem = x.row<const uint16_t>(blockIdx.z, first_row, blockIdx.y) + chunk * 8;

  // Deviations from the chunk's first row: their squares do not cancel when the mean is large.
  float pivot[8], sum[8] = {}, square[8] = {}, low[8], high[8];
  load_eight<Element>(pivot, gmem);
#pragma unroll
  for (int i = 0; i < 8; ++i) low[i] = INFINITY, high[i] = -INFINITY;
#pragma unroll 4
  for (int row = is_idle ? num_rows : group; row < num_rows; row += GROUPS) {
    float value[8];
    load_eight<Element>(value, gmem + row * x.stride_row);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float deviation = value[i] - pivot[i];
      sum[i] += deviation;
      square[i] = fmaf(deviation, deviation, square[i]);
      low[i] = fminf(low[i], value[i]);
      high[i] = fmaxf(high[i], value[i]);
    }
  }
  if (!is_idle) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      parts_smem[0][group][chunk * 8 + i] = sum[i];
      parts_smem[1][group][chunk * 8 + i] = low[i];
      parts_smem[2][group][chunk * 8 + i] = high[i];
      parts_smem[3][group][chunk * 8 + i] = square[i];
    }
  }
  __syncthreads();

  if (threadIdx.x >= HEAD_DIM) return;
  const int channel = threadIdx.x;
  float total = 0, least = INFINITY, most = -INFINITY, squares = 0;
#pragma unroll
  for (int g = 0; g < GROUPS; ++g) {
    total += parts_smem[0][g][channel];
    least = fminf(least, parts_smem[1][g][channel]);
    most = fmaxf(most, parts_smem[2][g][channel]);
    squares += parts_smem[3][g][channel];
  }
  const float origin = Element::to_float(x.row<const uint16_t>(blockIdx.z, first_row, blockIdx.y)[channel]);
  float* out = partials_gmem + ((int64_t(blockIdx.z) * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x) * 4 * HEAD_DIM;
  out[channel] = fmaf(float(num_rows), origin, total);
  out[HEAD_DIM + channel] = least;
  out[2 * HEAD_DIM + channel] = most;
  out[3 * HEAD_DIM + channel] = fmaxf(0.f, squares - total * (total / num_rows));
}
