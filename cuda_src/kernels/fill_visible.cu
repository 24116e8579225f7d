// The mask of a dense call: sets the bit of every block with a visible pair, clears the others.
//
// words [num_rows, num_words]: uint32, bits little-endian along keys; row r is query block r % num_q_blocks.
// Grid: ceil(num_rows * num_words / 256) CTAs of 256 threads, a word each.
#include "tile/shape.cuh"

__global__ void __launch_bounds__(256)
    fill_visible(uint32_t* words_gmem, Shape shape, int block_q, int block_k, int64_t num_rows, int num_words) {
  const int64_t index = int64_t(blockIdx.x) * 256 + threadIdx.x;
  if (index >= num_rows * num_words) return;
  const int q_block = int(index / num_words % ceil_div(shape.seqlen_q, block_q));
  const int word = int(index % num_words);
  auto bits_below = [&](int blocks) { return blocks <= 0 ? 0u : blocks >= 32 ? 0xffffffffu : (1u << blocks) - 1u; };
  // The last row of a query block sees farthest, the first row begins first.
  const int end = shape.visible_end<Shape::HAS_WINDOW>(q_block * block_q + block_q - 1);
  uint32_t bits = bits_below(ceil_div(end, block_k) - 32 * word);
  if constexpr (Shape::HAS_WINDOW)
    bits &= ~bits_below(shape.visible_begin<true>(q_block * block_q) / block_k - 32 * word);
  words_gmem[index] = bits;
}
