// m and l of every query row over its anchor keys, by exact products of the raw q and k.
//
// m = max s, l = sum exp(s - m), s = softmax_scale * (q . k - q . mean(k)), over the visible keys of the sink blocks
// and of the 64-row tile's local range. q [batch, seqlen_q, num_heads, HEAD_DIM], k [batch, seqlen_k, num_kv_heads,
// HEAD_DIM]; k_mean float32 [batch, num_kv_heads, HEAD_DIM]; m, l float32 [batch, num_heads, seqlen_q]; a row that sees
// no key has m = -inf, l = 0; rows that `map` does not hold are not written.
// FEATURES (tile/score_features.cuh): SOFTCAP: s = softcap * tanh(softmax_scale * q . k / softcap), and softmax_scale *
// q . mean(k) goes to shift, float32 like m. WINDOW: keys outside of it do not count. SINKS: a head's logit, float32
// [num_heads], is one more s.
// A CTA of 128 threads takes a tile's rows, 16 a warp, in num_heads_each heads of one KV head, AT_ONCE a warp: they
// share the keys, which stay in shared memory when they are no more than ANCHOR_BLOCKS blocks, as the
// defaults' are up to 128 dims.
// Grid: (ceil(seqlen_q / 64), num_heads / num_heads_each, batch).
#include "ptx/cp_async.cuh"
#include "ptx/ex2.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/mma.cuh"
#include "tile/row_map.cuh"
#include "tile/score_features.cuh"
#include "tile/shape.cuh"
#include "tile/tensor_view.cuh"

constexpr int ANCHOR_THREADS = 128;
constexpr int WARP_ROWS = 16;

template <int HEAD_DIM>
constexpr int PITCH = padded_dim(HEAD_DIM);  // elements from row to row in shared memory

template <int HEAD_DIM>
constexpr int ANCHOR_BLOCKS = HEAD_DIM > 128 ? 3 : 7;  // of 32 keys, at a time: what fits shared memory

template <int HEAD_DIM, int AT_ONCE>
struct AnchorStorage {
  alignas(128) uint16_t Q_smem[ANCHOR_THREADS / 32][AT_ONCE][WARP_ROWS * PITCH<HEAD_DIM>];
  alignas(128) uint16_t K_smem[ANCHOR_BLOCKS<HEAD_DIM>][KEY_BLOCK * PITCH<HEAD_DIM>];
  alignas(16) float mean[HEAD_DIM];
};

template <int HEAD_DIM>
__device__ __forceinline__ uint32_t anchor_offset(int row, int chunk) {
  return row * (2 * PITCH<HEAD_DIM>) + ((chunk ^ (row & 7)) << 4);
}

// Starts copying NUM_ROWS rows by THREADS threads; rows from `present` on are zero.
template <int HEAD_DIM, int NUM_ROWS, int THREADS>
__device__ __forceinline__ void load_anchor_rows(uint32_t smem_address, const uint16_t* gmem, int64_t stride_row,
                                                 int present) {
  constexpr int CHUNKS = HEAD_DIM / 8;
#pragma unroll
  for (int i = 0; i < NUM_ROWS * CHUNKS / THREADS; ++i) {
    const int index = i * THREADS + threadIdx.x % THREADS, row = index / CHUNKS, chunk = index % CHUNKS;
    const bool valid = row < present;
    cp_async_16(smem_address + anchor_offset<HEAD_DIM>(row, chunk), gmem + (valid ? row * stride_row : 0) + chunk * 8,
                valid);
  }
}

// A lane's two rows of one head: its share of the maximum and the sum, which four lanes have together.
struct RowStatistics {
  float top[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};

  __device__ __forceinline__ void add(const float (&s)[4][4], float scale_log2) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float best = top[r];
#pragma unroll
      for (int n = 0; n < 4; ++n) best = fmaxf(best, fmaxf(s[n][2 * r], s[n][2 * r + 1]));
      // Rounded up: no score exceeds 1 then, and where no maximum moves a sum is times exactly 1.
      const float base = best == -INFINITY ? 0.f : __fmul_ru(best, scale_log2);
      float parts[2] = {0, 0};
#pragma unroll
      for (int n = 0; n < 4; ++n)
#pragma unroll
        for (int c = 0; c < 2; ++c) parts[c] += ex2(fmaf(s[n][2 * r + c], scale_log2, -base));
      sum[r] = fmaf(sum[r], ex2(__fmul_ru(top[r], scale_log2) - base), parts[0] + parts[1]);
      top[r] = best;
    }
  }
};

template <int HEAD_DIM, typename Element, int AT_ONCE, int FEATURES = 0>
__global__ void __launch_bounds__(ANCHOR_THREADS, 2)
    anchor_statistics(TensorView q, TensorView k, const float* k_mean_gmem, float* m_gmem, float* l_gmem, Shape shape,
                      RowMap map, int num_heads_each, float softmax_scale, float softcap,
                      float cap_factor, const float* sink_logits_gmem, float* shift_gmem) {
  constexpr bool CAPPED = FEATURES & SOFTCAP, WINDOWED = FEATURES & WINDOW, WITH_SINKS = FEATURES & SINKS;
  constexpr int BLOCKS = ANCHOR_BLOCKS<HEAD_DIM>;
  constexpr int STEPS = HEAD_DIM / 16;
  using Storage = AnchorStorage<HEAD_DIM, AT_ONCE>;
  extern __shared__ __align__(128) uint8_t dynamic_smem[];
  Storage& smem = *reinterpret_cast<Storage*>(dynamic_smem);
  const int tile = blockIdx.x, first_head = blockIdx.y * num_heads_each, batch = blockIdx.z;
  const int kv_head = first_head / shape.group_size();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first_row = tile * TILE_ROWS;
  // Where every other or every fourth row is tested, as many heads take the place of the rows between.
  const int stride = first_row < map.first_full_row ? map.stride : 1;
  const int warps_per_head = TILE_ROWS / WARP_ROWS / stride, heads_at_once = stride * AT_ONCE;
  const int warp_row = first_row + warp % warps_per_head * (WARP_ROWS * stride);

  const Shape sequence = shape.of_sequence(batch);
  if (Shape::HAS_LENGTHS && first_row >= sequence.seqlen_q) return;

  // 32-key blocks: those of the sink, then those of the local range that are not the sink's; as far as the tile sees.
  const Range local = sequence.local_range(tile);
  const int num_seen = ceil_div(sequence.visible_end<WINDOWED>(first_row + TILE_ROWS - 1), KEY_BLOCK);
  const int first_seen = sequence.visible_begin<WINDOWED>(first_row) / KEY_BLOCK;
  const bool sees_sink = !WINDOWED || first_seen * KEY_BLOCK < sequence.sink_end;
  const int num_sink = sees_sink ? min(ceil_div(sequence.sink_end, KEY_BLOCK), num_seen) : 0;
  const int first_local = max(max(local.begin / KEY_BLOCK, first_seen), num_sink);
  const int num_blocks = num_sink + max(0, min(ceil_div(local.end, KEY_BLOCK), num_seen) - first_local);
  const bool resident = num_blocks <= BLOCKS;
  auto first_key = [&](int i) { return (i < num_sink ? i : i - num_sink + first_local) * KEY_BLOCK; };
  const uint16_t* k_gmem = k.row<const uint16_t>(batch, 0, kv_head);
  auto load_blocks = [&](int begin) {
    for (int i = begin; i < min(num_blocks, begin + BLOCKS); ++i) {
      const int key = first_key(i);
      load_anchor_rows<HEAD_DIM, KEY_BLOCK, ANCHOR_THREADS>(shared_address(smem.K_smem[i - begin]),
                                                            k_gmem + key * k.stride_row, k.stride_row,
                                                            sequence.seqlen_k - key);
    }
  };
  const int first_loaded = min(warp_row, sequence.seqlen_q - 1);
  auto load_q = [&](int head) {  // a warp its own rows
#pragma unroll
    for (int h = 0; h < AT_ONCE; ++h)
      load_anchor_rows<HEAD_DIM, WARP_ROWS, 32>(shared_address(smem.Q_smem[warp][h]),
                                                q.row<const uint16_t>(batch, first_loaded, head + h),
                                                stride * q.stride_row, ceil_div(sequence.seqlen_q - warp_row, stride));
  };
  const int heads_end = first_head + num_heads_each;
  int head = first_head + warp / warps_per_head * AT_ONCE;

  if (head < heads_end) load_q(head);
  if (resident) load_blocks(0);
  cp_async_commit();
#pragma unroll
  for (int first = 0; first < HEAD_DIM; first += ANCHOR_THREADS)
    if (first + threadIdx.x < HEAD_DIM)
      smem.mean[first + threadIdx.x] =
          k_mean_gmem[(int64_t(batch) * shape.num_kv_heads + kv_head) * HEAD_DIM + first + threadIdx.x];
  cp_async_wait<0>();
  __syncthreads();

  const uint32_t lane_offset = anchor_offset<HEAD_DIM>(lane % 16, lane / 16);
  const int row = warp_row + lane / 4 * stride;
  const int visible[2] = {sequence.visible_end<WINDOWED>(row), sequence.visible_end<WINDOWED>(row + 8 * stride)};
  const int hidden[2] = {sequence.visible_begin<WINDOWED>(row), sequence.visible_begin<WINDOWED>(row + 8 * stride)};
  const int visible_to_all = sequence.visible_end<WINDOWED>(warp_row);
  const int visible_to_all_from = sequence.visible_begin<WINDOWED>(warp_row + (WARP_ROWS - 1) * stride);
  const float value_scale = CAPPED ? softcap : softmax_scale;  // of a score that is held
  const float scale_log2 = value_scale * 1.4426950408889634f;
  const SoftCap cap = {cap_factor};

  for (int first = first_head; first < heads_end; first += heads_at_once, head += heads_at_once) {
    const bool has_next = head + heads_at_once < heads_end;
    uint32_t a[AT_ONCE][STEPS][4];
    cp_async_wait<0>();
    __syncwarp();
#pragma unroll
    for (int h = 0; h < AT_ONCE; ++h)
#pragma unroll
      for (int step = 0; step < STEPS; ++step)
        ldmatrix_x4(a[h][step], shared_address(smem.Q_smem[warp][h]) + (lane_offset ^ step * 32));
    __syncwarp();
    if (resident && has_next) load_q(head + heads_at_once);
    cp_async_commit();

    RowStatistics statistics[AT_ONCE];
    for (int begin = 0; begin < num_blocks; begin += BLOCKS) {
      if (!resident) {
        __syncthreads();
        load_blocks(begin);
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();
      }
#pragma unroll 1
      for (int i = begin; i < min(num_blocks, begin + BLOCKS) && head < heads_end; ++i) {
        float s[AT_ONCE][4][4] = {};
#pragma unroll
        for (int step = 0; step < STEPS; ++step)
#pragma unroll
          for (int n = 0; n < 4; n += 2) {
            uint32_t b[4];
            ldmatrix_x4(b, shared_address(smem.K_smem[i - begin]) + n * 8 * 2 * PITCH<HEAD_DIM> +
                               (lane_offset ^ step * 32));
#pragma unroll
            for (int h = 0; h < AT_ONCE; ++h) {
              mma_m16n8k16<Element>(s[h][n], a[h][step], b[0], b[2]);
              mma_m16n8k16<Element>(s[h][n + 1], a[h][step], b[1], b[3]);
            }
          }
        const int key = first_key(i);
        if constexpr (CAPPED) {
#pragma unroll
          for (int h = 0; h < AT_ONCE; ++h)
#pragma unroll
            for (int n = 0; n < 4; ++n)
#pragma unroll
              for (int c = 0; c < 4; ++c) s[h][n][c] = cap(s[h][n][c]);
        }
        if (WINDOWED && key < visible_to_all_from) {
#pragma unroll
          for (int n = 0; n < 4; ++n)
#pragma unroll
            for (int c = 0; c < 4; ++c)
              if (key + lane % 4 * 2 + n * 8 + c % 2 < hidden[c / 2])
#pragma unroll
                for (int h = 0; h < AT_ONCE; ++h) s[h][n][c] = -INFINITY;
        }
        if (key + KEY_BLOCK > visible_to_all) {
#pragma unroll
          for (int n = 0; n < 4; ++n)
#pragma unroll
            for (int c = 0; c < 4; ++c)
              if (key + lane % 4 * 2 + n * 8 + c % 2 >= visible[c / 2])
#pragma unroll
                for (int h = 0; h < AT_ONCE; ++h) s[h][n][c] = -INFINITY;
        }
#pragma unroll
        for (int h = 0; h < AT_ONCE; ++h) statistics[h].add(s[h], scale_log2);
      }
    }
    if (!resident && has_next) {
      load_q(head + heads_at_once);
      cp_async_commit();
    }

    // The four lanes of a row: combine, and take off what the mean of the keys adds to every score.
#pragma unroll
    for (int h = 0; h < AT_ONCE; ++h) {
      float shift[2] = {0, 0};
#pragma unroll
      for (int step = 0; step < STEPS; ++step)
#pragma unroll
        for (int i = 0; i < 4; ++i) {  // rows r and r + 8 of dims 2t, 2t + 1 and 8 further
          const float2 pair = unpack<Element>(a[h][step][i]);
          const float2 mean = *reinterpret_cast<const float2*>(&smem.mean[step * 16 + i / 2 * 8 + lane % 4 * 2]);
          shift[i % 2] = fmaf(pair.x, mean.x, fmaf(pair.y, mean.y, shift[i % 2]));
        }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float best = statistics[h].top[r];
#pragma unroll
        for (int step = 1; step < 4; step *= 2) {
          shift[r] += __shfl_xor_sync(~0u, shift[r], step);
          best = fmaxf(best, __shfl_xor_sync(~0u, best, step));
        }
        const float base = best == -INFINITY ? 0.f : __fmul_ru(best, scale_log2);
        float total = statistics[h].sum[r] * ex2(__fmul_ru(statistics[h].top[r], scale_log2) - base);
#pragma unroll
        for (int step = 1; step < 4; step *= 2) total += __shfl_xor_sync(~0u, total, step);
        const int out_row = row + 8 * r * stride;
        if (lane % 4 == 0 && out_row < sequence.seqlen_q && head < heads_end) {
          const int64_t index = (int64_t(batch) * shape.num_heads + head + h) * shape.seqlen_q + out_row;
          const bool sees_a_key = visible[r] > hidden[r];
          float top = value_scale * best;
          if constexpr (WITH_SINKS) add_sink(top, total, sink_logits_gmem[head + h]);
          if constexpr (CAPPED) shift_gmem[index] = softmax_scale * shift[r];
          m_gmem[index] = !sees_a_key ? -INFINITY : CAPPED ? top : top - softmax_scale * shift[r];
          l_gmem[index] = sees_a_key ? total : 0.f;
        }
      }
    }
  }
}
