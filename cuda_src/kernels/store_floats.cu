// Writes values that come as an argument to memory, so that a call's host values need no copy and no memory to wait in.
//
// target [count] float32, count <= COUNT. Grid: one CTA of COUNT threads.
#include "tile/types.cuh"

template <int COUNT>
struct Floats {
  float value[COUNT];
};

template <int COUNT>
__global__ void __launch_bounds__(COUNT)
    store_floats(float* target_gmem, const __grid_constant__ Floats<COUNT> values, int count) {
  if (int(threadIdx.x) < count) target_gmem[threadIdx.x] = values.value[threadIdx.x];
}
