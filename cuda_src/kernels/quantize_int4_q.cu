// int4 codes of q - mean, a scale for rows r and r + 8 of each 16-row tile, packed or held in bytes.
//
// q [batch, seqlen, heads, HEAD_DIM]; mean float32 [batch, heads, HEAD_DIM]; codes in tiles (salekit/codes.py);
// scale float32 [batch, heads, padded / 2], entry 8 * (row / 16) + row % 8. Rows past the end have codes 0;
// lengths: the rows of each batch, where they have their own (tile/shape.cuh).
// Grid: (padded / 128, heads, batch) CTAs of 256 threads; a thread has 8 dims of a pair of rows at a time.
#include "tile/codes.cuh"
#include "tile/tensor_view.cuh"

template <int HEAD_DIM, typename Element, int CODE_BITS>
__global__ void __launch_bounds__(256) quantize_int4_q(TensorView q, uint8_t* codes_gmem, float* scale_gmem,
                                                       const float* mean_gmem, int seqlen, int padded,
                                                       const int* lengths_gmem) {
  constexpr int CODE_DIM = padded_dim(HEAD_DIM);
  constexpr int CHUNKS = CODE_DIM / 8;
  if constexpr (Shape::HAS_LENGTHS) seqlen = lengths_gmem[blockIdx.z];
  constexpr int STEP_PAIRS = 256 / CHUNKS;
  const int chunk = threadIdx.x % CHUNKS;
  const bool has_dims = CODE_DIM == HEAD_DIM || chunk < HEAD_DIM / 8;
  const int64_t head = int64_t(blockIdx.z) * gridDim.y + blockIdx.y;
  uint8_t* tiles = codes_gmem + head * padded * (CODE_DIM * CODE_BITS / 8);
  float mean[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) mean[i] = has_dims ? mean_gmem[head * HEAD_DIM + chunk * 8 + i] : 0.f;

#pragma unroll
  for (int step = 0; step < CODE_TILE_ROWS / 2 / STEP_PAIRS; ++step) {
    const int pair = blockIdx.x * (CODE_TILE_ROWS / 2) + step * STEP_PAIRS + threadIdx.x / CHUNKS;
    const int rows[2] = {pair / 8 * 16 + pair % 8, pair / 8 * 16 + pair % 8 + 8};
    float value[2][8] = {};
    uint32_t amax = 0;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (rows[r] < seqlen && has_dims) {
        load_eight<Element>(value[r], q.row<const uint16_t>(blockIdx.z, rows[r], blockIdx.y) + chunk * 8);
#pragma unroll
        for (int i = 0; i < 8; ++i) value[r][i] = __fsub_rn(value[r][i], mean[i]);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) amax = max(amax, magnitude_bits(value[r][i]));
    }
    const GroupScale group(max_over_lanes<CHUNKS>(amax), 7.f);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      int code[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) code[i] = encode(value[r][i], group.factor, 7);
      store_eight<CODE_DIM, CODE_BITS>(tiles, rows[r], chunk, code);
    }
    if (chunk == 0) scale_gmem[head * (padded / 2) + pair] = group.scale;
  }
}
