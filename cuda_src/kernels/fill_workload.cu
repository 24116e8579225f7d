// Writes one tensor of the LLM-like workload (salekit/workloads.py): block vectors plus element noise plus one channel.
//   channel 4c, c < 16:  row < skip_rows ? 0 : vector[row / block_rows][c] + noise_in[head] * g
//   channel 1:           row < constant_rows ? constant[head] : 0
//   others:              noise_out * g
// with g a standard normal from a counter: the value depends on (seed, batch, row, head, d) alone.
// tensor: [batch, seqlen, heads, HEAD_DIM]; vectors: float32 [batch, num_blocks, heads, 16].
// Grid: (ceil(seqlen * HEAD_DIM / 8 / 256), heads, batch), 256 threads; a thread writes 8 channels, 16 bytes.
#include "tile/element.cuh"
#include "tile/tensor_view.cuh"
#include "tile/types.cuh"

constexpr int NUM_COHERENT = 16;

// The finalizer of MurmurHash3 (64 bits): a bijection whose output bits all depend on all input bits.
__device__ __forceinline__ uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 33)) * 0xFF51AFD7ED558CCDull;
  x = (x ^ (x >> 33)) * 0xC4CEB9FE1A85EC53ull;
  return x ^ (x >> 33);
}

// Two standard normals (Box-Muller) from 64 random bits.
__device__ __forceinline__ float2 normal_pair(uint64_t bits) {
  float u = (float(uint32_t(bits) >> 8) + 0.5f) * 0x1p-24f;  // in (0, 1): its logarithm is finite
  float turn = float(uint32_t(bits >> 40)) * 0x1p-24f;
  float radius = sqrtf(-2.0f * __logf(u));
  return {radius * __cosf(6.2831853f * turn), radius * __sinf(6.2831853f * turn)};
}

template <int HEAD_DIM, typename Element>
__global__ void __launch_bounds__(256) fill_workload(
    TensorView tensor, const float* vectors, const float* noise_in, const float* constant, float noise_out, int seqlen,
    int block_rows, int skip_rows, int constant_rows, uint64_t seed) {
  static_assert(HEAD_DIM % 8 == 0 && HEAD_DIM >= 4 * NUM_COHERENT, "every coherent channel must exist");
  constexpr int CHUNKS = HEAD_DIM / 8;
  int64_t index = int64_t(blockIdx.x) * 256 + threadIdx.x;
  int row = int(index / CHUNKS), chunk = int(index % CHUNKS);
  if (row >= seqlen) return;
  int head = blockIdx.y, batch = blockIdx.z, num_heads = gridDim.y;
  int num_blocks = (seqlen + block_rows - 1) / block_rows;
  const float* vector = vectors + ((int64_t(batch) * num_blocks + row / block_rows) * num_heads + head) * NUM_COHERENT;
  uint64_t counter = ((uint64_t(batch) * num_heads + head) * uint64_t(seqlen) + row) * CHUNKS + chunk;

  uint32_t words[4];
  for (int pair = 0; pair < 4; ++pair) {
    float2 g = normal_pair(mix(seed + mix(counter * 4 + pair + 1)));
    int channel = chunk * 8 + pair * 2;
    float low = noise_out * g.x, high = noise_out * g.y;
    if (channel % 4 == 0 && channel < 4 * NUM_COHERENT)
      low = row < skip_rows ? 0.0f : vector[channel / 4] + noise_in[head] * g.x;
    if (channel == 0) high = row < constant_rows ? constant[head] : 0.0f;
    words[pair] = Element::pack(low, high);
  }
  uint4* target = reinterpret_cast<uint4*>(tensor.row<uint16_t>(batch, row, head) + chunk * 8);
  *target = {words[0], words[1], words[2], words[3]};
}
