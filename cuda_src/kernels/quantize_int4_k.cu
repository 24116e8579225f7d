// int4 codes of k - mean, a scale for the keys of a 32-key block with equal (j % 8) / 2, and the corrections mean(q) .
// k'.
//
// k [batch, seqlen, kv_heads, HEAD_DIM]; k_mean float32 [batch, kv_heads, HEAD_DIM], q_mean [batch, num_heads,
// HEAD_DIM]; codes in tiles (salekit/codes.py); scale float32 [batch, kv_heads, padded / 8], entry 4 * (j / 32) + j % 8
// / 2; correction float32 [batch, num_heads, padded]. Keys past the end have codes and corrections 0.
// lengths: the keys of each batch, where they have their own (tile/shape.cuh).
// Grid: (padded / 128, kv_heads, batch) CTAs of 2 * padded_dim(HEAD_DIM) threads; a thread has 8 dims of a group's 8
// keys.
#include "tile/codes.cuh"
#include "tile/tensor_view.cuh"

template <int HEAD_DIM, typename Element, int CODE_BITS>
__global__ void __launch_bounds__(2 * padded_dim(HEAD_DIM))
    quantize_int4_k(TensorView k, uint8_t* codes_gmem, float* scale_gmem, float* correction_gmem,
                    const float* k_mean_gmem, const float* q_mean_gmem, int seqlen, int padded, int group_size,
                    const int* lengths_gmem) {
  if constexpr (Shape::HAS_LENGTHS) seqlen = lengths_gmem[blockIdx.z];
  constexpr int CODE_DIM = padded_dim(HEAD_DIM);
  constexpr int CHUNKS = CODE_DIM / 8;
  constexpr int KEYS = 8;  // of a group
  const int chunk = threadIdx.x % CHUNKS, group = threadIdx.x / CHUNKS % 4, block = threadIdx.x / CHUNKS / 4;
  const bool has_dims = CODE_DIM == HEAD_DIM || chunk < HEAD_DIM / 8;
  const int first_key = blockIdx.x * CODE_TILE_ROWS + block * KEY_BLOCK + group * 2;
  const int64_t head = int64_t(blockIdx.z) * gridDim.y + blockIdx.y;
  uint8_t* tiles = codes_gmem + head * padded * (CODE_DIM * CODE_BITS / 8);

  float value[KEYS][8] = {};
  float mean[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) mean[i] = has_dims ? k_mean_gmem[head * HEAD_DIM + chunk * 8 + i] : 0.f;
  uint32_t amax = 0;
#pragma unroll
  for (int n = 0; n < KEYS; ++n) {
    const int key = first_key + n / 2 * 8 + n % 2;
    if (key < seqlen && has_dims) {
      load_eight<Element>(value[n], k.row<const uint16_t>(blockIdx.z, key, blockIdx.y) + chunk * 8);
#pragma unroll
      for (int i = 0; i < 8; ++i) value[n][i] = __fsub_rn(value[n][i], mean[i]);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) amax = max(amax, magnitude_bits(value[n][i]));
  }
  const GroupScale scale(max_over_lanes<CHUNKS>(amax), 7.f);
#pragma unroll
  for (int n = 0; n < KEYS; ++n) {
    int code[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) code[i] = encode(value[n][i], scale.factor, 7);
    store_eight<CODE_DIM, CODE_BITS>(tiles, first_key + n / 2 * 8 + n % 2, chunk, code);
  }
  if (chunk == 0) scale_gmem[head * (padded / 8) + first_key / 32 * 4 + group] = scale.scale;

  for (int h = 0; h < group_size; ++h) {
    const int64_t q_head = head * group_size + h;
    float q_mean[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) q_mean[i] = has_dims ? q_mean_gmem[q_head * HEAD_DIM + chunk * 8 + i] : 0.f;
#pragma unroll
    for (int n = 0; n < KEYS; ++n) {
      float dot = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) dot = fmaf(q_mean[i], value[n][i], dot);
#pragma unroll
      for (int step = CHUNKS / 2; step > 0; step /= 2) dot += __shfl_xor_sync(~0u, dot, step);
      const int key = first_key + n / 2 * 8 + n % 2;
      if (chunk == 0) correction_gmem[q_head * padded + key] = key < seqlen ? dot : 0.f;
    }
  }
}
