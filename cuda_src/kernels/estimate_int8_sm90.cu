// Which key blocks matter, on Hopper: int8 scores of the tested rows, one bit a block, with wgmma.
//
// bit(row block, key block) = any score > its row's threshold, or anchor; words, of 32-key blocks,
// [batch, num_heads, num_q_blocks, num_words]. k_codes: 128-row tiles in shared-memory order (salekit/codes.py),
// q_codes too; or SPARSE: q pruned 2:4, in the order of registers, for the sparse tensor cores. limits: int32 [batch,
// num_heads, positions]. What is tested where: tile/row_map.cuh.
// Two consumer warpgroups have 128 positions each, as two products of 64 rows that cover for each other's decisions; a
// thread of a third warpgroup copies key tiles through a ring of six stages (four where rows of codes are 256 bytes).
// Grid: ceil(positions / 256) * batch * num_heads CTAs of 384 threads, the rows that see most first.
#include "ptx/bar_sync.cuh"
#include "ptx/bulk_copy.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/setmaxnreg.cuh"
#include "ptx/wgmma.cuh"
#include "ptx/wgmma_sp.cuh"
#include "tile/aligned_storage.cuh"
#include "tile/mask_bits.cuh"
#include "tile/row_map.cuh"
#include "tile/votes.cuh"

constexpr int ESTIMATE_BLOCK_Q = 256;
constexpr int ESTIMATE_CONSUMERS = 2;       // warpgroups
constexpr int ESTIMATE_TILES_PER_WORD = 8;  // 128-key tiles of a mask word
constexpr int ESTIMATE_VOTE_WORDS = 32;     // words between two stores

// Tiles of pruned rows in straight code; with 256 dims, whose rows take 40 registers, 16 would spill.
template <int HEAD_DIM>
constexpr int ESTIMATE_RUN = HEAD_DIM == 256 ? 8 : 16;

template <int HEAD_DIM>
struct EstimateInt8Storage {
  static constexpr int ROW_BYTES = padded_dim(HEAD_DIM), TILE_BYTES = CODE_TILE_ROWS * ROW_BYTES;
  static constexpr int STAGES = ROW_BYTES == 256 ? 4 : 6;
  alignas(1024) uint8_t Q_smem[ESTIMATE_CONSUMERS][TILE_BYTES];
  alignas(1024) uint8_t K_smem[STAGES][TILE_BYTES];
  uint32_t votes[ESTIMATE_CONSUMERS][2][4][ESTIMATE_VOTE_WORDS];  // [warpgroup][64-row half][warp][word]
  alignas(8) uint64_t full[STAGES], empty[STAGES], q_full;
  uint8_t alignment_slack[1024];
};

// Scores of 64 rows and 128 keys.
template <int HEAD_DIM>
__device__ __forceinline__ void multiply(int (&d)[64], uint64_t q_desc, uint64_t k_desc) {
#pragma unroll
  for (int step = 0; step < HEAD_DIM / 32; ++step)
    wgmma_m64n128k32_s8(d, q_desc + wgmma_step(step), k_desc + wgmma_step(step), step != 0);
}

// Rows pruned 2:4, in registers: a warpgroup's 64 rows, 64 dims a step.
template <int HEAD_DIM>
struct SparseRows {
  static constexpr int STEPS = ceil_div(HEAD_DIM, 64);
  uint32_t codes[STEPS][4], metadata[STEPS];

  // words: null: no rows.
  __device__ __forceinline__ void load(const uint32_t* words, int thread) {
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
#pragma unroll
      for (int i = 0; i < 4; ++i) codes[step][i] = words == nullptr ? 0 : words[(step * 5 + i) * 128 + thread];
      metadata[step] = words == nullptr ? 0x44444444u : words[(step * 5 + 4) * 128 + thread];
    }
  }
};

template <int HEAD_DIM>
__device__ __forceinline__ void multiply(int (&d)[64], const SparseRows<HEAD_DIM>& q, uint64_t k_desc) {
#pragma unroll
  for (int step = 0; step < SparseRows<HEAD_DIM>::STEPS; ++step)
    wgmma_sp_m64n128k64_s8(d, q.codes[step], q.metadata[step], k_desc + wgmma_step(2 * step), step != 0);
}

// Bit b: a score of the lane's two rows in the tile's block b passes its threshold.
__device__ __forceinline__ uint32_t tile_votes(const int (&d)[64], const int (&thresholds)[2]) {
  uint32_t bits = 0;
#pragma unroll
  for (int block = 0; block < 4; ++block) {
    // Both maxima before the test: a short-circuit would branch eight times a tile.
    const int tops[2] = {row_max(d + 16 * block, 0), row_max(d + 16 * block, 1)};
    if (tops[0] > thresholds[0] || tops[1] > thresholds[1]) bits |= 1u << block;
  }
  return bits;
}

// The same for a tile with absent keys, whose scores are 0 and must not vote.
__device__ __forceinline__ uint32_t tile_votes_present(const int (&d)[64], const int (&thresholds)[2],
                                                       int num_present) {
  uint32_t bits = 0;
#pragma unroll
  for (int block = 0; block < 4; ++block)
#pragma unroll
    for (int r = 0; r < 2; ++r)
      if (row_max_present(d + 16 * block, r, num_present - block * KEY_BLOCK) > thresholds[r]) bits |= 1u << block;
  return bits;
}

// What a lane of a consumer warpgroup holds: q, the thresholds of its rows, its place in the ring, its votes so far.
template <int HEAD_DIM, bool SPARSE>
struct Voter {
  using Storage = EstimateInt8Storage<HEAD_DIM>;
  Storage& smem;
  int thresholds[2][2];        // [half][row]
  uint64_t q_desc, k_desc;     // of the first stage
  SparseRows<HEAD_DIM> q[2];   // of each half
  int stage = 0;
  uint32_t parity = 0;
  uint32_t votes[2] = {0, 0};  // of each half's rows, in the current word

  // Starts the product of one half's rows and the key tile of the current stage.
  __device__ __forceinline__ void start(int (&d)[64], int half) const {
    constexpr uint64_t HALF = Storage::TILE_BYTES / 2 / 16;  // 64 rows further, in a descriptor's units
    const uint64_t k = k_desc + stage * uint64_t(Storage::TILE_BYTES / 16);
    wgmma_fence();
    if constexpr (SPARSE)
      multiply(d, q[half], k);
    else
      multiply<HEAD_DIM>(d, q_desc + half * HALF, k);
    wgmma_commit();
  }

  // Scores and votes of the next NUM key tiles. A half's votes are taken while the other half's product runs, from tile
  // to tile; but none may be in flight at a loop's end, where ptxas would serialise all of them.
  // num_present: keys of a single tile that are not absent.
  template <int NUM>
  __device__ __forceinline__ void estimate(int tile, int num_present = CODE_TILE_ROWS) {
    int upper[64], lower[64];
    mbarrier_wait(&smem.full[stage], parity);
    start(upper, 0);
    start(lower, 1);
#pragma unroll
    for (int i = 0; i < NUM; ++i) {
      const bool has_next = i + 1 < NUM;
      const int shift = (tile + i) % ESTIMATE_TILES_PER_WORD * 4;
      const int done = stage;
      if (++stage == Storage::STAGES) stage = 0, parity ^= 1;
      if (has_next) mbarrier_wait(&smem.full[stage], parity);
      wgmma_wait<1>();
      touch(upper);
      votes[0] |= of_tile<NUM>(upper, 0, num_present) << shift;
      if (has_next) {
        start(upper, 0);
        wgmma_wait<1>();
      } else {
        wgmma_wait<0>();
      }
      touch(lower);
      if (threadIdx.x % 32 == 0) mbarrier_arrive(&smem.empty[done]);
      votes[1] |= of_tile<NUM>(lower, 1, num_present) << shift;
      if (has_next) start(lower, 1);
      if (has_next && i % ESTIMATE_TILES_PER_WORD == ESTIMATE_TILES_PER_WORD - 1)
        keep_word((tile + i) / ESTIMATE_TILES_PER_WORD);
    }
  }

  // The current word's votes of this warp's rows go to shared memory.
  __device__ __forceinline__ void keep_word(int word) {
    const int warp = threadIdx.x / 32;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t of_warp = __reduce_or_sync(~0u, votes[half]);
      if (threadIdx.x % 32 == 0) smem.votes[warp / 4][half][warp % 4][word % ESTIMATE_VOTE_WORDS] = of_warp;
      votes[half] = 0;
    }
  }

 private:
  template <int NUM>
  __device__ __forceinline__ uint32_t of_tile(const int (&d)[64], int half, int num_present) const {
    if (NUM == 1 && num_present < CODE_TILE_ROWS) return tile_votes_present(d, thresholds[half], num_present);
    return tile_votes(d, thresholds[half]);
  }
};

template <int HEAD_DIM, int BLOCK_Q, bool SPARSE>
__global__ void __launch_bounds__(128 * (ESTIMATE_CONSUMERS + 1), 1)
    estimate_int8_sm90(const uint8_t* q_codes_gmem, const uint8_t* k_codes_gmem, const int* limits_gmem,
                       uint32_t* words_gmem, Shape shape, RowMap map) {
  static_assert(BLOCK_Q == 64 || BLOCK_Q == 128, "mask blocks are 64 or 128 query rows");
  using Storage = EstimateInt8Storage<HEAD_DIM>;
  constexpr uint32_t TILE_BYTES = Storage::TILE_BYTES;
  extern __shared__ uint8_t dynamic_smem[];
  Storage& smem = aligned_storage<Storage>(dynamic_smem);

  // Which rows of which head.
  const int num_heads_all = shape.batch * shape.num_heads;
  const int num_code_tiles = map.num_positions / CODE_TILE_ROWS;
  const int q_index = ceil_div(num_code_tiles, ESTIMATE_CONSUMERS) - 1 - blockIdx.x / num_heads_all;
  const int head = blockIdx.x % num_heads_all;  // of all batches
  const int kv_head = head / shape.num_heads * shape.num_kv_heads + head % shape.num_heads / shape.group_size();
  const int first_code_tile = q_index * ESTIMATE_CONSUMERS;
  const int rows_end = map.tile_end((first_code_tile + ESTIMATE_CONSUMERS - 1) * CODE_TILE_ROWS);
  const Shape sequence = shape.of_sequence(head / shape.num_heads);
  if (Shape::HAS_LENGTHS && map.tile_begin(first_code_tile * CODE_TILE_ROWS) >= sequence.seqlen_q) return;
  const int num_tiles = ceil_div(sequence.visible_keys(rows_end - 1), CODE_TILE_ROWS);

  if (threadIdx.x == 0) {
    for (int stage = 0; stage < Storage::STAGES; ++stage) {
      mbarrier_init(&smem.full[stage], 1);
      mbarrier_init(&smem.empty[stage], 4 * ESTIMATE_CONSUMERS);  // every consumer warp
    }
    mbarrier_init(&smem.q_full, 1);
    mbarrier_init_fence();
  }
  __syncthreads();

  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);  // known to be uniform: so are the descriptors
  if (warpgroup == ESTIMATE_CONSUMERS) {
    setmaxnreg_dec<24>();
    if (threadIdx.x % 128 == 0 && num_tiles != 0) {
      if constexpr (!SPARSE) {
        // The last CTA's second code tile may be absent: its rows then have no threshold and its scores do not count.
        const uint32_t q_bytes = min(ESTIMATE_CONSUMERS, num_code_tiles - first_code_tile) * TILE_BYTES;
        mbarrier_arrive_expect_tx(&smem.q_full, q_bytes);
        const uint8_t* q_tiles = q_codes_gmem + (int64_t(head) * num_code_tiles + first_code_tile) * TILE_BYTES;
        bulk_copy(shared_address(smem.Q_smem), q_tiles, q_bytes, shared_address(&smem.q_full));
      }
      const uint8_t* k_tiles = k_codes_gmem + int64_t(kv_head) * shape.padded_k() * Storage::ROW_BYTES;
      int stage = 0;
      uint32_t parity = 1;
      for (int tile = 0; tile < num_tiles; ++tile) {
        mbarrier_wait(&smem.empty[stage], parity);
        mbarrier_arrive_expect_tx(&smem.full[stage], TILE_BYTES);
        bulk_copy(shared_address(smem.K_smem[stage]), k_tiles + int64_t(tile) * TILE_BYTES, TILE_BYTES,
                  shared_address(&smem.full[stage]));
        if (++stage == Storage::STAGES) stage = 0, parity ^= 1;
      }
    }
  } else {
    setmaxnreg_inc<240>();
    const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
    const int code_tile = first_code_tile + warpgroup;

    Voter<HEAD_DIM, SPARSE> voter{smem};
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int position = code_tile * CODE_TILE_ROWS + half * 64 + warp * 16 + r * 8 + lane / 4;
        voter.thresholds[half][r] = position < map.num_positions
                                  ? limits_gmem[int64_t(head) * map.num_positions + position] : SELECT_NONE;
      }

    // Mask rows of this warpgroup: 1 to 8, each the votes of 16 positions or a multiple.
    const int first_position = code_tile * CODE_TILE_ROWS;
    const bool strided = map.is_strided(first_position);
    const int parts = (strided ? BLOCK_Q / map.stride : BLOCK_Q) / 16;
    const int num_q_blocks = ceil_div(shape.seqlen_q, BLOCK_Q);
    const int first_mask_row = map.tile_begin(first_position) / BLOCK_Q;
    const int mask_rows_end = strided ? min(map.first_full_row / BLOCK_Q, num_q_blocks) : num_q_blocks;
    const int num_mask_rows = min(8 / parts, mask_rows_end - first_mask_row);
    const int num_words = shape.num_words();
    auto mask_row = [&](int i) {
      return words_gmem + (int64_t(head) * num_q_blocks + first_mask_row + i) * num_words;
    };
    // Stores words [begin, end), which all warps of the warpgroup have finished.
    auto store_words = [&](int begin, int end) {
      const int word = begin + thread % ESTIMATE_VOTE_WORDS;
      if (word >= end) return;
      for (int i = thread / ESTIMATE_VOTE_WORDS; i < num_mask_rows; i += 128 / ESTIMATE_VOTE_WORDS) {
        uint32_t votes = 0;
        for (int part = i * parts; part < (i + 1) * parts; ++part)
          votes |= smem.votes[warpgroup][part / 4][part % 4][word - begin];
        mask_row(i)[word] = finish_word<BLOCK_Q>(sequence, first_mask_row + i, word, votes);
      }
    };

    voter.q_desc = wgmma_descriptor<Storage::ROW_BYTES>(shared_address(smem.Q_smem[warpgroup]));
    voter.k_desc = wgmma_descriptor<Storage::ROW_BYTES>(shared_address(smem.K_smem[0]));
    // Causal calls need no care: the rows that see the ragged last block have it as an anchor.
    const bool ragged = !shape.causal && sequence.seqlen_k % KEY_BLOCK != 0;

    if constexpr (SPARSE) {
      constexpr int HALF_WORDS = SparseRows<HEAD_DIM>::STEPS * 5 * 128;
      const uint32_t* words = reinterpret_cast<const uint32_t*>(q_codes_gmem) +
                              (int64_t(head) * num_code_tiles + code_tile) * (2 * HALF_WORDS);
      const bool present = code_tile < num_code_tiles;
      voter.q[0].load(present ? words : nullptr, thread);
      voter.q[1].load(present ? words + HALF_WORDS : nullptr, thread);
    } else if (num_tiles != 0) {
      mbarrier_wait(&smem.q_full, 0);
    }
    // Stores the words that are finished with tile `tile`.
    auto store = [&](int tile) {
      if (tile % ESTIMATE_TILES_PER_WORD != ESTIMATE_TILES_PER_WORD - 1 && tile != num_tiles - 1) return;
      const int word = tile / ESTIMATE_TILES_PER_WORD;
      voter.keep_word(word);
      if (word % ESTIMATE_VOTE_WORDS == ESTIMATE_VOTE_WORDS - 1 || tile == num_tiles - 1) {
        bar_sync(1 + warpgroup, 128);
        store_words(word / ESTIMATE_VOTE_WORDS * ESTIMATE_VOTE_WORDS, word + 1);
        bar_sync(1 + warpgroup, 128);  // before the buffer is used again
      }
    };
    int tile = 0;
    if constexpr (SPARSE) {  // the dense products are twice as long and lose by it
      constexpr int RUN = ESTIMATE_RUN<HEAD_DIM>;
      static_assert(ESTIMATE_VOTE_WORDS * ESTIMATE_TILES_PER_WORD % RUN == 0, "no run goes past a store");
      for (; tile + RUN <= num_tiles - int(ragged); tile += RUN) {
        voter.template estimate<RUN>(tile);
        store(tile + RUN - 1);
      }
      for (; tile + 2 <= num_tiles - int(ragged); tile += 2) {
        voter.template estimate<2>(tile);
        store(tile + 1);
      }
    }
    for (; tile < num_tiles; ++tile) {
      voter.template estimate<1>(tile, ragged ? sequence.seqlen_k - tile * CODE_TILE_ROWS : CODE_TILE_ROWS);
      store(tile);
    }

    // Nothing is visible beyond.
    const int words_done = ceil_div(num_tiles, ESTIMATE_TILES_PER_WORD);
    for (int i = 0; i < num_mask_rows; ++i)
      for (int word = words_done + thread; word < num_words; word += 128) mask_row(i)[word] = 0;
  }
}
