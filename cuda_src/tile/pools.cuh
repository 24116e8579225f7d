// Pools of skipped keys: one for each query block and 128 neighbouring keys (docs/skipped-mass.md). Mirrors
// salekit/skipped_mass.py.
//
// A query block is known by its mean query. Those of a KV head are counted block by block, its query heads innermost,
// and taken in strips of 128. A launch holds the pools of some strips: keys and values [strips * 128, padded_pools,
// HEAD_DIM], terms [strips * 128, padded_pools]; pool i of a mean query is that of keys [128 * i, 128 * i + 128).
#pragma once
#include "tile/shape.cuh"

constexpr int POOL_KEYS = 128;
constexpr int POOL_STRIP = 128;
constexpr int POOL_SLOTS = POOL_KEYS / KEY_BLOCK;
constexpr int POOL_RUN = 8;                  // strips that a CTA takes one after the other with the same keys
constexpr int KEY_FACTS = POOL_KEYS + 4;     // floats of a group in measure_keys
constexpr float LOG2_E = 1.4426950408889634f;

// What a pool adds to a row's score: bias + min(MOST_VARIANCE * log2(e), |q - q'|^2 * spread), as powers of two.
struct PoolTerms {
  float bias, spread;
};
constexpr float MOST_SECOND_ORDER = 1.0f * LOG2_E;

// A mean query: its head, its block of BLOCK_Q rows and where it stands among all.
template <int BLOCK_Q>
struct PoolQuery {
  int batch, kv_head, head, block;
  int number;  // among those of the KV head
  bool exists;
  int64_t index;

  __device__ PoolQuery(const Shape& shape, int strip, int place) {
    const int of_kv_head = count(shape), strips = ceil_div(of_kv_head, POOL_STRIP);
    const int kv_index = strip / strips;
    number = strip % strips * POOL_STRIP + place;
    batch = kv_index / shape.num_kv_heads;
    kv_head = kv_index % shape.num_kv_heads;
    block = number / shape.group_size();
    head = kv_head * shape.group_size() + number % shape.group_size();
    exists = number < of_kv_head;
    index = int64_t(kv_index) * of_kv_head + number;
  }

  // Of a KV head.
  __device__ static int count(const Shape& shape) { return ceil_div(shape.seqlen_q, BLOCK_Q) * shape.group_size(); }
  __device__ int first_row() const { return block * BLOCK_Q; }
  // Keys that all rows of the block see: only those are pooled.
  __device__ int visible_to_all(const Shape& shape) const { return exists ? shape.visible_keys(first_row()) : 0; }
};

// Bit i: the mean query's block skips 32-key slot i of the group, and all of its rows see the mask's whole block.
template <int BLOCK_Q>
__device__ __forceinline__ uint32_t skipped_slots(const PoolQuery<BLOCK_Q>& query, const uint32_t* mask_gmem,
                                                  int expand_log2, int group, const Shape& shape) {
  if (!query.exists) return 0;
  const int num_words = ceil_div(ceil_div(shape.seqlen_k, KEY_BLOCK << expand_log2), 32);
  const int num_q_blocks = ceil_div(shape.seqlen_q, BLOCK_Q), seen = query.visible_to_all(shape);
  const int first = group * POOL_SLOTS >> expand_log2;  // block of the mask
  const int64_t row = int64_t(query.batch * shape.num_heads + query.head) * num_q_blocks + query.block;
  const uint32_t bits = mask_gmem[row * num_words + first / 32] >> first % 32;
  uint32_t slots = 0;
#pragma unroll
  for (int i = 0; i < POOL_SLOTS; ++i) {
    const int place = i >> expand_log2;
    const int end = min((first + place + 1) * (KEY_BLOCK << expand_log2), shape.seqlen_k);
    if (!(bits >> place & 1) && end <= seen) slots |= 1u << i;
  }
  return slots;
}

// The sum over the quad of lanes that share a row, in each of them.
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// The log2 of a pool's mass for its mean query. total: of the weights; base: the largest score as a power of two.
__device__ __forceinline__ float pool_mass(float total, float base) {
  return total == 0.f ? -INFINITY : base + __log2f(total);
}

// dot: q'.key of the rounded key; norm: the weighted mean of |k_j|^2; squared_key: |key|^2.
__device__ __forceinline__ PoolTerms pool_terms(float mass, float dot, float norm, float squared_key, int head_dim,
                                                float softmax_scale) {
  const float variance = fmaxf(norm - squared_key, 0.f) / head_dim;
  return {mass - dot * (softmax_scale * LOG2_E), variance * (0.5f * LOG2_E * softmax_scale * softmax_scale)};
}
