// Which key blocks matter: low-bit scores of every visible pair, one bit a block, with mma.sync.
//
// bit(row block, key block) = any score > its threshold, or anchor; words [batch, num_heads, num_q_blocks, num_words].
// Codes are 128-row tiles in shared-memory order (salekit/codes.py). Int8: limits are integer thresholds, int32
// [batch, num_heads, padded_q]. Int4 and Int4InBytes: limits are scores, float32 of that shape; the scales of groups
// of rows [batch, num_heads, padded_q / 2] and keys [batch, num_kv_heads, padded_k / 8] turn them into integers, and
// corrections [batch, num_heads, padded_k] are added to the scores.
// Grid: ceil(seqlen_q / 128) * batch * num_heads CTAs of 128 threads, the rows that see most first; a warp has 32 rows.
#include "ptx/cp_async.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/mma.cuh"
#include "tile/mask_bits.cuh"
#include "tile/swizzle.cuh"
#include "tile/votes.cuh"

struct Int8 {
  static constexpr int BITS = 8;
  static constexpr bool GROUPED = false;
};
struct Int4 {
  static constexpr int BITS = 4;
  static constexpr bool GROUPED = true;
};
struct Int4InBytes {
  static constexpr int BITS = 8;
  static constexpr bool GROUPED = true;
};

constexpr int ESTIMATE_THREADS = 128;
constexpr int ESTIMATE_TILE_K = 64;
constexpr int ESTIMATE_BLOCKS = ESTIMATE_TILE_K / KEY_BLOCK;      // 32-key blocks of a tile
constexpr int ESTIMATE_TILES_PER_WORD = 32 / ESTIMATE_BLOCKS;

template <int ROW_BYTES, bool GROUPED>
struct EstimateStorage {
  static constexpr int STAGES = ROW_BYTES == 128 ? 3 : 4;  // three CTAs have to fit in the 100 KB of sm_86 and sm_89
  alignas(128) uint8_t K_smem[STAGES][ESTIMATE_TILE_K * ROW_BYTES];
  alignas(16) float correction_smem[STAGES][GROUPED ? ESTIMATE_TILE_K : 4];
  alignas(16) float k_scale_smem[STAGES][GROUPED ? ESTIMATE_TILE_K / 8 : 4];
  uint32_t votes[2][ESTIMATE_THREADS / 32];  // per warp, of the last finished word and of the one before
};

template <int BITS>
__device__ __forceinline__ void mma_codes(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (BITS == 8)
    mma_m16n8k32_s8(d, a, b0, b1);
  else
    mma_m16n8k64_s4(d, a, b0, b1);
}

template <int HEAD_DIM, typename Format, int BLOCK_Q>
__global__ void __launch_bounds__(ESTIMATE_THREADS, 3)
    estimate_sm80(const uint8_t* q_codes_gmem, const uint8_t* k_codes_gmem, const void* limits_gmem,
                  const float* q_scale_gmem, const float* k_scale_gmem, const float* correction_gmem,
                  uint32_t* words_gmem, Shape shape, float softmax_scale) {
  constexpr int ROW_BYTES = HEAD_DIM * Format::BITS / 8;
  constexpr int STEPS = ROW_BYTES / 32;  // products along head_dim: 32 bytes each, whatever the code's width
  constexpr int TILE_BYTES = ESTIMATE_TILE_K * ROW_BYTES;
  constexpr int M_TILES = 2;  // 16-row tiles of a warp
  static_assert(BLOCK_Q == 64 || BLOCK_Q == 128, "mask blocks are 64 or 128 query rows");
  using Storage = EstimateStorage<ROW_BYTES, Format::GROUPED>;
  constexpr int STAGES = Storage::STAGES;
  __shared__ Storage smem;

  // Which rows of which head.
  const int num_heads_all = shape.batch * shape.num_heads;
  const int num_code_tiles = ceil_div(shape.seqlen_q, CODE_TILE_ROWS);
  const int code_tile = num_code_tiles - 1 - blockIdx.x / num_heads_all;
  const int head = blockIdx.x % num_heads_all;  // of all batches
  const int kv_head = head / shape.num_heads * shape.num_kv_heads + head % shape.num_heads / shape.group_size();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_row = code_tile * CODE_TILE_ROWS + warp * 32;
  const int num_tiles = ceil_div(shape.visible_keys((code_tile + 1) * CODE_TILE_ROWS - 1), ESTIMATE_TILE_K);

  // Query fragments: lane l has rows l/4 and l/4 + 8, bytes 4*(l%4) and 4*(l%4) + 16 of each 32-byte step.
  uint32_t a[M_TILES][STEPS][4];
  const uint8_t* q_tile = q_codes_gmem + (int64_t(head) * num_code_tiles + code_tile) * (CODE_TILE_ROWS * ROW_BYTES);
#pragma unroll
  for (int m = 0; m < M_TILES; ++m)
#pragma unroll
    for (int step = 0; step < STEPS; ++step)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        int row = warp * 32 + m * 16 + lane / 4 + i % 2 * 8;
        int byte = step * 32 + i / 2 * 16 + lane % 4 * 4;
        a[m][step][i] = *reinterpret_cast<const uint32_t*>(q_tile + swizzle<ROW_BYTES>(row * ROW_BYTES + byte));
      }

  // Thresholds of the lane's rows.
  int thresholds[M_TILES][2];
  GroupVote group_vote[M_TILES];
#pragma unroll
  for (int m = 0; m < M_TILES; ++m) {
    const int64_t row = int64_t(head) * shape.padded_q() + warp_row + m * 16 + lane / 4;
    if constexpr (Format::GROUPED) {
      const float* limits = static_cast<const float*>(limits_gmem);
      group_vote[m].y[0] = limits[row];
      group_vote[m].y[1] = limits[row + 8];
      group_vote[m].q_scale =
          q_scale_gmem[int64_t(head) * (shape.padded_q() / 2) + (warp_row / 16 + m) * 8 + lane / 4];
      group_vote[m].scaled_q = __fmul_rn(softmax_scale, group_vote[m].q_scale);
    } else {
      const int* limits = static_cast<const int*>(limits_gmem);
      thresholds[m][0] = limits[row];
      thresholds[m][1] = limits[row + 8];
    }
  }

  // Copies key tile `tile` to its stage; always commits a group, so that groups count tiles.
  const uint8_t* k_tiles = k_codes_gmem + int64_t(kv_head) * shape.padded_k() * ROW_BYTES;
  auto load_tile = [&](int tile) {
    if (tile < num_tiles) {
      const int stage = tile % STAGES;
#pragma unroll
      for (int byte = threadIdx.x * 16; byte < TILE_BYTES; byte += ESTIMATE_THREADS * 16)
        cp_async_16(shared_address(smem.K_smem[stage]) + byte, k_tiles + int64_t(tile) * TILE_BYTES + byte);
      if constexpr (Format::GROUPED) {
        const int chunk = threadIdx.x;
        if (chunk < ESTIMATE_TILE_K / 4)
          cp_async_16(shared_address(smem.correction_smem[stage] + chunk * 4),
                      correction_gmem + int64_t(head) * shape.padded_k() + tile * ESTIMATE_TILE_K + chunk * 4);
        else if (chunk < ESTIMATE_TILE_K / 4 + ESTIMATE_TILE_K / 32)
          cp_async_16(shared_address(smem.k_scale_smem[stage] + (chunk - ESTIMATE_TILE_K / 4) * 4),
                      k_scale_gmem + int64_t(kv_head) * (shape.padded_k() / 8) + tile * (ESTIMATE_TILE_K / 8) +
                          (chunk - ESTIMATE_TILE_K / 4) * 4);
      }
    }
    cp_async_commit();
  };

  // Mask rows of this CTA: one of 128 rows, or two of 64.
  constexpr int MASK_ROWS = CODE_TILE_ROWS / BLOCK_Q;
  const int num_q_blocks = ceil_div(shape.seqlen_q, BLOCK_Q);
  const int num_words = shape.num_words();
  auto mask_row = [&](int i) {
    return words_gmem + (int64_t(head) * num_q_blocks + code_tile * MASK_ROWS + i) * num_words;
  };
  auto store_word = [&](int word) {
    const int i = threadIdx.x;
    if (i >= MASK_ROWS || code_tile * MASK_ROWS + i >= num_q_blocks) return;
    const uint32_t(&of_warp)[4] = smem.votes[word % 2];
    uint32_t votes = of_warp[2 * i] | of_warp[2 * i + 1];
    if constexpr (BLOCK_Q == 128) votes |= of_warp[2] | of_warp[3];
    mask_row(i)[word] = finish_word<BLOCK_Q>(shape, code_tile * MASK_ROWS + i, word, votes);
  };

  // Key fragments come by ldmatrix, 64 bytes of 8 keys at a time (32 bytes of 16 keys for 32-byte rows). Only the row's
  // position among 8 enters the swizzle, so that a lane's addresses differ by constants.
  constexpr int LOADS = KEY_BLOCK * ROW_BYTES / 512;
  constexpr int LOADS_PER_ROW = ROW_BYTES == 128 ? 2 : 1;
  constexpr int LOAD_ROWS = ROW_BYTES == 32 ? 16 : 8;
  uint32_t lane_byte[LOADS_PER_ROW];
#pragma unroll
  for (int part = 0; part < LOADS_PER_ROW; ++part) {
    if constexpr (ROW_BYTES == 32)
      lane_byte[part] = swizzle<ROW_BYTES>((lane / 16 * 8 + lane % 8) * ROW_BYTES + lane / 8 % 2 * 16);
    else
      lane_byte[part] = swizzle<ROW_BYTES>(lane % 8 * ROW_BYTES + (part * 4 + lane / 8) * 16);
  }

#pragma unroll
  for (int tile = 0; tile < STAGES - 1; ++tile) load_tile(tile);
  uint32_t votes = 0;  // of the lane's rows, in the current word
  for (int tile = 0; tile < num_tiles; ++tile) {
    cp_async_wait<STAGES - 2>();
    __syncthreads();
    if (tile % ESTIMATE_TILES_PER_WORD == 0 && tile != 0) store_word(tile / ESTIMATE_TILES_PER_WORD - 1);
    load_tile(tile + STAGES - 1);

    const int stage = tile % STAGES;
#pragma unroll
    for (int block = 0; block < ESTIMATE_BLOCKS; ++block) {
      // Load.
      uint32_t b[LOADS][4];
      const uint32_t block_address = shared_address(smem.K_smem[stage]) + block * KEY_BLOCK * ROW_BYTES;
#pragma unroll
      for (int i = 0; i < LOADS; ++i)
        ldmatrix_x4(b[i], block_address + lane_byte[i % LOADS_PER_ROW] + i / LOADS_PER_ROW * LOAD_ROWS * ROW_BYTES);

      // Multiply: e[m][4n + ..] is the 16 x 8 product of row tile m and keys 8n ..
      int e[M_TILES][16] = {};
#pragma unroll
      for (int step = 0; step < STEPS; ++step)
#pragma unroll
        for (int n = 0; n < 4; ++n)
#pragma unroll
          for (int m = 0; m < M_TILES; ++m) {
            constexpr int WORDS = 2 * STEPS;
            const int at = n * WORDS + step * 2;
            mma_codes<Format::BITS>(reinterpret_cast<int(&)[4]>(e[m][4 * n]), a[m][step], b[at / 4][at % 4],
                                    b[at / 4][at % 4 + 1]);
          }

      // Decide.
      const int num_present = shape.seqlen_k - (tile * ESTIMATE_TILE_K + block * KEY_BLOCK);
      bool vote = false;
      if constexpr (Format::GROUPED) {
        float corrections[8];
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          float2 pair = *reinterpret_cast<const float2*>(
              &smem.correction_smem[stage][block * KEY_BLOCK + n * 8 + lane % 4 * 2]);
          corrections[2 * n] = pair.x;
          corrections[2 * n + 1] = pair.y;
        }
        const float k_scale = smem.k_scale_smem[stage][block * 4 + lane % 4];
#pragma unroll
        for (int m = 0; m < M_TILES; ++m) vote |= group_vote[m](e[m], corrections, k_scale, num_present);
      } else if (num_present >= KEY_BLOCK) {
#pragma unroll
        for (int m = 0; m < M_TILES; ++m)
#pragma unroll
          for (int r = 0; r < 2; ++r) vote |= row_max(e[m], r) > thresholds[m][r];
      } else {  // absent keys have score 0 and must not vote
#pragma unroll
        for (int m = 0; m < M_TILES; ++m)
#pragma unroll
          for (int r = 0; r < 2; ++r) vote |= row_max_present(e[m], r, num_present) > thresholds[m][r];
      }
      votes |= uint32_t(vote) << (tile % ESTIMATE_TILES_PER_WORD * ESTIMATE_BLOCKS + block);
    }

    if (tile % ESTIMATE_TILES_PER_WORD == ESTIMATE_TILES_PER_WORD - 1 || tile == num_tiles - 1) {
      votes = __reduce_or_sync(~0u, votes);
      if (lane == 0) smem.votes[tile / ESTIMATE_TILES_PER_WORD % 2][warp] = votes;
      votes = 0;
    }
  }
  __syncthreads();
  const int words_done = ceil_div(num_tiles, ESTIMATE_TILES_PER_WORD);
  if (words_done != 0) store_word(words_done - 1);

  // Nothing is visible beyond.
#pragma unroll
  for (int i = 0; i < MASK_ROWS; ++i)
    if (code_tile * MASK_ROWS + i < num_q_blocks)
      for (int word = words_done + threadIdx.x; word < num_words; word += ESTIMATE_THREADS) mask_row(i)[word] = 0;
}
