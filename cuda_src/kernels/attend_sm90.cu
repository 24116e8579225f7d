// Block-sparse attention on Hopper: one CTA attends 128 query rows of one head to the selected 32-key slots.
//
// out[b, i, h, :] = softmax(softmax_scale * q_i . k_j) v_j over the selected, visible keys j; lse is natural log.
// Warpgroup 0 produces: a warp for K and one for V each walk the mask bits from the last block to the first and gather
// four 32-key slots into each 128-key tile. Warpgroups 1 and 2 consume, 64 rows each, and take turns to issue their
// products: q.k of one tile and p.v of the tile before it, so that the softmax of the one runs under the products of both.
// A mask of 64-row blocks gives each warpgroup bits of its own: their union is gathered, and what a warpgroup has not
// selected scores -inf.
// Grid: batch * num_heads * ceil(seqlen_q / 128) CTAs of 384 threads, KV-head-major, longest rows first; a run of
// neighbouring query blocks of one head comes before the next head, so that they share K and V in the L2.
#include "ptx/bar_sync.cuh"
#include "ptx/bulk_tensor.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/ex2.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/setmaxnreg.cuh"
#include "ptx/wgmma.cuh"
#include "ptx/wgmma_f16.cuh"
#include "tile/shape.cuh"
#include "tile/slot_walker.cuh"
#include "tile/tensor_view.cuh"

constexpr int ATTEND_BLOCK_Q = 128;
constexpr int ATTEND_TILE_K = 128;
constexpr int ATTEND_STAGES = 3;
constexpr int ATTEND_SLOTS = ATTEND_TILE_K / KEY_BLOCK;
constexpr int ATTEND_RUN = 16;         // neighbouring query blocks of a head before the next head
constexpr int EARLY_EXPONENTIALS = 16;  // of a lane's 64, taken before p.v of the tile before is waited for
constexpr int TURN_BARRIER = 2;        // named barriers 2 and 3: the turns of the two consumers
constexpr int HALF_BYTES = 128;        // a swizzled row: 64 elements

template <int HEAD_DIM>
struct AttendSm90Storage {
  static constexpr int HALVES = HEAD_DIM / 64;
  alignas(1024) uint8_t Q_smem[HALVES][ATTEND_BLOCK_Q * HALF_BYTES];
  alignas(1024) uint8_t K_smem[ATTEND_STAGES][HALVES][ATTEND_TILE_K * HALF_BYTES];
  alignas(1024) uint8_t V_smem[ATTEND_STAGES][HALVES][ATTEND_TILE_K * HALF_BYTES];
  alignas(16) SlotTile tiles[ATTEND_STAGES];
  alignas(8) uint64_t k_full[ATTEND_STAGES], k_empty[ATTEND_STAGES], v_full[ATTEND_STAGES], v_empty[ATTEND_STAGES];
  uint64_t q_full;
  uint8_t alignment_slack[1024];  // dynamic shared memory is not promised to start on 1024 bytes
};

// Fills a tile's four slots; in one box when they are neighbours.
template <int HEAD_DIM>
__device__ __forceinline__ void load_tile(uint8_t (*tile)[ATTEND_TILE_K * HALF_BYTES], const TensorMap& map,
                                          const TensorMap& wide_map, int4 slots, int head, int batch, uint64_t* full) {
  constexpr int HALVES = HEAD_DIM / 64;
  const uint32_t barrier = shared_address(full);
  mbarrier_arrive_expect_tx(full, HALVES * ATTEND_TILE_K * HALF_BYTES);
  if (slots.x >= 0 && slots.w - slots.x == 3 * KEY_BLOCK) {
#pragma unroll
    for (int half = 0; half < HALVES; ++half)
      bulk_tensor_4d(shared_address(tile[half]), &wide_map, half * 64, slots.x, head, batch, barrier);
    return;
  }
  // An absent slot repeats the last one: its scores are masked, and 0 * v must not meet stale NaNs.
  const int keys[ATTEND_SLOTS] = {slots.x < 0 ? slots.w : slots.x, slots.y < 0 ? slots.w : slots.y,
                                  slots.z < 0 ? slots.w : slots.z, slots.w};
#pragma unroll
  for (int i = 0; i < ATTEND_SLOTS; ++i)
    for (int half = 0; half < HALVES; ++half)
      bulk_tensor_4d(shared_address(tile[half]) + i * KEY_BLOCK * HALF_BYTES, &map, half * 64, keys[i], head, batch,
                     barrier);
}

// Shared-memory matrix descriptors, 128-byte swizzle: groups of 8 rows are 1024 bytes apart (PTX ISA, "matrix descriptor").
__device__ __forceinline__ uint64_t descriptor(uint32_t smem_address, uint32_t leading_bytes) {
  return uint64_t((smem_address & 0x3FFFF) >> 4) | uint64_t(leading_bytes >> 4) << 16 | uint64_t(1024 >> 4) << 32 | 1ull << 62;
}

template <int HEAD_DIM, typename Element>
__device__ __forceinline__ void multiply_qk(float (&s)[64], uint64_t q_desc, uint64_t k_desc) {
#pragma unroll
  for (int step = 0; step < HEAD_DIM / 16; ++step) {
    uint64_t advance = uint64_t((step / 4) * (ATTEND_TILE_K * HALF_BYTES >> 4) + (step % 4) * (32 >> 4));
    wgmma_m64n128k16_ss<Element>(s, q_desc + advance, k_desc + advance, step != 0);
  }
}

template <int HEAD_DIM, typename Element>
__device__ __forceinline__ void multiply_pv(float (&o)[HEAD_DIM / 2], const uint32_t (&p)[8][4], uint64_t v_desc) {
#pragma unroll
  for (int step = 0; step < ATTEND_TILE_K / 16; ++step)
    wgmma_m64k16_rs<Element, HEAD_DIM / 2>(o, p[step], v_desc + uint64_t(step * (16 * HALF_BYTES >> 4)));
}

// Tells the compiler that the asynchronous products have written these registers.
template <int N>
__device__ __forceinline__ void touch(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Keeps the arithmetic that x >= 0 comes from before the waits that follow: ptxas moves a wait up, but not over a branch.
__device__ __forceinline__ void computed_before(float x) {
  if (x < 0.f) __nanosleep(1);
}

// Largest of row r's scores and of `before`; NaNs do not count.
__device__ __forceinline__ float row_max(const float (&s)[64], float before, int r) {
  float top = s[2 * r];
#pragma unroll
  for (int j = 0; j < 16; ++j) top = fmaxf(top, fmaxf(s[4 * j + 2 * r], s[4 * j + 2 * r + 1]));
  top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
  return fmaxf(before, fmaxf(top, __shfl_xor_sync(~0u, top, 2)));
}

// The same by integer maxima of three, at half the cost: right when the result is >= 0, as floats order like integers there.
__device__ __forceinline__ float row_max_if_positive(const float (&s)[64], float before, int r) {
  int top = __float_as_int(before);
#pragma unroll
  for (int j = 0; j < 16; ++j)
    top = __vimax3_s32(top, __float_as_int(s[4 * j + 2 * r]), __float_as_int(s[4 * j + 2 * r + 1]));
  top = max(top, __shfl_xor_sync(~0u, top, 1));
  return __int_as_float(max(top, __shfl_xor_sync(~0u, top, 2)));
}

// Running maximum and sum of a lane's two rows, in units of raw scores.
struct RowState {
  float top[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
  float base[2];     // what the exponents are taken relative to: top, scaled
  float rescale[2];  // what sums and outputs so far are to be multiplied by

  __device__ __forceinline__ void raise(const float (&s)[64], float scale_log2) {
    float raised[2] = {row_max_if_positive(s, top[0], 0), row_max_if_positive(s, top[1], 1)};
    if (__any_sync(~0u, !(raised[0] >= 0.f) | !(raised[1] >= 0.f))) {
      raised[0] = row_max(s, top[0], 0);
      raised[1] = row_max(s, top[1], 1);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      base[r] = raised[r] == -INFINITY ? 0.f : raised[r] * scale_log2;  // a row with nothing visible yet stays at zero
      rescale[r] = raised[r] == top[r] ? 1.f : ex2((top[r] - raised[r]) * scale_log2);
      top[r] = raised[r];
    }
  }

  // s[BEGIN .. END) becomes p.
  template <int BEGIN, int END>
  __device__ __forceinline__ void exponentiate(float (&s)[64], float scale_log2) const {
#pragma unroll
    for (int i = BEGIN; i < END; ++i) s[i] = ex2(fmaf(s[i], scale_log2, -base[i / 2 % 2]));
  }

  __device__ __forceinline__ void add(const float (&p)[64]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float part[2] = {0, 0};
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        part[0] += p[4 * j + 2 * r];
        part[1] += p[4 * j + 2 * r + 1];
      }
      sum[r] = fmaf(sum[r], rescale[r], part[0] + part[1]);
    }
  }
};

template <typename Element>
__device__ __forceinline__ void round_p(uint32_t (&p)[8][4], const float (&s)[64]) {
#pragma unroll
  for (int i = 0; i < 32; ++i) p[i / 4][i % 4] = Element::pack(s[2 * i], s[2 * i + 1]);
}

// Scores of slots that are not selected and of keys beyond a row's limit become -inf.
__device__ __forceinline__ void mask_scores(float (&s)[64], int4 slots, uint32_t selected, int visible_upper,
                                            int visible_lower) {
  const int starts[ATTEND_SLOTS] = {slots.x, slots.y, slots.z, slots.w};
#pragma unroll
  for (int j = 0; j < 16; ++j) {
    const bool absent = (selected >> (j / 4) & 1) == 0;
    const int key = starts[j / 4] + (j % 4) * 8 + (threadIdx.x % 4) * 2;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (absent | (key + i >= visible_upper)) s[4 * j + i] = -INFINITY;
      if (absent | (key + i >= visible_lower)) s[4 * j + 2 + i] = -INFINITY;
    }
  }
}

template <int HEAD_DIM, typename Element, int MASK_ROWS>
__global__ void __launch_bounds__(384, 1)
    attend_sm90(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
                const __grid_constant__ TensorMap v_map, const __grid_constant__ TensorMap k_wide_map,
                const __grid_constant__ TensorMap v_wide_map, TensorView out, float* lse_gmem, const uint32_t* mask_gmem,
                int expand_log2, Shape shape, float softmax_scale) {
  using Storage = AttendSm90Storage<HEAD_DIM>;
  constexpr int HALVES = Storage::HALVES;
  constexpr uint32_t TILE_BYTES = HALVES * ATTEND_TILE_K * HALF_BYTES;
  extern __shared__ uint8_t dynamic_smem[];
  Storage& smem = *reinterpret_cast<Storage*>((reinterpret_cast<uint64_t>(dynamic_smem) + 1023) & ~uint64_t(1023));

  // Which rows of which head.
  const int num_q_blocks = ceil_div(shape.seqlen_q, ATTEND_BLOCK_Q);
  const int group = shape.group_size();
  const int per_kv_head = group * num_q_blocks;
  const int kv_index = blockIdx.x / per_kv_head;
  const int within = blockIdx.x % per_kv_head;
  const int run = within / (group * ATTEND_RUN);
  const int in_run = within % (group * ATTEND_RUN);
  const int run_width = min(ATTEND_RUN, num_q_blocks - run * ATTEND_RUN);
  const int q_block = num_q_blocks - 1 - (run * ATTEND_RUN + in_run % run_width);
  const int batch = kv_index / shape.num_kv_heads;
  const int kv_head = kv_index % shape.num_kv_heads;
  const int head = kv_head * group + in_run / run_width;
  const int first_row = q_block * ATTEND_BLOCK_Q;

  const int num_visible = ceil_div(shape.visible_keys(first_row + ATTEND_BLOCK_Q - 1), KEY_BLOCK);
  using Walker = SlotWalker<MASK_ROWS>;
  const uint32_t* mask_rows[Walker::NUM_ROWS] = {};
  if (mask_gmem != nullptr) {
    const int num_mask_rows = ceil_div(shape.seqlen_q, MASK_ROWS);
    const int num_words = ceil_div(ceil_div(shape.seqlen_k, KEY_BLOCK << expand_log2), 32);
#pragma unroll
    for (int r = 0; r < Walker::NUM_ROWS; ++r) {
      const int row = q_block * Walker::NUM_ROWS + r;
      if (row < num_mask_rows)
        mask_rows[r] = mask_gmem + (int64_t(batch * shape.num_heads + head) * num_mask_rows + row) * num_words;
    }
  }
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < ATTEND_STAGES; ++stage) {
      mbarrier_init(&smem.k_full[stage], 1);
      mbarrier_init(&smem.v_full[stage], 1);
      mbarrier_init(&smem.k_empty[stage], 2);
      mbarrier_init(&smem.v_empty[stage], 2);
    }
    mbarrier_init(&smem.q_full, 1);
    mbarrier_init_fence();
  }
  __syncthreads();

  if (threadIdx.x < 128) {
    setmaxnreg_dec<24>();
    // One warp fetches K, another V: neither waits for room that the other needs.
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
    if (warp < 2) {
      const bool elected = threadIdx.x % 32 == 0, fetches_k = warp == 0;
      auto* tiles = fetches_k ? smem.K_smem : smem.V_smem;
      const TensorMap& map = fetches_k ? k_map : v_map;
      const TensorMap& wide_map = fetches_k ? k_wide_map : v_wide_map;
      uint64_t* full = fetches_k ? smem.k_full : smem.v_full;
      uint64_t* empty = fetches_k ? smem.k_empty : smem.v_empty;
      if (elected && fetches_k) {
        mbarrier_arrive_expect_tx(&smem.q_full, HALVES * ATTEND_BLOCK_Q * HALF_BYTES);
        for (int half = 0; half < HALVES; ++half)
          bulk_tensor_4d(shared_address(smem.Q_smem[half]), &q_map, half * 64, first_row, head, batch,
                         shared_address(&smem.q_full));
      }
      Walker walker(mask_rows, expand_log2, num_visible);
      int stage = 0;
      uint32_t phase = 1;
      while (true) {
        const SlotTile tile = walker.next();
        if (tile.first_key.w < 0) break;
        mbarrier_wait(&empty[stage], phase);  // all lanes: a diverged warp would spin instead of sleeping
        if (elected) {
          if (fetches_k) smem.tiles[stage] = tile;
          load_tile<HEAD_DIM>(tiles[stage], map, wide_map, tile.first_key, kv_head, batch, &full[stage]);
        }
        __syncwarp();
        if (++stage == ATTEND_STAGES) stage = 0, phase ^= 1;
      }
    }
  } else {
    setmaxnreg_inc<240>();
    const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0) - 1;  // uniform: so are the descriptors
    const bool leader = threadIdx.x % 128 == 0;
    const int row = first_row + warpgroup * 64 + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
    const int visible_upper = shape.visible_keys(row), visible_lower = shape.visible_keys(row + 8);
    // Keys that every row of this CTA sees: slots inside need no mask.
    const int visible_to_all = shape.visible_keys(first_row);
    const float scale_log2 = softmax_scale * 1.4426950408889634f;
    const uint64_t q_desc = descriptor(shared_address(smem.Q_smem[0]) + warpgroup * 64 * HALF_BYTES, 16);
    const uint64_t k_desc = descriptor(shared_address(smem.K_smem[0][0]), 16);
    const uint64_t v_desc = descriptor(shared_address(smem.V_smem[0][0]), ATTEND_TILE_K * HALF_BYTES);
    auto mask_tile = [&](float(&s)[64], const SlotTile& tile) {
      const uint32_t selected = tile.selected_by(warpgroup);
      if ((selected != 15) | (tile.first_key.w + KEY_BLOCK > visible_to_all))
        mask_scores(s, tile.first_key, selected, visible_upper, visible_lower);
    };
    const int num_slots = Walker(mask_rows, expand_log2, num_visible).count();
    const int num_tiles = __shfl_sync(~0u, ceil_div(num_slots, ATTEND_SLOTS), 0);

    float s[64], o[HEAD_DIM / 2];
    uint32_t p[8][4];
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 2; ++i) o[i] = 0;
    RowState state;

    mbarrier_wait(&smem.q_full, 0);
    if (num_tiles > 0) {
      mbarrier_wait(&smem.k_full[0], 0);
      const SlotTile first_tile = smem.tiles[0];
      wgmma_fence();
      multiply_qk<HEAD_DIM, Element>(s, q_desc, k_desc);
      wgmma_commit();
      wgmma_wait<0>();
      touch(s);
      if (leader) mbarrier_arrive(&smem.k_empty[0]);
      mask_tile(s, first_tile);
      state.raise(s, scale_log2);
      state.exponentiate<0, 64>(s, scale_log2);
      state.add(s);
      round_p<Element>(p, s);

      if (warpgroup == 1 && num_tiles > 1) bar_arrive(TURN_BARRIER, 256);
      int stage = 0;
      uint32_t phase = 0;
      for (int t = 1; t < num_tiles; ++t) {
        int next = stage + 1;
        uint32_t next_phase = phase;
        if (next == ATTEND_STAGES) next = 0, next_phase ^= 1;
        mbarrier_wait(&smem.k_full[next], next_phase);
        const SlotTile tile = smem.tiles[next];
        bar_sync(TURN_BARRIER + warpgroup, 256);
        wgmma_fence();
        multiply_qk<HEAD_DIM, Element>(s, q_desc, k_desc + uint64_t(next * (TILE_BYTES >> 4)));
        wgmma_commit();
        mbarrier_wait(&smem.v_full[stage], phase);
        multiply_pv<HEAD_DIM, Element>(o, p, v_desc + uint64_t(stage * (TILE_BYTES >> 4)));
        wgmma_commit();
        if (warpgroup == 0 || t + 1 < num_tiles) bar_arrive(TURN_BARRIER + 1 - warpgroup, 256);
        wgmma_wait<1>();
        touch(s);
        if (leader) mbarrier_arrive(&smem.k_empty[next]);
        mask_tile(s, tile);
        state.raise(s, scale_log2);
        state.exponentiate<0, EARLY_EXPONENTIALS>(s, scale_log2);
        computed_before(s[EARLY_EXPONENTIALS - 1]);
        wgmma_wait<0>();
        touch(o);
        if (leader) mbarrier_arrive(&smem.v_empty[stage]);
        // One stretch without branches: ptxas hides the rescaling and the sums behind the exponentials.
        state.exponentiate<EARLY_EXPONENTIALS, 64>(s, scale_log2);
        state.add(s);
#pragma unroll
        for (int i = 0; i < HEAD_DIM / 2; ++i) o[i] *= state.rescale[i / 2 % 2];
        round_p<Element>(p, s);
        stage = next;
        phase = next_phase;
      }
      mbarrier_wait(&smem.v_full[stage], phase);
      wgmma_fence();
      multiply_pv<HEAD_DIM, Element>(o, p, v_desc + uint64_t(stage * (TILE_BYTES >> 4)));
      wgmma_commit();
      wgmma_wait<0>();
      touch(o);
    }

#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum = state.sum[r];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      const int out_row = row + 8 * r;
      if (out_row >= shape.seqlen_q) continue;
      const float inverse = sum == 0.f ? 0.f : 1.f / sum;
      uint32_t* out_gmem = out.row<uint32_t>(0, 0, 0) +
                           (batch * out.stride_batch + out_row * out.stride_row + head * out.stride_head) / 2 +
                           threadIdx.x % 4;
#pragma unroll
      for (int j = 0; j < HEAD_DIM / 8; ++j)
        out_gmem[4 * j] = Element::pack(o[4 * j + 2 * r] * inverse, o[4 * j + 2 * r + 1] * inverse);
      if (lse_gmem != nullptr && threadIdx.x % 4 == 0)
        lse_gmem[int64_t(batch * shape.num_heads + head) * shape.seqlen_q + out_row] =
            sum == 0.f ? -INFINITY : fmaf(state.top[r], softmax_scale, logf(sum));
    }
  }
}
