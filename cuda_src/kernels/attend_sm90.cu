// Block-sparse attention on Hopper: one CTA attends 128 query rows of one head to the selected 32-key slots.
//
// out[b, i, h, :] = softmax(softmax_scale * q_i . k_j) v_j over the selected, visible keys j; lse is natural log.
// Warpgroup 0 produces: its first warp walks the mask bits from the last block to the first and gathers four 32-key slots
// into each 128-key tile. Warpgroups 1 and 2 consume, 64 rows each: the product q.k of one tile runs with p.v of the tile
// before it, and the softmax of the one runs under the products of the other warpgroup.
// Grid: batch * num_heads * ceil(seqlen_q / 128) CTAs of 384 threads, KV-head-major, longest rows first; a run of
// neighbouring query blocks of one head comes before the next head, so that they share K and V in the L2.
#include "ptx/bulk_tensor.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/ex2.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/setmaxnreg.cuh"
#include "ptx/wgmma.cuh"
#include "ptx/wgmma_f16.cuh"
#include "tile/shape.cuh"
#include "tile/tensor_view.cuh"

constexpr int ATTEND_BLOCK_Q = 128;
constexpr int ATTEND_TILE_K = 128;
constexpr int ATTEND_STAGES = 2;
constexpr int ATTEND_SLOTS = ATTEND_TILE_K / KEY_BLOCK;
constexpr int ATTEND_RUN = 16;  // neighbouring query blocks of a head before the next head
constexpr int HALF_BYTES = 128; // a swizzled row: 64 elements

template <int HEAD_DIM>
struct AttendSm90Storage {
  static constexpr int HALVES = HEAD_DIM / 64;
  alignas(1024) uint8_t Q_smem[HALVES][ATTEND_BLOCK_Q * HALF_BYTES];
  alignas(1024) uint8_t K_smem[ATTEND_STAGES][HALVES][ATTEND_TILE_K * HALF_BYTES];
  alignas(1024) uint8_t V_smem[ATTEND_STAGES][HALVES][ATTEND_TILE_K * HALF_BYTES];
  alignas(16) int4 slots[ATTEND_STAGES];  // first key of each slot; -1: absent
  int num_tiles;
  alignas(8) uint64_t k_full[ATTEND_STAGES], k_empty[ATTEND_STAGES], v_full[ATTEND_STAGES], v_empty[ATTEND_STAGES], q_full;
  uint8_t alignment_slack[1024];  // dynamic shared memory is not promised to start on 1024 bytes
};

// Walks the selected, visible 32-key blocks of one mask row from the last to the first; all lanes of a warp together.
struct SlotWalker {
  const uint32_t* words;  // null: every block is selected
  int expand_log2, num_visible, base_word, lane;
  uint32_t mine;

  __device__ uint32_t load(int word) const {
    int below = num_visible - 32 * word;  // visible blocks in this word and after
    if (below <= 0) return 0;
    uint32_t bits = ~0u;
    if (words != nullptr) {
      bits = words[word >> expand_log2];
      if (expand_log2 != 0) {  // a coarse bit stands for 2 or 4 slots
        int width = 32 >> expand_log2;
        uint32_t part = bits >> ((word & ((1 << expand_log2) - 1)) * width);
        bits = 0;
        uint32_t ones = (1u << (1 << expand_log2)) - 1;
        for (int i = 0; i < width; ++i) bits |= ((part >> i) & 1) ? ones << (i << expand_log2) : 0;
      }
    }
    return below >= 32 ? bits : bits & ((1u << below) - 1);
  }

  __device__ SlotWalker(const uint32_t* row, int expand_log2, int num_visible)
      : words(row), expand_log2(expand_log2), num_visible(num_visible), lane(threadIdx.x % 32) {
    base_word = num_visible == 0 ? 0 : (num_visible - 1) / 1024 * 32;
    mine = load(base_word + lane);
  }

  __device__ int count() const {
    int total = 0;
    for (int word = lane; word * 32 < num_visible; word += 32) total += __popc(load(word));
    return __reduce_add_sync(~0u, total);
  }

  // The next block's first key, or -1.
  __device__ int next() {
    while (true) {
      uint32_t some = __ballot_sync(~0u, mine != 0);
      if (some != 0) {
        int owner = 31 - __clz(some);
        int bit = 31 - __clz(__shfl_sync(~0u, mine, owner));
        if (lane == owner) mine ^= 1u << bit;
        return ((base_word + owner) * 32 + bit) * KEY_BLOCK;
      }
      if (base_word == 0) return -1;
      base_word -= 32;
      mine = load(base_word + lane);
    }
  }
};

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

// Running maximum and sum of a lane's two rows, in units of raw scores.
struct RowState {
  float max[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};

  // s becomes p; rescale receives what the accumulated output is to be multiplied by.
  __device__ __forceinline__ void update(float (&s)[64], float scale_log2, float (&rescale)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float top = s[2 * r];
#pragma unroll
      for (int j = 0; j < 16; ++j) top = fmaxf(top, fmaxf(s[4 * j + 2 * r], s[4 * j + 2 * r + 1]));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
      top = fmaxf(max[r], fmaxf(top, __shfl_xor_sync(~0u, top, 2)));
      float base = top == -INFINITY ? 0.f : top * scale_log2;  // a row with nothing visible yet stays at zero
      rescale[r] = ex2(fmaf(max[r], scale_log2, -base));
      max[r] = top;
      float even = 0, odd = 0;
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        float& x = s[4 * j + 2 * r];
        float& y = s[4 * j + 2 * r + 1];
        x = ex2(fmaf(x, scale_log2, -base));
        y = ex2(fmaf(y, scale_log2, -base));
        even += x;
        odd += y;
      }
      sum[r] = fmaf(sum[r], rescale[r], even + odd);
    }
  }
};

template <typename Element>
__device__ __forceinline__ void round_p(uint32_t (&p)[8][4], const float (&s)[64]) {
#pragma unroll
  for (int i = 0; i < 32; ++i) p[i / 4][i % 4] = Element::pack(s[2 * i], s[2 * i + 1]);
}

// Scores of absent slots and of keys beyond a row's limit become -inf.
__device__ __forceinline__ void mask_scores(float (&s)[64], int4 slots, int visible_upper, int visible_lower) {
  int starts[4] = {slots.x, slots.y, slots.z, slots.w};
#pragma unroll
  for (int j = 0; j < 16; ++j) {
    int start = starts[j / 4];
    int key = start + (j % 4) * 8 + (threadIdx.x % 4) * 2;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (start < 0 || key + i >= visible_upper) s[4 * j + i] = -INFINITY;
      if (start < 0 || key + i >= visible_lower) s[4 * j + 2 + i] = -INFINITY;
    }
  }
}

template <int HEAD_DIM, typename Element>
__global__ void __launch_bounds__(384, 1)
    attend_sm90(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
                const __grid_constant__ TensorMap v_map, TensorView out, float* lse_gmem, const uint32_t* mask_gmem,
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
  const uint32_t* mask_row = nullptr;
  if (mask_gmem != nullptr)
    mask_row = mask_gmem + (int64_t(batch * shape.num_heads + head) * num_q_blocks + q_block) *
                               ceil_div(ceil_div(shape.seqlen_k, KEY_BLOCK << expand_log2), 32);
  if (threadIdx.x < 32) {
    int num_tiles = ceil_div(SlotWalker(mask_row, expand_log2, num_visible).count(), ATTEND_SLOTS);
    if (threadIdx.x == 0) {
      smem.num_tiles = num_tiles;
      for (int stage = 0; stage < ATTEND_STAGES; ++stage) {
        mbarrier_init(&smem.k_full[stage], 1);
        mbarrier_init(&smem.v_full[stage], 1);
        mbarrier_init(&smem.k_empty[stage], 2);
        mbarrier_init(&smem.v_empty[stage], 2);
      }
      mbarrier_init(&smem.q_full, 1);
      mbarrier_init_fence();
    }
  }
  __syncthreads();
  const int num_tiles = __shfl_sync(~0u, smem.num_tiles, 0);

  if (threadIdx.x < 128) {
    setmaxnreg_dec<24>();
    if (threadIdx.x < 32) {
      const bool elected = threadIdx.x == 0;
      if (elected) {
        mbarrier_arrive_expect_tx(&smem.q_full, HALVES * ATTEND_BLOCK_Q * HALF_BYTES);
        for (int half = 0; half < HALVES; ++half)
          bulk_tensor_4d(shared_address(smem.Q_smem[half]), &q_map, half * 64, first_row, head, batch,
                         shared_address(&smem.q_full));
      }
      SlotWalker walker(mask_row, expand_log2, num_visible);
      int stage = 0;
      uint32_t phase = 1;
      for (int tile = 0; tile < num_tiles; ++tile) {
        int4 slots;
        slots.x = walker.next();
        slots.y = walker.next();
        slots.z = slots.y < 0 ? -1 : walker.next();
        slots.w = slots.z < 0 ? -1 : walker.next();
        if (elected) {
          mbarrier_wait(&smem.k_empty[stage], phase);
          smem.slots[stage] = slots;
          // An absent slot repeats the first one: its scores are masked, and 0 * v must not meet stale NaNs.
          const int keys[ATTEND_SLOTS] = {slots.x, slots.y < 0 ? slots.x : slots.y, slots.z < 0 ? slots.x : slots.z,
                                          slots.w < 0 ? slots.x : slots.w};
          mbarrier_arrive_expect_tx(&smem.k_full[stage], TILE_BYTES);
#pragma unroll
          for (int i = 0; i < ATTEND_SLOTS; ++i)
            for (int half = 0; half < HALVES; ++half)
              bulk_tensor_4d(shared_address(smem.K_smem[stage][half]) + i * KEY_BLOCK * HALF_BYTES, &k_map, half * 64,
                             keys[i], kv_head, batch, shared_address(&smem.k_full[stage]));
          mbarrier_wait(&smem.v_empty[stage], phase);
          mbarrier_arrive_expect_tx(&smem.v_full[stage], TILE_BYTES);
#pragma unroll
          for (int i = 0; i < ATTEND_SLOTS; ++i)
            for (int half = 0; half < HALVES; ++half)
              bulk_tensor_4d(shared_address(smem.V_smem[stage][half]) + i * KEY_BLOCK * HALF_BYTES, &v_map, half * 64,
                             keys[i], kv_head, batch, shared_address(&smem.v_full[stage]));
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
    auto needs_mask = [&](int4 slots) {
      return slots.w < 0 || slots.x + KEY_BLOCK > visible_to_all;  // the walk goes down: x is the last slot
    };

    float s[64], o[HEAD_DIM / 2], rescale[2];
    uint32_t p[8][4];
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 2; ++i) o[i] = 0;
    RowState state;

    mbarrier_wait(&smem.q_full, 0);
    if (num_tiles > 0) {
      mbarrier_wait(&smem.k_full[0], 0);
      int4 slots = smem.slots[0];
      wgmma_fence();
      multiply_qk<HEAD_DIM, Element>(s, q_desc, k_desc);
      wgmma_commit();
      wgmma_wait<0>();
      touch(s);
      if (leader) mbarrier_arrive(&smem.k_empty[0]);
      if (needs_mask(slots)) mask_scores(s, slots, visible_upper, visible_lower);
      state.update(s, scale_log2, rescale);
      round_p<Element>(p, s);

      int stage = 0;
      uint32_t phase = 0;
      for (int tile = 1; tile < num_tiles; ++tile) {
        int next = stage + 1;
        uint32_t next_phase = phase;
        if (next == ATTEND_STAGES) next = 0, next_phase ^= 1;
        mbarrier_wait(&smem.k_full[next], next_phase);
        slots = smem.slots[next];
        wgmma_fence();
        multiply_qk<HEAD_DIM, Element>(s, q_desc, k_desc + uint64_t(next * (TILE_BYTES >> 4)));
        wgmma_commit();
        mbarrier_wait(&smem.v_full[stage], phase);
        multiply_pv<HEAD_DIM, Element>(o, p, v_desc + uint64_t(stage * (TILE_BYTES >> 4)));
        wgmma_commit();
        wgmma_wait<1>();
        touch(s);
        if (leader) mbarrier_arrive(&smem.k_empty[next]);
        if (needs_mask(slots)) mask_scores(s, slots, visible_upper, visible_lower);
        state.update(s, scale_log2, rescale);
        wgmma_wait<0>();
        touch(o);
        if (leader) mbarrier_arrive(&smem.v_empty[stage]);
#pragma unroll
        for (int i = 0; i < HEAD_DIM / 2; ++i) o[i] *= rescale[i / 2 % 2];
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
            sum == 0.f ? -INFINITY : fmaf(state.max[r], softmax_scale, logf(sum));
    }
  }
}
