// attend_pools on Hopper, for blocks of 128 rows: the same sums (kernels/attend_pools.cu says of what), by products of a
// warpgroup.
//
// q_map: boxes of 128 rows; key_map, value_map: the launch's pools as [1, padded_pools, strips * 128, HEAD_DIM], boxes of
// 128 pools of one mean query; out, lse, mean and terms as in attend_pools.
// Grid: a CTA of 384 threads for each multiprocessor, or fewer; each takes one mean query's block after the other, the last
// ones first. Warpgroup 0 fetches, warpgroups 1 and 2 have 64 rows each.
#include "ptx/bar_sync.cuh"
#include "ptx/bulk_copy.cuh"
#include "ptx/bulk_tensor.cuh"
#include "ptx/ex2.cuh"
#include "ptx/fence_proxy.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/setmaxnreg.cuh"
#include "tile/aligned_storage.cuh"
#include "tile/pools.cuh"
#include "tile/ring_stage.cuh"
#include "tile/tensor_view.cuh"
#include "tile/wgmma_products.cuh"

constexpr int BLOCK_ROWS = 128;
constexpr int UNIT_ROWS = 64;         // of a warpgroup
constexpr int KV_STAGES = 2;
constexpr int Q_STAGES = 2;
constexpr int POOL_TILE = WGMMA_KEYS;
constexpr int WARPGROUP_BARRIER = 1;  // named barriers 1 and 2: of a consumer warpgroup; 3: of both
constexpr int CONSUMER_BARRIER = 3;

template <int HEAD_DIM>
struct AttendPoolsSm90Storage {
  static constexpr int HALVES = HEAD_DIM / 64;
  alignas(1024) uint8_t Q_smem[Q_STAGES][HALVES][BLOCK_ROWS * HALF_BYTES];  // what the pools contribute too, at the end
  alignas(1024) uint8_t K_smem[KV_STAGES][HALVES][POOL_TILE * HALF_BYTES];
  alignas(1024) uint8_t V_smem[KV_STAGES][HALVES][POOL_TILE * HALF_BYTES];
  alignas(16) PoolTerms terms_smem[KV_STAGES][POOL_TILE];
  alignas(16) uint16_t mean_smem[Q_STAGES][HEAD_DIM];
  float keep_smem[BLOCK_ROWS];  // of each row: what the output so far is multiplied by
  uint64_t q_full[Q_STAGES], q_empty[Q_STAGES], kv_full[KV_STAGES], kv_empty[KV_STAGES];
  uint8_t alignment_slack[1024];
};

// Calls f(place among the launch's mean queries, mean query, how many pools) for each block that this CTA takes.
template <typename F>
__device__ __forceinline__ void for_each_block(const Shape& shape, int first_strip, int num_strips, F&& f) {
  for (int item = blockIdx.x; item < num_strips * POOL_STRIP; item += gridDim.x) {
    const int place = num_strips * POOL_STRIP - 1 - item;
    const PoolQuery<BLOCK_ROWS> query(shape, first_strip + place / POOL_STRIP, place % POOL_STRIP);
    const int num_pools = ceil_div(query.visible_to_all(shape), POOL_KEYS);
    if (num_pools > 0) f(place, query, num_pools);
  }
}

// Two elements of a row, chunk * 8 + lane % 4 * 2 on, in a tile of swizzled halves of 128 rows.
__device__ __forceinline__ uint32_t* place_in_tile(uint8_t* tile, int row, int chunk) {
  return reinterpret_cast<uint32_t*>(tile + chunk / 8 * (BLOCK_ROWS * HALF_BYTES) + row * HALF_BYTES +
                                     ((chunk % 8 ^ row & 7) << 4) + threadIdx.x % 4 * 4);
}

template <int HEAD_DIM, typename Element>
__global__ void __launch_bounds__(384, 1)
    attend_pools_sm90(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap key_map,
                      const __grid_constant__ TensorMap value_map, TensorView out, float* lse_gmem,
                      const uint16_t* mean_gmem, const PoolTerms* terms_gmem, Shape shape, float softmax_scale,
                      int first_strip, int num_strips, int padded_pools) {
  using Storage = AttendPoolsSm90Storage<HEAD_DIM>;
  using Query = PoolQuery<BLOCK_ROWS>;
  constexpr int HALVES = Storage::HALVES;
  constexpr uint32_t Q_BYTES = HALVES * BLOCK_ROWS * HALF_BYTES, TILE_BYTES = HALVES * POOL_TILE * HALF_BYTES;
  extern __shared__ uint8_t dynamic_smem[];
  Storage& smem = aligned_storage<Storage>(dynamic_smem);
  if (threadIdx.x == 0) {
    for (int i = 0; i < Q_STAGES; ++i) mbarrier_init(&smem.q_full[i], 1), mbarrier_init(&smem.q_empty[i], 2);
    for (int i = 0; i < KV_STAGES; ++i) mbarrier_init(&smem.kv_full[i], 1), mbarrier_init(&smem.kv_empty[i], 2);
    mbarrier_init_fence();
  }
  __syncthreads();

  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  if (threadIdx.x < 128) {
    setmaxnreg_dec<56>();
    if (threadIdx.x != 0) return;
    RingStage<Q_STAGES> q;
    RingStage<KV_STAGES> kv;
    for_each_block(shape, first_strip, num_strips, [&](int place, const Query& query, int num_pools) {
      mbarrier_wait(&smem.q_empty[q.index], q.phase ^ 1);
      uint64_t* full = &smem.q_full[q.index];
      mbarrier_arrive_expect_tx(full, Q_BYTES + HEAD_DIM * 2);
      for (int half = 0; half < HALVES; ++half)
        bulk_tensor_4d(shared_address(smem.Q_smem[q.index][half]), &q_map, half * 64, query.first_row(), query.head,
                       query.batch, shared_address(full));
      bulk_copy(shared_address(smem.mean_smem[q.index]), mean_gmem + query.index * HEAD_DIM, HEAD_DIM * 2,
                shared_address(full));
      q.advance();
      for (int first = 0; first < num_pools; first += POOL_TILE) {
        mbarrier_wait(&smem.kv_empty[kv.index], kv.phase ^ 1);
        full = &smem.kv_full[kv.index];
        const uint32_t terms_bytes = min(POOL_TILE, padded_pools - first) * sizeof(PoolTerms);
        mbarrier_arrive_expect_tx(full, 2 * TILE_BYTES + terms_bytes);
        for (int half = 0; half < HALVES; ++half) {
          bulk_tensor_4d(shared_address(smem.K_smem[kv.index][half]), &key_map, half * 64, first, place, 0,
                         shared_address(full));
          bulk_tensor_4d(shared_address(smem.V_smem[kv.index][half]), &value_map, half * 64, first, place, 0,
                         shared_address(full));
        }
        bulk_copy(shared_address(smem.terms_smem[kv.index]), terms_gmem + int64_t(place) * padded_pools + first,
                  terms_bytes, shared_address(full));
        kv.advance();
      }
    });
    return;
  }

  setmaxnreg_inc<224>();
  const int unit = warp / 4 - 1, lane = threadIdx.x % 32;
  const int row = unit * UNIT_ROWS + warp % 4 * 16 + lane / 4;  // of the block: this lane's first, the other is + 8
  const bool leader = threadIdx.x % 128 == 0;
  const float scale_log2 = softmax_scale * LOG2_E;
  const uint64_t q_desc = descriptor(shared_address(smem.Q_smem[0]) + unit * UNIT_ROWS * HALF_BYTES, 16);
  const uint64_t k_desc = descriptor(shared_address(smem.K_smem[0]), 16);
  const uint64_t v_desc = descriptor(shared_address(smem.V_smem[0]), POOL_TILE * HALF_BYTES);
  RingStage<Q_STAGES> q;
  RingStage<KV_STAGES> kv;
  for_each_block(shape, first_strip, num_strips, [&](int, const Query& query, int num_pools) {
    uint8_t* rows_smem = smem.Q_smem[q.index][0];
    mbarrier_wait(&smem.q_full[q.index], q.phase);
    float distance[2] = {};
#pragma unroll
    for (int chunk = 0; chunk < HEAD_DIM / 8; ++chunk) {
      const float2 mean =
          unpack<Element>(*reinterpret_cast<const uint32_t*>(&smem.mean_smem[q.index][chunk * 8 + lane % 4 * 2]));
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float2 x = unpack<Element>(*place_in_tile(rows_smem, row + 8 * r, chunk));
        distance[r] = fmaf(x.x - mean.x, x.x - mean.x, fmaf(x.y - mean.y, x.y - mean.y, distance[r]));
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) distance[r] = quad_sum(distance[r]);

    float o[HEAD_DIM / 2], top[2] = {-INFINITY, -INFINITY}, sum[2] = {};
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 2; ++i) o[i] = 0;
    for (int first = 0; first < num_pools; first += POOL_TILE) {
      mbarrier_wait(&smem.kv_full[kv.index], kv.phase);
      float s[64];
      wgmma_fence();
      multiply_qk<HEAD_DIM, Element, BLOCK_ROWS>(s, q_desc + uint64_t(q.index * (Q_BYTES >> 4)),
                                                 k_desc + uint64_t(kv.index * (TILE_BYTES >> 4)));
      wgmma_commit();
      const int left = num_pools - first;
      if (left < POOL_TILE) {  // absent pools may be anything: their values become 0
        uint4* values = reinterpret_cast<uint4*>(smem.V_smem[kv.index]);
        for (int i = threadIdx.x - 128; i < int(TILE_BYTES / 16); i += 256)
          if (i / (HALF_BYTES / 16) % POOL_TILE >= left) values[i] = {0, 0, 0, 0};
        fence_proxy_async();
        bar_sync(CONSUMER_BARRIER, 256);
      }
      wgmma_wait<0>();
      touch(s);
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        const float4 terms = *reinterpret_cast<const float4*>(&smem.terms_smem[kv.index][j * 8 + lane % 4 * 2]);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          float& low = s[4 * j + 2 * r];
          float& high = s[4 * j + 2 * r + 1];
          low = fmaf(low, scale_log2, terms.x + fminf(distance[r] * terms.y, MOST_SECOND_ORDER));
          high = fmaf(high, scale_log2, terms.z + fminf(distance[r] * terms.w, MOST_SECOND_ORDER));
        }
      }
      if (left < POOL_TILE) {
        const int present = left - lane % 4 * 2;
#pragma unroll
        for (int i = 0; i < 64; ++i)
          if (i / 4 * 8 + i % 2 >= present) s[i] = -INFINITY;
      }
      float base[2], rescale[2];
      bool moved = false;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float most = s[2 * r];
#pragma unroll
        for (int j = 0; j < 16; ++j) most = fmaxf(most, fmaxf(s[4 * j + 2 * r], s[4 * j + 2 * r + 1]));
        most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
        most = fmaxf(top[r], fmaxf(most, __shfl_xor_sync(~0u, most, 2)));
        base[r] = most == -INFINITY ? 0.f : most;
        rescale[r] = ex2(top[r] - base[r]);
        moved |= most != top[r];
        top[r] = most;
      }
      if (__any_sync(~0u, moved)) {  // else they are all 1
#pragma unroll
        for (int i = 0; i < HEAD_DIM / 2; ++i) o[i] *= rescale[i / 2 % 2];
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float even = 0, odd = 0;
#pragma unroll
        for (int j = 0; j < 16; ++j) {
          even += s[4 * j + 2 * r] = ex2(s[4 * j + 2 * r] - base[r]);
          odd += s[4 * j + 2 * r + 1] = ex2(s[4 * j + 2 * r + 1] - base[r]);
        }
        sum[r] = fmaf(sum[r], rescale[r], even + odd);
      }
      uint32_t p[8][4];
      round_p<Element>(p, s);
      wgmma_fence();
      multiply_pv<HEAD_DIM, Element, true>(o, p, v_desc + uint64_t(kv.index * (TILE_BYTES >> 4)));
      wgmma_commit();
      wgmma_wait<0>();
      touch(o);
      if (leader) mbarrier_arrive(&smem.kv_empty[kv.index]);
      kv.advance();
    }

    // Merge: each row's outputs by their share of the mass.
    const int num_rows = min(BLOCK_ROWS, shape.seqlen_q - query.first_row());
    float* own_lse_gmem =
        lse_gmem + int64_t(query.batch * shape.num_heads + query.head) * shape.seqlen_q + query.first_row();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int own = row + 8 * r;
      const float total = quad_sum(sum[r]);
      const float before = own < num_rows ? own_lse_gmem[own] * LOG2_E : -INFINITY;
      const PoolShare share(before, total == 0.f ? -INFINITY : top[r] + __log2f(total), total);
      if (lane % 4 == 0) {
        smem.keep_smem[own] = share.keep;
        if (own < num_rows && share.is_changed) own_lse_gmem[own] = share.mass * (1.f / LOG2_E);
      }
#pragma unroll
      for (int chunk = 0; chunk < HEAD_DIM / 8; ++chunk)
        *place_in_tile(rows_smem, own, chunk) =
            share.is_changed ? Element::pack(o[4 * chunk + 2 * r] * share.add, o[4 * chunk + 2 * r + 1] * share.add)
                             : 0;
    }
    __syncwarp();
    constexpr int CHUNKS = HEAD_DIM / 8;
    uint16_t* out_gmem = out.row<uint16_t>(query.batch, query.first_row(), query.head);
#pragma unroll
    for (int i = 0; i < 16; i += 32 / CHUNKS) {
      const int own = unit * UNIT_ROWS + warp % 4 * 16 + i + lane / CHUNKS, chunk = lane % CHUNKS;
      if (own < num_rows) {
        const uint4 added = *reinterpret_cast<const uint4*>(rows_smem + chunk / 8 * (BLOCK_ROWS * HALF_BYTES) +
                                                            own * HALF_BYTES + ((chunk % 8 ^ own & 7) << 4));
        add_to_output<Element>(out_gmem + own * out.stride_row + chunk * 8, smem.keep_smem[own], added);
      }
    }
    fence_proxy_async();
    bar_sync(WARPGROUP_BARRIER + unit, 128);
    if (leader) mbarrier_arrive(&smem.q_empty[q.index]);
    q.advance();
  });
}
