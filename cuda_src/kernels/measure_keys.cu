// What pool_skipped_sm90 wants to know of each group of 128 keys: |k_j|^2 of its finite elements, and whether k or v has
// one that is not finite.
//
// k, v [batch, seqlen_k, num_kv_heads, HEAD_DIM] views; facts float32 [batch, num_kv_heads, groups, KEY_FACTS]: the norms
// (0 of absent keys), then 1 or 0. Grid: (groups, num_kv_heads, batch) CTAs of 128 threads; a thread has eight neighbouring
// channels of every few rows.
#include "tile/codes.cuh"
#include "tile/pools.cuh"
#include "tile/tensor_view.cuh"

template <int HEAD_DIM, typename Element>
__global__ void __launch_bounds__(128) measure_keys(TensorView k, TensorView v, float* facts_gmem, int seqlen_k) {
  constexpr int CHUNKS = HEAD_DIM / 8, STEP = 128 / CHUNKS;
  const int group = blockIdx.x, kv_head = blockIdx.y, batch = blockIdx.z;
  const int part = threadIdx.x / CHUNKS, channel = threadIdx.x % CHUNKS * 8;
  float* facts = facts_gmem + ((int64_t(batch) * gridDim.y + kv_head) * gridDim.x + group) * KEY_FACTS;
  uint32_t largest = 0;
#pragma unroll 4
  for (int i = 0; i < POOL_KEYS / STEP; ++i) {
    const int place = part + i * STEP, key = group * POOL_KEYS + place;
    const bool present = key < seqlen_k;
    float x[8], y[8], norm = 0;
    unpack_eight<Element>(x, ld_global_16(k.row<const uint16_t>(batch, present ? key : 0, kv_head) + channel, present));
    unpack_eight<Element>(y, ld_global_16(v.row<const uint16_t>(batch, present ? key : 0, kv_head) + channel, present));
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const uint32_t size = magnitude_bits(x[j]);
      norm = size < INFINITE_BITS ? fmaf(x[j], x[j], norm) : norm;
      largest = max(largest, max(size, magnitude_bits(y[j])));
    }
#pragma unroll
    for (int step = 1; step < CHUNKS; step *= 2) norm += __shfl_xor_sync(~0u, norm, step);
    if (channel == 0) facts[place] = norm;
  }
  const int any = __syncthreads_or(largest >= INFINITE_BITS);
  if (threadIdx.x < KEY_FACTS - POOL_KEYS) facts[POOL_KEYS + threadIdx.x] = any ? 1.f : 0.f;
}
