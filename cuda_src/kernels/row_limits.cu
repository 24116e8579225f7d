// What a row's scores have to exceed: y = m + ln(tau * l), as a float (int4) or as an integer threshold (int8).
//
// m, l float32 [batch, num_heads, seqlen_q]; q_scale float32 [batch, num_heads, positions], k_scale [batch,
// num_kv_heads]; tau: thresholds[head] when not null, else `threshold`. limits [batch, num_heads, positions]: float y,
// or int32 T = floor(y / (softmax_scale * q_scale * k_scale)) clamped to +-2^30; -inf or SELECT_ALL selects every
// visible block, +inf or SELECT_NONE never votes.
// CAPPED: scores are capped, m and l are those of capped scores, and y is the uncapped score that belongs to the
// limit, less the row's shift, float32 [batch, num_heads, seqlen_q].
// Grid: (positions / 128, num_heads, batch) CTAs of 128 threads, one a row.
#include "tile/row_map.cuh"
#include "tile/shape.cuh"

constexpr float LIMIT_CLAMP = 1073741824.f;  // 2^30

// What an uncapped score has to exceed for its capped one to exceed y; +inf: none does, -inf: all do.
__device__ __forceinline__ float uncap(float y, float softcap) {
  const float ratio = __fdiv_rn(y, softcap);
  return ratio >= 1.f ? INFINITY : ratio <= -1.f ? -INFINITY : softcap * atanhf(ratio);
}

// Whether query_stride tests the row: every s-th of its block, or all of a block that holds one of the last full_rows.
__device__ __forceinline__ bool is_tested(const Shape& shape, int row, int block_q) {
  const int in_block = row % block_q, block_end = min(row - in_block + block_q, shape.seqlen_q);
  return in_block % shape.query_stride == 0 || block_end > shape.seqlen_q - shape.full_rows;
}

template <bool INTEGER, bool CAPPED = false>
__global__ void __launch_bounds__(128)
    row_limits(const float* m_gmem, const float* l_gmem, const float* q_scale_gmem, const float* k_scale_gmem,
               const float* thresholds_gmem, float threshold, void* limits_gmem, Shape shape, RowMap map,
               int block_q, float softmax_scale, float softcap, const float* shift_gmem) {
  const int position = blockIdx.x * 128 + threadIdx.x, row = map.row(position), head = blockIdx.y, batch = blockIdx.z;
  const int64_t head_index = int64_t(batch) * shape.num_heads + head;
  const int64_t padded_index = head_index * map.num_positions + position;
  const Shape sequence = shape.of_sequence(batch);
  float y = INFINITY;
  const bool present = row >= 0 && (!Shape::HAS_LENGTHS || row < sequence.seqlen_q);
  if (present && sequence.sees_a_key(row) && is_tested(sequence, row, block_q)) {
    const float tau = thresholds_gmem != nullptr ? thresholds_gmem[head] : threshold;
    const float m = m_gmem[head_index * shape.seqlen_q + row], l = l_gmem[head_index * shape.seqlen_q + row];
    const float shift = CAPPED ? shift_gmem[head_index * shape.seqlen_q + row] : 0.f;
    if (!(isfinite(m) && isfinite(l) && isfinite(shift) && tau > 0.f))
      y = -INFINITY;
    else if (tau < INFINITY)
      y = __fadd_rn(m, logf(__fmul_rn(tau, l)));
    if constexpr (CAPPED)
      if (isfinite(y)) y = uncap(y, softcap) - shift;
  }
  if constexpr (!INTEGER) {
    static_cast<float*>(limits_gmem)[padded_index] = y;
  } else {
    int limit = y > 0 ? SELECT_NONE : SELECT_ALL;
    if (isfinite(y)) {
      const float k_scale = k_scale_gmem[int64_t(batch) * shape.num_kv_heads + head / shape.group_size()];
      const float x = __fdiv_rn(y, __fmul_rn(__fmul_rn(softmax_scale, q_scale_gmem[padded_index]), k_scale));
      limit = isnan(x) ? SELECT_ALL : __float2int_rd(fmaxf(-LIMIT_CLAMP, fminf(LIMIT_CLAMP, x)));
    } else if (isnan(y)) {
      limit = SELECT_ALL;
    }
    static_cast<int*>(limits_gmem)[padded_index] = limit;
  }
}
