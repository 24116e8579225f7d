// int8 codes of q (a scale a row) or of k - mean (a scale a head), in the order that the estimation kernels read.
//
// SIDE 0: k; 1: q; 2: q pruned 2:4, of every four dims the two with the largest |q_d| * rms_d (ties keep the lower d);
// 3: the same, with the pruned dims left out (store_eight_sparse).
// x [batch, seqlen, heads, HEAD_DIM]; codes uint8 [batch, heads, num_tiles, 128 * HEAD_DIM], positions without a row
// zero; SIDE 3: uint32 [batch, heads, num_tiles * 2, HEAD_DIM / 64, 5, 128].
// q: scale float32 [batch, heads, positions] is written, 1 where there is no row; statistics is rms [batch, kv heads,
// HEAD_DIM]. k: statistics is the mean, scale the heads' amax [batch, heads], read.
// Grid: (positions / ROWS, heads, batch) CTAs of 256 threads; a thread has 8 dims of 4 rows, loaded before the first
// use.
#include "tile/codes.cuh"
#include "tile/row_map.cuh"
#include "tile/tensor_view.cuh"

constexpr int QUANTIZE_THREADS = 256;
constexpr int QUANTIZE_STEPS = 4;  // rows of a thread
constexpr float FLOAT_MAX = 3.402823466e38f;

enum Side { SIDE_K, SIDE_Q, SIDE_Q_PRUNED, SIDE_Q_SPARSE };

template <int HEAD_DIM, typename Element, int SIDE>
__global__ void __launch_bounds__(QUANTIZE_THREADS)
    quantize_int8(TensorView x, uint8_t* codes_gmem, float* scale_gmem, const float* statistics_gmem, RowMap map,
                  int group_size) {
  constexpr bool PRUNED = SIDE == SIDE_Q_PRUNED || SIDE == SIDE_Q_SPARSE;
  constexpr int CHUNKS = HEAD_DIM / 8;
  constexpr int STEP_ROWS = QUANTIZE_THREADS / CHUNKS;
  const int chunk = threadIdx.x % CHUNKS;
  const int first_position = blockIdx.x * (STEP_ROWS * QUANTIZE_STEPS) + threadIdx.x / CHUNKS;
  const int64_t head = int64_t(blockIdx.z) * gridDim.y + blockIdx.y;
  const int64_t statistics_head = int64_t(blockIdx.z) * (gridDim.y / group_size) + blockIdx.y / group_size;
  const int padded = map.num_positions;

  float value[QUANTIZE_STEPS][8] = {};
#pragma unroll
  for (int step = 0; step < QUANTIZE_STEPS; ++step) {
    const int row = map.row(first_position + step * STEP_ROWS);
    if (row >= 0) load_eight<Element>(value[step], x.row<const uint16_t>(blockIdx.z, row, blockIdx.y) + chunk * 8);
  }
  float statistics[8];
  if constexpr (SIDE != SIDE_Q) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float of_dim = statistics_gmem[statistics_head * HEAD_DIM + chunk * 8 + i];
      statistics[i] = !PRUNED ? of_dim : isnan(of_dim) ? 0.f : fminf(of_dim, FLOAT_MAX);  // as NumPy's nan_to_num
    }
  }

#pragma unroll
  for (int step = 0; step < QUANTIZE_STEPS; ++step) {
    const int position = first_position + step * STEP_ROWS;
    const bool present = map.row(position) >= 0;
    uint32_t amax;
    KeptPair kept[2];
    if constexpr (SIDE == SIDE_K) {
      amax = __float_as_uint(scale_gmem[head]);
#pragma unroll
      for (int i = 0; i < 8; ++i) value[step][i] = __fsub_rn(value[step][i], statistics[i]);
    } else {
      amax = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) amax = max(amax, magnitude_bits(value[step][i]));
      if constexpr (PRUNED) {
        float weight[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) weight[i] = __fmul_rn(fabsf(value[step][i]), statistics[i]);
        kept[0] = KeptPair::largest(weight);
        kept[1] = KeptPair::largest(weight + 4);
        const bool finite = amax < INFINITE_BITS;
        if (finite) amax = 0;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          if (!kept[i / 4].has(i % 4)) value[step][i] = 0;
          if (finite) amax = max(amax, magnitude_bits(value[step][i]));
        }
      }
      amax = max_over_lanes<CHUNKS>(amax);  // in a row that is not finite, that of what is not
      if (PRUNED && amax >= INFINITE_BITS) kept[0] = kept[1] = {0, 1};  // its codes are 0, whatever is kept
    }
    const GroupScale group(amax, 127.f);
    const uint2 codes = encode_eight(value[step], present ? group.factor : 0.f);
    if constexpr (SIDE == SIDE_Q_SPARSE) {
      constexpr int WORDS_A_ROW = HEAD_DIM / 64 * 10;
      uint32_t* words = reinterpret_cast<uint32_t*>(codes_gmem) + head * padded * WORDS_A_ROW;
      store_eight_sparse<HEAD_DIM>(words, position, chunk, codes, kept);
    } else {
      store_eight<HEAD_DIM>(codes_gmem + head * padded * HEAD_DIM, position, chunk, codes);
    }
    if (SIDE != SIDE_K && chunk == 0) scale_gmem[head * padded + position] = present ? group.scale : 1.f;
  }
}
