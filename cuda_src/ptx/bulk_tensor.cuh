// Copies of boxes of a tensor, global to shared memory, completing on an mbarrier (PTX ISA, "cp.async.bulk.tensor").
// What lies outside the tensor arrives as zeros and counts towards the transaction all the same.
#pragma once
#include "tile/types.cuh"

// A CUtensorMap, encoded by the host (salekit/tensor_map.py) and passed by value.
struct alignas(64) TensorMap {
  uint64_t opaque[16];
};

__device__ __forceinline__ void bulk_tensor_4d(uint32_t smem_address, const TensorMap* map, int c0, int c1, int c2,
                                               int c3, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4, %5}], [%6];"
      ::"r"(smem_address), "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(barrier)
      : "memory");
}

__device__ __forceinline__ void prefetch_tensor_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
