// A strided 4-D tensor, passed by value. Strides count elements; the last axis is contiguous.
#pragma once
#include "tile/types.cuh"

struct TensorView {
  uint64_t pointer;
  int64_t stride_batch, stride_row, stride_head;

  template <typename T>
  __device__ T* row(int batch, int row_idx, int head) const {
    return reinterpret_cast<T*>(pointer) + batch * stride_batch + row_idx * stride_row + head * stride_head;
  }
};
