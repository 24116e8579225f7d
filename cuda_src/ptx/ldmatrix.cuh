// Warp-wide loads of 8x8 matrices of 16-bit elements from shared memory (PTX ISA, "ldmatrix").
// Lane l gives the address of row l%8 of matrix l/8; it receives elements 2*(l%4), +1 of row l/4 of each matrix.
#pragma once
#include "tile/types.cuh"

__device__ __forceinline__ void ldmatrix_x4(uint32_t (&d)[4], uint32_t smem_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(smem_address) : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&d)[4], uint32_t smem_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(smem_address) : "memory");
}
