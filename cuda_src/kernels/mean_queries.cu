// The mean query of each block of BLOCK_Q rows, over its rows without a NaN or an infinity; 0 where it has none.
//
// q [batch, seqlen_q, num_heads, HEAD_DIM] view; mean [batch, num_kv_heads, num_q_blocks, group_size, HEAD_DIM], rounded
// to q's type. Sums in float32. Grid: (num_q_blocks, num_heads, batch) CTAs of 128 threads; a thread has eight
// neighbouring channels of every few rows.
#include "tile/codes.cuh"
#include "tile/tensor_view.cuh"

constexpr int MEAN_THREADS = 128;

template <int HEAD_DIM, int BLOCK_Q, typename Element>
__global__ void __launch_bounds__(MEAN_THREADS) mean_queries(TensorView q, uint16_t* mean_gmem, Shape shape) {
  constexpr int CHUNKS = HEAD_DIM / 8, STEP = MEAN_THREADS / CHUNKS;
  static_assert(32 % CHUNKS == 0, "a row's lanes are of one warp");
  __shared__ float sums_smem[STEP][HEAD_DIM];
  __shared__ int counts_smem[STEP];
  const int block = blockIdx.x, head = blockIdx.y, batch = blockIdx.z;
  const int part = threadIdx.x / CHUNKS, channel = threadIdx.x % CHUNKS * 8;
  const int first = block * BLOCK_Q, end = min(first + BLOCK_Q, shape.seqlen_q);

  float sums[8] = {};
  int rows = 0;
#pragma unroll 4
  for (int i = 0; i < BLOCK_Q / STEP; ++i) {
    const int row = first + part + i * STEP;
    float x[8];
    load_eight<Element>(x, q.row<const uint16_t>(batch, min(row, end - 1), head) + channel);
    uint32_t largest = 0;
#pragma unroll
    for (int j = 0; j < 8; ++j) largest = max(largest, magnitude_bits(x[j]));
    if (max_over_lanes<CHUNKS>(largest) >= INFINITE_BITS || row >= end) continue;
    ++rows;
#pragma unroll
    for (int j = 0; j < 8; ++j) sums[j] += x[j];
  }
#pragma unroll
  for (int j = 0; j < 8; ++j) sums_smem[part][channel + j] = sums[j];
  if (channel == 0) counts_smem[part] = rows;
  __syncthreads();

  if (threadIdx.x >= HEAD_DIM / 2) return;
  float low = 0, high = 0;
  int count = 0;
#pragma unroll
  for (int i = 0; i < STEP; ++i) {
    low += sums_smem[i][2 * threadIdx.x];
    high += sums_smem[i][2 * threadIdx.x + 1];
    count += counts_smem[i];
  }
  const float per_row = count ? 1.f / count : 0.f;
  const int group = shape.group_size();
  const int64_t index = ((int64_t(batch) * shape.num_kv_heads + head / group) * gridDim.x + block) * group + head % group;
  reinterpret_cast<uint32_t*>(mean_gmem)[index * (HEAD_DIM / 2) + threadIdx.x] =
      Element::pack(low * per_row, high * per_row);
}
