// pool_skipped on Hopper: the same pools (kernels/pool_skipped.cu says of what), by products of a warpgroup.
//
// mean_map: mean queries [1, all, 1, HEAD_DIM], boxes of 64; k_map, v_map: boxes of 128 keys; key_map, value_map: the
// launch's pools as [1, strips * 128, padded_pools, HEAD_DIM], boxes of 64; facts: of measure_keys.
// Grid: a CTA of 512 threads for each multiprocessor, or fewer; work items are a group of 128 keys and a run of POOL_RUN
// strips. Warpgroup 0 fetches: keys and values once an item, mean queries by 64, and in its other warps what of the mask
// they need. Warpgroups 1 to 3 take 64 mean queries in turn: scores, weights, pooled keys, pooled values, stored by the copy
// engine.
#include "ptx/bar_sync.cuh"
#include "ptx/bulk_copy.cuh"
#include "ptx/bulk_store.cuh"
#include "ptx/ex2.cuh"
#include "ptx/fence_proxy.cuh"
#include "ptx/ld_shared.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/setmaxnreg.cuh"
#include "tile/aligned_storage.cuh"
#include "tile/pools.cuh"
#include "tile/wgmma_products.cuh"

constexpr int POOL_UNIT = 64;         // mean queries of a warpgroup
constexpr int POOL_CONSUMERS = 3;     // warpgroups
constexpr int KV_STAGES = 2;
constexpr int UNIT_STAGES = 5;
constexpr int WARPGROUP_BARRIER = 1;  // named barriers 1 to 3: of a consumer warpgroup; 4: of all of them
constexpr int CONSUMER_BARRIER = 4;

// What the consumers are to know of 64 mean queries.
struct PoolUnit {
  int unit;  // of the launch; -1: there are no more
  int group;
  int has_new_keys;
};

template <int HEAD_DIM>
struct PoolSm90Storage {
  static constexpr int HALVES = HEAD_DIM / 64;
  alignas(1024) uint8_t K_smem[KV_STAGES][HALVES][POOL_KEYS * HALF_BYTES];
  alignas(1024) uint8_t V_smem[KV_STAGES][HALVES][POOL_KEYS * HALF_BYTES];
  alignas(1024) uint8_t Q_smem[UNIT_STAGES][HALVES][POOL_UNIT * HALF_BYTES];  // their pools, too, on their way out
  alignas(16) float facts_smem[KV_STAGES][KEY_FACTS];
  alignas(16) float2 sums_smem[POOL_CONSUMERS][POOL_UNIT];  // mass and norm: in registers they would cause spills
  PoolUnit units[UNIT_STAGES];
  uint8_t slots_smem[UNIT_STAGES][POOL_UNIT];  // of each mean query: which slots of the group it skips
  uint64_t kv_full[KV_STAGES], kv_empty[KV_STAGES], q_full[UNIT_STAGES], q_empty[UNIT_STAGES];
  uint8_t alignment_slack[1024];
};

// Where a ring of STAGES is.
template <int STAGES>
struct RingStage {
  int index = 0;
  uint32_t phase = 0;
  __device__ void advance() {
    if (++index == STAGES) index = 0, phase ^= 1;
  }
};

// Calls f(unit of the launch, group, its first mean query, KV head whose keys of the group come now or -1) for each 64 mean
// queries that this CTA takes.
template <int BLOCK_Q, typename F>
__device__ __forceinline__ void for_each_unit(const Shape& shape, int first_strip, int num_strips, int num_groups,
                                              F&& f) {
  using Query = PoolQuery<BLOCK_Q>;
  const int num_items = ceil_div(num_strips, POOL_RUN) * num_groups;
  for (int item = blockIdx.x; item < num_items; item += gridDim.x) {
    const int group = item % num_groups, begin = item / num_groups * POOL_RUN;
    int held = -1;
    for (int strip = begin; strip < min(begin + POOL_RUN, num_strips); ++strip) {
      const Query first(shape, first_strip + strip, 0);
      const int num_queries = min(POOL_STRIP, Query::count(shape) - first.number);
      if (group * POOL_KEYS >= Query(shape, first_strip + strip, num_queries - 1).visible_to_all(shape)) continue;
      const int kv_index = first.batch * shape.num_kv_heads + first.kv_head;
      for (int unit = 0; unit * POOL_UNIT < num_queries; ++unit)
        f(strip * 2 + unit, group, int(first.index) + unit * POOL_UNIT, unit == 0 && kv_index != held ? kv_index : -1);
      held = kv_index;
    }
  }
}

// Where elements [8 * chunk + 2 * (lane % 4), + 2) of a row lie in a tile of swizzled halves of 64 rows.
__device__ __forceinline__ uint32_t* place_in_tile(uint8_t* tile, int row, int chunk) {
  return reinterpret_cast<uint32_t*>(tile + chunk / 8 * (POOL_UNIT * HALF_BYTES) + row * HALF_BYTES +
                                     ((chunk % 8 ^ row & 7) << 4) + threadIdx.x % 4 * 4);
}

// Elements that are not finite become 0; all consumers together.
template <int HEAD_DIM, typename Element>
__device__ __forceinline__ void drop_infinite(uint32_t* tile) {
  for (int i = threadIdx.x - 128; i < POOL_KEYS * HEAD_DIM / 2; i += POOL_CONSUMERS * 128) {
    uint32_t word = tile[i];
    if ((word & 0x7FFF) >= Element::INFINITE) word &= 0xFFFF0000;
    if ((word >> 16 & 0x7FFF) >= Element::INFINITE) word &= 0xFFFF;
    tile[i] = word;
  }
}

template <int HEAD_DIM, int BLOCK_Q, typename Element>
__global__ void __launch_bounds__(512, 1)
    pool_skipped_sm90(const __grid_constant__ TensorMap mean_map, const __grid_constant__ TensorMap k_map,
                      const __grid_constant__ TensorMap v_map, const __grid_constant__ TensorMap key_map,
                      const __grid_constant__ TensorMap value_map, const float* facts_gmem, const uint32_t* mask_gmem,
                      int expand_log2, PoolTerms* terms_gmem, Shape shape, float softmax_scale, int first_strip,
                      int num_strips, int num_groups, int padded_pools) {
  using Storage = PoolSm90Storage<HEAD_DIM>;
  constexpr int HALVES = Storage::HALVES;
  constexpr uint32_t TILE_BYTES = HALVES * POOL_KEYS * HALF_BYTES, UNIT_BYTES = HALVES * POOL_UNIT * HALF_BYTES;
  extern __shared__ uint8_t dynamic_smem[];
  Storage& smem = aligned_storage<Storage>(dynamic_smem);
  if (threadIdx.x == 0) {
    for (int i = 0; i < KV_STAGES; ++i) {
      mbarrier_init(&smem.kv_full[i], 1);
      mbarrier_init(&smem.kv_empty[i], POOL_CONSUMERS * 128);  // each lane, for what it has read
    }
    for (int i = 0; i < UNIT_STAGES; ++i) {
      mbarrier_init(&smem.q_full[i], 1 + 32);
      mbarrier_init(&smem.q_empty[i], POOL_CONSUMERS * 128);
    }
    mbarrier_init_fence();
  }
  __syncthreads();

  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  if (threadIdx.x < 128) {
    setmaxnreg_dec<56>();
    RingStage<UNIT_STAGES> q;
    if (threadIdx.x == 0) {
      RingStage<KV_STAGES> kv;
      for_each_unit<BLOCK_Q>(shape, first_strip, num_strips, num_groups,
                             [&](int, int group, int first_query, int new_kv) {
        if (new_kv >= 0) {
          mbarrier_wait(&smem.kv_empty[kv.index], kv.phase ^ 1);
          uint64_t* full = &smem.kv_full[kv.index];
          mbarrier_arrive_expect_tx(full, 2 * TILE_BYTES + KEY_FACTS * 4);
          const int batch = new_kv / shape.num_kv_heads, kv_head = new_kv % shape.num_kv_heads;
          for (int half = 0; half < HALVES; ++half) {
            bulk_tensor_4d(shared_address(smem.K_smem[kv.index][half]), &k_map, half * 64, group * POOL_KEYS, kv_head,
                           batch, shared_address(full));
            bulk_tensor_4d(shared_address(smem.V_smem[kv.index][half]), &v_map, half * 64, group * POOL_KEYS, kv_head,
                           batch, shared_address(full));
          }
          const int64_t facts = int64_t(new_kv) * ceil_div(shape.seqlen_k, POOL_KEYS) + group;
          bulk_copy(shared_address(smem.facts_smem[kv.index]), facts_gmem + facts * KEY_FACTS, KEY_FACTS * 4,
                    shared_address(full));
          kv.advance();
        }
        mbarrier_wait(&smem.q_empty[q.index], q.phase ^ 1);
        uint64_t* full = &smem.q_full[q.index];
        mbarrier_arrive_expect_tx(full, UNIT_BYTES);
        for (int half = 0; half < HALVES; ++half)
          bulk_tensor_4d(shared_address(smem.Q_smem[q.index][half]), &mean_map, half * 64, first_query, 0, 0,
                         shared_address(full));
        q.advance();
      });
      mbarrier_wait(&smem.q_empty[q.index], q.phase ^ 1);
      mbarrier_arrive(&smem.q_full[q.index]);  // the end
    } else if (warp > 0) {
      int turn = 1;  // units go round the three warps
      auto send = [&](PoolUnit unit) {
        if (threadIdx.x % 32 == 0) smem.units[q.index] = unit;
        mbarrier_arrive(&smem.q_full[q.index]);  // each lane for what it has written
      };
      auto next = [&] {
        q.advance();
        if (++turn == 4) turn = 1;
      };
      for_each_unit<BLOCK_Q>(shape, first_strip, num_strips, num_groups, [&](int unit, int group, int, int new_kv) {
        if (turn == warp) {
          uint32_t slots[2];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int place = unit % 2 * POOL_UNIT + i * 32 + threadIdx.x % 32;
            slots[i] = skipped_slots(PoolQuery<BLOCK_Q>(shape, first_strip + unit / 2, place), mask_gmem, expand_log2,
                                     group, shape);
          }
          mbarrier_wait(&smem.q_empty[q.index], q.phase ^ 1);
#pragma unroll
          for (int i = 0; i < 2; ++i) smem.slots_smem[q.index][i * 32 + threadIdx.x % 32] = slots[i];
          send({unit, group, new_kv >= 0});
        }
        next();
      });
      if (turn == warp) {
        mbarrier_wait(&smem.q_empty[q.index], q.phase ^ 1);
        send({-1, 0, 0});
      }
    }
    return;
  }

  setmaxnreg_inc<152>();
  const int consumer = warp / 4 - 1, lane = threadIdx.x % 32;
  const int row = warp % 4 * 16 + lane / 4;  // of the unit's 64: this lane's first, the other is + 8
  const bool leader = threadIdx.x % 128 == 0;
  const float scale_log2 = softmax_scale * LOG2_E;
  const uint64_t q_desc = descriptor(shared_address(smem.Q_smem[0]), 16);
  const uint64_t k_desc = descriptor(shared_address(smem.K_smem[0]), 16);
  const uint64_t key_desc = descriptor(shared_address(smem.K_smem[0]), POOL_KEYS * HALF_BYTES);  // as values
  const uint64_t value_desc = descriptor(shared_address(smem.V_smem[0]), POOL_KEYS * HALF_BYTES);
  RingStage<UNIT_STAGES> q;
  RingStage<KV_STAGES> kv;
  bool has_keys = false;
  for (int turn = 0;; turn = turn == POOL_CONSUMERS - 1 ? 0 : turn + 1, q.advance()) {
    mbarrier_wait(&smem.q_full[q.index], q.phase);
    const int unit = smem.units[q.index].unit, group = smem.units[q.index].group;
    if (unit < 0) break;
    if (smem.units[q.index].has_new_keys) {
      if (has_keys) {
        mbarrier_arrive(&smem.kv_empty[kv.index]);
        kv.advance();
      }
      has_keys = true;
      mbarrier_wait(&smem.kv_full[kv.index], kv.phase);
      if (smem.facts_smem[kv.index][POOL_KEYS] != 0.f) {
        bar_sync(CONSUMER_BARRIER, POOL_CONSUMERS * 128);
        drop_infinite<HEAD_DIM, Element>(reinterpret_cast<uint32_t*>(smem.K_smem[kv.index]));
        drop_infinite<HEAD_DIM, Element>(reinterpret_cast<uint32_t*>(smem.V_smem[kv.index]));
        fence_proxy_async();
        bar_sync(CONSUMER_BARRIER, POOL_CONSUMERS * 128);
      }
    }
    if (turn != consumer) {
      mbarrier_arrive(&smem.q_empty[q.index]);
      continue;
    }

    // Weights, from the scores of skipped keys.
    float s[64];
    wgmma_fence();
    multiply_qk<HEAD_DIM, Element, POOL_UNIT>(s, q_desc + uint64_t(q.index * (UNIT_BYTES >> 4)),
                                              k_desc + uint64_t(kv.index * (TILE_BYTES >> 4)));
    wgmma_commit();
    wgmma_wait<0>();
    touch(s);
    const int present = shape.seqlen_k - group * POOL_KEYS - lane % 4 * 2;
    if (present < POOL_KEYS) {
#pragma unroll
      for (int i = 0; i < 64; ++i)
        if (i / 4 * 8 + i % 2 >= present) s[i] = -INFINITY;
    }
    float base[2], total[2] = {}, norm[2] = {};  // base: the largest score, as a power of two
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint32_t skipped = smem.slots_smem[q.index][row + 8 * r];
#pragma unroll
      for (int slot = 0; slot < POOL_SLOTS; ++slot)
        if (!(skipped >> slot & 1))
#pragma unroll
          for (int j = slot * 4; j < slot * 4 + 4; ++j) s[4 * j + 2 * r] = s[4 * j + 2 * r + 1] = -INFINITY;
      float top = s[2 * r];
#pragma unroll
      for (int j = 0; j < 16; ++j) top = fmaxf(top, fmaxf(s[4 * j + 2 * r], s[4 * j + 2 * r + 1]));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
      base[r] = top == -INFINITY ? 0.f : __fmul_ru(top, scale_log2);
    }
#pragma unroll
    for (int i = 0; i < 64; ++i) s[i] = ex2(fmaf(s[i], scale_log2, -base[i / 2 % 2]));
    // The sums are those of the rounded weights, which the products use.
    uint32_t p[8][4];
    round_p<Element>(p, s);
    const uint32_t facts_smem = shared_address(&smem.facts_smem[kv.index][lane % 4 * 2]);
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      const float2 squares = ld_shared_f32x2(facts_smem + j * 32);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float2 weight = unpack<Element>(p[j / 2][j % 2 * 2 + r]);
        total[r] += weight.x + weight.y;
        norm[r] = fmaf(weight.x, squares.x, fmaf(weight.y, squares.y, norm[r]));
      }
    }
    float factor[2], dot[2] = {}, squared_key[2] = {};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      total[r] = quad_sum(total[r]);
      factor[r] = total[r] == 0.f ? 0.f : 1.f / total[r];
      norm[r] = quad_sum(norm[r]) * factor[r];
      if (lane % 4 == r) smem.sums_smem[consumer][row + 8 * r] = {pool_mass(total[r], base[r]), norm[r]};
    }

    float o[HEAD_DIM / 2];
    wgmma_fence();
    multiply_pv<HEAD_DIM, Element>(o, p, key_desc + uint64_t(kv.index * (TILE_BYTES >> 4)));
    wgmma_commit();

    // Pooled keys take the place of the mean queries.
    uint8_t* rows_smem = smem.Q_smem[q.index][0];
    wgmma_wait<0>();
    touch(o);
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 4; ++i) {
      const int r = i % 2;
      uint32_t* place = place_in_tile(rows_smem, row + 8 * r, i / 2);
      const float low = o[2 * i] * factor[r], high = o[2 * i + 1] * factor[r];
      squared_key[r] = fmaf(low, low, fmaf(high, high, squared_key[r]));
      const float2 mean = unpack<Element>(*place);
      const uint32_t word = Element::pack(low, high);
      *place = word;
      const float2 rounded = unpack<Element>(word);
      dot[r] = fmaf(mean.x, rounded.x, fmaf(mean.y, rounded.y, dot[r]));
    }
    wgmma_fence();
    multiply_pv<HEAD_DIM, Element>(o, p, value_desc + uint64_t(kv.index * (TILE_BYTES >> 4)));
    wgmma_commit();
    auto store_pools = [&](const TensorMap& map) {  // the leader
      for (int half = 0; half < HALVES; ++half)
        bulk_store_4d(&map, half * 64, unit * POOL_UNIT, group, 0, shared_address(smem.Q_smem[q.index][half]));
      bulk_store_commit();
      bulk_store_wait_read<0>();
    };
    fence_proxy_async();
    bar_sync(WARPGROUP_BARRIER + consumer, 128);
    if (leader) store_pools(key_map);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      dot[r] = quad_sum(dot[r]), squared_key[r] = quad_sum(squared_key[r]);
      if (lane % 4 == r) {
        const float2 sums = smem.sums_smem[consumer][row + 8 * r];
        terms_gmem[int64_t(unit * POOL_UNIT + row + 8 * r) * padded_pools + group] =
            pool_terms(sums.x, dot[r], sums.y, squared_key[r], HEAD_DIM, softmax_scale);
      }
    }

    // Then pooled values take theirs.
    bar_sync(WARPGROUP_BARRIER + consumer, 128);
    wgmma_wait<0>();
    touch(o);
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 4; ++i) {
      const int r = i % 2;
      *place_in_tile(rows_smem, row + 8 * r, i / 2) = Element::pack(o[2 * i] * factor[r], o[2 * i + 1] * factor[r]);
    }
    fence_proxy_async();
    bar_sync(WARPGROUP_BARRIER + consumer, 128);
    if (leader) store_pools(value_map);
    mbarrier_arrive(&smem.q_empty[q.index]);
  }
}
