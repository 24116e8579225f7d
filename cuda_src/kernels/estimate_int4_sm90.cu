// Which key blocks matter, on Hopper: int4 scores of every visible pair with scales of groups, with wgmma on bytes.
//
// bit(row block, key block) = any score + correction > its threshold, or anchor; words, of 32-key blocks,
// [batch, num_heads, num_q_blocks, num_words]. q_codes, k_codes: 128-row tiles in shared-memory order, a code a byte
// (salekit/codes.py); limits: float32 scores [batch, num_heads, padded_q]; scales of groups of rows [batch, num_heads,
// padded_q / 2] and of keys [batch, num_kv_heads, padded_k / 8]; corrections [batch, num_heads, padded_k]; bounds: what
// prepare_int4_bounds made of the keys' scales and corrections.
// The structure is estimate_int8_sm90's. Bounds (tile/group_bounds.cuh) decide; the blocks that they leave open, a few
// in a thousand, are decided again one by one, exactly.
// Grid: ceil(seqlen_q / 256) * batch * num_heads CTAs of 384 threads, the rows that see most first.
#include "ptx/bar_sync.cuh"
#include "ptx/bulk_copy.cuh"
#include "ptx/ld_shared.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/setmaxnreg.cuh"
#include "ptx/wgmma.cuh"
#include "tile/aligned_storage.cuh"
#include "tile/group_bounds.cuh"
#include "tile/mask_bits.cuh"

constexpr int ESTIMATE_BLOCK_Q = 256;
constexpr int ESTIMATE_STAGES = 6;
constexpr int ESTIMATE_CONSUMERS = 2;       // warpgroups
constexpr int ESTIMATE_TILES_PER_WORD = 8;  // 128-key tiles of a mask word
constexpr int ESTIMATE_VOTE_WORDS = 32;     // words between two stores
constexpr int ESTIMATE_BLOCKS = 4;          // 32-key blocks of a tile

template <int HEAD_DIM>
struct EstimateInt4Storage {
  alignas(1024) uint8_t Q_smem[ESTIMATE_CONSUMERS][CODE_TILE_ROWS * HEAD_DIM];
  alignas(1024) uint8_t K_smem[ESTIMATE_STAGES][CODE_TILE_ROWS * HEAD_DIM];
  alignas(16) KeyBounds bounds[ESTIMATE_STAGES];
  uint32_t votes[ESTIMATE_CONSUMERS][2][4][ESTIMATE_VOTE_WORDS];  // [warpgroup][64-row half][warp][word]
  alignas(8) uint64_t full[ESTIMATE_STAGES], empty[ESTIMATE_STAGES], q_full;
  uint8_t alignment_slack[1024];
};

// Scores of 64 rows and 128 keys.
template <int HEAD_DIM>
__device__ __forceinline__ void multiply(int (&d)[64], uint64_t q_desc, uint64_t k_desc) {
#pragma unroll
  for (int step = 0; step < HEAD_DIM / 32; ++step)
    wgmma_m64n128k32_s8(d, q_desc + step * 2, k_desc + step * 2, step != 0);
}

// What the lane's key group needs of a tile's KeyBounds.
constexpr uint32_t RECIPROCALS_BYTE = sizeof(KeyBounds::corrections);  // where they lie in KeyBounds

struct TileKeys {
  float corrections[ESTIMATE_BLOCKS][8], reciprocals[ESTIMATE_BLOCKS], largest_correction, largest_reciprocal;
};

__device__ __forceinline__ void load_block(float (&corrections)[8], uint32_t bounds, int block) {
  const uint32_t address = bounds + block * sizeof(KeyBounds::corrections[0]) + threadIdx.x % 4 * 32;
  const float4 low = ld_shared_f32x4(address), high = ld_shared_f32x4(address + 16);
  corrections[0] = low.x, corrections[1] = low.y, corrections[2] = low.z, corrections[3] = low.w;
  corrections[4] = high.x, corrections[5] = high.y, corrections[6] = high.z, corrections[7] = high.w;
}

__device__ __forceinline__ void load_tile(TileKeys& keys, uint32_t bounds) {
#pragma unroll
  for (int block = 0; block < ESTIMATE_BLOCKS; ++block) load_block(keys.corrections[block], bounds, block);
  const float4 reciprocals = ld_shared_f32x4(bounds + RECIPROCALS_BYTE + threadIdx.x % 4 * 16);
  keys.reciprocals[0] = reciprocals.x, keys.reciprocals[1] = reciprocals.y;
  keys.reciprocals[2] = reciprocals.z, keys.reciprocals[3] = reciprocals.w;
  const float4 largest = ld_shared_f32x4(bounds + RECIPROCALS_BYTE + sizeof(KeyBounds::reciprocals));
  keys.largest_correction = largest.x, keys.largest_reciprocal = largest.y;
}

// The warp's votes, each shifted left by its block of the tile.
__device__ __forceinline__ uint32_t tile_votes(const int (&d)[64], const TileKeys& keys, const RowBounds& rows) {
  uint32_t votes = 0;
#pragma unroll
  for (int block = 0; block < ESTIMATE_BLOCKS; ++block)
    votes |= bounded_vote(d + 16 * block, keys.corrections[block], keys.reciprocals[block], rows) << block;
  const bool hold = rows.hold(keys.largest_correction, keys.largest_reciprocal);
  return __reduce_or_sync(~0u, hold ? votes : 15 * POSSIBLE_VOTE);
}

template <int HEAD_DIM, int BLOCK_Q>
__global__ void __launch_bounds__(128 * (ESTIMATE_CONSUMERS + 1), 1)
    estimate_int4_sm90(const uint8_t* q_codes_gmem, const uint8_t* k_codes_gmem, const float* limits_gmem,
                       const float* q_scale_gmem, const float* k_scale_gmem, const float* correction_gmem,
                       const KeyBounds* bounds_gmem, uint32_t* words_gmem, Shape shape, float softmax_scale) {
  static_assert(HEAD_DIM == 64 || HEAD_DIM == 128, "code rows are one 64- or 128-byte swizzled row");
  static_assert(BLOCK_Q == 64 || BLOCK_Q == 128, "mask blocks are 64 or 128 query rows");
  using Storage = EstimateInt4Storage<HEAD_DIM>;
  constexpr uint32_t TILE_BYTES = CODE_TILE_ROWS * HEAD_DIM;
  extern __shared__ uint8_t dynamic_smem[];
  Storage& smem = aligned_storage<Storage>(dynamic_smem);

  // Which rows of which head.
  const int num_heads_all = shape.batch * shape.num_heads;
  const int q_index = ceil_div(shape.seqlen_q, ESTIMATE_BLOCK_Q) - 1 - blockIdx.x / num_heads_all;
  const int head = blockIdx.x % num_heads_all;  // of all batches
  const int kv_head = head / shape.num_heads * shape.num_kv_heads + head % shape.num_heads / shape.group_size();
  const int num_code_tiles = ceil_div(shape.seqlen_q, CODE_TILE_ROWS);
  const int first_code_tile = q_index * ESTIMATE_CONSUMERS;
  const Shape sequence = shape.of_sequence(head / shape.num_heads);
  if (Shape::HAS_LENGTHS && q_index * ESTIMATE_BLOCK_Q >= sequence.seqlen_q) return;
  const int num_tiles = ceil_div(sequence.visible_keys((q_index + 1) * ESTIMATE_BLOCK_Q - 1), CODE_TILE_ROWS);

  if (threadIdx.x == 0) {
    for (int stage = 0; stage < ESTIMATE_STAGES; ++stage) {
      mbarrier_init(&smem.full[stage], 1);
      mbarrier_init(&smem.empty[stage], 128 * ESTIMATE_CONSUMERS);  // each lane, for what it has read
    }
    mbarrier_init(&smem.q_full, 1);
    mbarrier_init_fence();
  }
  __syncthreads();

  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);  // uniform: so are the descriptors
  if (warpgroup == ESTIMATE_CONSUMERS) {
    setmaxnreg_dec<24>();
    if (threadIdx.x % 128 == 0 && num_tiles != 0) {
      // The last CTA's second code tile may be absent: its rows then have no threshold and its scores do not count.
      const uint32_t q_bytes = min(ESTIMATE_CONSUMERS, num_code_tiles - first_code_tile) * TILE_BYTES;
      mbarrier_arrive_expect_tx(&smem.q_full, q_bytes);
      const uint8_t* q_tiles = q_codes_gmem + (int64_t(head) * num_code_tiles + first_code_tile) * TILE_BYTES;
      bulk_copy(shared_address(smem.Q_smem), q_tiles, q_bytes, shared_address(&smem.q_full));
      const uint8_t* k_tiles = k_codes_gmem + int64_t(kv_head) * shape.padded_k() * HEAD_DIM;
      const KeyBounds* bounds = bounds_gmem + int64_t(head) * (shape.padded_k() / CODE_TILE_ROWS);
      int stage = 0;
      uint32_t parity = 1;
      for (int tile = 0; tile < num_tiles; ++tile) {
        mbarrier_wait(&smem.empty[stage], parity);
        mbarrier_arrive_expect_tx(&smem.full[stage], TILE_BYTES + sizeof(KeyBounds));
        bulk_copy(shared_address(smem.K_smem[stage]), k_tiles + int64_t(tile) * TILE_BYTES, TILE_BYTES,
                  shared_address(&smem.full[stage]));
        bulk_copy(shared_address(&smem.bounds[stage]), bounds + tile, sizeof(KeyBounds),
                  shared_address(&smem.full[stage]));
        if (++stage == ESTIMATE_STAGES) stage = 0, parity ^= 1;
      }
    }
  } else {
    setmaxnreg_inc<240>();
    const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
    const int code_tile = first_code_tile + warpgroup;

    const int lane_row = code_tile * CODE_TILE_ROWS + warp * 16 + lane / 4;  // of the upper half
    auto group_vote_of = [&](int half) {
      GroupVote vote;
      const int row = lane_row + half * 64;
      const int64_t at = int64_t(head) * shape.padded_q() + row;
      const bool present = row < sequence.seqlen_q;
      vote.q_scale =
          present ? q_scale_gmem[int64_t(head) * (shape.padded_q() / 2) + row / 16 * 8 + row % 8] : 1.f;
      vote.scaled_q = __fmul_rn(softmax_scale, vote.q_scale);
      vote.y[0] = present ? limits_gmem[at] : INFINITY;
      vote.y[1] = row + 8 < sequence.seqlen_q ? limits_gmem[at + 8] : INFINITY;
      return vote;
    };
    const RowBounds upper_rows(group_vote_of(0)), lower_rows(group_vote_of(1));

    // Mask rows of this warpgroup: one of 128 rows, or two of 64.
    constexpr int MASK_ROWS = CODE_TILE_ROWS / BLOCK_Q;
    const int num_q_blocks = ceil_div(shape.seqlen_q, BLOCK_Q);
    const int num_words = shape.num_words();
    auto mask_row = [&](int i) {
      return words_gmem + (int64_t(head) * num_q_blocks + code_tile * MASK_ROWS + i) * num_words;
    };
    // Stores words [begin, end), which all warps of the warpgroup have finished.
    auto store_words = [&](int begin, int end) {
      const int i = thread / ESTIMATE_VOTE_WORDS, word = begin + thread % ESTIMATE_VOTE_WORDS;
      if (i >= MASK_ROWS || code_tile * MASK_ROWS + i >= num_q_blocks || word >= end) return;
      uint32_t votes = 0;
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        if constexpr (BLOCK_Q == 128)
          votes |= smem.votes[warpgroup][0][w][word - begin] | smem.votes[warpgroup][1][w][word - begin];
        else
          votes |= smem.votes[warpgroup][i][w][word - begin];
      }
      mask_row(i)[word] = finish_word<BLOCK_Q>(sequence, code_tile * MASK_ROWS + i, word, votes);
    };

    const uint64_t q_desc = wgmma_descriptor<HEAD_DIM>(shared_address(smem.Q_smem[warpgroup]));
    const uint64_t k_desc_0 = wgmma_descriptor<HEAD_DIM>(shared_address(smem.K_smem[0]));
    constexpr uint64_t HALF = TILE_BYTES / 2 / 16;  // 64 rows further, in a descriptor's units
    if (num_tiles != 0) mbarrier_wait(&smem.q_full, 0);
    uint32_t votes[2] = {0, 0};  // of the warp's rows, in the current word
    int stage = 0;
    uint32_t parity = 0;
    for (int tile = 0; tile < num_tiles; ++tile) {
      const uint64_t k_desc = k_desc_0 + stage * uint64_t(TILE_BYTES / 16);
      const int shift = tile % ESTIMATE_TILES_PER_WORD * 4;
      mbarrier_wait(&smem.full[stage], parity);

      // Multiply. No product may be in flight at the loop's end: ptxas would serialise all of them.
      int upper[64], lower[64];
      wgmma_fence();
      multiply<HEAD_DIM>(upper, q_desc, k_desc);
      wgmma_commit();
      multiply<HEAD_DIM>(lower, q_desc + HALF, k_desc);
      wgmma_commit();

      // Decide: the warp's votes of both halves, the lower one's shifted by the blocks of a tile.
      const uint32_t bounds = shared_address(&smem.bounds[stage]);
      TileKeys keys;
      load_tile(keys, bounds);
      wgmma_wait<1>();
      touch(upper);
      uint32_t found = tile_votes(upper, keys, upper_rows);
      wgmma_wait<0>();
      touch(lower);
      found |= tile_votes(lower, keys, lower_rows) << ESTIMATE_BLOCKS;
      uint32_t certain = found & 0xFF, open = found / POSSIBLE_VOTE & ~certain;
      if constexpr (BLOCK_Q == 128) open &= ~(certain >> ESTIMATE_BLOCKS | certain << ESTIMATE_BLOCKS);

      // Decide what is open, block by block; the warp's lanes go together.
      while (open != 0) {
        const int index = __ffs(open) - 1, half = index / ESTIMATE_BLOCKS, block = index % ESTIMATE_BLOCKS;
        open &= open - 1;
        int e[16];
#pragma unroll
        for (int i = 0; i < 2 * ESTIMATE_BLOCKS; ++i)
          if (index == i)
#pragma unroll
            for (int score = 0; score < 16; ++score)
              e[score] = (i < ESTIMATE_BLOCKS ? upper : lower)[i % ESTIMATE_BLOCKS * 16 + score];
        float corrections[8];
        load_block(corrections, bounds, block);
        const RowBounds rows(half == 0, upper_rows, lower_rows);
        const float reciprocal =
            ld_shared_f32(bounds + RECIPROCALS_BYTE + (lane % 4 * ESTIMATE_BLOCKS + block) * sizeof(float));
        bool vote = rows.hold(keys.largest_correction, keys.largest_reciprocal) &&
                    certain_vote(e, corrections, reciprocal, rows);
        if (!__any_sync(~0u, vote)) {
          const int first_key = tile * CODE_TILE_ROWS + block * KEY_BLOCK;
          const float* c = correction_gmem + int64_t(head) * shape.padded_k() + first_key + lane % 4 * 2;
#pragma unroll
          for (int column = 0; column < 8; ++column) corrections[column] = c[column / 2 * 8 + column % 2];
          const float k_scale =
              k_scale_gmem[int64_t(kv_head) * (shape.padded_k() / 8) + first_key / 8 + lane % 4];
          vote = group_vote_of(half)(e, corrections, k_scale, sequence.seqlen_k - first_key);
        }
        if (__any_sync(~0u, vote)) certain |= 1u << index;
      }
      mbarrier_arrive(&smem.empty[stage]);
      if (++stage == ESTIMATE_STAGES) stage = 0, parity ^= 1;
      votes[0] |= (certain & 15) << shift;
      votes[1] |= (certain >> ESTIMATE_BLOCKS) << shift;

      // Store.
      if (tile % ESTIMATE_TILES_PER_WORD == ESTIMATE_TILES_PER_WORD - 1 || tile == num_tiles - 1) {
        const int word = tile / ESTIMATE_TILES_PER_WORD;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (lane == 0) smem.votes[warpgroup][half][warp][word % ESTIMATE_VOTE_WORDS] = votes[half];
          votes[half] = 0;
        }
        if (word % ESTIMATE_VOTE_WORDS == ESTIMATE_VOTE_WORDS - 1 || tile == num_tiles - 1) {
          bar_sync(1 + warpgroup, 128);
          store_words(word / ESTIMATE_VOTE_WORDS * ESTIMATE_VOTE_WORDS, word + 1);
          bar_sync(1 + warpgroup, 128);  // before the buffer is used again
        }
      }
    }

    // Nothing is visible beyond.
    const int words_done = ceil_div(num_tiles, ESTIMATE_TILES_PER_WORD);
#pragma unroll
    for (int i = 0; i < MASK_ROWS; ++i)
      if (code_tile * MASK_ROWS + i < num_q_blocks)
        for (int word = words_done + thread; word < num_words; word += 128) mask_row(i)[word] = 0;
  }
}
