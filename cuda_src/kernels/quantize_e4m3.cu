// e4m3 codes of v for low-bit attention, transposed as the tensor cores want them.
//
// x [batch, seqlen, heads, HEAD_DIM]; factor float32 [batch, heads, HEAD_DIM] (finish_balance.cu), 0 gives codes 0.
// codes uint8 [batch, heads, padded / 32, HEAD_DIM / 8 + 1, 2, 8, 16]: of 32 keys, per 8 channels and half of the keys,
// 16 bytes a channel; keys past the end zero; the last 8 channels are ones. Byte 4t + i of a half is key
// 8 * (i / 2) + 2t + i % 2 of it: so lane t of a quad holds the matching scores of q.k as wgmma leaves them.
// Grid: (padded / 128, heads, batch) CTAs of 128 threads, a warp for 32 keys; a lane has 8 channels of pairs of keys.
#include "ptx/wgmma_e4m3.cuh"
#include "tile/codes.cuh"
#include "tile/tensor_view.cuh"

constexpr int E4M3_THREADS = 128;
constexpr uint32_t FOUR_ONES = 0x38383838;

template <int HEAD_DIM, typename Element>
__global__ void __launch_bounds__(E4M3_THREADS)
    quantize_e4m3(TensorView x, uint8_t* codes_gmem, const float* factor_gmem, int seqlen, int padded) {
  constexpr int CHUNKS = HEAD_DIM / 8, STEP_PAIRS = 32 / CHUNKS, STEPS = 16 / STEP_PAIRS;
  constexpr int CHUNK_BYTES = 8 * 32, CHUNK_PITCH = CHUNK_BYTES + 8;  // lanes that store together meet other banks
  __shared__ alignas(16) uint8_t smem[E4M3_THREADS / 32][CHUNKS * CHUNK_PITCH];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, chunk = lane % CHUNKS;
  const int block = blockIdx.x * (E4M3_THREADS / 32) + warp;
  const int64_t head = int64_t(blockIdx.z) * gridDim.y + blockIdx.y;

  uint4 words[STEPS][2];
#pragma unroll
  for (int step = 0; step < STEPS; ++step)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int key = block * 32 + 2 * (step * STEP_PAIRS + lane / CHUNKS) + i;
      words[step][i] = {0, 0, 0, 0};
      const uint16_t* gmem = x.row<const uint16_t>(blockIdx.z, key, blockIdx.y) + chunk * 8;
      if (key < seqlen) words[step][i] = *reinterpret_cast<const uint4*>(gmem);
    }
  float factor[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) factor[i] = factor_gmem[head * HEAD_DIM + chunk * 8 + i];

#pragma unroll
  for (int step = 0; step < STEPS; ++step) {
    const int pair = step * STEP_PAIRS + lane / CHUNKS;  // keys 2 * pair and + 1 of the block
    uint8_t* target = smem[warp] + chunk * CHUNK_PITCH + pair / 8 * 128 + pair % 4 * 4 + pair / 4 % 2 * 2;
    float low[8], high[8];
    unpack_eight<Element>(low, words[step][0]);
    unpack_eight<Element>(high, words[step][1]);
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      float scaled[4];
#pragma unroll
      for (int j = 0; j < 2; ++j) {  // a channel that is not finite has codes 0
        scaled[2 * j] = factor[i + j] == 0.f ? 0.f : __fmul_rn(low[i + j], factor[i + j]);
        scaled[2 * j + 1] = factor[i + j] == 0.f ? 0.f : __fmul_rn(high[i + j], factor[i + j]);
      }
      const uint32_t packed = pack_e4m3(scaled[0], scaled[1], scaled[2], scaled[3]);
      *reinterpret_cast<uint16_t*>(target + i * 16) = uint16_t(packed);
      *reinterpret_cast<uint16_t*>(target + i * 16 + 16) = uint16_t(packed >> 16);
    }
  }
  __syncwarp();
  uint8_t* codes = codes_gmem + (head * (padded / 32) + block) * (32 * (HEAD_DIM + 8));
#pragma unroll
  for (int byte = lane * 8; byte < 32 * HEAD_DIM; byte += 32 * 8)
    *reinterpret_cast<uint2*>(codes + byte) =
        *reinterpret_cast<const uint2*>(smem[warp] + byte / CHUNK_BYTES * CHUNK_PITCH + byte % CHUNK_BYTES);
  *reinterpret_cast<uint2*>(codes + 32 * HEAD_DIM + lane * 8) = {FOUR_ONES, FOUR_ONES};
}
