// Merges the attention of the same query rows over two sets of keys into that over both.
//
// out = (w_a out_a + w_b out_b) / (w_a + w_b), w = exp(lse - max(lse_a, lse_b)); lse = max + ln(w_a + w_b), natural
// log. A side with lse -inf has seen no key: its output does not count; with two of them out is 0, lse -inf.
// out_a, out_b, out [batch, seqlen, heads, 8 * chunks]: out may be one of the two; lse_a, lse_b float32, element
// (batch, row, head) by views whose last axis is the row; lse float32 [batch, heads, seqlen] or null.
// Grid: ceil(batch * seqlen * heads * chunks / 256) CTAs of 256 threads; a thread has 8 channels of a row of a head.
#include "tile/codes.cuh"
#include "tile/tensor_view.cuh"

constexpr int MERGE_THREADS = 256;

// lse_a's row axis is contiguous: what TensorView calls a row has stride 1.
template <typename Element>
__global__ void __launch_bounds__(MERGE_THREADS)
    merge_states(TensorView out_a, TensorView lse_a, TensorView out_b, TensorView lse_b, TensorView out,
                 float* lse_gmem, int64_t num_threads, int seqlen, int heads, int chunks) {
  const int64_t index = int64_t(blockIdx.x) * MERGE_THREADS + threadIdx.x;
  if (index >= num_threads) return;
  const int chunk = int(index % chunks), head = int(index / chunks % heads);
  const int64_t row_of_all = index / chunks / heads;
  const int row = int(row_of_all % seqlen), batch = int(row_of_all / seqlen);

  const float a = *lse_a.row<const float>(batch, row, head), b = *lse_b.row<const float>(batch, row, head);
  const float top = fmaxf(a, b);
  const bool has_a = !(a == -INFINITY), has_b = !(b == -INFINITY);
  const float weight_a = has_a ? expf(a - top) : 0.f, weight_b = has_b ? expf(b - top) : 0.f;
  const float sum = weight_a + weight_b;
  const float share_a = has_a ? __fdiv_rn(weight_a, sum) : 0.f, share_b = has_b ? __fdiv_rn(weight_b, sum) : 0.f;

  float x[8] = {}, y[8] = {};
  if (has_a) load_eight<Element>(x, out_a.row<const uint16_t>(batch, row, head) + chunk * 8);
  if (has_b) load_eight<Element>(y, out_b.row<const uint16_t>(batch, row, head) + chunk * 8);
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i)
    words[i] = Element::pack(fmaf(share_a, x[2 * i], share_b * y[2 * i]),
                             fmaf(share_a, x[2 * i + 1], share_b * y[2 * i + 1]));
  *reinterpret_cast<uint4*>(out.row<uint16_t>(batch, row, head) + chunk * 8) = {words[0], words[1], words[2], words[3]};
  if (chunk == 0 && lse_gmem != nullptr)
    lse_gmem[(int64_t(batch) * heads + head) * seqlen + row] = has_a || has_b ? top + logf(sum) : -INFINITY;
}
