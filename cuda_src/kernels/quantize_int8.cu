// int8 codes of q (a scale a row) or of k - mean (a scale a head), in the order that the estimation kernels read.
//
// SIDE 0: k; 1: q; 2: q pruned 2:4, of every four dims the two with the largest |q_d| * rms_d (ties keep the lower d);
// 3: k by statistics of other keys, which may not reach as far: codes are clamped, a key that is not finite has 0.
// x [batch, seqlen, heads, HEAD_DIM]; codes uint8 [batch, heads, num_tiles, 128 * padded_dim(HEAD_DIM)], zero where
// there is no row or dim.
// q: scale float32 [batch, heads, positions] is written, 1 where there is no row; statistics is rms [batch, kv heads,
// HEAD_DIM]. k: statistics is the mean, scale the heads' amax [batch, heads], read. lengths: the keys of each batch,
// where they have their own (tile/shape.cuh); rows of q past an end are zeros, whose codes are 0.
// Grid: (positions / ROWS, heads, batch) CTAs of 256 threads; a thread has 8 dims of 4 rows, all loaded first.
#include "ptx/ld_global.cuh"
#include "tile/codes.cuh"
#include "tile/row_map.cuh"
#include "tile/tensor_view.cuh"

constexpr int QUANTIZE_THREADS = 256;
constexpr int QUANTIZE_STEPS = 4;  // rows of a thread
constexpr float FLOAT_MAX = 3.402823466e38f;

enum Side { SIDE_K, SIDE_Q, SIDE_Q_PRUNED, SIDE_K_GIVEN };

template <int HEAD_DIM, typename Element, int SIDE>
__global__ void __launch_bounds__(QUANTIZE_THREADS)
    quantize_int8(TensorView x, uint8_t* codes_gmem, float* scale_gmem, const float* statistics_gmem, RowMap map,
                  int group_size, const int* lengths_gmem) {
  constexpr bool PRUNED = SIDE == SIDE_Q_PRUNED, IS_K = SIDE == SIDE_K || SIDE == SIDE_K_GIVEN;
  if constexpr (IS_K && Shape::HAS_LENGTHS) map.num_rows = lengths_gmem[blockIdx.z];
  constexpr int CODE_DIM = padded_dim(HEAD_DIM);
  constexpr int CHUNKS = CODE_DIM / 8;
  constexpr int STEP_ROWS = QUANTIZE_THREADS / CHUNKS;
  const int chunk = threadIdx.x % CHUNKS;
  const bool has_dims = CODE_DIM == HEAD_DIM || chunk < HEAD_DIM / 8;
  const int first_position = blockIdx.x * (STEP_ROWS * QUANTIZE_STEPS) + threadIdx.x / CHUNKS;
  const int64_t head = int64_t(blockIdx.z) * gridDim.y + blockIdx.y;
  const int64_t statistics_head = int64_t(blockIdx.z) * (gridDim.y / group_size) + blockIdx.y / group_size;
  const int padded = map.num_positions;

  uint4 loaded[QUANTIZE_STEPS];
  bool present[QUANTIZE_STEPS];
#pragma unroll
  for (int step = 0; step < QUANTIZE_STEPS; ++step) {
    const int row = map.row(first_position + step * STEP_ROWS);
    present[step] = row >= 0;
    loaded[step] =
        ld_global_16(x.row<const uint16_t>(blockIdx.z, row, blockIdx.y) + chunk * 8, present[step] && has_dims);
  }
  __syncwarp();  // ptxas would move loads down, past the first use
  float statistics[8];
  if constexpr (SIDE != SIDE_Q) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float of_dim = has_dims ? statistics_gmem[statistics_head * HEAD_DIM + chunk * 8 + i] : 0.f;
      statistics[i] = !PRUNED ? of_dim : isnan(of_dim) ? 0.f : fminf(of_dim, FLOAT_MAX);  // as NumPy's nan_to_num
    }
  }

  float value[QUANTIZE_STEPS][8];
  uint32_t amax[QUANTIZE_STEPS];
#pragma unroll
  for (int step = 0; step < QUANTIZE_STEPS; ++step) {
    unpack_eight<Element>(value[step], loaded[step]);
    amax[step] = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if constexpr (IS_K) value[step][i] = __fsub_rn(value[step][i], statistics[i]);
      amax[step] = max(amax[step], magnitude_bits(value[step][i]));
    }
    if constexpr (PRUNED) {
      float weight[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) weight[i] = __fmul_rn(fabsf(value[step][i]), statistics[i]);
      const uint32_t places[2] = {KeptPair(weight).places(), KeptPair(weight + 4).places()};
      uint32_t kept = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (i % 4 != (places[i / 4] & 3) && i % 4 != places[i / 4] >> 2) value[step][i] = 0;
        kept = max(kept, magnitude_bits(value[step][i]));
      }
      if (amax[step] < INFINITE_BITS) amax[step] = kept;
    }
  }

  // Of q, lane l of a row's chunks has the scale of the l % 4-th of four rows.
  const GroupScale group(IS_K ? __float_as_uint(scale_gmem[head]) : max_transposed<CHUNKS>(amax), 127.f);
  if (!IS_K && chunk < QUANTIZE_STEPS)
    scale_gmem[head * padded + first_position + chunk * STEP_ROWS] = group.scale;
#pragma unroll
  for (int step = 0; step < QUANTIZE_STEPS; ++step) {
    const float factor =
        !IS_K ? __shfl_sync(~0u, group.factor, (threadIdx.x & 28) + step) : present[step] ? group.factor : 0.f;
    if constexpr (SIDE == SIDE_K_GIVEN) {
      const float largest = scale_gmem[head];
#pragma unroll
      for (int i = 0; i < 8; ++i)
        value[step][i] = magnitude_bits(value[step][i]) < INFINITE_BITS
                             ? fmaxf(-largest, fminf(largest, value[step][i])) : 0.f;
    }
    store_eight<CODE_DIM>(codes_gmem + head * padded * CODE_DIM, first_position + step * STEP_ROWS, chunk,
                          encode_eight(value[step], factor));
  }
}
