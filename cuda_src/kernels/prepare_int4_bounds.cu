// The key side of int4's bounds (tile/group_bounds.cuh), per query head and 128 keys, in the order the lanes read it.
//
// correction float32 [batch, num_heads, padded_k]; k_scale [batch, num_kv_heads, padded_k / 8]; bounds [batch,
// num_heads, padded_k / 128]. Grid: (padded_k / 128, num_heads, batch) CTAs of 128 threads, one a key.
#include "tile/group_bounds.cuh"

__global__ void __launch_bounds__(CODE_TILE_ROWS)
    prepare_int4_bounds(const float* k_scale_gmem, const float* correction_gmem, KeyBounds* bounds_gmem, Shape shape) {
  __shared__ uint32_t largest_smem[2][CODE_TILE_ROWS / 32];
  const int in_tile = threadIdx.x, key = blockIdx.x * CODE_TILE_ROWS + in_tile;
  const int block = in_tile / 32, group = in_tile % 8 / 2, column = in_tile % 32 / 8 * 2 + in_tile % 2;
  const int64_t head = int64_t(blockIdx.z) * shape.num_heads + blockIdx.y;
  const int64_t kv_head = int64_t(blockIdx.z) * shape.num_kv_heads + blockIdx.y / shape.group_size();
  KeyBounds& bounds = bounds_gmem[head * gridDim.x + blockIdx.x];

  const bool present = key < shape.of_sequence(blockIdx.z).seqlen_k;
  float corrected = -INFINITY, reciprocal = 1.f;
  uint32_t largest[2] = {0, 0};  // as bits, so that NaN counts
  if (present) {
    const float scale = k_scale_gmem[kv_head * (shape.padded_k() / 8) + key / KEY_BLOCK * 4 + group];
    reciprocal = __frcp_rn(scale);
    const float weighted = __fmul_rn(correction_gmem[head * shape.padded_k() + key], reciprocal);
    corrected = moved_up(weighted);
    largest[0] = __float_as_uint(weighted) & 0x7FFFFFFF;
    largest[1] = __float_as_uint(bound_in_range(scale) ? reciprocal : INFINITY);
  }
  bounds.corrections[block][group][column] = corrected;
  if (column == 0) bounds.reciprocals[group][block] = reciprocal;

#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t of_warp = __reduce_max_sync(~0u, largest[i]);
    if (threadIdx.x % 32 == 0) largest_smem[i][block] = of_warp;
  }
  __syncthreads();
  if (threadIdx.x < 2) {
    const uint32_t(&of_warps)[4] = largest_smem[threadIdx.x];
    const float of_tile = __uint_as_float(max(max(of_warps[0], of_warps[1]), max(of_warps[2], of_warps[3])));
    (threadIdx.x == 0 ? bounds.largest_correction : bounds.largest_reciprocal) = of_tile;
  }
}
