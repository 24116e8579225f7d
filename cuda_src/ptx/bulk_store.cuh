// Copies of boxes from shared memory to a tensor (PTX ISA, "cp.async.bulk.tensor", "cp.async.bulk.commit_group").
// What lies outside the tensor is not written.
#pragma once
#include "ptx/bulk_tensor.cuh"

__device__ __forceinline__ void bulk_store_4d(const TensorMap* map, int c0, int c1, int c2, int c3,
                                              uint32_t smem_address) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%1, %2, %3, %4}], [%5];"
               ::"l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(smem_address) : "memory");
}

__device__ __forceinline__ void bulk_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until at most PENDING of this thread's most recent groups have yet to read shared memory.
template <int PENDING>
__device__ __forceinline__ void bulk_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}
