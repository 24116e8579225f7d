// Dynamic shared memory as a struct. It is not promised to start on 1024 bytes, as swizzled tiles must: a Storage has
// as many to spare. The offset is added to the array, so that the compiler still knows the address space.
#pragma once
#include "ptx/cp_async.cuh"

template <typename Storage>
__device__ __forceinline__ Storage& aligned_storage(uint8_t* dynamic_smem) {
  return *reinterpret_cast<Storage*>(dynamic_smem + (-shared_address(dynamic_smem) & 1023));
}
