// int8 codes of q (a scale a row) or of k - mean (a scale a head), in the tiles that the estimation kernels read.
//
// SIDE 0: k; 1: q; 2: q pruned 2:4, of every four dims the two with the largest |q_d| * rms_d (ties keep the lower d).
// x [batch, seqlen, heads, HEAD_DIM]; codes uint8 [batch, heads, num_tiles, 128 * HEAD_DIM], rows past the end zero.
// q: scale float32 [batch, heads, padded rows] is written, 1 past the end; statistics is rms [batch, kv heads, HEAD_DIM].
// k: statistics is the mean, scale the heads' amax [batch, heads], read.
// Grid: (padded rows / ROWS, heads, batch) CTAs of 256 threads; a thread has 8 dims of 4 rows, loaded before the first use.
#include "tile/codes.cuh"
#include "tile/tensor_view.cuh"

constexpr int QUANTIZE_THREADS = 256;
constexpr int QUANTIZE_STEPS = 4;  // rows of a thread

enum Side { SIDE_K, SIDE_Q, SIDE_Q_PRUNED };

// Keeps two of four: a dim stays when fewer than two of the others are larger, or equal and lower.
__device__ __forceinline__ void prune_four(float* x, const float* weight) {
  bool keep[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    int ahead = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (j != i) ahead += j < i ? weight[j] >= weight[i] : weight[j] > weight[i];
    keep[i] = ahead < 2;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (!keep[i]) x[i] = 0;
}

template <int HEAD_DIM, typename Element, int SIDE>
__global__ void __launch_bounds__(QUANTIZE_THREADS)
    quantize_int8(TensorView x, uint8_t* codes_gmem, float* scale_gmem, const float* statistics_gmem, int seqlen,
                  int padded, int group_size) {
  constexpr int CHUNKS = HEAD_DIM / 8;
  constexpr int STEP_ROWS = QUANTIZE_THREADS / CHUNKS;
  const int chunk = threadIdx.x % CHUNKS;
  const int first_row = blockIdx.x * (STEP_ROWS * QUANTIZE_STEPS) + threadIdx.x / CHUNKS;
  const int64_t head = int64_t(blockIdx.z) * gridDim.y + blockIdx.y;
  const int64_t statistics_head = int64_t(blockIdx.z) * (gridDim.y / group_size) + blockIdx.y / group_size;
  uint8_t* tiles = codes_gmem + head * padded * HEAD_DIM;

  float value[QUANTIZE_STEPS][8] = {};
#pragma unroll
  for (int step = 0; step < QUANTIZE_STEPS; ++step) {
    const int row = first_row + step * STEP_ROWS;
    if (row < seqlen) load_eight<Element>(value[step], x.row<const uint16_t>(blockIdx.z, row, blockIdx.y) + chunk * 8);
  }
  float statistics[8];
  if constexpr (SIDE != SIDE_Q)
#pragma unroll
    for (int i = 0; i < 8; ++i) statistics[i] = statistics_gmem[statistics_head * HEAD_DIM + chunk * 8 + i];

#pragma unroll
  for (int step = 0; step < QUANTIZE_STEPS; ++step) {
    const int row = first_row + step * STEP_ROWS;
    uint32_t amax;
    if constexpr (SIDE == SIDE_K) {
      amax = __float_as_uint(scale_gmem[head]);
    } else {
      amax = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) amax = max(amax, magnitude_bits(value[step][i]));
      amax = max_over_lanes<CHUNKS>(amax);
      if constexpr (SIDE == SIDE_Q_PRUNED) {
        if (amax < INFINITE_BITS) {
          float weight[8];
#pragma unroll
          for (int i = 0; i < 8; ++i) weight[i] = __fmul_rn(fabsf(value[step][i]), statistics[i]);
          prune_four(value[step], weight);
          prune_four(value[step] + 4, weight + 4);
        }
        uint32_t kept = 0;
#pragma unroll
        for (int i = 0; i < 8; ++i) kept = max(kept, magnitude_bits(value[step][i]));
        amax = max_over_lanes<CHUNKS>(kept);
      }
    }
    const GroupScale group(amax, 127.f);
    int code[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float centred = SIDE == SIDE_K ? __fsub_rn(value[step][i], statistics[i]) : value[step][i];
      code[i] = row < seqlen ? encode(centred, group.factor, 127) : 0;
    }
    store_eight<HEAD_DIM, 8>(tiles, row, chunk, code);
    if (SIDE != SIDE_K && chunk == 0) scale_gmem[head * padded + row] = row < seqlen ? group.scale : 1.f;
  }
}
