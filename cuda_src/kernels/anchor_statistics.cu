// m and l of every query row over its anchor keys, by exact products of the raw q and k.
//
// m = max s, l = sum exp(s - m), s = softmax_scale * (q . k - q . mean(k)), over the visible keys of the sink blocks and of
// the 64-row tile's local range. q [batch, seqlen_q, num_heads, HEAD_DIM], k [batch, seqlen_k, num_kv_heads, HEAD_DIM];
// k_mean float32 [batch, num_kv_heads, HEAD_DIM]; m, l float32 [batch, num_heads, seqlen_q]; a row that sees no key has
// m = -inf, l = 0. Grid: (ceil(seqlen_q / 64), num_heads, batch) CTAs of 128 threads, 16 rows a warp.
#include "ptx/cp_async.cuh"
#include "ptx/ex2.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/mma.cuh"
#include "tile/shape.cuh"
#include "tile/tensor_view.cuh"

constexpr int ANCHOR_THREADS = 128;

template <int HEAD_DIM>
__device__ __forceinline__ uint32_t anchor_offset(int row, int chunk) {
  return row * (2 * HEAD_DIM) + ((chunk ^ (row & 7)) << 4);
}

template <int HEAD_DIM, int NUM_ROWS>
__device__ __forceinline__ void load_anchor_rows(uint32_t smem_address, const uint16_t* gmem, int64_t stride_row, int present) {
  constexpr int CHUNKS = HEAD_DIM / 8;
#pragma unroll
  for (int i = 0; i < NUM_ROWS * CHUNKS / ANCHOR_THREADS; ++i) {
    const int index = i * ANCHOR_THREADS + threadIdx.x, row = index / CHUNKS, chunk = index % CHUNKS;
    const bool valid = row < present;
    cp_async_16(smem_address + anchor_offset<HEAD_DIM>(row, chunk), gmem + (valid ? row * stride_row : 0) + chunk * 8, valid);
  }
}

template <int HEAD_DIM, typename Element>
__global__ void __launch_bounds__(ANCHOR_THREADS)
    anchor_statistics(TensorView q, TensorView k, const float* k_mean_gmem, float* m_gmem, float* l_gmem, Shape shape,
                      float softmax_scale) {
  constexpr int STEPS = HEAD_DIM / 16;
  __shared__ alignas(1024) uint16_t Q_smem[TILE_ROWS * HEAD_DIM];
  __shared__ alignas(1024) uint16_t K_smem[2][KEY_BLOCK * HEAD_DIM];
  const int tile = blockIdx.x, head = blockIdx.y, batch = blockIdx.z;
  const int kv_head = head / shape.group_size();
  const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * 16;
  const int first_row = tile * TILE_ROWS;

  // 32-key blocks: those of the sink, then those of the local range that are not the sink's; as far as the tile sees.
  const Range local = shape.local_range(tile);
  const int num_seen = ceil_div(shape.visible_keys(first_row + TILE_ROWS - 1), KEY_BLOCK);
  const int num_sink = min(ceil_div(shape.sink_end, KEY_BLOCK), num_seen);
  const int first_local = max(local.begin / KEY_BLOCK, num_sink);
  const int num_blocks = num_sink + max(0, min(ceil_div(local.end, KEY_BLOCK), num_seen) - first_local);
  auto first_key = [&](int i) { return (i < num_sink ? i : i - num_sink + first_local) * KEY_BLOCK; };
  const uint16_t* k_gmem = k.row<const uint16_t>(batch, 0, kv_head);
  auto load_block = [&](int i) {
    const int key = first_key(i);
    load_anchor_rows<HEAD_DIM, KEY_BLOCK>(shared_address(K_smem[i % 2]), k_gmem + key * k.stride_row, k.stride_row,
                                          shape.seqlen_k - key);
  };

  load_anchor_rows<HEAD_DIM, TILE_ROWS>(shared_address(Q_smem), q.row<const uint16_t>(batch, first_row, head),
                                        q.stride_row, shape.seqlen_q - first_row);
  if (num_blocks > 0) load_block(0);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();

  const uint32_t lane_offset = anchor_offset<HEAD_DIM>(lane % 16, lane / 16);
  uint32_t a[STEPS][4];
#pragma unroll
  for (int step = 0; step < STEPS; ++step)
    ldmatrix_x4(a[step], shared_address(Q_smem) + warp_row * 2 * HEAD_DIM + (lane_offset ^ step * 32));

  const int row = first_row + warp_row + lane / 4;
  const int visible[2] = {shape.visible_keys(row), shape.visible_keys(row + 8)};
  const float scale_log2 = softmax_scale * 1.4426950408889634f;
  float top[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
  for (int i = 0; i < num_blocks; ++i) {
    if (i + 1 < num_blocks) load_block(i + 1);
    cp_async_commit();
    float s[4][4] = {};
#pragma unroll
    for (int step = 0; step < STEPS; ++step)
#pragma unroll
      for (int n = 0; n < 4; n += 2) {
        uint32_t b[4];
        ldmatrix_x4(b, shared_address(K_smem[i % 2]) + n * 8 * 2 * HEAD_DIM + (lane_offset ^ step * 32));
        mma_m16n8k16<Element>(s[n], a[step], b[0], b[2]);
        mma_m16n8k16<Element>(s[n + 1], a[step], b[1], b[3]);
      }
    const int key = first_key(i) + lane % 4 * 2;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float best = top[r];
#pragma unroll
      for (int n = 0; n < 4; ++n)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& score = s[n][2 * r + c];
          if (key + n * 8 + c >= visible[r]) score = -INFINITY;
          best = fmaxf(best, score);
        }
      const float base = best == -INFINITY ? 0.f : best * scale_log2;
      float add = 0;
#pragma unroll
      for (int n = 0; n < 4; ++n)
#pragma unroll
        for (int c = 0; c < 2; ++c) add += ex2(fmaf(s[n][2 * r + c], scale_log2, -base));
      sum[r] = fmaf(sum[r], ex2(fmaf(top[r], scale_log2, -base)), add);
      top[r] = best;
    }
    cp_async_wait<0>();
    __syncthreads();
  }

  // The four lanes of a row: combine, and take off what the mean of the keys adds to every score.
  const float* k_mean = k_mean_gmem + (int64_t(batch) * shape.num_kv_heads + kv_head) * HEAD_DIM;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float shift = 0;
    for (int d = lane % 4; d < HEAD_DIM; d += 4) {
      const int row_in_tile = warp_row + lane / 4 + 8 * r;
      const uint16_t bits = Q_smem[anchor_offset<HEAD_DIM>(row_in_tile, d / 8) / 2 + d % 8];
      shift = fmaf(Element::to_float(bits), k_mean[d], shift);
    }
    float best = top[r];
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
      shift += __shfl_xor_sync(~0u, shift, step);
      best = fmaxf(best, __shfl_xor_sync(~0u, best, step));
    }
    const float base = best == -INFINITY ? 0.f : best * scale_log2;
    float total = sum[r] * ex2(fmaf(top[r], scale_log2, -base));
#pragma unroll
    for (int step = 1; step < 4; step *= 2) total += __shfl_xor_sync(~0u, total, step);
    const int out_row = row + 8 * r;
    if (lane % 4 == 0 && out_row < shape.seqlen_q) {
      const int64_t index = (int64_t(batch) * shape.num_heads + head) * shape.seqlen_q + out_row;
      m_gmem[index] = visible[r] > 0 ? softmax_scale * best - softmax_scale * shift : -INFINITY;
      l_gmem[index] = visible[r] > 0 ? total : 0.f;
    }
  }
}
