// Random bits for measurements, and the ones among them that are small, finite numbers of a type.
#pragma once
#include "tile/element.cuh"

// A permutation of 32-bit words without a pattern (the finaliser of MurmurHash3).
__device__ __forceinline__ uint32_t scramble(uint32_t x) {
  x = (x + 0x9E3779B9u) * 0x85EBCA6Bu;
  x = (x ^ (x >> 13)) * 0xC2B2AE35u;
  return x ^ (x >> 16);
}

// Two 16-bit floats of any sign from [1/2, 1): the mantissa is random.
template <typename Element>
__device__ __forceinline__ uint32_t small_halves(uint32_t bits);
template <>
__device__ __forceinline__ uint32_t small_halves<BFloat16>(uint32_t bits) {
  return (bits & 0x807F807Fu) | 0x3F003F00u;
}
template <>
__device__ __forceinline__ uint32_t small_halves<Half>(uint32_t bits) {
  return (bits & 0x83FF83FFu) | 0x38003800u;
}

// Four e4m3 below 2: with the exponent's top bit clear, none is NaN.
__device__ __forceinline__ uint32_t small_e4m3(uint32_t bits) { return bits & 0xBFBFBFBFu; }
