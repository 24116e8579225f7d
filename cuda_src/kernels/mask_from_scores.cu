// Block masks at any tau from block scores: a bit is set when the score exceeds its head's ln(tau), or is +inf.
//
// scores float32 [num_rows, num_k_blocks], rows counted through batches, heads and query blocks; log_taus float32
// [num_heads]; words uint32 [num_rows, num_words], bits little-endian along keys. Scores of blocks without a visible pair
// do not count.
// Grid: ceil(num_rows * num_words / 8) CTAs of 256 threads, a word a warp.
#include "tile/shape.cuh"

__global__ void __launch_bounds__(256)
    mask_from_scores(const float* scores_gmem, const float* log_taus_gmem, uint32_t* words_gmem, Shape shape,
                     int block_q, int block_k) {
  const int num_q_blocks = ceil_div(shape.seqlen_q, block_q);
  const int num_k_blocks = ceil_div(shape.seqlen_k, block_k);
  const int num_words = ceil_div(num_k_blocks, 32);
  const int64_t index = int64_t(blockIdx.x) * 8 + threadIdx.x / 32;
  const int64_t row = index / num_words;
  if (row >= int64_t(shape.batch) * shape.num_heads * num_q_blocks) return;
  const int last_query = (int(row % num_q_blocks) + 1) * block_q - 1;
  const int num_visible = ceil_div(shape.visible_keys(last_query), block_k);
  const int block = int(index % num_words) * 32 + threadIdx.x % 32;
  bool is_set = false;
  if (block < num_visible) {
    const float score = scores_gmem[row * num_k_blocks + block];
    is_set = score > log_taus_gmem[row / num_q_blocks % shape.num_heads] || score == INFINITY;
  }
  const uint32_t word = __ballot_sync(~0u, is_set);
  if (threadIdx.x % 32 == 0) words_gmem[index] = word;
}
