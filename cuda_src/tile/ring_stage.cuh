// Where a ring of STAGES is, and the parity of its barriers there.
#pragma once
#include "tile/types.cuh"

template <int STAGES>
struct RingStage {
  int index = 0;
  uint32_t phase = 0;
  __device__ void advance() {
    if (++index == STAGES) index = 0, phase ^= 1;
  }
};
