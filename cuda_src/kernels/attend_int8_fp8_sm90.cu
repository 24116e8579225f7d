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
#include "ptx/bar_sync.cuh"
#include "ptx/bulk_copy.cuh"
#include "ptx/ex2.cuh"
#include "ptx/setmaxnreg.cuh"
#include "ptx/wgmma.cuh"
#include "ptx/wgmma_e4m3.cuh"
#include "tile/attend_ring.cuh"

constexpr int LOW_BIT_STAGES = 4;
constexpr int EARLY_EXPONENTIALS = 16;               // of a lane's 64, before p.v of the tile before is waited for
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
  uint8_t alignment_slack[1024];  // dynamic shared memory is not promised to start on 1024 bytes
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

// s becomes the bits of ZERO_SCORE + q.k.
template <int HEAD_DIM>
__device__ __forceinline__ void multiply_qk(int (&s)[64], uint64_t q_desc, uint64_t k_desc) {
#pragma unroll
  for (int step = 0; step < HEAD_DIM / 32; ++step) wgmma_m64n128k32_s8(s, q_desc + step * 2, k_desc + step * 2, true);
}

template <int HEAD_DIM>
__device__ __forceinline__ void multiply_pv(float (&o)[HEAD_DIM / 2], const uint32_t (&p)[4][4], uint64_t v_desc,
                                            bool accumulate) {
#pragma unroll
  for (int slot = 0; slot < ATTEND_SLOTS; ++slot)
    wgmma_m64k32_rs_e4m3<HEAD_DIM / 2>(o, p[slot], v_desc + uint64_t(slot * (KEY_BLOCK * HEAD_DIM >> 4)),
                                       accumulate || slot != 0);
}

// A v tile's block of 32 keys: 8 channels x 16 keys are 128 bytes, 16 keys further 128, 8 channels further 256.
__device__ __forceinline__ uint64_t v_descriptor(uint32_t smem_address) {
  return uint64_t((smem_address & 0x3FFFF) >> 4) | uint64_t(128 >> 4) << 16 | uint64_t(256 >> 4) << 32;
}

// Sums of a lane's two rows, relative to a base that is raised only when p would not fit e4m3. Exponents are base 2.
struct LowBitState {
  float base[2] = {0, 0}, sum[2] = {0, 0};
  bool seen[2] = {false, false};  // whether the row has seen a key, which base then comes from
  float rescale[2];               // what sums and outputs so far are to be multiplied by after a raise

  // x = log2 of p * 2 ** P_EXPONENT, from scores and each row's scale times log2(e) * softmax_scale.
  __device__ __forceinline__ void exponents(float (&x)[64], const int (&s)[64], const float (&row_scale)[2],
                                            const float (&k_scale)[ATTEND_SLOTS]) const {
#pragma unroll
    for (int slot = 0; slot < ATTEND_SLOTS; ++slot) {
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
  __device__ __forceinline__ bool needs_raise(const float (&x)[64]) const {
    int top = __float_as_int(x[0]);
#pragma unroll
    for (int i = 1; i < 63; i += 2) top = __vimax3_s32(top, __float_as_int(x[i]), __float_as_int(x[i + 1]));
    top = max(top, __float_as_int(x[63]));
    return __any_sync(~0u, (top > LARGEST_P_EXPONENT_BITS) | !seen[0] | !seen[1]);
  }

  __device__ __forceinline__ void raise(float (&x)[64]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float top = x[2 * r];
#pragma unroll
      for (int j = 0; j < 16; ++j) top = fmaxf(top, fmaxf(x[4 * j + 2 * r], x[4 * j + 2 * r + 1]));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
      float by = top - P_EXPONENT;
      if (seen[r]) by = by < 0.f ? 0.f : by;
      if (top == -INFINITY) by = 0;
      rescale[r] = seen[r] ? ex2(-by) : 1.f;
      seen[r] |= top != -INFINITY;
      base[r] += by;
#pragma unroll
      for (int j = 0; j < 16; ++j) x[4 * j + 2 * r] -= by, x[4 * j + 2 * r + 1] -= by;
    }
  }

  // x[BEGIN .. END) becomes p.
  template <int BEGIN, int END>
  __device__ __forceinline__ void exponentiate(float (&x)[64]) const {
#pragma unroll
    for (int i = BEGIN; i < END; ++i) x[i] = ex2(x[i]);
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
      sum[r] += part[0] + part[1];
    }
  }
};

// The accumulators of a slot are A's registers when v's keys are ordered to match (quantize_e4m3.cu).
__device__ __forceinline__ void round_p(uint32_t (&rounded)[4][4], const float (&p)[64]) {
#pragma unroll
  for (int slot = 0; slot < ATTEND_SLOTS; ++slot)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* of_row = p + 16 * slot + 8 * (i / 2) + 2 * (i % 2);
      rounded[slot][i] = pack_e4m3(of_row[0], of_row[1], of_row[4], of_row[5]);
    }
}

// A lane's outputs: the recent ones in the tensor cores' registers, those before in shared memory.
template <int HEAD_DIM>
struct LowBitOutput {
  float o[HEAD_DIM / 2];
  float4* sums;          // this lane's: every 128th
  float pending[2];      // what the rows' sums are yet to be multiplied by
  int num_held = 0;      // tiles in o
  bool promoted = false;

  __device__ __forceinline__ void rescale(const float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 2; ++i) o[i] *= factor[i / 2 % 2];
    pending[0] *= factor[0];
    pending[1] *= factor[1];
  }

  // o += the sums.
  __device__ __forceinline__ void collect() {
#pragma unroll
    for (int j = 0; j < HEAD_DIM / 8; ++j) {
      const float4 before = sums[j * 128];
      o[4 * j] = fmaf(before.x, pending[0], o[4 * j]);
      o[4 * j + 1] = fmaf(before.y, pending[0], o[4 * j + 1]);
      o[4 * j + 2] = fmaf(before.z, pending[1], o[4 * j + 2]);
      o[4 * j + 3] = fmaf(before.w, pending[1], o[4 * j + 3]);
    }
  }

  __device__ __forceinline__ void promote() {
    if (promoted) collect();
#pragma unroll
    for (int j = 0; j < HEAD_DIM / 8; ++j) sums[j * 128] = {o[4 * j], o[4 * j + 1], o[4 * j + 2], o[4 * j + 3]};
    pending[0] = pending[1] = 1;
    promoted = true;
    num_held = 0;
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
  Storage& smem = *reinterpret_cast<Storage*>((reinterpret_cast<uint64_t>(dynamic_smem) + 1023) & ~uint64_t(1023));

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
    const uint64_t v_desc = v_descriptor(shared_address(smem.V_smem[0]));
    int stage = 0;
    uint32_t phase = 0, q_phase = 0;
    ItemCursor cursor;
    if (warpgroup == 1) bar_arrive(TURN_BARRIER, 256);

    for (WorkItem item = cursor.receive(ring); item.index >= 0; item = cursor.receive(ring)) {
      const Rows rows(shape, item.index);
      const int first_row = rows.q_block * ATTEND_BLOCK_Q;
      const int row = first_row + warpgroup * 64 + warp % 4 * 16 + threadIdx.x % 32 / 4;
      const int visible_upper = shape.visible_keys(row), visible_lower = shape.visible_keys(row + 8);
      // Keys that every row of this CTA sees: slots inside need no mask.
      const int visible_to_all = shape.visible_keys(first_row);
      auto mask_tile = [&](float(&x)[64], const SlotTile& tile) {
        const uint32_t selected = tile.selected_by(warpgroup);
        if ((selected != 15) | (tile.first_key.w + KEY_BLOCK > visible_to_all))
          mask_scores(x, tile.first_key, selected, visible_upper, visible_lower);
      };
      const int64_t code_row = int64_t(rows.batch * shape.num_heads + rows.head) * shape.padded_q() + row;
      const float scale_log2 = softmax_scale * 1.4426950408889634f;
      const float row_scale[2] = {q_scale_gmem[code_row] * scale_log2, q_scale_gmem[code_row + 8] * scale_log2};

      LowBitState state;
      LowBitOutput<HEAD_DIM> output;
      output.sums = smem.sums[warpgroup][0] + threadIdx.x % 128;
      // Read before the products: a warp may release a stage when the products are done, ahead of the other warps.
      float k_scale[ATTEND_SLOTS];
      auto read_k_scale = [&](int of_stage) {
#pragma unroll
        for (int slot = 0; slot < ATTEND_SLOTS; ++slot) k_scale[slot] = smem.k_scales[of_stage][slot].x;
      };
      int s[64];
      float x[64];
      uint32_t p[4][4];

      mbarrier_wait(&ring.q_full, q_phase);
      q_phase ^= 1;
      if (item.num_tiles > 0) {
        mbarrier_wait(&ring.k_full[stage], phase);
        const SlotTile first_tile = ring.tiles[stage];
        read_k_scale(stage);
#pragma unroll
        for (int i = 0; i < 64; ++i) s[i] = ZERO_SCORE_BITS;
        wgmma_fence();
        multiply_qk<HEAD_DIM>(s, q_desc, k_desc + uint64_t(stage * (TILE_BYTES >> 4)));
        wgmma_commit();
        wgmma_wait<0>();
        touch(s);
        if (leader) mbarrier_arrive(&ring.k_empty[stage]);
        state.exponents(x, s, row_scale, k_scale);
        mask_tile(x, first_tile);
        state.raise(x);
        state.exponentiate<0, 64>(x);
        state.add(x);
        round_p(p, x);

        for (int t = 1; t < item.num_tiles; ++t) {
          int next = stage + 1;
          uint32_t next_phase = phase;
          if (next == LOW_BIT_STAGES) next = 0, next_phase ^= 1;
#pragma unroll
          for (int i = 0; i < 64; ++i) s[i] = ZERO_SCORE_BITS;
          mbarrier_wait(&ring.k_full[next], next_phase);
          const SlotTile tile = ring.tiles[next];
          read_k_scale(next);
          bar_sync(TURN_BARRIER + warpgroup, 256);
          wgmma_fence();
          multiply_qk<HEAD_DIM>(s, q_desc, k_desc + uint64_t(next * (TILE_BYTES >> 4)));
          wgmma_commit();
          mbarrier_wait(&ring.v_full[stage], phase);
          multiply_pv<HEAD_DIM>(output.o, p, v_desc + uint64_t(stage * (TILE_BYTES >> 4)), output.num_held != 0);
          wgmma_commit();
          bar_arrive(TURN_BARRIER + 1 - warpgroup, 256);
          wgmma_wait<1>();
          touch(s);
          if (leader) mbarrier_arrive(&ring.k_empty[next]);
          state.exponents(x, s, row_scale, k_scale);
          mask_tile(x, tile);
          const bool raised = state.needs_raise(x);
          if (raised) state.raise(x);
          state.exponentiate<0, EARLY_EXPONENTIALS>(x);
          computed_before(x[EARLY_EXPONENTIALS - 1]);
          wgmma_wait<0>();
          touch(output.o);
          if (leader) mbarrier_arrive(&ring.v_empty[stage]);
          if (raised) {
            output.rescale(state.rescale);
#pragma unroll
            for (int r = 0; r < 2; ++r) state.sum[r] *= state.rescale[r];
          }
          if (++output.num_held == PROMOTE_TILES) output.promote();
          // One stretch without branches: ptxas hides the sums and the rounding behind the exponentials.
          state.exponentiate<EARLY_EXPONENTIALS, 64>(x);
          state.add(x);
          round_p(p, x);
          stage = next;
          phase = next_phase;
        }
      }
      if (leader) mbarrier_arrive(&ring.q_empty);
      if (item.num_tiles > 0) {
        mbarrier_wait(&ring.v_full[stage], phase);
        wgmma_fence();
        multiply_pv<HEAD_DIM>(output.o, p, v_desc + uint64_t(stage * (TILE_BYTES >> 4)), output.num_held != 0);
        wgmma_commit();
        wgmma_wait<0>();
        touch(output.o);
        if (leader) mbarrier_arrive(&ring.v_empty[stage]);
        if (output.promoted) output.collect();
        if (++stage == LOW_BIT_STAGES) stage = 0, phase ^= 1;
      }

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
    if (warpgroup == 0) bar_sync(TURN_BARRIER, 256);  // the turn that warpgroup 1 passed on last
  }
}
