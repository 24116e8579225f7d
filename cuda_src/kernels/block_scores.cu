// The largest relative score of every block: what decides its bit at any tau, in one pass, with mma.sync.
//
// scores float32 [batch, num_heads, num_q_blocks, num_k_blocks]: over the pairs of a block that may vote, the largest
// estimated score less the row's base, m + ln(l); +inf for anchors and blocks of a row that selects everything, the
// largest float for a group of codes that is not finite, -inf where no pair is visible or may vote. A block of a mask is
// set when its score exceeds ln(tau).
// Codes, scales and corrections as in estimate_sm80.cu; int8: q_scale [batch, num_heads, padded_q], k_scale [batch,
// num_kv_heads]. bases float32 [batch, num_heads, padded_q]: -inf selects everything, +inf never votes.
// Grid: ceil(seqlen_q / 128) * batch * num_heads CTAs of 128 threads, the rows that see most first; a warp has 32 rows.
#include "tile/code_products.cuh"
#include "tile/mask_bits.cuh"
#include "tile/votes.cuh"

constexpr float LARGEST_SCORE = 3.4028234663852886e38f;  // above ln(tau) of every finite tau

// The relative score of a row's largest integer score (salekit.reference_scores.relative_scores). unit: what one of it
// is worth. NaN, which the maximum ignores, only for 0 times an infinite unit.
__device__ __forceinline__ float relative_score(int top, float unit, float base) {
  if (base == INFINITY || top == SELECT_ALL) return -INFINITY;
  if (base == -INFINITY) return INFINITY;
  const float score = __fsub_rn(__fmul_rn(__int2float_rn(top), unit), base);
  return isnan(unit) || score > LARGEST_SCORE ? LARGEST_SCORE : score;
}

// The largest of a warp's values, none of which is NaN: as integers of the same order.
__device__ __forceinline__ float warp_max(float x) {
  auto flip = [](int bits) { return bits ^ (bits >> 31 & 0x7FFFFFFF); };
  return __int_as_float(flip(__reduce_max_sync(~0u, flip(__float_as_int(x)))));
}

struct WordOfScores {
  float score[32];  // per 32-key block
};

template <int HEAD_DIM, typename Format, int BLOCK_Q>
__global__ void __launch_bounds__(PRODUCT_THREADS, CodeProducts<HEAD_DIM, Format, WordOfScores>::CTAS)
    block_scores(const uint8_t* q_codes_gmem, const uint8_t* k_codes_gmem, const float* bases_gmem,
                 const float* q_scale_gmem, const float* k_scale_gmem, const float* correction_gmem,
                 float* scores_gmem, Shape shape, float softmax_scale, int block_k) {
  using Products = CodeProducts<HEAD_DIM, Format, WordOfScores>;
  constexpr int M_TILES = Products::M_TILES, STAGES = Products::Ring::STAGES;
  static_assert(BLOCK_Q == 64 || BLOCK_Q == 128, "mask blocks are 64 or 128 query rows");
  __shared__ typename Products::Ring smem;

  const CodeRows rows(shape);
  const int head = rows.head, code_tile = rows.code_tile, num_tiles = rows.num_tiles;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  Products products;
  products.load_query(q_codes_gmem, rows);

  // Bases and scales of the lane's rows; unit is the scale of a product, of int4 without the keys' part.
  float base[M_TILES][2], q_scale[M_TILES], unit[M_TILES][2];
#pragma unroll
  for (int m = 0; m < M_TILES; ++m) {
    const int64_t row = int64_t(head) * shape.padded_q() + rows.warp_row + m * 16 + lane / 4;
    if constexpr (Format::GROUPED)
      q_scale[m] = q_scale_gmem[int64_t(head) * (shape.padded_q() / 2) + (rows.warp_row / 16 + m) * 8 + lane / 4];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      base[m][r] = bases_gmem[row + 8 * r];
      if constexpr (Format::GROUPED)
        unit[m][r] = __fmul_rn(softmax_scale, q_scale[m]);
      else
        unit[m][r] = __fmul_rn(__fmul_rn(softmax_scale, q_scale_gmem[row + 8 * r]), k_scale_gmem[rows.kv_head]);
    }
  }

  auto load_tile = [&](int tile) {
    Products::load_tile(smem, tile, rows, k_codes_gmem, k_scale_gmem, correction_gmem, shape);
  };

  // Rows of blocks of this CTA: one of 128 query rows, or two of 64. A warp stores 32 blocks of 32 keys of one of them.
  constexpr int BLOCK_ROWS = CODE_TILE_ROWS / BLOCK_Q;
  const int num_q_blocks = ceil_div(shape.seqlen_q, BLOCK_Q), num_k_blocks = ceil_div(shape.seqlen_k, block_k);
  const int fold = block_k / KEY_BLOCK;
  auto block_row = [&](int i) {
    return scores_gmem + (int64_t(head) * num_q_blocks + code_tile * BLOCK_ROWS + i) * num_k_blocks;
  };
  auto store_word = [&](int word) {
    const int i = warp, q_block = code_tile * BLOCK_ROWS + i;
    if (i >= BLOCK_ROWS || q_block >= num_q_blocks) return;
    const WordOfScores(&of_warp)[4] = smem.found[word % 2];
    float best = fmaxf(of_warp[2 * i].score[lane], of_warp[2 * i + 1].score[lane]);
    if constexpr (BLOCK_Q == 128) best = fmaxf(best, fmaxf(of_warp[2].score[lane], of_warp[3].score[lane]));
    if (!(finish_word<BLOCK_Q>(shape, q_block, word, ~0u) >> lane & 1)) best = -INFINITY;  // not visible
    if (finish_word<BLOCK_Q>(shape, q_block, word, 0) >> lane & 1) best = INFINITY;        // an anchor
    for (int step = 1; step < fold; step *= 2) best = fmaxf(best, __shfl_xor_sync(~0u, best, step));
    const int block = (word * 32 + lane) / fold;
    if (lane % fold == 0 && block < num_k_blocks) block_row(i)[block] = best;
  };

  products.place_lane();
#pragma unroll
  for (int tile = 0; tile < STAGES - 1; ++tile) load_tile(tile);
  for (int tile = 0; tile < num_tiles; ++tile) {
    cp_async_wait<STAGES - 2>();
    __syncthreads();
    const int word = tile / PRODUCT_TILES_PER_WORD;
    if (tile % PRODUCT_TILES_PER_WORD == 0 && tile != 0) store_word(word - 1);
    load_tile(tile + STAGES - 1);

    const int stage = tile % STAGES;
#pragma unroll
    for (int block = 0; block < PRODUCT_BLOCKS; ++block) {
      int e[M_TILES][16];
      products.multiply(e, smem, stage, block);

      // Compare.
      const int num_present = shape.seqlen_k - (tile * PRODUCT_TILE_K + block * KEY_BLOCK);
      float best = -INFINITY;
      if constexpr (Format::GROUPED) {
        float corrections[8];
        const float k_scale = Products::load_groups(corrections, smem, stage, block);
#pragma unroll
        for (int m = 0; m < M_TILES; ++m) {
          int top[2];
          corrected_tops(top, e[m], corrections, q_scale[m], k_scale, num_present);
#pragma unroll
          for (int r = 0; r < 2; ++r)
            best = fmaxf(best, relative_score(top[r], __fmul_rn(unit[m][r], k_scale), base[m][r]));
        }
      } else {
#pragma unroll
        for (int m = 0; m < M_TILES; ++m)
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            int top = num_present >= KEY_BLOCK ? row_max(e[m], r) : row_max_present(e[m], r, num_present);
            best = fmaxf(best, relative_score(top, unit[m][r], base[m][r]));
          }
      }
      best = warp_max(best);
      if (lane == 0) smem.found[word % 2][warp].score[tile % PRODUCT_TILES_PER_WORD * PRODUCT_BLOCKS + block] = best;
    }
  }
  __syncthreads();
  const int words_done = ceil_div(num_tiles, PRODUCT_TILES_PER_WORD);
  if (words_done != 0) store_word(words_done - 1);

  // Nothing is visible beyond.
#pragma unroll
  for (int i = 0; i < BLOCK_ROWS; ++i)
    if (code_tile * BLOCK_ROWS + i < num_q_blocks)
      for (int block = words_done * 32 / fold + threadIdx.x; block < num_k_blocks; block += PRODUCT_THREADS)
        block_row(i)[block] = -INFINITY;
}
