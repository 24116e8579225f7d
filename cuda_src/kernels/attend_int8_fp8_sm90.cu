// Block-sparse attention from 8-bit products on Hopper: attend_sm90 with int8 q.k and e4m3 p.v.
//
// out[b, i, h, :] = softmax(softmax_scale * q_i . k_j) v_j over the selected, visible keys j, of q, k and v as
// quantize_balanced and quantize_e4m3 hold them; lse is natural log, of the scores before smoothing (row_shift: q_i .
// the mean of k; null with lse). Codes of q and k are 128-row tiles (salekit/codes.py); of v, tiles of 32 keys
// (quantize_e4m3.cu). q_scale, row_shift float32 [batch, num_heads, padded_q]; k_scale float32 [batch, num_kv_heads,
// padded_k / 32, 4], each four times over; v_scale float32 [batch, num_kv_heads, HEAD_DIM].
// q.k is added to integers that are the bits of ZERO_SCORE: the sums are the bits of the float ZERO_SCORE + q.k, and a
// score's exponent is one multiply-add away. p is rounded to e4m3 at 2 ** 7 times its value, at most 448.
// The tensor cores' sums of p.v are too coarse to run long: every PROMOTE_TILES tiles they are added to float32 sums in
// shared memory, where each lane has its own.
// Grid and roles as in attend_sm90.
#include "ptx/bulk_copy.cuh"
#include "ptx/ex2.cuh"
#include "ptx/setmaxnreg.cuh"
#include "ptx/wgmma.cuh"
#include "ptx/wgmma_e4m3.cuh"
#include "tile/aligned_storage.cuh"
#include "tile/attend_ring.cuh"

constexpr int LOW_BIT_STAGES = 4;
constexpr int HALF_SLOTS = ATTEND_SLOTS / 2;         // what a warpgroup takes at a time
constexpr int PROMOTE_TILES = 4;
constexpr float ZERO_SCORE = 12582912.f;             // 1.5 * 2 ** 23: integers within 2 ** 22 of it are exact
constexpr int ZERO_SCORE_BITS = 0x4B400000;
constexpr float P_EXPONENT = 7.f;                    // the largest p of a row when its base is raised: 2 ** 7
constexpr int LARGEST_P_EXPONENT_BITS = 0x410CCCCD;  // 8.8: e4m3 ends at 448 = 2 ** 8.807

template <int HEAD_DIM>
struct AttendInt8Fp8Sm90Storage {
  alignas(1024) uint8_t Q_smem[ATTEND_BLOCK_Q * HEAD_DIM];
  alignas(1024) uint8_t K_smem[LOW_BIT_STAGES][ATTEND_TILE_K * HEAD_DIM];
  alignas(1024) uint8_t V_smem[LOW_BIT_STAGES][ATTEND_TILE_K * HEAD_DIM];
  alignas(16) float4 sums[2][HEAD_DIM / 8][128];  // [warpgroup][columns of a lane, in fours][lane]
  alignas(16) float4 k_scales[LOW_BIT_STAGES][ATTEND_SLOTS];
  AttendRing<LOW_BIT_STAGES> ring;
  uint8_t alignment_slack[1024];
};

// Fills a tile's four slots from 32-key blocks of BYTES each; in one copy when they are neighbours.
template <int BYTES>
__device__ __forceinline__ void load_slots(uint32_t smem_address, const uint8_t* blocks_gmem, const SlotKeys& keys,
                                           uint32_t barrier) {
  if (keys.are_neighbours) {
    bulk_copy(smem_address, blocks_gmem + int64_t(keys.first[0] / KEY_BLOCK) * BYTES, ATTEND_SLOTS * BYTES, barrier);
    return;
  }
#pragma unroll
  for (int i = 0; i < ATTEND_SLOTS; ++i)
    bulk_copy(smem_address + i * BYTES, blocks_gmem + int64_t(keys.first[i] / KEY_BLOCK) * BYTES, BYTES, barrier);
}

// A v tile's block of 32 keys: 8 channels x 16 keys are 128 bytes, 16 keys further 128, 8 channels further 256.
__device__ __forceinline__ uint64_t v_descriptor(uint32_t smem_address) {
  return uint64_t((smem_address & 0x3FFFF) >> 4) | uint64_t(128 >> 4) << 16 | uint64_t(256 >> 4) << 32;
}

// Sums of a lane's two rows, relative to a base that is raised only when p would not fit e4m3. Exponents are base 2.
// The scores of half a tile are 8 keys of each of two slots, for two rows: x[4 * j + 2 * r + i].
struct LowBitState {
  float base[2] = {0, 0}, sum[2] = {0, 0};
  bool seen[2] = {false, false};  // whether the row has seen a key, which base then comes from
  float rescale[2];               // what sums and outputs so far are to be multiplied by after a raise

  // x = log2 of p * 2 ** P_EXPONENT. row_scale: q's, times softmax_scale * log2(e).
  __device__ __forceinline__ void exponents(float (&x)[32], const int (&s)[32], const float (&row_scale)[2],
                                            const float (&k_scale)[HALF_SLOTS]) const {
#pragma unroll
    for (int slot = 0; slot < HALF_SLOTS; ++slot) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float scale = row_scale[r] * k_scale[slot], offset = fmaf(-ZERO_SCORE, scale, P_EXPONENT - base[r]);
#pragma unroll
        for (int j = 4 * slot; j < 4 * slot + 4; ++j)
#pragma unroll
          for (int i = 4 * j + 2 * r; i < 4 * j + 2 * r + 2; ++i) x[i] = fmaf(__int_as_float(s[i]), scale, offset);
      }
    }
  }

  // Whether any row of this warp needs a raise. As integers, negative exponents are negative and NaN is large.
  __device__ __forceinline__ bool needs_raise(const float (&x)[32]) const {
    int tops[4];  // chains that do not wait for each other
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      tops[c] = max(__float_as_int(x[c]), __float_as_int(x[c + 4]));
#pragma unroll
      for (int i = c + 8; i < 32; i += 8) tops[c] = __vimax3_s32(tops[c], __float_as_int(x[i]), __float_as_int(x[i + 4]));
    }
    const int top = max(__vimax3_s32(tops[0], tops[1], tops[2]), tops[3]);
    return __any_sync(~0u, (top > LARGEST_P_EXPONENT_BITS) | !seen[0] | !seen[1]);
  }

  __device__ __forceinline__ void raise(float (&x)[32]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float top = x[2 * r];
#pragma unroll
      for (int j = 0; j < 8; ++j) top = fmaxf(top, fmaxf(x[4 * j + 2 * r], x[4 * j + 2 * r + 1]));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
      float by = top - P_EXPONENT;
      if (seen[r]) by = by < 0.f ? 0.f : by;
      if (top == -INFINITY) by = 0;
      rescale[r] = seen[r] ? ex2(-by) : 1.f;
      seen[r] |= top != -INFINITY;
      base[r] += by;
      sum[r] *= rescale[r];
#pragma unroll
      for (int j = 0; j < 8; ++j) x[4 * j + 2 * r] -= by, x[4 * j + 2 * r + 1] -= by;
    }
  }
};

// p = 2 ** x, and each row's sum of it.
__device__ __forceinline__ void exponentiate(float (&p)[32], float (&sums)[2], const float (&x)[32]) {
#pragma unroll
  for (int i = 0; i < 32; ++i) p[i] = ex2(x[i]);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float parts[2] = {0, 0};
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      parts[0] += p[4 * j + 2 * r];
      parts[1] += p[4 * j + 2 * r + 1];
    }
    sums[r] = parts[0] + parts[1];
  }
}

// The accumulators of a slot are A's registers when v's keys are ordered to match (quantize_e4m3.cu).
__device__ __forceinline__ void round_p(uint32_t (&rounded)[HALF_SLOTS][4], const float (&p)[32]) {
#pragma unroll
  for (int slot = 0; slot < HALF_SLOTS; ++slot)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* of_row = p + 16 * slot + 8 * (i / 2) + 2 * (i % 2);
      rounded[slot][i] = pack_e4m3(of_row[0], of_row[1], of_row[4], of_row[5]);
    }
}

// A lane's outputs: the recent ones in the tensor cores' registers, those before in shared memory. A tile's turn comes to
// one of PROMOTE_TILES groups of columns, so that the traffic is even.
template <int HEAD_DIM>
struct LowBitOutput {
  static constexpr int GROUP = HEAD_DIM / 8 / PROMOTE_TILES;  // of four columns
  float o[HEAD_DIM / 2];
  float4* sums;                      // this lane's: every 128th
  float pending[PROMOTE_TILES][2];   // what the sums of each group and row are yet to be multiplied by

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 2; ++i) o[i] = 0;
#pragma unroll
    for (int j = 0; j < HEAD_DIM / 8; ++j) sums[j * 128] = {0, 0, 0, 0};
#pragma unroll
    for (int group = 0; group < PROMOTE_TILES; ++group) pending[group][0] = pending[group][1] = 1;
  }

  __device__ __forceinline__ void rescale(const float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 2; ++i) o[i] *= factor[i / 2 % 2];
#pragma unroll
    for (int group = 0; group < PROMOTE_TILES; ++group)
#pragma unroll
      for (int r = 0; r < 2; ++r) pending[group][r] *= factor[r];
  }

  // o += the sums of a group.
  template <int GROUP_INDEX>
  __device__ __forceinline__ void collect() {
    const float* factor = pending[GROUP_INDEX];
#pragma unroll
    for (int j = GROUP_INDEX * GROUP; j < (GROUP_INDEX + 1) * GROUP; ++j) {
      const float4 before = sums[j * 128];
      o[4 * j] = fmaf(before.x, factor[0], o[4 * j]);
      o[4 * j + 1] = fmaf(before.y, factor[0], o[4 * j + 1]);
      o[4 * j + 2] = fmaf(before.z, factor[1], o[4 * j + 2]);
      o[4 * j + 3] = fmaf(before.w, factor[1], o[4 * j + 3]);
    }
  }

  template <int GROUP_INDEX>
  __device__ __forceinline__ void promote() {
    collect<GROUP_INDEX>();
#pragma unroll
    for (int j = GROUP_INDEX * GROUP; j < (GROUP_INDEX + 1) * GROUP; ++j) {
      sums[j * 128] = {o[4 * j], o[4 * j + 1], o[4 * j + 2], o[4 * j + 3]};
      o[4 * j] = o[4 * j + 1] = o[4 * j + 2] = o[4 * j + 3] = 0;
    }
    pending[GROUP_INDEX][0] = pending[GROUP_INDEX][1] = 1;
  }

  __device__ __forceinline__ void promote_in_turn(int turn) {
    static_assert(PROMOTE_TILES == 4, "a case for each turn");
    switch (turn % PROMOTE_TILES) {
      case 0: promote<0>(); break;
      case 1: promote<1>(); break;
      case 2: promote<2>(); break;
      case 3: promote<3>(); break;
    }
  }

  __device__ __forceinline__ void collect_all() {
    collect<0>();
    collect<1>();
    collect<2>();
    collect<3>();
  }
};

// A lane of a consumer warpgroup at one work item. Tiles are taken in halves of two slots: under the softmax of a half run
// p.v of the half before and q.k of the half after.
template <int HEAD_DIM>
struct LowBitConsumer {
  static constexpr uint32_t TILE_BYTES = ATTEND_TILE_K * HEAD_DIM, SLOT_BYTES = KEY_BLOCK * HEAD_DIM;
  static constexpr int STEPS = HEAD_DIM / 32;
  AttendInt8Fp8Sm90Storage<HEAD_DIM>& smem;
  int warpgroup;
  uint64_t q_desc, k_desc, v_desc;  // of the first stage
  int k_stage = 0, v_stage = 0;
  uint32_t k_phase = 0, v_phase = 0;
  // Of the work item.
  int visible_upper, visible_lower;  // keys that the lane's rows see
  int visible_to_all;                // keys that every row of the CTA sees: slots inside need no mask
  float row_scale[2];                // q's scales times softmax_scale * log2(e)
  LowBitState state;
  LowBitOutput<HEAD_DIM> output;
  uint32_t p[HALF_SLOTS][4];  // of the half before
  // Of the tile at hand, read before its last product: after that a stage may be filled again.
  SlotTile tile;
  float k_scale[ATTEND_SLOTS];
  int turn;  // of the columns whose outputs are promoted next

  // Starts q.k of half a tile: s becomes the bits of ZERO_SCORE + q.k.
  template <int HALF>
  __device__ __forceinline__ void start_scores(int (&s)[32]) {
#pragma unroll
    for (int i = 0; i < 32; ++i) s[i] = ZERO_SCORE_BITS;
    if constexpr (HALF == 0) mbarrier_wait(&smem.ring.k_full[k_stage], k_phase);
    const uint64_t desc = k_desc + uint64_t((k_stage * TILE_BYTES + HALF * HALF_SLOTS * SLOT_BYTES) >> 4);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < STEPS; ++step) wgmma_m64n64k32_s8(s, q_desc + step * 2, desc + step * 2);
    wgmma_commit();
  }

  template <int HALF>
  __device__ __forceinline__ void finish_scores(int (&s)[32]) {
    wgmma_wait<0>();
    touch(s);
    if constexpr (HALF == 1) {
      if (threadIdx.x % 128 == 0) mbarrier_arrive(&smem.ring.k_empty[k_stage]);
      if (++k_stage == LOW_BIT_STAGES) k_stage = 0, k_phase ^= 1;
    }
  }

  // Starts p.v of half a tile.
  template <int HALF>
  __device__ __forceinline__ void start_output() {
    if constexpr (HALF == 0) mbarrier_wait(&smem.ring.v_full[v_stage], v_phase);
    const uint64_t desc = v_desc + uint64_t((v_stage * TILE_BYTES + HALF * HALF_SLOTS * SLOT_BYTES) >> 4);
    wgmma_fence();
#pragma unroll
    for (int slot = 0; slot < HALF_SLOTS; ++slot)
      wgmma_m64k32_rs_e4m3<HEAD_DIM / 2>(output.o, p[slot], desc + uint64_t(slot * (SLOT_BYTES >> 4)),
                                         true);
    wgmma_commit();
  }

  template <int HALF, int PENDING>
  __device__ __forceinline__ void finish_output() {
    wgmma_wait<PENDING>();
    touch(output.o);
    if constexpr (HALF == 1) {
      if (threadIdx.x % 128 == 0) mbarrier_arrive(&smem.ring.v_empty[v_stage]);
      if (++v_stage == LOW_BIT_STAGES) v_stage = 0, v_phase ^= 1;
    }
  }

  // The softmax of half a tile with scores s, while those of the next half arrive in s_after.
  template <int HALF, bool HAS_BEFORE, bool HAS_AFTER>
  __device__ __forceinline__ void step(int (&s)[32], int (&s_after)[32]) {
    if constexpr (HALF == 0) {
      tile = smem.ring.tiles[k_stage];
#pragma unroll
      for (int slot = 0; slot < ATTEND_SLOTS; ++slot) k_scale[slot] = smem.k_scales[k_stage][slot].x;
    }
    if constexpr (HAS_BEFORE) start_output<1 - HALF>();
    if constexpr (HAS_AFTER) start_scores<1 - HALF>(s_after);
    float x[32], exponentials[32], sums[2];
    const float scale[HALF_SLOTS] = {k_scale[HALF * HALF_SLOTS], k_scale[HALF * HALF_SLOTS + 1]};
    state.exponents(x, s, row_scale, scale);
    const uint32_t selected = tile.selected_by(warpgroup);
    if ((selected != 15) | (tile.first_key.w + KEY_BLOCK > visible_to_all))
      mask_scores<HALF * HALF_SLOTS>(x, tile.first_key, selected, visible_upper, visible_lower);
    // One stretch without branches, so that exponentials, sums and maxima hide each other: a raise, which is rare, takes
    // the exponentials again. ptxas moves waits up, but not over the branch.
    exponentiate(exponentials, sums, x);
    const bool raised = state.needs_raise(x);
    if (raised) {
      state.raise(x);
      exponentiate(exponentials, sums, x);
    }
    if constexpr (HAS_BEFORE) {
      finish_output<1 - HALF, HAS_AFTER ? 1 : 0>();
      if (raised) output.rescale(state.rescale);
      if constexpr (HALF == 0) output.promote_in_turn(turn++);
    }
    state.sum[0] += sums[0];
    state.sum[1] += sums[1];
    round_p(p, exponentials);
    if constexpr (HAS_AFTER) finish_scores<1 - HALF>(s_after);
  }

  // All tiles of a work item; num_tiles > 0.
  __device__ __forceinline__ void attend(int num_tiles) {
    int left[32], right[32];  // scores of a tile's first and second half
    output.clear();
    turn = 0;
    start_scores<0>(left);
    finish_scores<0>(left);
    step<0, false, true>(left, right);
    for (int t = 1; t < num_tiles; ++t) {
      step<1, true, true>(right, left);
      step<0, true, true>(left, right);
    }
    step<1, true, false>(right, left);
    start_output<1>();
    finish_output<1, 0>();
    output.collect_all();
  }
};

template <int HEAD_DIM, typename Element, int MASK_ROWS>
__global__ void __launch_bounds__(384, 1)
    attend_int8_fp8_sm90(const uint8_t* q_codes_gmem, const uint8_t* k_codes_gmem, const uint8_t* v_codes_gmem,
                         const float* q_scale_gmem, const float* k_scale_gmem, const float* v_scale_gmem,
                         const float* row_shift_gmem, TensorView out, float* lse_gmem, const uint32_t* mask_gmem,
                         int expand_log2, uint32_t* next_item, Shape shape, float softmax_scale) {
  constexpr uint32_t TILE_BYTES = ATTEND_TILE_K * HEAD_DIM, SLOT_BYTES = KEY_BLOCK * HEAD_DIM;
  using Storage = AttendInt8Fp8Sm90Storage<HEAD_DIM>;
  extern __shared__ uint8_t dynamic_smem[];
  Storage& smem = aligned_storage<Storage>(dynamic_smem);

  if (threadIdx.x == 0) smem.ring.init();
  __syncthreads();

  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  AttendRing<LOW_BIT_STAGES>& ring = smem.ring;
  if (threadIdx.x < 128) {
    setmaxnreg_dec<40>();
    if (warp == 0) {
      auto load_k = [&](const Rows& rows, const SlotKeys& keys, int stage) {
        constexpr int SCALE_BYTES = sizeof(float4);
        const int64_t first_row = int64_t(rows.batch * shape.num_kv_heads + rows.kv_head) * shape.padded_k();
        const uint8_t* scales = reinterpret_cast<const uint8_t*>(k_scale_gmem) + first_row / KEY_BLOCK * SCALE_BYTES;
        const uint32_t barrier = shared_address(&ring.k_full[stage]);
        mbarrier_arrive_expect_tx(&ring.k_full[stage], TILE_BYTES + ATTEND_SLOTS * SCALE_BYTES);
        load_slots<SLOT_BYTES>(shared_address(smem.K_smem[stage]), k_codes_gmem + first_row * HEAD_DIM, keys, barrier);
        load_slots<SCALE_BYTES>(shared_address(smem.k_scales[stage]), scales, keys, barrier);
      };
      hand_out_items<MASK_ROWS>(ring, shape, mask_gmem, expand_log2, next_item, load_k);
    } else if (warp == 1) {
      auto load_q = [&](const Rows& rows) {
        constexpr uint32_t BYTES = ATTEND_BLOCK_Q * HEAD_DIM;
        const int64_t row = int64_t(rows.batch * shape.num_heads + rows.head) * shape.padded_q() +
                            rows.q_block * ATTEND_BLOCK_Q;
        mbarrier_arrive_expect_tx(&ring.q_full, BYTES);
        bulk_copy(shared_address(smem.Q_smem), q_codes_gmem + row * HEAD_DIM, BYTES, shared_address(&ring.q_full));
      };
      auto load_v = [&](const Rows& rows, const SlotKeys& keys, int stage) {
        const int64_t first_row = int64_t(rows.batch * shape.num_kv_heads + rows.kv_head) * shape.padded_k();
        mbarrier_arrive_expect_tx(&ring.v_full[stage], TILE_BYTES);
        load_slots<SLOT_BYTES>(shared_address(smem.V_smem[stage]), v_codes_gmem + first_row * HEAD_DIM, keys,
                               shared_address(&ring.v_full[stage]));
      };
      fetch_queries_and_values<MASK_ROWS>(ring, shape, mask_gmem, expand_log2, load_q, load_v);
    }
  } else {
    setmaxnreg_inc<232>();
    const int warpgroup = warp / 4 - 1;
    const bool leader = threadIdx.x % 128 == 0;
    const uint64_t q_desc = wgmma_descriptor<HEAD_DIM>(shared_address(smem.Q_smem) + warpgroup * 64 * HEAD_DIM);
    const uint64_t k_desc = wgmma_descriptor<HEAD_DIM>(shared_address(smem.K_smem[0]));
    LowBitConsumer<HEAD_DIM> consumer{smem, warpgroup, q_desc, k_desc, v_descriptor(shared_address(smem.V_smem[0]))};
    LowBitState& state = consumer.state;
    LowBitOutput<HEAD_DIM>& output = consumer.output;
    uint32_t q_phase = 0;
    ItemCursor cursor;

    for (WorkItem item = cursor.receive(ring); item.index >= 0; item = cursor.receive(ring)) {
      const Rows rows(shape, item.index);
      const int first_row = rows.q_block * ATTEND_BLOCK_Q;
      const int row = first_row + warpgroup * 64 + warp % 4 * 16 + threadIdx.x % 32 / 4;
      const int64_t code_row = int64_t(rows.batch * shape.num_heads + rows.head) * shape.padded_q() + row;
      const float scale_log2 = softmax_scale * 1.4426950408889634f;
      consumer.visible_upper = shape.visible_keys(row);
      consumer.visible_lower = shape.visible_keys(row + 8);
      consumer.visible_to_all = shape.visible_keys(first_row);
      consumer.row_scale[0] = q_scale_gmem[code_row] * scale_log2;
      consumer.row_scale[1] = q_scale_gmem[code_row + 8] * scale_log2;
      state = LowBitState();
      output.sums = smem.sums[warpgroup][0] + threadIdx.x % 128;

      mbarrier_wait(&ring.q_full, q_phase);
      q_phase ^= 1;
      if (item.num_tiles > 0) consumer.attend(item.num_tiles);
      if (leader) mbarrier_arrive(&ring.q_empty);

      float inverse[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float sum = state.sum[r];
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        state.sum[r] = sum;
        inverse[r] = 1.f / sum;
      }
      const float2* v_scales = reinterpret_cast<const float2*>(
          v_scale_gmem + int64_t(rows.batch * shape.num_kv_heads + rows.kv_head) * HEAD_DIM + threadIdx.x % 4 * 2);
#pragma unroll
      for (int j = 0; j < HEAD_DIM / 8; ++j) {
        const float2 v_scale = v_scales[4 * j];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const bool some = state.sum[r] != 0.f;  // a row without a key has no output, whatever v is
          output.o[4 * j + 2 * r] = some ? output.o[4 * j + 2 * r] * inverse[r] * v_scale.x : 0.f;
          output.o[4 * j + 2 * r + 1] = some ? output.o[4 * j + 2 * r + 1] * inverse[r] * v_scale.y : 0.f;
        }
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int out_row = row + 8 * r;
        const bool present = out_row < shape.seqlen_q;
        store_row<Element>(out.row<uint16_t>(rows.batch, present ? out_row : 0, rows.head), present, output.o, r, 1.f);
        if (present && lse_gmem != nullptr && threadIdx.x % 4 == 0) {
          const float smooth_lse = (state.base[r] - P_EXPONENT + log2f(state.sum[r])) * 0.6931471805599453f;
          lse_gmem[int64_t(rows.batch * shape.num_heads + rows.head) * shape.seqlen_q + out_row] =
              state.sum[r] == 0.f ? -INFINITY : fmaf(row_shift_gmem[code_row + 8 * r], softmax_scale, smooth_lse);
        }
      }
    }
  }
}
