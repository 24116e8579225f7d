// Lets the host read sizeof(SharedStorage) out of the compiled module: jit.py asks NVRTC for the lowered name of
// shared_bytes<sizeof(...)> and reads the number in it. The size is never computed twice.
#pragma once
template <unsigned BYTES>
__global__ void shared_bytes() {}
