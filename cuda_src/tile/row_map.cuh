// Which query rows are tested, and where their codes, scales and limits are held. Mirrors salekit/plans.py (ROW_MAP).
//
// Rows before first_full_row are held one in `stride`, the others all; both parts start on a code tile. A position is
// that of codes, scales and limits; first_full_row is a multiple of the mask's block. Identity: {1, 0, 0, rows,
// padded}.
#pragma once
#include "tile/shape.cuh"

struct RowMap {
  int stride, first_full_row, first_full_position, num_rows, num_positions;

  __device__ bool is_strided(int position) const { return position < first_full_position; }

  // The row at a position, or -1: padding.
  __device__ int row(int position) const {
    const bool strided = is_strided(position);
    const int row = strided ? position * stride : first_full_row + position - first_full_position;
    return row < num_rows && (row < first_full_row || !strided) ? row : -1;
  }

  // The first row that the code tile at `position` stands for.
  __device__ int tile_begin(int position) const {
    return is_strided(position) ? position * stride : first_full_row + position - first_full_position;
  }

  // One past the last row that the code tile at `position` stands for, tested or not.
  __device__ int tile_end(int position) const {
    if (is_strided(position)) return min((position + CODE_TILE_ROWS) * stride, first_full_row);
    return first_full_row + position + CODE_TILE_ROWS - first_full_position;
  }
};
