// Copies of contiguous bytes, global to shared memory, completing on an mbarrier (PTX ISA, "cp.async.bulk").
// Both addresses and the size are multiples of 16 bytes.
#pragma once
#include "tile/types.cuh"

__device__ __forceinline__ void bulk_copy(uint32_t smem_address, const void* gmem, uint32_t bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               ::"r"(smem_address), "l"(gmem), "r"(bytes), "r"(barrier)
               : "memory");
}
