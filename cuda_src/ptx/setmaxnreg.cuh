// Registers moved between warpgroups (PTX ISA, "setmaxnreg"): all warps of a warpgroup execute it; needs a register cap
// at entry (__launch_bounds__ with a block count). COUNT is a multiple of 8 from 24 to 256.
#pragma once

template <int COUNT>
__device__ __forceinline__ void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

template <int COUNT>
__device__ __forceinline__ void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
