// m and l of the tested query rows over their anchor keys, on Hopper: what anchor_statistics.cu computes, with wgmma.
//
// For sinks of at most 32 keys and local ranges of at most NUM_SLOTS slots of 64 keys. Rows that the map does not hold
// are not written. q_map, strided_map, k_map, sink_map: bshd tensors in boxes of 64, 64 / stride, 64 and 32 rows
// (strided_map: every stride-th row); k_mean float32 [batch, num_kv_heads, HEAD_DIM]; m, l float32 [batch, num_heads,
// seqlen_q].
// A warpgroup's product has 64 rows: a tile's rows of one head, or its tested rows of `stride` heads of a group. These
// jobs are numbered by KV head, tile, and part of the group; a CTA does a stretch of them, its warpgroups in turn. A
// tile's local range starts 64 keys after that of the tile before, so each tile needs one new slot of a ring; the sink
// stays, together with the mean of the keys, as three 16-bit rows that sum to it: their scores are what it adds.
// Grid: a CTA of 416 threads for each multiprocessor, or fewer; the last warp copies.
#include "ptx/bulk_tensor.cuh"
#include "ptx/ex2.cuh"
#include "ptx/fence_proxy.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/wgmma.cuh"
#include "ptx/wgmma_f16.cuh"
#include "tile/aligned_storage.cuh"
#include "tile/row_map.cuh"

constexpr int ANCHOR_WARPGROUPS = 3;
constexpr int ANCHOR_THREADS = ANCHOR_WARPGROUPS * 128 + 32;
constexpr int ANCHOR_Q_STAGES = 6;
constexpr int ANCHOR_SLOTS = 6;  // of the ring
constexpr int SLOT_KEYS = 64;
constexpr int HALF_BYTES = 128;  // a swizzled row: 64 elements

template <int HEAD_DIM>
struct AnchorSm90Storage {
  static constexpr int HALVES = HEAD_DIM / 64;
  alignas(1024) uint8_t Q_smem[ANCHOR_Q_STAGES][HALVES][TILE_ROWS * HALF_BYTES];
  alignas(1024) uint8_t K_smem[ANCHOR_SLOTS][HALVES][SLOT_KEYS * HALF_BYTES];
  alignas(1024) uint8_t sink_smem[HALVES][SLOT_KEYS * HALF_BYTES];  // rows 0-2: the mean, 3-7: zero, 32-63: the sink
  alignas(8) uint64_t q_full[ANCHOR_Q_STAGES], q_empty[ANCHOR_Q_STAGES];
  uint64_t k_full[ANCHOR_SLOTS], k_empty[ANCHOR_SLOTS], sink_full, sink_empty;
  uint8_t alignment_slack[1024];
};

// The first key of the slots of tile 0's local range; it may lie before the first that there is.
__device__ __forceinline__ int first_slot_key(const Shape& shape) {
  return (shape.offset() - shape.local) & -KEY_BLOCK;
}

// Walks over a CTA's jobs.
template <int NUM_SLOTS>
struct JobWalker {
  int num_kv_heads, num_tiles, num_strided_tiles, strided_parts, full_parts;
  int job, end;  // within the grid's jobs
  int batch, kv_head, tile, part;
  int num_heads_before = 0, first_slot = 0;  // since the CTA's first job: KV heads; slots before those of this tile

  __device__ JobWalker(const Shape& shape, const RowMap& map) : num_kv_heads(shape.num_kv_heads) {
    num_tiles = ceil_div(shape.seqlen_q, TILE_ROWS);
    num_strided_tiles = min(map.first_full_row / TILE_ROWS, num_tiles);
    full_parts = shape.group_size();
    strided_parts = ceil_div(full_parts, min(map.stride, full_parts));
    const int strided_jobs = num_strided_tiles * strided_parts;
    const int jobs_a_head = strided_jobs + (num_tiles - num_strided_tiles) * full_parts;
    const int64_t jobs = int64_t(jobs_a_head) * shape.batch * shape.num_kv_heads;
    job = int(jobs * blockIdx.x / gridDim.x);
    end = int(jobs * (blockIdx.x + 1) / gridDim.x);
    batch = job / jobs_a_head / num_kv_heads;
    kv_head = job / jobs_a_head % num_kv_heads;
    const int within = job % jobs_a_head;
    const int parts = within < strided_jobs ? strided_parts : full_parts;
    const int past = within < strided_jobs ? within : within - strided_jobs;
    tile = (within < strided_jobs ? 0 : num_strided_tiles) + past / parts;
    part = past % parts;
  }

  __device__ bool is_strided() const { return tile < num_strided_tiles; }
  __device__ int num_parts() const { return is_strided() ? strided_parts : full_parts; }

  // Goes `count` jobs on, or to the end; calls leave() after each tile that it leaves.
  template <typename Leave>
  __device__ __forceinline__ void advance(int count, Leave leave) {
    count = min(count, end - job);
    job += count;
    part += count;
    for (int parts = num_parts(); part >= parts; parts = num_parts()) {
      part -= parts;
      ++first_slot;
      if (++tile == num_tiles) {
        tile = 0;
        first_slot += NUM_SLOTS - 1;
        ++num_heads_before;
        if (++kv_head == num_kv_heads) kv_head = 0, ++batch;
      }
      leave();
    }
  }
};

// What a lane knows of its two rows: the maximum so far and the sum of exponentials below it.
struct RowStatistics {
  float top[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};

  // Takes in the scores of columns 8 * FIRST and on; column 0 is key `key`. Keys outside [low, limits) do not count.
  template <int FIRST>
  __device__ __forceinline__ void add(float (&s)[32], bool masked, int key, int low, const int (&limits)[2],
                                      float scale_log2) {
    if (masked) {
      key += threadIdx.x % 4 * 2;
#pragma unroll
      for (int i = FIRST; i < 8; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int column_key = key + i * 8 + j % 2;
          if (column_key < low || column_key >= limits[j / 2]) s[4 * i + j] = -INFINITY;
        }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float best = top[r];
#pragma unroll
      for (int i = FIRST; i < 8; ++i) best = fmaxf(best, fmaxf(s[4 * i + 2 * r], s[4 * i + 2 * r + 1]));
      // Rounded up: no score exceeds 1 then, and where no maximum moves a sum is times exactly 1.
      const float base = best == -INFINITY ? 0.f : __fmul_ru(best, scale_log2);
      float even = sum[r] * ex2(__fmul_ru(top[r], scale_log2) - base), odd = 0;
#pragma unroll
      for (int i = FIRST; i < 8; ++i) {
        even += ex2(fmaf(s[4 * i + 2 * r], scale_log2, -base));
        odd += ex2(fmaf(s[4 * i + 2 * r + 1], scale_log2, -base));
      }
      sum[r] = even + odd;
      top[r] = best;
    }
  }
};

// Starts the product of 64 rows, in registers, and a slot's 64 keys.
template <int HEAD_DIM, typename Element>
__device__ __forceinline__ void start_product(float (&s)[32], const uint32_t (&q)[HEAD_DIM / 16][4],
                                              uint64_t slot_desc) {
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < HEAD_DIM / 16; ++step)
    wgmma_m64n64k16_rs<Element>(s, q[step], slot_desc + step / 4 * (SLOT_KEYS * HALF_BYTES / 16) + step % 4 * 2,
                                step != 0);
}

// Waits for all products but those of the last group.
__device__ __forceinline__ void commit_and_await_previous(float (&s)[32]) {
  wgmma_commit();
  wgmma_wait<1>();
  touch(s);
}

// The mean of a KV head's keys as rows 0 to 2 of a slot. All lanes of a warp call it.
template <int HEAD_DIM, typename Element>
__device__ __forceinline__ void store_mean(uint8_t (*slot)[SLOT_KEYS * HALF_BYTES], const float* mean_gmem) {
#pragma unroll
  for (int dim = threadIdx.x % 32; dim < HEAD_DIM; dim += 32) {
    float rest = mean_gmem[dim];
#pragma unroll
    for (int row = 0; row < 8; ++row) {
      const uint16_t bits = row < 3 ? uint16_t(Element::pack(rest, 0.f)) : 0;
      rest -= Element::to_float(bits);
      const int byte = row * HALF_BYTES + ((dim % 64 / 8 ^ row) << 4) + dim % 8 * 2;
      *reinterpret_cast<uint16_t*>(slot[dim / 64] + byte) = bits;
    }
  }
}

template <int HEAD_DIM, typename Element, int NUM_SLOTS>  // at least 3: with 2, ptxas runs out of registers
__global__ void __launch_bounds__(ANCHOR_THREADS, 1)
    anchor_statistics_sm90(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap strided_map,
                           const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap sink_map,
                           const float* k_mean_gmem, float* m_gmem, float* l_gmem, Shape shape, RowMap map,
                           float softmax_scale) {
  using Storage = AnchorSm90Storage<HEAD_DIM>;
  constexpr int STEPS = HEAD_DIM / 16;
  constexpr uint32_t TILE_BYTES = TILE_ROWS * HEAD_DIM * 2;
  extern __shared__ uint8_t dynamic_smem[];
  Storage& smem = aligned_storage<Storage>(dynamic_smem);
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;

  if (threadIdx.x == 0) {
    for (int stage = 0; stage < ANCHOR_Q_STAGES; ++stage) {
      mbarrier_init(&smem.q_full[stage], 1);
      mbarrier_init(&smem.q_empty[stage], 4);
    }
    for (int slot = 0; slot < ANCHOR_SLOTS; ++slot) {
      mbarrier_init(&smem.k_full[slot], 1);
      mbarrier_init(&smem.k_empty[slot], 4 * ANCHOR_WARPGROUPS);
    }
    mbarrier_init(&smem.sink_full, 1);
    mbarrier_init(&smem.sink_empty, 4 * ANCHOR_WARPGROUPS);
    mbarrier_init_fence();
  }
  __syncthreads();

  const int call_first_key = first_slot_key(shape);
  auto first_key_of = [&](int batch) {
    return Shape::HAS_LENGTHS ? first_slot_key(shape.of_sequence(batch)) : call_first_key;
  };
  JobWalker<NUM_SLOTS> walker(shape, map);
  const int stride_heads = min(map.stride, walker.full_parts);  // heads of a strided job
  const int first_job = walker.job;

  if (warp == ANCHOR_WARPGROUPS * 4) {
    int num_heads_loaded = 0, num_loaded = 0;
    for (; walker.job < walker.end; walker.advance(1, [] {})) {
      if (num_heads_loaded == walker.num_heads_before) {
        mbarrier_wait(&smem.sink_empty, num_heads_loaded % 2 ^ 1);
        const int64_t kv_index = int64_t(walker.batch) * shape.num_kv_heads + walker.kv_head;
        store_mean<HEAD_DIM, Element>(smem.sink_smem, k_mean_gmem + kv_index * HEAD_DIM);
        fence_proxy_async();
        __syncwarp();
        if (lane == 0) {
          mbarrier_arrive_expect_tx(&smem.sink_full, KEY_BLOCK * HEAD_DIM * 2);
#pragma unroll
          for (int half = 0; half < Storage::HALVES; ++half)
            bulk_tensor_4d(shared_address(smem.sink_smem[half]) + KEY_BLOCK * HALF_BYTES, &sink_map, half * 64, 0,
                           walker.kv_head, walker.batch, shared_address(&smem.sink_full));
        }
        ++num_heads_loaded;
      }
      for (; num_loaded < walker.first_slot + NUM_SLOTS; ++num_loaded) {
        const int slot = num_loaded % ANCHOR_SLOTS;
        mbarrier_wait(&smem.k_empty[slot], num_loaded / ANCHOR_SLOTS % 2 ^ 1);
        if (lane == 0) {
          const int key = first_key_of(walker.batch) + (walker.tile + num_loaded - walker.first_slot) * SLOT_KEYS;
          mbarrier_arrive_expect_tx(&smem.k_full[slot], TILE_BYTES);
#pragma unroll
          for (int half = 0; half < Storage::HALVES; ++half)
            bulk_tensor_4d(shared_address(smem.K_smem[slot][half]), &k_map, half * 64, key, walker.kv_head,
                           walker.batch, shared_address(&smem.k_full[slot]));
        }
        __syncwarp();
      }
      const int index = walker.job - first_job, stage = index % ANCHOR_Q_STAGES;
      mbarrier_wait(&smem.q_empty[stage], index / ANCHOR_Q_STAGES % 2 ^ 1);
      if (lane == 0) {
        const bool strided = walker.is_strided();
        const int heads = strided ? stride_heads : 1, rows = strided ? TILE_ROWS / map.stride : TILE_ROWS;
        const int head = walker.kv_head * walker.full_parts + walker.part * heads;
        mbarrier_arrive_expect_tx(&smem.q_full[stage], heads * rows * HEAD_DIM * 2);
        for (int i = 0; i < heads; ++i)
#pragma unroll
          for (int half = 0; half < Storage::HALVES; ++half)
            bulk_tensor_4d(shared_address(smem.Q_smem[stage][half]) + i * rows * HALF_BYTES,
                           strided ? &strided_map : &q_map, half * 64, walker.tile * rows, head + i, walker.batch,
                           shared_address(&smem.q_full[stage]));
      }
      __syncwarp();
    }
    return;
  }

  // Hands back the slots and the sink that are left behind, in the order in which they are filled. Those that were
  // skipped are waited for: a barrier takes one arrival of each warp a fill.
  int num_heads_left = 0, num_left = 0;
  auto hand_back = [&] {
    for (; num_left < walker.first_slot; ++num_left) {
      mbarrier_wait(&smem.k_full[num_left % ANCHOR_SLOTS], num_left / ANCHOR_SLOTS % 2);
      __syncwarp();
      if (lane == 0) mbarrier_arrive(&smem.k_empty[num_left % ANCHOR_SLOTS]);
    }
    if (num_heads_left < walker.num_heads_before) {
      mbarrier_wait(&smem.sink_full, num_heads_left % 2);
      __syncwarp();
      if (lane == 0) mbarrier_arrive(&smem.sink_empty);
      ++num_heads_left;
    }
  };
  const uint64_t k_desc = wgmma_descriptor<HALF_BYTES>(shared_address(smem.K_smem));
  const uint64_t sink_desc = wgmma_descriptor<HALF_BYTES>(shared_address(smem.sink_smem));
  const float scale_log2 = softmax_scale * 1.4426950408889634f;
  walker.advance(warp / 4, hand_back);
  for (; walker.job < walker.end; walker.advance(ANCHOR_WARPGROUPS, hand_back)) {
    const int index = walker.job - first_job, stage = index % ANCHOR_Q_STAGES;
    uint32_t q[STEPS][4];
    mbarrier_wait(&smem.q_full[stage], index / ANCHOR_Q_STAGES % 2);
    const int q_row = warp % 4 * 16 + lane % 16;
    const uint32_t q_address = shared_address(smem.Q_smem[stage]) + q_row * HALF_BYTES;
#pragma unroll
    for (int step = 0; step < STEPS; ++step)
      ldmatrix_x4(q[step], q_address + step / 4 * (TILE_ROWS * HALF_BYTES) +
                               ((step % 4 * 2 + lane / 16 ^ q_row & 7) << 4));
    if (lane == 0) mbarrier_arrive(&smem.q_empty[stage]);

    const bool strided = walker.is_strided();
    const int stride = strided ? map.stride : 1, rows_log2 = 6 - (stride > 1) - (stride > 2);  // rows of a head
    const Shape sequence = shape.of_sequence(walker.batch);
    const int first_key = first_key_of(walker.batch);
    const Range local = sequence.local_range(walker.tile);
    auto row = [&](int r) {
      return walker.tile * TILE_ROWS + ((warp % 4 * 16 + lane / 4 + 8 * r) & ((1 << rows_log2) - 1)) * stride;
    };
    const int limits[2] = {min(sequence.visible_keys(row(0)), local.end), min(sequence.visible_keys(row(1)), local.end)};
    const int least_limit = __reduce_min_sync(~0u, min(limits[0], limits[1]));

    // Each slot's product runs under the exponentials of the slot before.
    RowStatistics statistics;
    float s[2][32];
    auto start = [&](float (&to)[32], int i) {
      const int number = walker.first_slot + i, slot = number % ANCHOR_SLOTS;
      mbarrier_wait(&smem.k_full[slot], number / ANCHOR_SLOTS % 2);
      start_product<HEAD_DIM, Element>(to, q, k_desc + slot * uint64_t(TILE_BYTES / 16));
    };
    auto add = [&](float (&from)[32], int i) {
      const int key = first_key + (walker.tile + i) * SLOT_KEYS;
      const bool masked = key < sequence.sink_end || key + SLOT_KEYS > least_limit;
      statistics.add<0>(from, masked, key, sequence.sink_end, limits, scale_log2);
    };
    mbarrier_wait(&smem.sink_full, walker.num_heads_before % 2);
    start_product<HEAD_DIM, Element>(s[0], q, sink_desc);
    wgmma_commit();
    start(s[1], 0);
    commit_and_await_previous(s[0]);
    float shift[2] = {s[0][0] + s[0][1], s[0][2] + s[0][3]};
    const int sink_limits[2] = {min(sequence.visible_keys(row(0)), sequence.sink_end),
                                min(sequence.visible_keys(row(1)), sequence.sink_end)};
    statistics.add<4>(s[0], min(least_limit, sequence.sink_end) < KEY_BLOCK, -KEY_BLOCK, 0, sink_limits, scale_log2);
#pragma unroll
    for (int i = 0; i < NUM_SLOTS; ++i) {
      if (i + 1 < NUM_SLOTS) start(s[i % 2], i + 1);
      commit_and_await_previous(s[(i + 1) % 2]);
      add(s[(i + 1) % 2], i);
    }

    // The four lanes of a row: combine, and take off what the mean of the keys adds to every score.
    const int head_in_group = walker.part * (strided ? stride_heads : 1);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float best = statistics.top[r];
#pragma unroll
      for (int step = 1; step < 4; step *= 2) {
        shift[r] += __shfl_xor_sync(~0u, shift[r], step);
        best = fmaxf(best, __shfl_xor_sync(~0u, best, step));
      }
      const float base = best == -INFINITY ? 0.f : __fmul_ru(best, scale_log2);
      float total = statistics.sum[r] * ex2(__fmul_ru(statistics.top[r], scale_log2) - base);
#pragma unroll
      for (int step = 1; step < 4; step *= 2) total += __shfl_xor_sync(~0u, total, step);
      const int in_product = warp % 4 * 16 + lane / 4 + 8 * r, head_offset = in_product >> rows_log2;
      const int head = head_in_group + head_offset;
      if (lane % 4 == 0 && row(r) < sequence.seqlen_q && head < walker.full_parts &&
          head_offset < (strided ? stride_heads : 1)) {
        const int64_t q_head = int64_t(walker.batch) * shape.num_heads + walker.kv_head * walker.full_parts + head;
        const int64_t index = q_head * shape.seqlen_q + row(r);
        const bool sees_a_key = sequence.visible_keys(row(r)) > 0;
        m_gmem[index] = sees_a_key ? softmax_scale * best - softmax_scale * shift[r] : -INFINITY;
        l_gmem[index] = sees_a_key ? total : 0.f;
      }
    }
  }
}
