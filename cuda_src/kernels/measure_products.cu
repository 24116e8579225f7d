// How fast a warp's tensor core instructions (mma.sync) multiply: products of one kind, from operands in registers.
//
// checksums uint32 [grid, MEASURE_THREADS]: what depends on every product of a thread. A warp does num_rounds *
// MEASURE_CHAINS products of 16 rows, 8 columns and a kind's depth, in MEASURE_CHAINS sums that do not wait for each
// other. Operands are random bits that are small, finite numbers: a chip at its power cap multiplies zeros faster.
// Grid: two CTAs of MEASURE_THREADS threads for each multiprocessor.
#include "ptx/mma.cuh"
#include "tile/scramble.cuh"

constexpr int MEASURE_THREADS = 256;
constexpr int MEASURE_CHAINS = 8;

template <typename Element>
struct HalfProducts {
  using Sum = float;
  __device__ static uint32_t element_bits(uint32_t bits) { return small_halves<Element>(bits); }
  __device__ static void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_m16n8k16<Element>(d, a, b[0], b[1]);
  }
};

struct Int8Products {
  using Sum = int;
  __device__ static uint32_t element_bits(uint32_t bits) { return bits; }
  __device__ static void multiply(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_m16n8k32_s8(d, a, b[0], b[1]);
  }
};

struct Int4Products {
  using Sum = int;
  __device__ static uint32_t element_bits(uint32_t bits) { return bits; }
  __device__ static void multiply(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_m16n8k64_s4(d, a, b[0], b[1]);
  }
};

__device__ __forceinline__ uint32_t bits_of(int x) { return uint32_t(x); }
__device__ __forceinline__ uint32_t bits_of(float x) { return __float_as_uint(x); }

template <typename Products>
__global__ void __launch_bounds__(MEASURE_THREADS, 2) measure_products(uint32_t* checksums_gmem, int num_rounds) {
  uint32_t a[4], b[2];
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = Products::element_bits(scramble(6 * threadIdx.x + i));
#pragma unroll
  for (int i = 0; i < 2; ++i) b[i] = Products::element_bits(scramble(6 * threadIdx.x + 4 + i));
  typename Products::Sum sums[MEASURE_CHAINS][4];
#pragma unroll
  for (int chain = 0; chain < MEASURE_CHAINS; ++chain)
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[chain][i] = chain;  // each its own, or the compiler may do one for all
  for (int round = 0; round < num_rounds; ++round)
#pragma unroll
    for (int chain = 0; chain < MEASURE_CHAINS; ++chain) Products::multiply(sums[chain], a, b);

  uint32_t checksum = 0;
#pragma unroll
  for (int chain = 0; chain < MEASURE_CHAINS; ++chain)
#pragma unroll
    for (int i = 0; i < 4; ++i) checksum ^= bits_of(sums[chain][i]) << chain;
  checksums_gmem[blockIdx.x * MEASURE_THREADS + threadIdx.x] = checksum;
}
