// Copies packed sequences, or those of a paged cache, to one padded array; zeros beyond each sequence's end.
//
// source, 16-bit: packed [1, total, heads, 8 * chunks], or pages [num_pages, page_size, heads, 8 * chunks] that
// block_table, int32 [batch, >= max_seqlen / page_size] with rows table_stride apart, lists for each sequence; a page
// that there is not gives zeros. block_table null: packed. target [batch, max_seqlen, heads, 8 * chunks]. lengths,
// starts int32 [batch].
// Grid: (ceil(max_seqlen * heads * chunks / 256), batch) CTAs of 256 threads; a thread copies 16 bytes.
#include "ptx/ld_global.cuh"
#include "tile/tensor_view.cuh"

constexpr int GATHER_THREADS = 256;

__global__ void __launch_bounds__(GATHER_THREADS)
    gather_sequences(TensorView source, TensorView target, const int* lengths_gmem, const int* starts_gmem,
                     const int* block_table, int64_t table_stride, int page_size, int num_pages, int max_seqlen,
                     int heads, int chunks) {
  const int64_t index = int64_t(blockIdx.x) * GATHER_THREADS + threadIdx.x;
  const int chunk = int(index % chunks), head = int(index / chunks % heads), batch = blockIdx.y;
  const int64_t of_sequence = index / chunks / heads;
  if (of_sequence >= max_seqlen) return;
  const int row = int(of_sequence);
  bool present = row < lengths_gmem[batch];
  int page = 0, in_page = starts_gmem[batch] + row;
  if (block_table != nullptr && present) {
    page = block_table[batch * table_stride + row / page_size];
    in_page = row % page_size;
    present = page >= 0 && page < num_pages;
  }
  const uint16_t* from = source.row<const uint16_t>(present ? page : 0, present ? in_page : 0, head) + chunk * 8;
  *reinterpret_cast<uint4*>(target.row<uint16_t>(batch, row, head) + chunk * 8) = ld_global_16(from, present);
}
