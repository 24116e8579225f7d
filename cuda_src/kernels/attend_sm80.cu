// Block-sparse attention for sm_80 and later: a CTA attends 64 or 128 query rows of a head to the selected key blocks.
//
// out[b, i, h, :] = softmax(softmax_scale * q_i . k_j) v_j over the selected, visible keys j; lse is natural log.
// FEATURES (tile/score_features.cuh): scores capped, a window, a sink logit for each head: float32 [num_heads].
// A tile of 64 keys is gathered from any two selected 32-key blocks. A warp owns 32 query rows, so that each ldmatrix
// of K or V feeds four products, or 16 where the output of 32 would not fit the registers; scores, p and the output
// stay in registers (FlashAttention-2, arXiv 2307.08691).
// STAGES 1: V arrives under q.k, the next K under softmax and p.v. STAGES 2: both arrive under the tile before.
// q [batch, seqlen_q, num_heads, HEAD_DIM], k, v [batch, seqlen_k, num_kv_heads, HEAD_DIM], rows on 16-byte boundaries;
// mask uint32 [batch, num_heads, ceil(seqlen_q / BLOCK_Q), num_words], null: dense; lse float32 [batch, num_heads,
// seqlen_q], null: not wanted.
// Grid: a CTA for each CTA_ROWS rows of each head; all of a KV head before the next, longest rows first, its query
// heads innermost, so that K and V stay in the L2.
#include "ptx/cp_async.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/mma.cuh"
#include "tile/block_walker.cuh"
#include "tile/online_softmax.cuh"
#include "tile/score_features.cuh"
#include "tile/shape.cuh"
#include "tile/tensor_view.cuh"

constexpr int ATTEND_TILE_K = 2 * KEY_BLOCK;
constexpr int KEY_TILES = ATTEND_TILE_K / 8;  // n8 tiles of the scores

// How the rows of a mask block of BLOCK_Q rows are shared out. Mirrors salekit/attend.py (sm80_grid).
template <int HEAD_DIM, int BLOCK_Q, int FEATURES>
struct AttendRows {
  // Caps and windows take registers, wide rows registers and shared memory.
  static constexpr bool FEWER = HEAD_DIM > 128 || (HEAD_DIM > 64 && (FEATURES & (SOFTCAP | WINDOW)) != 0);
  static constexpr int CTA_ROWS = FEWER ? 64 : BLOCK_Q;
  static constexpr int ROW_TILES = FEWER ? 1 : 2;  // m16 tiles of a warp
  static constexpr int WARP_ROWS = 16 * ROW_TILES;
  static constexpr int THREADS = CTA_ROWS / WARP_ROWS * 32;
};

template <int HEAD_DIM>
constexpr int PITCH = padded_dim(HEAD_DIM);  // elements from row to row of a tile in shared memory

template <int HEAD_DIM, int CTA_ROWS, int STAGES>
struct AttendSm80Storage {
  alignas(128) uint16_t Q_smem[CTA_ROWS * PITCH<HEAD_DIM>];  // the output too, at the end
  alignas(128) uint16_t K_smem[STAGES][ATTEND_TILE_K * PITCH<HEAD_DIM>];
  alignas(128) uint16_t V_smem[STAGES][ATTEND_TILE_K * PITCH<HEAD_DIM>];
  alignas(16) BlockList selected;
  // Needed once a tile at most; in registers they would cause spills.
  int first_row;
  int visible_to_all;       // keys before this one, and
  int visible_to_all_from;  // with a window from this one on, are seen by every row of the CTA: no mask is needed
  const uint16_t* k_gmem;
  const uint16_t* v_gmem;
#ifdef SEQUENCE_LENGTHS
  Shape sequence;
  __device__ const Shape& shape_in_loop(const Shape&) const { return sequence; }
#else
  __device__ static const Shape& shape_in_loop(const Shape& shape) { return shape; }
#endif
};

// Which rows of which head a CTA attends.
struct AttendWork {
  int batch, head, first_row;
  __device__ int64_t head_index(const Shape& shape) const { return int64_t(batch) * shape.num_heads + head; }
};

// Worked out anew by every call, though the answer is the same: across the main loop it would cost registers.
template <int CTA_ROWS>
__device__ __forceinline__ AttendWork locate_work(const Shape& shape) {
  int block = blockIdx.x;
  asm volatile("" : "+r"(block));
  const int num_q_blocks = ceil_div(shape.seqlen_q, CTA_ROWS), group = shape.group_size();
  const int kv_index = block / (group * num_q_blocks);
  const int within = block % (group * num_q_blocks);
  return {kv_index / shape.num_kv_heads, kv_index % shape.num_kv_heads * group + within % group,
          (num_q_blocks - 1 - within / group) * CTA_ROWS};
}

// Where 16-byte chunk `chunk` of row `row` lies in a tile: bits 4 to 6 of the address are XORed with the row, so that
// eight rows at one chunk, or eight chunks of one row, touch all banks once.
template <int HEAD_DIM>
__device__ __forceinline__ uint32_t chunk_offset(int row, int chunk) {
  return row * (2 * PITCH<HEAD_DIM>) + ((chunk ^ (row & 7)) << 4);
}

// Copies NUM_ROWS rows to shared memory, rows from `present` on as zeros.
template <int HEAD_DIM, int NUM_THREADS, int NUM_ROWS>
__device__ __forceinline__ void load_rows(uint32_t smem_address, const uint16_t* gmem, int64_t stride_row,
                                          int present) {
  constexpr int CHUNKS = PITCH<HEAD_DIM> / 8;
  constexpr int STEP = NUM_THREADS / CHUNKS;
  static_assert(NUM_ROWS % STEP == 0, "the threads copy the same number of chunks each");
  int thread = threadIdx.x;
  asm volatile("" : "+r"(thread), "+l"(stride_row));  // so that no address is kept, in registers, across the main loop
  const int row = thread / CHUNKS, chunk = thread % CHUNKS;
  if (HEAD_DIM != PITCH<HEAD_DIM> && chunk >= HEAD_DIM / 8) return;  // no one reads those
  const uint16_t* source = gmem + row * stride_row + chunk * 8;
#pragma unroll
  for (int i = 0; i < NUM_ROWS; i += STEP) {
    cp_async_16(smem_address + chunk_offset<HEAD_DIM>(row + i, chunk), source, row + i < present);
    source += STEP * stride_row;
  }
}

// Gathers a tile of K or V, whose head starts at `gmem`, from two 32-key blocks. The second may be -1, absent; absent
// keys and those from seqlen_k on are zeros.
template <int HEAD_DIM, int NUM_THREADS>
__device__ __forceinline__ void load_tile(uint32_t smem_address, const uint16_t* gmem, int64_t stride_row, int2 blocks,
                                          int seqlen_k) {
  constexpr int SLOT_BYTES = KEY_BLOCK * PITCH<HEAD_DIM> * 2;
  load_rows<HEAD_DIM, NUM_THREADS, KEY_BLOCK>(smem_address, gmem + blocks.x * KEY_BLOCK * stride_row, stride_row,
                                              seqlen_k - blocks.x * KEY_BLOCK);
  const int second = max(blocks.y, 0) * KEY_BLOCK;
  load_rows<HEAD_DIM, NUM_THREADS, KEY_BLOCK>(smem_address + SLOT_BYTES, gmem + second * stride_row, stride_row,
                                              blocks.y < 0 ? 0 : seqlen_k - second);
}

// Scores of an absent block and of keys beyond a row's limits become -inf. `row` is this lane's first row.
template <bool WINDOWED, int ROW_TILES>
__device__ __forceinline__ void mask_scores(float (&scores)[ROW_TILES][KEY_TILES][4], int2 blocks, int row,
                                            const Shape& shape) {
#pragma unroll
  for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int visible = shape.visible_end<WINDOWED>(row + 16 * m + 8 * r) - threadIdx.x % 4 * 2;
#pragma unroll
      for (int j = 0; j < KEY_TILES; ++j) {
        const int block = j < KEY_TILES / 2 ? blocks.x : blocks.y;
        const int left = block < 0 ? 0 : visible - (block * KEY_BLOCK + j % (KEY_TILES / 2) * 8);
        if (left <= 0) scores[m][j][2 * r] = -INFINITY;
        if (left <= 1) scores[m][j][2 * r + 1] = -INFINITY;
      }
    }
}

// Scores of keys before a row's first become -inf; apart from the above for want of registers.
template <int ROW_TILES>
__device__ __forceinline__ void mask_scores_before(float (&scores)[ROW_TILES][KEY_TILES][4], int2 blocks, int row,
                                                   const Shape& shape) {
#pragma unroll
  for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      int hidden = shape.visible_begin<true>(row + 16 * m + 8 * r) - threadIdx.x % 4 * 2;
      asm volatile("" : "+r"(hidden));  // one row after the other
#pragma unroll
      for (int j = 0; j < KEY_TILES; ++j) {
        const int before = hidden - ((j < KEY_TILES / 2 ? blocks.x : blocks.y) * KEY_BLOCK + j % (KEY_TILES / 2) * 8);
        if (before > 0) scores[m][j][2 * r] = -INFINITY;
        if (before > 1) scores[m][j][2 * r + 1] = -INFINITY;
      }
    }
}

template <int HEAD_DIM, int BLOCK_Q, typename Element, int STAGES, int FEATURES = 0>
__global__ void __launch_bounds__(AttendRows<HEAD_DIM, BLOCK_Q, FEATURES>::THREADS,
                                  256 / AttendRows<HEAD_DIM, BLOCK_Q, FEATURES>::THREADS)
    attend_sm80(TensorView q, TensorView k, TensorView v, TensorView out, float* lse_gmem, const uint32_t* mask_gmem,
                int expand_log2, Shape shape, float softmax_scale, float softcap, float cap_factor,
                const float* sink_logits_gmem) {
  using Part = AttendRows<HEAD_DIM, BLOCK_Q, FEATURES>;
  using Storage = AttendSm80Storage<HEAD_DIM, Part::CTA_ROWS, STAGES>;
  static_assert(STAGES == 1 || STAGES == 2, "K and V have one or two stages");
  constexpr int CTA_ROWS = Part::CTA_ROWS, ROW_TILES = Part::ROW_TILES, WARP_ROWS = Part::WARP_ROWS;
  constexpr int THREADS = Part::THREADS;
  constexpr bool WINDOWED = FEATURES & WINDOW;
  constexpr int ROW_BYTES = PITCH<HEAD_DIM> * 2;
  constexpr int TILE_BYTES = ATTEND_TILE_K * ROW_BYTES;
  constexpr int DIM_STEPS = HEAD_DIM / 16;
  constexpr bool Q_IN_REGISTERS = HEAD_DIM <= 64;  // 128 would need 64 registers more than there are
  extern __shared__ __align__(128) uint8_t dynamic_smem[];
  Storage& smem = *reinterpret_cast<Storage*>(dynamic_smem);

  const int num_q_blocks = ceil_div(shape.seqlen_q, BLOCK_Q);
  const AttendWork work = locate_work<CTA_ROWS>(shape);
  const Shape sequence = shape.of_sequence(work.batch);
  if (Shape::HAS_LENGTHS && work.first_row >= sequence.seqlen_q) return;
  const uint32_t* mask_row = nullptr;
  if (mask_gmem != nullptr)
    mask_row = mask_gmem + (work.head_index(shape) * num_q_blocks + work.first_row / BLOCK_Q) *
                               ceil_div(ceil_div(shape.seqlen_k, KEY_BLOCK << expand_log2), 32);
  if (threadIdx.x == 0) {
#ifdef SEQUENCE_LENGTHS
    smem.sequence = sequence;
#endif
    smem.first_row = work.first_row;
    smem.k_gmem = k.row<const uint16_t>(work.batch, 0, work.head / shape.group_size());
    smem.v_gmem = v.row<const uint16_t>(work.batch, 0, work.head / shape.group_size());
    smem.visible_to_all = sequence.visible_end<WINDOWED>(work.first_row);
    if (WINDOWED) smem.visible_to_all_from = sequence.visible_begin<WINDOWED>(work.first_row + CTA_ROWS - 1);
  }
  BlockWalker<WINDOWED> walker(smem.selected, mask_row, expand_log2,
                               sequence.visible_begin<WINDOWED>(work.first_row) / KEY_BLOCK,
                               ceil_div(sequence.visible_end<WINDOWED>(work.first_row + CTA_ROWS - 1), KEY_BLOCK));

  // Where this lane points ldmatrix in a tile: 16 rows at two chunks of 8 dims, for Q, for K and, transposed, for V.
  // A later step's chunk is an XOR away.
  const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * WARP_ROWS;
  const uint32_t q_smem = shared_address(smem.Q_smem);
  const uint32_t k_smem = shared_address(smem.K_smem), v_smem = shared_address(smem.V_smem);
  uint32_t lane_offset = chunk_offset<HEAD_DIM>(lane % 16, lane / 16);
  const uint32_t q_warp = q_smem + warp_row * ROW_BYTES;
  const float value_scale = FEATURES & SOFTCAP ? softcap : softmax_scale;  // of a score that is held
  const float scale_log2 = value_scale * 1.4426950408889634f;

  float o[ROW_TILES][HEAD_DIM / 8][4];
#pragma unroll
  for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
    for (int n = 0; n < HEAD_DIM / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) o[m][n][i] = 0;
  OnlineSoftmax<ROW_TILES> softmax;

  load_rows<HEAD_DIM, THREADS, CTA_ROWS>(q_smem, q.row<const uint16_t>(work.batch, work.first_row, work.head),
                                         q.stride_row, shape.seqlen_q - work.first_row);
  int2 blocks = walker.next();
  if (blocks.x >= 0) {
    load_tile<HEAD_DIM, THREADS>(k_smem, smem.k_gmem, k.stride_row, blocks, shape.seqlen_k);
    if (STAGES == 2) load_tile<HEAD_DIM, THREADS>(v_smem, smem.v_gmem, v.stride_row, blocks, shape.seqlen_k);
  }
  cp_async_commit();

  uint32_t q_rmem[Q_IN_REGISTERS ? DIM_STEPS : 1][ROW_TILES][4];
  if (Q_IN_REGISTERS) {
    cp_async_wait<0>();
    __syncthreads();
#pragma unroll
    for (int step = 0; step < (Q_IN_REGISTERS ? DIM_STEPS : 1); ++step)
#pragma unroll
      for (int m = 0; m < ROW_TILES; ++m)
        ldmatrix_x4(q_rmem[step][m], q_warp + (lane_offset ^ step * 32) + m * 16 * ROW_BYTES);
  }

  uint32_t stage_bytes = 0;  // of the tile being multiplied
  while (blocks.x >= 0) {
    // This tile's K (and V, with two stages) is there, and every warp is done with the tile before.
    cp_async_wait<0>();
    __syncthreads();
    if (STAGES == 1) {
      load_tile<HEAD_DIM, THREADS>(v_smem, smem.v_gmem, v.stride_row, blocks, shape.seqlen_k);
      cp_async_commit();
    }
    const int2 next_blocks = walker.next();
    if (STAGES == 2 && next_blocks.x >= 0) {
      const uint32_t next_stage = stage_bytes ^ TILE_BYTES;
      load_tile<HEAD_DIM, THREADS>(k_smem + next_stage, smem.k_gmem, k.stride_row, next_blocks, shape.seqlen_k);
      load_tile<HEAD_DIM, THREADS>(v_smem + next_stage, smem.v_gmem, v.stride_row, next_blocks, shape.seqlen_k);
      cp_async_commit();
    }

    // Scores. The lanes' addresses are worked out anew in every tile: kept, they would cost registers and spills.
    asm volatile("" : "+r"(lane_offset));
    float s[ROW_TILES][KEY_TILES][4];
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
      for (int j = 0; j < KEY_TILES; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) s[m][j][i] = 0;
#pragma unroll
    for (int step = 0; step < DIM_STEPS; ++step) {
      uint32_t a[ROW_TILES][4];
#pragma unroll
      for (int m = 0; m < ROW_TILES; ++m) {
        if (Q_IN_REGISTERS) {
#pragma unroll
          for (int i = 0; i < 4; ++i) a[m][i] = q_rmem[Q_IN_REGISTERS ? step : 0][m][i];
        } else {
          ldmatrix_x4(a[m], q_warp + (lane_offset ^ step * 32) + m * 16 * ROW_BYTES);
        }
      }
#pragma unroll
      for (int j = 0; j < KEY_TILES; j += 2) {
        uint32_t b[4];
        ldmatrix_x4(b, k_smem + stage_bytes + (lane_offset ^ step * 32) + j * 8 * ROW_BYTES);
#pragma unroll
        for (int m = 0; m < ROW_TILES; ++m) {
          mma_m16n8k16<Element>(s[m][j], a[m], b[0], b[2]);
          mma_m16n8k16<Element>(s[m][j + 1], a[m], b[1], b[3]);
        }
      }
    }
    if (STAGES == 1) {
      // V is there, and every warp is done with K.
      cp_async_wait<0>();
      __syncthreads();
      if (next_blocks.x >= 0)
        load_tile<HEAD_DIM, THREADS>(k_smem, smem.k_gmem, k.stride_row, next_blocks, shape.seqlen_k);
      cp_async_commit();
    }

    if constexpr ((FEATURES & SOFTCAP) != 0) {
      const SoftCap cap = {cap_factor};
#pragma unroll
      for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
        for (int j = 0; j < KEY_TILES; ++j)
#pragma unroll
          for (int i = 0; i < 4; ++i) s[m][j][i] = cap(s[m][j][i]);
    }

    // Softmax. Blocks go down: x is the one that reaches farthest.
    if (WINDOWED && blocks.y * KEY_BLOCK < smem.visible_to_all_from)  // true of an absent one
      mask_scores_before(s, blocks, smem.first_row + warp_row + lane / 4, smem.shape_in_loop(shape));
    if (blocks.y < 0 || (blocks.x + 1) * KEY_BLOCK > smem.visible_to_all)
      mask_scores<WINDOWED>(s, blocks, smem.first_row + warp_row + lane / 4, smem.shape_in_loop(shape));
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m) {
      float rescale[2];
      const bool moved = softmax.update(m, s[m], scale_log2, rescale);
      if (__any_sync(~0u, moved)) {  // else they are all 1
#pragma unroll
        for (int n = 0; n < HEAD_DIM / 8; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) o[m][n][i] *= rescale[i / 2];
      }
    }

    asm volatile("" : "+r"(lane_offset));
    // Output. An accumulator of scores is, rounded, an A operand as it lies.
#pragma unroll
    for (int step = 0; step < ATTEND_TILE_K / 16; ++step) {
      uint32_t p[ROW_TILES][4];
#pragma unroll
      for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          p[m][i] = Element::pack(s[m][2 * step + i / 2][i % 2 * 2], s[m][2 * step + i / 2][i % 2 * 2 + 1]);
#pragma unroll
      for (int n = 0; n < HEAD_DIM / 8; n += 2) {
        uint32_t b[4];
        ldmatrix_x4_trans(b, v_smem + stage_bytes + (lane_offset ^ n * 16) + step * 16 * ROW_BYTES);
#pragma unroll
        for (int m = 0; m < ROW_TILES; ++m) {
          mma_m16n8k16<Element>(o[m][n], p[m], b[0], b[1]);
          mma_m16n8k16<Element>(o[m][n + 1], p[m], b[2], b[3]);
        }
      }
    }
    blocks = next_blocks;
    if (STAGES == 2) stage_bytes ^= TILE_BYTES;
  }

  // Normalise, through this warp's own rows of Q_smem. With no tile at all, Q may still be on its way there.
  cp_async_wait<0>();
  __syncthreads();
  const AttendWork done = locate_work<CTA_ROWS>(shape);
  const int num_rows = shape.of_sequence(done.batch).seqlen_q;
#pragma unroll
  for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum = softmax.total(m, r), top = softmax.max[m][r], factor = 1;
      if constexpr ((FEATURES & SINKS) != 0) {
        top *= value_scale;
        factor = add_sink(top, sum, sink_logits_gmem[done.head]);
      }
      const float inverse = sum == 0.f ? 0.f : factor / sum;
      const int row = warp_row + 16 * m + 8 * r + lane / 4;
#pragma unroll
      for (int n = 0; n < HEAD_DIM / 8; ++n)
        *reinterpret_cast<uint32_t*>(dynamic_smem + chunk_offset<HEAD_DIM>(row, n) + lane % 4 * 4) =
            Element::pack(o[m][n][2 * r] * inverse, o[m][n][2 * r + 1] * inverse);
      if (lse_gmem != nullptr && lane % 4 == 0 && done.first_row + row < num_rows)
        lse_gmem[done.head_index(shape) * shape.seqlen_q + done.first_row + row] =
            fmaf(top, FEATURES & SINKS ? 1.f : value_scale, sum == 0.f ? 0.f : logf(sum));
    }
  __syncwarp();
  constexpr int CHUNKS = PITCH<HEAD_DIM> / 8;
  uint16_t* out_gmem = out.row<uint16_t>(done.batch, done.first_row, done.head);
#pragma unroll
  for (int i = 0; i < WARP_ROWS; i += 32 / CHUNKS) {
    const int row = warp_row + i + lane / CHUNKS, chunk = lane % CHUNKS;
    if (HEAD_DIM != PITCH<HEAD_DIM> && chunk >= HEAD_DIM / 8) continue;
    const uint4 data = *reinterpret_cast<const uint4*>(dynamic_smem + chunk_offset<HEAD_DIM>(row, chunk));
    if (done.first_row + row < num_rows)
      *reinterpret_cast<uint4*>(out_gmem + row * out.stride_row + chunk * 8) = data;
  }
}
