// Copies the rows of each sequence from a padded array to the packed one, with their lse. The inverse of
// gather_sequences for outputs; rows of no sequence are left alone.
//
// source [batch, max_seqlen, heads, 8 * chunks], target [1, total, heads, 8 * chunks], 16-bit; source_lse float32
// [batch, heads, max_seqlen], target_lse float32 [heads, total], or both null. lengths, starts int32 [batch].
// Grid: (ceil(max_seqlen * heads * chunks / 256), batch) CTAs of 256 threads; a thread copies 16 bytes.
#include "tile/tensor_view.cuh"

constexpr int SCATTER_THREADS = 256;

__global__ void __launch_bounds__(SCATTER_THREADS)
    scatter_sequences(TensorView source, TensorView target, const float* source_lse, float* target_lse,
                      const int* lengths_gmem, const int* starts_gmem, int max_seqlen, int total, int heads,
                      int chunks) {
  const int64_t index = int64_t(blockIdx.x) * SCATTER_THREADS + threadIdx.x;
  const int chunk = int(index % chunks), head = int(index / chunks % heads), batch = blockIdx.y;
  const int64_t of_sequence = index / chunks / heads;
  if (of_sequence >= lengths_gmem[batch]) return;
  const int row = int(of_sequence), packed = starts_gmem[batch] + row;
  *reinterpret_cast<uint4*>(target.row<uint16_t>(0, packed, head) + chunk * 8) =
      *reinterpret_cast<const uint4*>(source.row<const uint16_t>(batch, row, head) + chunk * 8);
  if (chunk == 0 && target_lse != nullptr)
    target_lse[int64_t(head) * total + packed] = source_lse[(int64_t(batch) * heads + head) * max_seqlen + row];
}
