// The order of codes and of shared-memory tiles: rows of ROW_BYTES whose 16-byte chunk index is XORed with address bits
// 7 and up (the 32-, 64- and 128-byte swizzles of the PTX manual, "Swizzling modes"); of 256-byte rows with the row
// modulo 8.
#pragma once
#include "tile/types.cuh"

template <int ROW_BYTES>
__device__ __forceinline__ uint32_t swizzle(uint32_t byte) {
  static_assert(ROW_BYTES == 32 || ROW_BYTES == 64 || ROW_BYTES == 128 || ROW_BYTES == 256,
                "swizzled rows are 32, 64, 128 or 256 bytes");
  if constexpr (ROW_BYTES == 256) return byte ^ ((byte >> 8 & 7) << 4);
  return byte ^ (((byte >> 7) & (ROW_BYTES / 16 - 1)) << 4);
}
