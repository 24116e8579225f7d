// How fast Hopper's tensor cores multiply: products of one kind, as many as fit, from operands that are there.
//
// checksums uint32 [grid, MEASURE_THREADS]: what depends on every product of a thread. A CTA does num_rounds *
// MEASURE_WARPGROUPS * MEASURE_PRODUCTS products of 64 rows, of a kind's columns and depth (salekit/ceilings.py); its
// two warpgroups cover for each other's waits. Operands are random bits that are small, finite numbers: a chip at its
// power cap multiplies zeros faster. Grid: a CTA of MEASURE_THREADS threads for each multiprocessor.
#include "ptx/fence_proxy.cuh"
#include "ptx/wgmma.cuh"
#include "ptx/wgmma_e4m3.cuh"
#include "ptx/wgmma_sp.cuh"
#include "tile/aligned_storage.cuh"
#include "tile/scramble.cuh"

constexpr int MEASURE_WARPGROUPS = 2;
constexpr int MEASURE_THREADS = 128 * MEASURE_WARPGROUPS;
constexpr int MEASURE_PRODUCTS = 16;  // of a warpgroup between two waits
constexpr int MEASURE_ROW_BYTES = 128;
constexpr int MEASURE_COLUMNS = 136;  // the most that a product has

struct MeasureStorage {
  alignas(1024) uint8_t A_smem[MEASURE_WARPGROUPS][64 * MEASURE_ROW_BYTES];
  alignas(1024) uint8_t B_smem[MEASURE_COLUMNS * MEASURE_ROW_BYTES];
  uint8_t alignment_slack[1024];
};

// Each kind: its sums, what makes random bits its elements, and its i-th product of a 128-byte row.
template <typename Element>
struct HalfProducts {
  float sums[64] = {};
  __device__ static uint32_t element_bits(uint32_t bits) { return small_halves<Element>(bits); }
  __device__ void multiply(uint64_t a_desc, const uint32_t (&)[4], uint64_t b_desc, int i) {
    wgmma_m64k16_ss<Element, 64>(sums, a_desc + i % 4 * 2, b_desc + i % 4 * 2, true);
  }
};

struct Int8Products {
  int sums[64] = {};
  __device__ static uint32_t element_bits(uint32_t bits) { return bits; }
  __device__ void multiply(uint64_t a_desc, const uint32_t (&)[4], uint64_t b_desc, int i) {
    wgmma_m64n128k32_s8(sums, a_desc + i % 4 * 2, b_desc + i % 4 * 2, true);
  }
};

struct SparseInt8Products {
  static constexpr uint32_t METADATA = 0xE9C84D94u;  // any two places of four, the lower first
  int sums[64] = {};
  __device__ static uint32_t element_bits(uint32_t bits) { return bits; }
  __device__ void multiply(uint64_t, const uint32_t (&a)[4], uint64_t b_desc, int i) {
    wgmma_sp_m64n128k64_s8(sums, a, METADATA, b_desc + i % 2 * 4, true);
  }
};

struct E4m3Products {
  float sums[68] = {};
  __device__ static uint32_t element_bits(uint32_t bits) { return small_e4m3(bits); }
  __device__ void multiply(uint64_t, const uint32_t (&a)[4], uint64_t b_desc, int i) {
    wgmma_m64k32_rs_e4m3(sums, a, b_desc + i % 4 * 2);
  }
};

__device__ __forceinline__ uint32_t bits_of(int x) { return uint32_t(x); }
__device__ __forceinline__ uint32_t bits_of(float x) { return __float_as_uint(x); }

template <typename Products>
__global__ void __launch_bounds__(MEASURE_THREADS, 1) measure_products_sm90(uint32_t* checksums_gmem, int num_rounds) {
  extern __shared__ uint8_t dynamic_smem[];
  MeasureStorage& smem = aligned_storage<MeasureStorage>(dynamic_smem);
  uint32_t* words = reinterpret_cast<uint32_t*>(smem.A_smem);
  constexpr int NUM_WORDS = (sizeof(smem.A_smem) + sizeof(smem.B_smem)) / 4;
  for (int i = threadIdx.x; i < NUM_WORDS; i += MEASURE_THREADS) words[i] = Products::element_bits(scramble(i));
  uint32_t a[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = Products::element_bits(scramble(NUM_WORDS + 4 * threadIdx.x + i));
  fence_proxy_async();
  __syncthreads();

  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);  // known to be uniform: so are the descriptors
  const uint64_t a_desc = wgmma_descriptor<MEASURE_ROW_BYTES>(shared_address(smem.A_smem[warpgroup]));
  const uint64_t b_desc = wgmma_descriptor<MEASURE_ROW_BYTES>(shared_address(smem.B_smem));
  Products products;
  for (int round = 0; round < num_rounds; ++round) {
    touch(products.sums);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < MEASURE_PRODUCTS; ++i) products.multiply(a_desc, a, b_desc, i);
    wgmma_commit();
    wgmma_wait<0>();
    touch(products.sums);
  }

  uint32_t checksum = 0;
  for (auto sum : products.sums) checksum ^= bits_of(sum);
  checksums_gmem[blockIdx.x * MEASURE_THREADS + threadIdx.x] = checksum;
}
