// int8 codes for low-bit attention: of q balanced, a scale a row, or of (k - mean) balanced, a scale for 32 keys.
//
// x [batch, seqlen, heads, HEAD_DIM]; codes uint8 [batch, heads, padded, HEAD_DIM] as 128-row tiles (salekit/codes.py),
// rows past the end zero. mean float32 [batch, kv heads, HEAD_DIM], balance [batch, kv heads, 2, HEAD_DIM]: of k, of q
// (finish_balance.cu). IS_K: scale float32 [batch, heads, padded / 32, 4], four times over. Otherwise: scale float32
// [batch, heads, padded], and shift, q . mean of k, likewise (may be null); a row past the end has scale 0. lengths: the
// rows of each batch, where they have their own (tile/shape.cuh).
// Grid: (padded / 128, heads, batch) CTAs of 128 threads, a warp for 32 rows, all of them loaded before the first use.
#include "tile/codes.cuh"
#include "tile/tensor_view.cuh"

constexpr int BALANCED_THREADS = 128;

// Of a group without a code but 0: 0, so that attention, which rounds at every scale, adds nothing.
__device__ __forceinline__ float scale_of(const GroupScale& group) {
  return group.factor == 0.f && !isnan(group.scale) ? 0.f : group.scale;
}

template <int HEAD_DIM, typename Element, bool IS_K>
__global__ void __launch_bounds__(BALANCED_THREADS)
    quantize_balanced(TensorView x, uint8_t* codes_gmem, float* scale_gmem, float* shift_gmem, const float* mean_gmem,
                      const float* balance_gmem, int seqlen, int padded, int group_size, const int* lengths_gmem) {
  if constexpr (Shape::HAS_LENGTHS) seqlen = lengths_gmem[blockIdx.z];
  constexpr int CHUNKS = HEAD_DIM / 8, STEP_ROWS = 32 / CHUNKS, STEPS = 32 / STEP_ROWS;
  const int lane = threadIdx.x % 32, chunk = lane % CHUNKS;
  const int block = blockIdx.x * (BALANCED_THREADS / 32) + threadIdx.x / 32;
  const int first_row = block * 32 + lane / CHUNKS;
  const int64_t head = int64_t(blockIdx.z) * gridDim.y + blockIdx.y;
  const int64_t kv_head = int64_t(blockIdx.z) * (gridDim.y / group_size) + blockIdx.y / group_size;

  uint4 words[STEPS];
#pragma unroll
  for (int step = 0; step < STEPS; ++step) {
    const int row = first_row + step * STEP_ROWS;
    words[step] = {0, 0, 0, 0};
    if (row < seqlen)
      words[step] = *reinterpret_cast<const uint4*>(x.row<const uint16_t>(blockIdx.z, row, blockIdx.y) + chunk * 8);
  }
  float mean[8], balance[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    mean[i] = mean_gmem[kv_head * HEAD_DIM + chunk * 8 + i];
    balance[i] = balance_gmem[(kv_head * 2 + (IS_K ? 0 : 1)) * HEAD_DIM + chunk * 8 + i];
  }
  auto balanced = [&](float(&value)[8], const uint4& from) {
    unpack_eight<Element>(value, from);
#pragma unroll
    for (int i = 0; i < 8; ++i) value[i] = __fmul_rn(IS_K ? __fsub_rn(value[i], mean[i]) : value[i], balance[i]);
  };

  uint32_t amax = 0;
  if constexpr (IS_K) {
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      if (first_row + step * STEP_ROWS >= seqlen) continue;
      float value[8];
      balanced(value, words[step]);
#pragma unroll
      for (int i = 0; i < 8; ++i) amax = max(amax, magnitude_bits(value[i]));
    }
    amax = max_over_lanes<32>(amax);
    if (lane == 0) {
      const float scale = scale_of(GroupScale(amax, 127.f));
      *reinterpret_cast<float4*>(scale_gmem + (head * (padded / 32) + block) * 4) = {scale, scale, scale, scale};
    }
  }
#pragma unroll
  for (int step = 0; step < STEPS; ++step) {
    const int row = first_row + step * STEP_ROWS;
    float value[8];
    balanced(value, words[step]);
    if constexpr (!IS_K) {
      amax = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) amax = max(amax, magnitude_bits(value[i]));
      amax = max_over_lanes<CHUNKS>(amax);
    }
    const GroupScale group(amax, 127.f);
    const uint2 codes = encode_eight(value, row < seqlen ? group.factor : 0.f);
    store_eight<HEAD_DIM>(codes_gmem + head * padded * HEAD_DIM, row, chunk, codes);
    if constexpr (!IS_K) {
      if (chunk == 0) scale_gmem[head * padded + row] = scale_of(group);
      if (shift_gmem != nullptr) {
        float raw[8], shift = 0;
        unpack_eight<Element>(raw, words[step]);
#pragma unroll
        for (int i = 0; i < 8; ++i) shift = fmaf(raw[i], mean[i], shift);
#pragma unroll
        for (int distance = CHUNKS / 2; distance > 0; distance /= 2) shift += __shfl_xor_sync(~0u, shift, distance);
        if (chunk == 0) shift_gmem[head * padded + row] = shift;
      }
    }
  }
}
