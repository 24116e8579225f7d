// The order of codes and of shared-memory tiles: rows of ROW_BYTES whose 16-byte chunk index is XORed with address bits
// 7 and up (the 32-, 64- and 128-byte swizzles of the PTX manual, "Swizzling modes"). Wider rows: see swizzle_wide.
#pragma once
#include "tile/types.cuh"

template <int ROW_BYTES>
__device__ __forceinline__ uint32_t swizzle(uint32_t byte) {
  static_assert(ROW_BYTES == 32 || ROW_BYTES == 64 || ROW_BYTES == 128, "swizzled rows are 32, 64 or 128 bytes");
  return byte ^ (((byte >> 7) & (ROW_BYTES / 16 - 1)) << 4);
}
