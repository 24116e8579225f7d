// Block-sparse attention on Hopper: one CTA attends 128 query rows of one head to the selected 32-key slots.
//
// out[b, i, h, :] = softmax(softmax_scale * q_i . k_j) v_j over the selected, visible keys j; lse is natural log.
// Warpgroup 0 produces: a warp for K and one for V each walk the mask bits from the last block to the first and gather
// 32-key slots into tiles of 128 keys, 96 or 64 (tile/attend_ring.cuh). Warpgroups 1 and 2 consume, 64 rows each, and
// take turns to issue their products: q.k of one tile and p.v of the tile before it, so that the softmax of the one
// runs under both's products.
// A mask of 64-row blocks gives each warpgroup bits of its own: their union is gathered, and what a warpgroup has not
// selected scores -inf.
// Grid: a CTA of 384 threads for each multiprocessor, or fewer; each takes one work item (128 rows of a head) after the
// other from a counter and fetches the next one's tiles while it finishes this one. Items are KV-head-major, longest
// rows first; a run of neighbouring query blocks of one head comes before the next head: they share K and V in the L2.
// FEATURES (tile/score_features.cuh): scores capped, a window, a sink logit for each head: float32 [num_heads].
// Where a KV head's keys and values do not fit the L2, a call is launches over segments of its keys (IN_SEGMENTS): what a
// row has summed so far waits in memory from one segment to the next.
#include "ptx/bar_sync.cuh"
#include "ptx/bulk_tensor.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/ex2.cuh"
#include "ptx/setmaxnreg.cuh"
#include "tile/aligned_storage.cuh"
#include "tile/attend_ring.cuh"
#include "tile/score_features.cuh"
#include "tile/wgmma_products.cuh"

constexpr int EARLY_EXPONENTIALS = 16;  // of a lane's scores, taken before p.v of the tile before is waited for

// What of K and V shared memory holds: so many keys a tile (SM90_TILE_KEYS of salekit/attend_grid.py) and tiles. Rows
// are halves of 64 dims; those of 96 end in zeros.
template <int HEAD_DIM>
struct AttendTiles {
  static constexpr int SLOTS = HEAD_DIM <= 128 ? 4 : HEAD_DIM == 192 ? 3 : 2;
  static constexpr int STAGES = HEAD_DIM <= 128 ? 3 : 2;
  static constexpr int KEYS = SLOTS * KEY_BLOCK, HALVES = ceil_div(HEAD_DIM, 64);
};

template <int HEAD_DIM>
struct AttendSm90Storage : AttendTiles<HEAD_DIM> {
  using Tiles = AttendTiles<HEAD_DIM>;
  alignas(1024) uint8_t Q_smem[Tiles::HALVES][ATTEND_BLOCK_Q * HALF_BYTES];
  alignas(1024) uint8_t K_smem[Tiles::STAGES][Tiles::HALVES][Tiles::KEYS * HALF_BYTES];
  alignas(1024) uint8_t V_smem[Tiles::STAGES][Tiles::HALVES][Tiles::KEYS * HALF_BYTES];
  AttendRing<Tiles::STAGES, Tiles::SLOTS> ring;
  uint8_t alignment_slack[1024];
};

// Fills a tile's slots; in one box when they are neighbours.
template <int HEAD_DIM, int SLOTS, int BYTES>
__device__ __forceinline__ void load_tile(uint8_t (*tile)[BYTES], const TensorMap& map, const TensorMap& wide_map,
                                          const SlotKeys<SLOTS>& keys, const Rows& rows, uint64_t* full) {
  constexpr int HALVES = AttendTiles<HEAD_DIM>::HALVES;
  const uint32_t barrier = shared_address(full);
  mbarrier_arrive_expect_tx(full, HALVES * BYTES);
  if (keys.are_neighbours) {
#pragma unroll
    for (int half = 0; half < HALVES; ++half)
      bulk_tensor_4d(shared_address(tile[half]), &wide_map, half * 64, keys.first[0], rows.kv_head, rows.batch,
                     barrier);
    return;
  }
#pragma unroll
  for (int i = 0; i < SLOTS; ++i)
    for (int half = 0; half < HALVES; ++half)
      bulk_tensor_4d(shared_address(tile[half]) + i * KEY_BLOCK * HALF_BYTES, &map, half * 64, keys.first[i],
                     rows.kv_head, rows.batch, barrier);
}

// Largest of row r's scores and of `before`, over the four lanes that share the row; NaNs do not count.
template <int NUM_SCORES>
__device__ __forceinline__ float row_max(const float (&s)[NUM_SCORES], float before, int r) {
  float top = s[2 * r];
#pragma unroll
  for (int j = 0; j < NUM_SCORES / 4; ++j) top = fmaxf(top, fmaxf(s[4 * j + 2 * r], s[4 * j + 2 * r + 1]));
  top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
  return fmaxf(before, fmaxf(top, __shfl_xor_sync(~0u, top, 2)));
}

// Largest of this lane's scores of row r as integers, two a step: the float's bits if it is >= 0, else negative.
template <int NUM_SCORES>
__device__ __forceinline__ int lane_max_bits(const float (&s)[NUM_SCORES], int r) {
  int top = __vimax3_s32(__float_as_int(s[2 * r]), __float_as_int(s[2 * r + 1]), __float_as_int(s[4 + 2 * r]));
#pragma unroll
  for (int i = 3; i < NUM_SCORES / 2 - 1; i += 2)
    top = __vimax3_s32(top, __float_as_int(s[i / 2 * 4 + 2 * r + 1]), __float_as_int(s[i / 2 * 4 + 4 + 2 * r]));
  return max(top, __float_as_int(s[NUM_SCORES - 4 + 2 * r + 1]));
}

// Sums of a lane's two rows, relative to a maximum that is raised only when a score exceeds it by a factor of 2 ** 8:
// most tiles then need no maximum over lanes and no rescaling. Scores are raw, before softmax_scale.
template <int NUM_SCORES>
struct RowState {
  float top[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
  float base[2];     // what the exponents are taken relative to: top, scaled
  float rescale[2];  // what sums and outputs so far are to be multiplied by after a raise

  // Whether any row of this warp needs a raise for these scores. slack: 8 in units of raw scores.
  __device__ __forceinline__ bool needs_raise(const float (&s)[NUM_SCORES], float slack) const {
    bool needed = false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int bits = lane_max_bits(s, r);
      const float limit = top[r] + slack;
      needed |= (__int_as_float(bits) > limit) | ((bits < 0) & !(limit >= 0.f));
    }
    return __any_sync(~0u, needed);
  }

  __device__ __forceinline__ void raise(const float (&s)[NUM_SCORES], float scale_log2) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float raised = row_max(s, top[r], r);
      // A row with nothing visible yet stays at zero. Rounded up, so that no p exceeds 1 however large scores are.
      base[r] = raised == -INFINITY ? 0.f : __fmul_ru(raised, scale_log2);
      rescale[r] = raised == top[r] ? 1.f : ex2((top[r] - raised) * scale_log2);
      top[r] = raised;
    }
  }

  // s[BEGIN .. END) becomes p.
  template <int BEGIN, int END>
  __device__ __forceinline__ void exponentiate(float (&s)[NUM_SCORES], float scale_log2) const {
#pragma unroll
    for (int i = BEGIN; i < END; ++i) s[i] = ex2(fmaf(s[i], scale_log2, -base[i / 2 % 2]));
  }

  __device__ __forceinline__ void add(const float (&p)[NUM_SCORES]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float part[2] = {0, 0};
#pragma unroll
      for (int j = 0; j < NUM_SCORES / 4; ++j) {
        part[0] += p[4 * j + 2 * r];
        part[1] += p[4 * j + 2 * r + 1];
      }
      sum[r] += part[0] + part[1];
    }
  }
};

// Where a lane keeps its sums and outputs between segments: float4s, 128 apart, those of the tops and sums last.
template <int HEAD_DIM>
struct CarriedState {
  static constexpr int FOURS = HEAD_DIM / 8 + 1;
  float4* mine;

  __device__ CarriedState(float4* carried_gmem, int slot, int warpgroup)
      : mine(carried_gmem + (int64_t(slot) * 2 + warpgroup) * (FOURS * 128) + threadIdx.x % 128) {}

  template <typename State>
  __device__ void load(float (&o)[HEAD_DIM / 2], State& state) const {
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 8; ++i) {
      const float4 x = __ldcs(mine + i * 128);
      o[4 * i] = x.x, o[4 * i + 1] = x.y, o[4 * i + 2] = x.z, o[4 * i + 3] = x.w;
    }
    const float4 x = __ldcs(mine + (FOURS - 1) * 128);
    state.top[0] = x.x, state.top[1] = x.y, state.sum[0] = x.z, state.sum[1] = x.w;
  }

  template <typename State>
  __device__ void store(const float (&o)[HEAD_DIM / 2], const State& state) const {
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 8; ++i)
      __stcs(mine + i * 128, make_float4(o[4 * i], o[4 * i + 1], o[4 * i + 2], o[4 * i + 3]));
    __stcs(mine + (FOURS - 1) * 128, make_float4(state.top[0], state.top[1], state.sum[0], state.sum[1]));
  }
};

template <int HEAD_DIM, typename Element, int MASK_ROWS, bool IN_SEGMENTS, int FEATURES = 0>
__global__ void __launch_bounds__(384, 1)
    attend_sm90(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
                const __grid_constant__ TensorMap v_map, const __grid_constant__ TensorMap k_wide_map,
                const __grid_constant__ TensorMap v_wide_map, TensorView out, float* lse_gmem,
                const uint32_t* mask_gmem, int expand_log2, uint32_t* next_item, Shape shape, float softmax_scale,
                Segment part, float4* carried_gmem, float softcap, float cap_factor, const float* sink_logits_gmem) {
  using Storage = AttendSm90Storage<HEAD_DIM>;
  constexpr int HALVES = Storage::HALVES, SLOTS = Storage::SLOTS, STAGES = Storage::STAGES, KEYS = Storage::KEYS;
  constexpr int NUM_SCORES = KEYS / 2;  // of a lane
  constexpr uint32_t TILE_BYTES = HALVES * KEYS * HALF_BYTES, ALL_SLOTS = 15 & 15 << (4 - SLOTS);
  constexpr bool WINDOWED = FEATURES & WINDOW;
  static_assert(!(WINDOWED && IN_SEGMENTS), "a call with a window is one segment");
  extern __shared__ uint8_t dynamic_smem[];
  Storage& smem = aligned_storage<Storage>(dynamic_smem);

  if (threadIdx.x == 0) smem.ring.init();
  __syncthreads();

  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  AttendRing<STAGES, SLOTS>& ring = smem.ring;
  const Segment segment = IN_SEGMENTS ? part : Segment::whole(shape);
  if (threadIdx.x < 128) {
    setmaxnreg_dec<40>();
    if (warp == 0) {
      auto load_k = [&](const Rows& rows, const SlotKeys<SLOTS>& keys, int stage) {
        load_tile<HEAD_DIM>(smem.K_smem[stage], k_map, k_wide_map, keys, rows, &ring.k_full[stage]);
      };
      hand_out_items<MASK_ROWS, WINDOWED>(ring, shape, segment, mask_gmem, expand_log2, next_item, load_k);
    } else if (warp == 1) {
      auto load_q = [&](const Rows& rows) {
        mbarrier_arrive_expect_tx(&ring.q_full, HALVES * ATTEND_BLOCK_Q * HALF_BYTES);
        for (int half = 0; half < HALVES; ++half)
          bulk_tensor_4d(shared_address(smem.Q_smem[half]), &q_map, half * 64, rows.q_block * ATTEND_BLOCK_Q, rows.head,
                         rows.batch, shared_address(&ring.q_full));
      };
      auto load_v = [&](const Rows& rows, const SlotKeys<SLOTS>& keys, int stage) {
        load_tile<HEAD_DIM>(smem.V_smem[stage], v_map, v_wide_map, keys, rows, &ring.v_full[stage]);
      };
      fetch_queries_and_values<MASK_ROWS, WINDOWED>(ring, shape, segment, mask_gmem, expand_log2, load_q, load_v);
    }
  } else {
    setmaxnreg_inc<232>();
    const int warpgroup = warp / 4 - 1;
    const bool elected = threadIdx.x % 32 == 0;
    const float value_scale = FEATURES & SOFTCAP ? softcap : softmax_scale;  // of a score that is held
    const float scale_log2 = value_scale * 1.4426950408889634f, slack = 8.f / scale_log2;
    const SoftCap cap = {cap_factor};
    const uint64_t q_desc = descriptor(shared_address(smem.Q_smem[0]) + warpgroup * 64 * HALF_BYTES, 16);
    const uint64_t k_desc = descriptor(shared_address(smem.K_smem[0][0]), 16);
    const uint64_t v_desc = descriptor(shared_address(smem.V_smem[0][0]), KEYS * HALF_BYTES);
    int stage = 0;
    uint32_t phase = 0, q_phase = 0;
    ItemCursor cursor;
    if (warpgroup == 1) bar_arrive(TURN_BARRIER, 256);

    for (WorkItem item = cursor.receive(ring); item.index >= 0; item = cursor.receive(ring)) {
      const Rows rows(shape, item.index);
      const int first_row = rows.q_block * ATTEND_BLOCK_Q;
      const int row = first_row + warpgroup * 64 + warp % 4 * 16 + threadIdx.x % 32 / 4;
      const Shape sequence = shape.of_sequence(rows.batch);
      const int visible_upper = sequence.visible_end<WINDOWED>(row);
      const int visible_lower = sequence.visible_end<WINDOWED>(row + 8);
      // Keys that every row of this CTA sees: slots inside need no mask.
      const int visible_to_all = sequence.visible_end<WINDOWED>(first_row);
      auto mask_tile = [&](float(&s)[NUM_SCORES], const SlotTile& tile) {
        const uint32_t selected = tile.selected_by(warpgroup);
        if constexpr ((FEATURES & SOFTCAP) != 0) {
#pragma unroll
          for (int i = 0; i < NUM_SCORES; ++i) s[i] = cap(s[i]);
        }
        if (WINDOWED && SlotStarts<SLOTS>(tile.first_key).first[0] <
                            sequence.visible_begin<WINDOWED>(first_row + ATTEND_BLOCK_Q - 1))
          mask_scores_before(s, tile.first_key, sequence.visible_begin<WINDOWED>(row),
                             sequence.visible_begin<WINDOWED>(row + 8));
        if ((selected != ALL_SLOTS) | (tile.first_key.w + KEY_BLOCK > visible_to_all))
          mask_scores(s, tile.first_key, selected, visible_upper, visible_lower);
      };

      float s[NUM_SCORES], o[HEAD_DIM / 2];
      uint32_t p[KEYS / 16][4];
#pragma unroll
      for (int i = 0; i < HEAD_DIM / 2; ++i) o[i] = 0;
      RowState<NUM_SCORES> state;
      // A row's first segment starts at nothing, its last one stores the output; it is in no segment after that.
      const int num_visible = IN_SEGMENTS ? rows.num_visible(shape) : 0;
      const bool is_first = !IN_SEGMENTS || segment.first_block == 0;
      const bool is_last = !IN_SEGMENTS || num_visible <= segment.end_block;
      const bool is_done = !is_first && num_visible <= segment.first_block;
      const CarriedState<HEAD_DIM> carried(carried_gmem, item.index - segment.first_item, warpgroup);
      if (!is_first && !is_done) carried.load(o, state);

      mbarrier_wait(&ring.q_full, q_phase);
      q_phase ^= 1;
      if (item.num_tiles > 0) {
        mbarrier_wait(&ring.k_full[stage], phase);
        const SlotTile first_tile = ring.tiles[stage];
        wgmma_fence();
        multiply_qk<HEAD_DIM, Element, ATTEND_BLOCK_Q>(s, q_desc, k_desc + uint64_t(stage * (TILE_BYTES >> 4)));
        wgmma_commit();
        wgmma_wait<0>();
        touch(s);
        mbarrier_arrive(&ring.k_empty[stage]);
        mask_tile(s, first_tile);
        state.raise(s, scale_log2);
        if (!is_first) {
#pragma unroll
          for (int i = 0; i < HEAD_DIM / 2; ++i) o[i] *= state.rescale[i / 2 % 2];
#pragma unroll
          for (int r = 0; r < 2; ++r) state.sum[r] *= state.rescale[r];
        }
        state.template exponentiate<0, NUM_SCORES>(s, scale_log2);
        state.add(s);
        round_p<Element>(p, s);

        for (int t = 1; t < item.num_tiles; ++t) {
          int next = stage + 1;
          uint32_t next_phase = phase;
          if (next == STAGES) next = 0, next_phase ^= 1;
          mbarrier_wait(&ring.k_full[next], next_phase);
          const SlotTile tile = ring.tiles[next];
          bar_sync(TURN_BARRIER + warpgroup, 256);
          wgmma_fence();
          multiply_qk<HEAD_DIM, Element, ATTEND_BLOCK_Q>(s, q_desc, k_desc + uint64_t(next * (TILE_BYTES >> 4)));
          wgmma_commit();
          mbarrier_wait(&ring.v_full[stage], phase);
          multiply_pv<HEAD_DIM, Element, true>(o, p, v_desc + uint64_t(stage * (TILE_BYTES >> 4)));
          wgmma_commit();
          bar_arrive(TURN_BARRIER + 1 - warpgroup, 256);
          wgmma_wait<1>();
          touch(s);
          mbarrier_arrive(&ring.k_empty[next]);
          mask_tile(s, tile);
          const bool raised = state.needs_raise(s, slack);
          if (raised) state.raise(s, scale_log2);
          state.template exponentiate<0, EARLY_EXPONENTIALS>(s, scale_log2);
          computed_before(s[EARLY_EXPONENTIALS - 1]);
          wgmma_wait<0>();
          touch(o);
          if (elected) mbarrier_arrive(&ring.v_empty[stage]);
          if (raised) {
#pragma unroll
            for (int i = 0; i < HEAD_DIM / 2; ++i) o[i] *= state.rescale[i / 2 % 2];
#pragma unroll
            for (int r = 0; r < 2; ++r) state.sum[r] *= state.rescale[r];
          }
          // One stretch without branches: ptxas hides the sums and the rounding behind the exponentials.
          state.template exponentiate<EARLY_EXPONENTIALS, NUM_SCORES>(s, scale_log2);
          state.add(s);
          round_p<Element>(p, s);
          stage = next;
          phase = next_phase;
        }
      }
      if (elected) mbarrier_arrive(&ring.q_empty);
      if (item.num_tiles > 0) {
        mbarrier_wait(&ring.v_full[stage], phase);
        wgmma_fence();
        multiply_pv<HEAD_DIM, Element, true>(o, p, v_desc + uint64_t(stage * (TILE_BYTES >> 4)));
        wgmma_commit();
        wgmma_wait<0>();
        touch(o);
        if (elected) mbarrier_arrive(&ring.v_empty[stage]);
        if (++stage == STAGES) stage = 0, phase ^= 1;
      }
      if (is_done) continue;
      if (!is_last) {
        carried.store(o, state);
        continue;
      }

#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float sum = state.sum[r];
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        float top = state.top[r], factor = 1;
        if constexpr ((FEATURES & SINKS) != 0) {
          top *= value_scale;
          factor = add_sink(top, sum, sink_logits_gmem[rows.head]);
        }
        const float inverse = sum == 0.f ? 0.f : factor / sum;
        const int out_row = row + 8 * r;
        const bool present = out_row < shape.of_sequence(rows.batch).seqlen_q;
        store_row<HEAD_DIM, Element>(out.row<uint16_t>(rows.batch, present ? out_row : 0, rows.head), present, o, r,
                                     inverse);
        if (present && lse_gmem != nullptr && threadIdx.x % 4 == 0)
          lse_gmem[int64_t(rows.batch * shape.num_heads + rows.head) * shape.seqlen_q + out_row] =
              fmaf(top, FEATURES & SINKS ? 1.f : value_scale, sum == 0.f ? 0.f : logf(sum));
      }
    }
    if (warpgroup == 0) bar_sync(TURN_BARRIER, 256);  // the turn that warpgroup 1 passed on last
  }
}
