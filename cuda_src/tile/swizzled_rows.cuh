// Rows of 16-bit elements in shared memory as ldmatrix reads them without bank conflicts.
#pragma once
#include "ptx/cp_async.cuh"

// Where 16-byte chunk `chunk` of row `row` lies in a tile: bits 4 to 6 of the address are XORed with the row, so that
// eight rows at one chunk, or eight chunks of one row, touch all banks once.
template <int HEAD_DIM>
__device__ __forceinline__ uint32_t chunk_offset(int row, int chunk) {
  return row * (2 * HEAD_DIM) + ((chunk ^ (row & 7)) << 4);
}

// `thread` of NUM_THREADS copies its share of NUM_ROWS rows to shared memory, rows from `present` on as zeros.
template <int HEAD_DIM, int NUM_THREADS, int NUM_ROWS>
__device__ __forceinline__ void load_rows(int thread, uint32_t smem_address, const uint16_t* gmem, int64_t stride_row,
                                          int present) {
  constexpr int CHUNKS = HEAD_DIM / 8;
  constexpr int STEP = NUM_THREADS / CHUNKS;
  static_assert(NUM_THREADS % CHUNKS == 0 && NUM_ROWS % STEP == 0, "the threads copy the same number of chunks each");
  asm volatile("" : "+r"(thread), "+l"(stride_row));  // so that no address is kept, in registers, across a main loop
  const int row = thread / CHUNKS, chunk = thread % CHUNKS;
  const uint16_t* source = gmem + row * stride_row + chunk * 8;
#pragma unroll 2
  for (int i = 0; i < NUM_ROWS; i += STEP) {
    cp_async_16(smem_address + chunk_offset<HEAD_DIM>(row + i, chunk), source, row + i < present);
    source += STEP * stride_row;
  }
}
