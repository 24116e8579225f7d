// Block-sparse attention from 8-bit products on Hopper: attend_sm90 with int8 q.k and e4m3 p.v.
//
// out[b, i, h, :] = softmax(softmax_scale * q_i . k_j) v_j over the selected, visible keys j, of q, k and v as
// quantize_balanced and quantize_e4m3 hold them; lse is natural log, of the scores before smoothing (row_shift: q_i .
// the mean of k; null with lse). Codes of q and k are 128-row tiles (salekit/codes.py); of v, tiles of 32 keys with
// channels of ones (quantize_e4m3.cu), by which the tensor cores sum p as well. q_scale, row_shift float32 [batch,
// num_heads, padded_q]; k_scale float32 [batch, num_kv_heads, padded_k / 32, 4], each four times over; v_scale float32
// [batch, num_kv_heads, HEAD_DIM].
// q.k is added to integers that are the bits of ZERO_SCORE: the sums are the bits of the float ZERO_SCORE + q.k, and a
// score's exponent is one multiply-add away. p is rounded to e4m3 at 2 ** 6 times its value, at most 448.
// The tensor cores add e4m3 products with 13 bits or so, which is too coarse for long: each tile, one of PROMOTE_TILES
// groups of columns is added to float32 sums in shared memory, where each lane has its own.
// Grid and roles as in attend_sm90; the warpgroups do not take turns, for here the softmax takes longer than the
// products.
#include "ptx/bulk_copy.cuh"
#include "ptx/ex2.cuh"
#include "ptx/setmaxnreg.cuh"
#include "ptx/wgmma.cuh"
#include "ptx/wgmma_e4m3.cuh"
#include "tile/aligned_storage.cuh"
#include "tile/attend_ring.cuh"

constexpr int LOW_BIT_STAGES = 4;
constexpr int EARLY_EXPONENTIALS = 32;               // of a lane's 64, before the maxima are known
constexpr int PROMOTE_TILES = 8;
constexpr float ZERO_SCORE = 12582912.f;             // 1.5 * 2 ** 23: integers within 2 ** 22 of it are exact
constexpr int ZERO_SCORE_BITS = 0x4B400000;
constexpr float P_EXPONENT = 6.f;                    // the largest p of a row when its base is raised: 2 ** 6
constexpr int LARGEST_P_EXPONENT_BITS = 0x410CCCCD;  // 8.8: e4m3 ends at 448 = 2 ** 8.807

template <int HEAD_DIM>
struct AttendInt8Fp8Sm90Storage {
  alignas(1024) uint8_t Q_smem[ATTEND_BLOCK_Q * HEAD_DIM];
  alignas(1024) uint8_t K_smem[LOW_BIT_STAGES][ATTEND_TILE_K * HEAD_DIM];
  alignas(1024) uint8_t V_smem[LOW_BIT_STAGES][ATTEND_TILE_K * (HEAD_DIM + 8)];
  alignas(16) float4 sums[2][HEAD_DIM / 8 + 1][128];  // [warpgroup][columns of a lane, in fours][lane]
  alignas(16) float4 k_scales[LOW_BIT_STAGES][ATTEND_SLOTS];
  AttendRing<LOW_BIT_STAGES> ring;
  uint8_t alignment_slack[1024];  // dynamic shared memory is not promised to start on 1024 bytes
};

// Fills a tile's four slots from 32-key blocks of BYTES each; in one copy when they are neighbours.
template <int BYTES>
__device__ __forceinline__ void load_slots(uint32_t smem_address, const uint8_t* blocks_gmem,
                                           const SlotKeys<ATTEND_SLOTS>& keys, uint32_t barrier) {
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
__device__ __forceinline__ void multiply_pv(float (&o)[HEAD_DIM / 2 + 4], const uint32_t (&p)[4][4], uint64_t v_desc) {
#pragma unroll
  for (int slot = 0; slot < ATTEND_SLOTS; ++slot)
    wgmma_m64k32_rs_e4m3(o, p[slot], v_desc + uint64_t(slot * (KEY_BLOCK * (HEAD_DIM + 8) >> 4)));
}

// A v tile's block of 32 keys: 8 channels x 16 keys are 128 bytes, 16 keys further 128, 8 channels further 256.
__device__ __forceinline__ uint64_t v_descriptor(uint32_t smem_address) {
  return uint64_t((smem_address & 0x3FFFF) >> 4) | uint64_t(128 >> 4) << 16 | uint64_t(256 >> 4) << 32;
}

// What the p of a lane's two rows are relative to: a base that is raised only when p would not fit e4m3. Exponents are
// base 2.
struct LowBitState {
  float base[2] = {0, 0};
  bool seen[2] = {false, false};  // whether the row has seen a key, which base then comes from
  float rescale[2];               // what outputs so far are to be multiplied by after a raise

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
    int tops[8];
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      tops[c] = max(__float_as_int(x[c]), __float_as_int(x[c + 8]));
#pragma unroll
      for (int i = c + 16; i < 64; i += 16)
        tops[c] = __vimax3_s32(tops[c], __float_as_int(x[i]), __float_as_int(x[i + 8]));
    }
    const int first = __vimax3_s32(tops[0], tops[1], tops[2]), second = __vimax3_s32(tops[3], tops[4], tops[5]);
    const int top = max(__vimax3_s32(first, second, tops[6]), tops[7]);
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

// A lane's outputs and, in the last four, the sums of p: the recent ones in the tensor cores' registers, those before
// in shared memory. Each tile it is one group's turn to go there, so that the traffic is even.
template <int HEAD_DIM>
struct LowBitOutput {
  static constexpr int FOURS = HEAD_DIM / 8 + 1;
  float o[4 * FOURS];
  float4* sums;  // this lane's: every 128th

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < 4 * FOURS; ++i) o[i] = 0;
#pragma unroll
    for (int j = 0; j < FOURS; ++j) sums[j * 128] = {0, 0, 0, 0};
  }

  __device__ __forceinline__ void rescale(const float (&factor)[2]) {
#pragma unroll
    for (int j = 0; j < FOURS; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) o[4 * j + i] *= factor[i / 2];
      const float4 x = sums[j * 128];
      sums[j * 128] = {x.x * factor[0], x.y * factor[0], x.z * factor[1], x.w * factor[1]};
    }
  }

  // Adds the sums of four columns to o.
  __device__ __forceinline__ void collect(int j) {
    const float4 before = sums[j * 128];
    o[4 * j] += before.x;
    o[4 * j + 1] += before.y;
    o[4 * j + 2] += before.z;
    o[4 * j + 3] += before.w;
  }

  template <int TURN>
  __device__ __forceinline__ void promote() {
#pragma unroll
    for (int j = TURN; j < FOURS; j += PROMOTE_TILES) {
      collect(j);
      sums[j * 128] = {o[4 * j], o[4 * j + 1], o[4 * j + 2], o[4 * j + 3]};
      o[4 * j] = o[4 * j + 1] = o[4 * j + 2] = o[4 * j + 3] = 0;
    }
  }

  __device__ __forceinline__ void promote_in_turn(int turn) {
    static_assert(PROMOTE_TILES == 8, "a case for each turn");
    switch (turn % PROMOTE_TILES) {
      case 0: promote<0>(); break;
      case 1: promote<1>(); break;
      case 2: promote<2>(); break;
      case 3: promote<3>(); break;
      case 4: promote<4>(); break;
      case 5: promote<5>(); break;
      case 6: promote<6>(); break;
      case 7: promote<7>(); break;
    }
  }
};

template <int HEAD_DIM, typename Element, int MASK_ROWS>
__global__ void __launch_bounds__(384, 1)
    attend_int8_fp8_sm90(const uint8_t* q_codes_gmem, const uint8_t* k_codes_gmem, const uint8_t* v_codes_gmem,
                         const float* q_scale_gmem, const float* k_scale_gmem, const float* v_scale_gmem,
                         const float* row_shift_gmem, TensorView out, float* lse_gmem, const uint32_t* mask_gmem,
                         int expand_log2, uint32_t* next_item, Shape shape, float softmax_scale) {
  constexpr uint32_t TILE_BYTES = ATTEND_TILE_K * HEAD_DIM, SLOT_BYTES = KEY_BLOCK * HEAD_DIM;
  constexpr uint32_t V_TILE_BYTES = ATTEND_TILE_K * (HEAD_DIM + 8), V_SLOT_BYTES = KEY_BLOCK * (HEAD_DIM + 8);
  using Storage = AttendInt8Fp8Sm90Storage<HEAD_DIM>;
  extern __shared__ uint8_t dynamic_smem[];
  Storage& smem = aligned_storage<Storage>(dynamic_smem);

  if (threadIdx.x == 0) smem.ring.init();
  __syncthreads();

  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  AttendRing<LOW_BIT_STAGES>& ring = smem.ring;
  const Segment segment = Segment::whole(shape);
  if (threadIdx.x < 128) {
    setmaxnreg_dec<40>();
    if (warp == 0) {
      auto load_k = [&](const Rows& rows, const SlotKeys<ATTEND_SLOTS>& keys, int stage) {
        constexpr int SCALE_BYTES = sizeof(float4);
        const int64_t first_row = int64_t(rows.batch * shape.num_kv_heads + rows.kv_head) * shape.padded_k();
        const uint8_t* scales = reinterpret_cast<const uint8_t*>(k_scale_gmem) + first_row / KEY_BLOCK * SCALE_BYTES;
        const uint32_t barrier = shared_address(&ring.k_full[stage]);
        mbarrier_arrive_expect_tx(&ring.k_full[stage], TILE_BYTES + ATTEND_SLOTS * SCALE_BYTES);
        load_slots<SLOT_BYTES>(shared_address(smem.K_smem[stage]), k_codes_gmem + first_row * HEAD_DIM, keys, barrier);
        load_slots<SCALE_BYTES>(shared_address(smem.k_scales[stage]), scales, keys, barrier);
      };
      hand_out_items<MASK_ROWS>(ring, shape, segment, mask_gmem, expand_log2, next_item, load_k);
    } else if (warp == 1) {
      auto load_q = [&](const Rows& rows) {
        constexpr uint32_t BYTES = ATTEND_BLOCK_Q * HEAD_DIM;
        const int64_t row = int64_t(rows.batch * shape.num_heads + rows.head) * shape.padded_q() +
                            rows.q_block * ATTEND_BLOCK_Q;
        mbarrier_arrive_expect_tx(&ring.q_full, BYTES);
        bulk_copy(shared_address(smem.Q_smem), q_codes_gmem + row * HEAD_DIM, BYTES, shared_address(&ring.q_full));
      };
      auto load_v = [&](const Rows& rows, const SlotKeys<ATTEND_SLOTS>& keys, int stage) {
        const int64_t first_row = int64_t(rows.batch * shape.num_kv_heads + rows.kv_head) * shape.padded_k();
        mbarrier_arrive_expect_tx(&ring.v_full[stage], V_TILE_BYTES);
        load_slots<V_SLOT_BYTES>(shared_address(smem.V_smem[stage]), v_codes_gmem + first_row * (HEAD_DIM + 8), keys,
                                 shared_address(&ring.v_full[stage]));
      };
      fetch_queries_and_values<MASK_ROWS>(ring, shape, segment, mask_gmem, expand_log2, load_q, load_v);
    }
  } else {
    setmaxnreg_inc<232>();
    const int warpgroup = warp / 4 - 1;
    const bool elected = threadIdx.x % 32 == 0;
    const uint64_t q_desc = wgmma_descriptor<HEAD_DIM>(shared_address(smem.Q_smem) + warpgroup * 64 * HEAD_DIM);
    const uint64_t k_desc = wgmma_descriptor<HEAD_DIM>(shared_address(smem.K_smem[0]));
    const uint64_t v_desc = v_descriptor(shared_address(smem.V_smem[0]));
    int stage = 0;
    uint32_t phase = 0, q_phase = 0;
    ItemCursor cursor;

    for (WorkItem item = cursor.receive(ring); item.index >= 0; item = cursor.receive(ring)) {
      const Rows rows(shape, item.index);
      const int first_row = rows.q_block * ATTEND_BLOCK_Q;
      const int row = first_row + warpgroup * 64 + warp % 4 * 16 + threadIdx.x % 32 / 4;
      // A plain use of shape where there are no lengths: a copy would change the registers.
      auto visible_keys = [&](int of_row) {
        if constexpr (Shape::HAS_LENGTHS) return shape.of_sequence(rows.batch).visible_keys(of_row);
        return shape.visible_keys(of_row);
      };
      const int visible_upper = visible_keys(row), visible_lower = visible_keys(row + 8);
      // Keys that every row of this CTA sees: slots inside need no mask.
      const int visible_to_all = visible_keys(first_row);
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
      output.clear();
      // Read before the products, after which a stage is released.
      float k_scale[ATTEND_SLOTS];
      auto read_k_scale = [&](int of_stage) {
#pragma unroll
        for (int slot = 0; slot < ATTEND_SLOTS; ++slot) k_scale[slot] = smem.k_scales[of_stage][slot].x;
      };
      int s[64];
      float x[64];
      uint32_t p[4][4];
      float sum[2] = {0, 0};  // of p, from the channels of ones

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
        mbarrier_arrive(&ring.k_empty[stage]);
        state.exponents(x, s, row_scale, k_scale);
        mask_tile(x, first_tile);
        state.raise(x);
        state.exponentiate<0, 64>(x);
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
          wgmma_fence();
          multiply_qk<HEAD_DIM>(s, q_desc, k_desc + uint64_t(next * (TILE_BYTES >> 4)));
          wgmma_commit();
          mbarrier_wait(&ring.v_full[stage], phase);
          multiply_pv<HEAD_DIM>(output.o, p, v_desc + uint64_t(stage * (V_TILE_BYTES >> 4)));
          wgmma_commit();
          wgmma_wait<1>();
          touch(s);
          mbarrier_arrive(&ring.k_empty[next]);
          state.exponents(x, s, row_scale, k_scale);
          mask_tile(x, tile);
          // Taken before it is known whether they are right: they hide the search for maxima. A raise is rare.
          float early[EARLY_EXPONENTIALS];
#pragma unroll
          for (int i = 0; i < EARLY_EXPONENTIALS; ++i) early[i] = ex2(x[i]);
          const bool raised = state.needs_raise(x);
          if (raised) {
            state.raise(x);
#pragma unroll
            for (int i = 0; i < EARLY_EXPONENTIALS; ++i) early[i] = ex2(x[i]);
          }
          wgmma_wait<0>();
          touch(output.o);
          if (elected) mbarrier_arrive(&ring.v_empty[stage]);
          if (raised) output.rescale(state.rescale);
          output.promote_in_turn(t);
          // One stretch without branches: ptxas hides the sums and the rounding behind the exponentials.
#pragma unroll
          for (int i = 0; i < EARLY_EXPONENTIALS; ++i) x[i] = early[i];
          state.exponentiate<EARLY_EXPONENTIALS, 64>(x);
          round_p(p, x);
          stage = next;
          phase = next_phase;
        }
      }
      if (elected) mbarrier_arrive(&ring.q_empty);
      if (item.num_tiles > 0) {
        mbarrier_wait(&ring.v_full[stage], phase);
        wgmma_fence();
        multiply_pv<HEAD_DIM>(output.o, p, v_desc + uint64_t(stage * (V_TILE_BYTES >> 4)));
        wgmma_commit();
        wgmma_wait<0>();
        touch(output.o);
        if (elected) mbarrier_arrive(&ring.v_empty[stage]);
#pragma unroll
        for (int j = 0; j < HEAD_DIM / 8 + 1; ++j) output.collect(j);
#pragma unroll
        for (int r = 0; r < 2; ++r) sum[r] = output.o[HEAD_DIM / 2 + 2 * r];
        if (++stage == LOW_BIT_STAGES) stage = 0, phase ^= 1;
      }

      const float inverse[2] = {1.f / sum[0], 1.f / sum[1]};
      const float2* v_scales = reinterpret_cast<const float2*>(
          v_scale_gmem + int64_t(rows.batch * shape.num_kv_heads + rows.kv_head) * HEAD_DIM + threadIdx.x % 4 * 2);
#pragma unroll
      for (int j = 0; j < HEAD_DIM / 8; ++j) {
        const float2 v_scale = v_scales[4 * j];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const bool some = sum[r] != 0.f;  // a row without a key has no output, whatever v is
          output.o[4 * j + 2 * r] = some ? output.o[4 * j + 2 * r] * inverse[r] * v_scale.x : 0.f;
          output.o[4 * j + 2 * r + 1] = some ? output.o[4 * j + 2 * r + 1] * inverse[r] * v_scale.y : 0.f;
        }
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int out_row = row + 8 * r;
        const bool present = out_row < (Shape::HAS_LENGTHS ? shape.of_sequence(rows.batch).seqlen_q : shape.seqlen_q);
        store_row<HEAD_DIM, Element>(out.row<uint16_t>(rows.batch, present ? out_row : 0, rows.head), present, output.o,
                                     r, 1.f);
        if (present && lse_gmem != nullptr && threadIdx.x % 4 == 0) {
          const float smooth_lse = (state.base[r] - P_EXPONENT + log2f(sum[r])) * 0.6931471805599453f;
          lse_gmem[int64_t(rows.batch * shape.num_heads + rows.head) * shape.seqlen_q + out_row] =
              sum[r] == 0.f ? -INFINITY : fmaf(row_shift_gmem[code_row + 8 * r], softmax_scale, smooth_lse);
        }
      }
    }
  }
}
