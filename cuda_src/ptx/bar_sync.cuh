// A barrier among some warps of a block (PTX ISA, "bar"); barrier 0 is __syncthreads.
#pragma once

__device__ __forceinline__ void bar_sync(int barrier, int num_threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(num_threads) : "memory");
}

// Counts this warp in without waiting.
__device__ __forceinline__ void bar_arrive(int barrier, int num_threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(num_threads) : "memory");
}
