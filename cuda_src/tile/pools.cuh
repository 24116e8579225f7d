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
