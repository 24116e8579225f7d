// Which key blocks matter: low-bit scores of every visible pair, one bit a block, with mma.sync.
//
// bit(row block, key block) = any score > its threshold, or anchor; words [batch, num_heads, num_q_blocks, num_words].
// Codes are 128-row tiles in shared-memory order (salekit/codes.py). Int8: limits are integer thresholds, int32
// [batch, num_heads, padded_q]. Int4 and Int4InBytes: limits are scores, float32 of that shape; the scales of groups
// of rows [batch, num_heads, padded_q / 2] and keys [batch, num_kv_heads, padded_k / 8] turn them into integers, and
// corrections [batch, num_heads, padded_k] are added to the scores.
// WINDOWED: the shape has a window, and pairs outside of it do not vote.
// Grid: ceil(seqlen_q / 128) * batch * num_heads CTAs of 128 threads, the rows that see most first; a warp has 32 rows.
#include "tile/code_products.cuh"
#include "tile/mask_bits.cuh"
#include "tile/votes.cuh"

template <int HEAD_DIM, typename Format, int BLOCK_Q, bool WINDOWED = false>
__global__ void __launch_bounds__(PRODUCT_THREADS, CodeProducts<HEAD_DIM, Format, uint32_t>::CTAS)
    estimate_sm80(const uint8_t* q_codes_gmem, const uint8_t* k_codes_gmem, const void* limits_gmem,
                  const float* q_scale_gmem, const float* k_scale_gmem, const float* correction_gmem,
                  uint32_t* words_gmem, Shape shape, float softmax_scale) {
  using Products = CodeProducts<HEAD_DIM, Format, uint32_t>;  // a word of votes
  constexpr int M_TILES = Products::M_TILES, STAGES = Products::Ring::STAGES;
  static_assert(BLOCK_Q == 64 || BLOCK_Q == 128, "mask blocks are 64 or 128 query rows");
  __shared__ typename Products::Ring smem;

  const CodeRows rows = CodeRows::of<WINDOWED>(shape);
#if defined(SEQUENCE_LENGTHS) && defined(KEY_WINDOW)
  __shared__ Shape sequence;  // for want of registers
  if (threadIdx.x == 0) sequence = shape.of_sequence(rows.head / shape.num_heads);
  __syncthreads();
#else
  const Shape sequence = shape.of_sequence(rows.head / shape.num_heads);
#endif
  if (Shape::HAS_LENGTHS && rows.code_tile * CODE_TILE_ROWS >= sequence.seqlen_q) return;
  const int head = rows.head, code_tile = rows.code_tile, num_tiles = rows.num_tiles;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  Products products;
  products.load_query(q_codes_gmem, rows);

  // Thresholds of the lane's rows.
  int thresholds[M_TILES][2];
  GroupVote group_vote[M_TILES];
#pragma unroll
  for (int m = 0; m < M_TILES; ++m) {
    const int64_t row = int64_t(head) * shape.padded_q() + rows.warp_row + m * 16 + lane / 4;
    if constexpr (Format::GROUPED) {
      const float* limits = static_cast<const float*>(limits_gmem);
      group_vote[m].y[0] = limits[row];
      group_vote[m].y[1] = limits[row + 8];
      group_vote[m].q_scale =
          q_scale_gmem[int64_t(head) * (shape.padded_q() / 2) + (rows.warp_row / 16 + m) * 8 + lane / 4];
      group_vote[m].scaled_q = __fmul_rn(softmax_scale, group_vote[m].q_scale);
    } else {
      const int* limits = static_cast<const int*>(limits_gmem);
      thresholds[m][0] = limits[row];
      thresholds[m][1] = limits[row + 8];
    }
  }

  auto load_tile = [&](int tile) {
    Products::load_tile(smem, tile, rows, k_codes_gmem, k_scale_gmem, correction_gmem, shape);
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
    const uint32_t(&of_warp)[4] = smem.found[word % 2];
    uint32_t votes = of_warp[2 * i] | of_warp[2 * i + 1];
    if constexpr (BLOCK_Q == 128) votes |= of_warp[2] | of_warp[3];
    mask_row(i)[word] = finish_word<BLOCK_Q, WINDOWED>(sequence, code_tile * MASK_ROWS + i, word, votes);
  };

  // A window's walk begins with the word that holds the first key that a row sees.
  const int first_word = sequence.visible_begin<WINDOWED>(code_tile * CODE_TILE_ROWS) / (32 * KEY_BLOCK);
  const int first_tile = first_word * PRODUCT_TILES_PER_WORD;
  // Keys that each of the warp's rows sees: blocks inside need no test of single pairs.
  const Range seen_by_all = {sequence.visible_begin<WINDOWED>(rows.warp_row + 31),
                             sequence.visible_end<WINDOWED>(rows.warp_row)};

  products.place_lane();
#pragma unroll
  for (int tile = 0; tile < STAGES - 1; ++tile) load_tile(first_tile + tile);
  uint32_t votes = 0;  // of the lane's rows, in the current word
  for (int tile = first_tile; tile < num_tiles; ++tile) {
    cp_async_wait<STAGES - 2>();
    __syncthreads();
    if (tile % PRODUCT_TILES_PER_WORD == 0 && tile != first_tile) store_word(tile / PRODUCT_TILES_PER_WORD - 1);
    load_tile(tile + STAGES - 1);

    const int stage = tile % STAGES;
#pragma unroll
    for (int block = 0; block < PRODUCT_BLOCKS; ++block) {
      int e[M_TILES][16];
      products.multiply(e, smem, stage, block);

      // Decide.
      const int first_key = tile * PRODUCT_TILE_K + block * KEY_BLOCK;
      const int num_present = sequence.seqlen_k - first_key;
      bool vote = false;
      if (WINDOWED && (first_key < seen_by_all.begin || first_key + KEY_BLOCK > seen_by_all.end)) {
        float corrections[8] = {};
        float k_scale = 0;
        if constexpr (Format::GROUPED) k_scale = Products::load_groups(corrections, smem, stage, block);
#pragma unroll
        for (int m = 0; m < M_TILES; ++m) {
          int begin[2], end[2];
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const int row = rows.warp_row + m * 16 + r * 8 + lane / 4;
            begin[r] = sequence.visible_begin<WINDOWED>(row) - first_key;
            end[r] = sequence.visible_end<WINDOWED>(row) - first_key;
          }
          if constexpr (Format::GROUPED) {
            vote |= group_vote[m].within(e[m], corrections, k_scale, begin, end);
          } else {
#pragma unroll
            for (int r = 0; r < 2; ++r) vote |= row_max_within(e[m], r, begin[r], end[r]) > thresholds[m][r];
          }
        }
      } else if constexpr (Format::GROUPED) {
        float corrections[8];
        const float k_scale = Products::load_groups(corrections, smem, stage, block);
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
      votes |= uint32_t(vote) << (tile % PRODUCT_TILES_PER_WORD * PRODUCT_BLOCKS + block);
    }

    if (tile % PRODUCT_TILES_PER_WORD == PRODUCT_TILES_PER_WORD - 1 || tile == num_tiles - 1) {
      votes = __reduce_or_sync(~0u, votes);
      if (lane == 0) smem.found[tile / PRODUCT_TILES_PER_WORD % 2][warp] = votes;
      votes = 0;
    }
  }
  __syncthreads();
  const int words_done = max(first_word, ceil_div(num_tiles, PRODUCT_TILES_PER_WORD));
  if (words_done != first_word) store_word(words_done - 1);

  // Nothing is visible beyond, nor before a window.
#pragma unroll
  for (int i = 0; i < MASK_ROWS; ++i)
    if (code_tile * MASK_ROWS + i < num_q_blocks) {
      for (int word = words_done + threadIdx.x; word < num_words; word += PRODUCT_THREADS) mask_row(i)[word] = 0;
      if constexpr (WINDOWED)
        for (int word = threadIdx.x; word < first_word; word += PRODUCT_THREADS) mask_row(i)[word] = 0;
    }
}
