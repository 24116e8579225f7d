// The order of codes and of shared-memory tiles: rows of ROW_BYTES whose 16-byte chunk index is XORed with address bits
// 7 and up (the 32-, 64- and 128-byte swizzles of the PTX manual, "Swizzling modes"). Of eight 256-byte rows the first
// halves come first, then the second ones, each as eight 128-byte rows.
#pragma once
#include "tile/types.cuh"

template <int ROW_BYTES>
__device__ __forceinline__ uint32_t swizzle(uint32_t byte) {
  static_assert(ROW_BYTES == 32 || ROW_BYTES == 64 || ROW_BYTES == 128 || ROW_BYTES == 256,
                "swizzled rows are 32, 64, 128 or 256 bytes");
  if constexpr (ROW_BYTES == 256) {
    const uint32_t row = byte >> 8 & 7, half = byte >> 7 & 1;
    return (byte & ~0x7F0u) | half << 10 | row << 7 | ((byte >> 4 & 7) ^ row) << 4;
  }
  return byte ^ (((byte >> 7) & (ROW_BYTES / 16 - 1)) << 4);
}
