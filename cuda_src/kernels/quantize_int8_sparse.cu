// int8 codes of q pruned 2:4, a scale a row, as the sparse tensor cores take them from registers.
//
// Of every four dims the two with the largest |q_d| * rms_d are kept, ties keep the lower d.
// x [batch, seqlen, heads, HEAD_DIM]; rms float32 [batch, kv heads, HEAD_DIM]; codes uint32 [batch, heads,
// positions / 64, ceil(HEAD_DIM / 64), 5, 128]: for a 64-row tile, 64-dim step and thread of a warpgroup four words of
// codes and one of metadata (salekit/codes.py, wgmma_sp.cuh), codes 0 where there is no row or dim; scale float32 [batch,
// heads, positions], 1 where there is no row.
// Grid: (positions / ROWS, heads, batch) CTAs of 256 threads; a thread has 8 dims of 4 rows, all loaded first, and of 4
// more where those are not 64 rows. Codes and metadata go through shared memory, where they come to lie as they are
// stored.
#include "ptx/ld_global.cuh"
#include "ptx/max_u16x2.cuh"
#include "tile/codes.cuh"
#include "tile/row_map.cuh"
#include "tile/tensor_view.cuh"

constexpr int QUANTIZE_THREADS = 256;
constexpr int QUANTIZE_STEPS = 4;  // rows of a thread
constexpr float FLOAT_MAX = 3.402823466e38f;
constexpr float NOT_FINITE = -1.f;  // in place of a row's factor

// Whether one of eight 16-bit floats is infinite or NaN.
template <typename Element>
__device__ __forceinline__ bool any_not_finite(const uint4& words) {
  constexpr uint32_t MAGNITUDES = 0x7FFF7FFF;
  const uint32_t most = max_u16x2(max_u16x2(words.x & MAGNITUDES, words.y & MAGNITUDES),
                                  max_u16x2(words.z & MAGNITUDES, words.w & MAGNITUDES));
  return max(most & 0xFFFF, most >> 16) >= Element::INFINITE;
}

template <int HEAD_DIM, typename Element>
__global__ void __launch_bounds__(QUANTIZE_THREADS)
    quantize_int8_sparse(TensorView x, uint32_t* codes_gmem, float* scale_gmem, const float* rms_gmem, RowMap map,
                         int group_size) {
  constexpr int CHUNKS = padded_dim(HEAD_DIM) / 8, DIM_STEPS = ceil_div(HEAD_DIM, 64);
  constexpr int STEP_ROWS = QUANTIZE_THREADS / CHUNKS, PART_ROWS = STEP_ROWS * QUANTIZE_STEPS;
  constexpr int ROWS = PART_ROWS < 64 ? 64 : PART_ROWS;
  constexpr int NUM_WORDS = ROWS / 64 * DIM_STEPS * 5 * 128;
  __shared__ alignas(16) uint32_t words_smem[NUM_WORDS];
  const int chunk = threadIdx.x % CHUNKS;
  const bool has_dims = CHUNKS * 8 == HEAD_DIM || chunk < HEAD_DIM / 8, is_stored = chunk < DIM_STEPS * 8;
  const int first_position = blockIdx.x * ROWS;
  const int64_t head = int64_t(blockIdx.z) * gridDim.y + blockIdx.y;
  const int64_t rms_head = int64_t(blockIdx.z) * (gridDim.y / group_size) + blockIdx.y / group_size;

#pragma unroll
  for (int part_row = 0; part_row < ROWS; part_row += PART_ROWS) {
    const int first_row = part_row + threadIdx.x / CHUNKS;
    uint4 loaded[QUANTIZE_STEPS];
#pragma unroll
    for (int step = 0; step < QUANTIZE_STEPS; ++step) {
      const int row = map.row(first_position + first_row + step * STEP_ROWS);
      loaded[step] = ld_global_16(x.row<const uint16_t>(blockIdx.z, row, blockIdx.y) + chunk * 8, row >= 0 && has_dims);
    }
    __syncwarp();  // ptxas would move loads down, past the first use
    const float4* rms_of_chunk =
        reinterpret_cast<const float4*>(rms_gmem + rms_head * HEAD_DIM + (has_dims ? chunk * 8 : 0));
    const float4 rms_low = rms_of_chunk[0], rms_high = rms_of_chunk[1];
    float rms[8] = {rms_low.x, rms_low.y, rms_low.z, rms_low.w, rms_high.x, rms_high.y, rms_high.z, rms_high.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) rms[i] = isnan(rms[i]) ? 0.f : fminf(rms[i], FLOAT_MAX);  // as NumPy's nan_to_num

    float kept[QUANTIZE_STEPS][4];
    uint32_t places[QUANTIZE_STEPS], amax[QUANTIZE_STEPS];
#pragma unroll
    for (int step = 0; step < QUANTIZE_STEPS; ++step) {
      float value[8], weight[8];
      unpack_eight<Element>(value, loaded[step]);
#pragma unroll
      for (int i = 0; i < 8; ++i) weight[i] = __fmul_rn(fabsf(value[i]), rms[i]);
      const KeptPair low(weight), high(weight + 4);
      kept[step][0] = low.first(value), kept[step][1] = low.second(value);
      kept[step][2] = high.first(value + 4), kept[step][3] = high.second(value + 4);
      places[step] = low.places() | high.places() << 4;
      float most = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) most = fmaxf(most, fabsf(kept[step][i]));
      amax[step] = any_not_finite<Element>(loaded[step]) ? INFINITE_BITS : __float_as_uint(most);
    }

    // Lane l of a row's chunks has the scale of the l % 4-th of four rows.
    const uint32_t row_amax = max_transposed<CHUNKS>(amax);
    const GroupScale group(row_amax, 127.f);
    const float row_factor = row_amax < INFINITE_BITS ? group.factor : NOT_FINITE;
    if (chunk < QUANTIZE_STEPS)
      scale_gmem[head * map.num_positions + first_position + first_row + chunk * STEP_ROWS] = group.scale;
#pragma unroll
    for (int step = 0; step < QUANTIZE_STEPS; ++step) {
      const float factor = __shfl_sync(~0u, row_factor, (threadIdx.x & 28) + step);
      // A row that is not finite has codes 0, whatever is kept.
      const bool finite = factor != NOT_FINITE;
      if (!is_stored) continue;
      const int row = first_row + step * STEP_ROWS, in_tile = row % 64;
      const int high = in_tile / 8 % 2, part = chunk % 8 / 4;
      const int quad = in_tile / 16 * 32 + in_tile % 8 * 4;  // the first of the four threads that hold the row
      uint32_t* words = words_smem + (row / 64 * DIM_STEPS + chunk / 8) * (5 * 128);
      words[(high + 2 * part) * 128 + quad + chunk % 4] = finite ? encode_four(kept[step], factor) : 0;
      // Four chunks make a word of metadata.
      reinterpret_cast<uint8_t*>(words + 4 * 128 + quad + high + 2 * part)[chunk % 4] = finite ? places[step] : 0x44;
    }
  }
  __syncthreads();
  uint4* target = reinterpret_cast<uint4*>(codes_gmem + (head * (map.num_positions / ROWS) + blockIdx.x) * NUM_WORDS);
#pragma unroll 1
  for (int i = threadIdx.x; i < NUM_WORDS / 4; i += QUANTIZE_THREADS)
    target[i] = reinterpret_cast<const uint4*>(words_smem)[i];
}
