// What low-bit attention needs to know of q, k and v before it quantises them, from the partials of reduce_channels.
//
// Per KV head and channel: the mean of k; balance, the two factors that share the sizes of q and k - mean between them:
// k's f = sqrt(max|q| / max|k - mean|), q's 1 / f (1 where a maximum is below 2^-100 or not finite); and v's e4m3
// factor and scale, which take the largest |v| to 448. partials float32 [batch, heads, num_chunks, 4, HEAD_DIM] of
// each; k_mean, v_factor, v_scale float32 [batch, num_kv_heads, HEAD_DIM]; balance [batch, num_kv_heads, 2, HEAD_DIM]:
// of k, of q. per_key: 1 / seqlen_k. q_lengths, k_lengths: how many rows of each batch the chunks, of chunk_rows, are
// of, where they have their own (tile/shape.cuh). Grid: (num_kv_heads, batch) CTAs of 8 * HEAD_DIM threads, an eighth of the chunks
// each.
#include "tile/codes.cuh"

constexpr int BALANCE_PARTS = 8;
constexpr float E4M3_MAX = 448.f;

// The sum, the smallest and the largest of a channel.
template <int HEAD_DIM>
struct Extremes {
  double sum = 0;
  float low = INFINITY, high = -INFINITY;

  // Of num_heads heads; of each the first `valid` of num_chunks chunks hold something.
  __device__ void add(const float* partials, int num_heads, int num_chunks, int valid, int part) {
#pragma unroll 4
    for (int chunk = part; chunk < num_heads * num_chunks; chunk += BALANCE_PARTS) {
      if (Shape::HAS_LENGTHS && chunk % num_chunks >= valid) continue;
      const float* of_chunk = partials + chunk * 4 * HEAD_DIM;
      sum += of_chunk[0];
      low = fminf(low, of_chunk[HEAD_DIM]);
      high = fmaxf(high, of_chunk[2 * HEAD_DIM]);
    }
  }

  // Combines the parts of each channel; all threads call it and get the result.
  __device__ void combine(double (*sums_smem)[HEAD_DIM], float (*extremes_smem)[BALANCE_PARTS][HEAD_DIM], int channel,
                          int part) {
    __syncthreads();
    sums_smem[part][channel] = sum;
    extremes_smem[0][part][channel] = low;
    extremes_smem[1][part][channel] = high;
    __syncthreads();
    sum = 0;
#pragma unroll
    for (int i = 0; i < BALANCE_PARTS; ++i) {
      sum += sums_smem[i][channel];
      low = fminf(low, extremes_smem[0][i][channel]);
      high = fmaxf(high, extremes_smem[1][i][channel]);
    }
  }

  // Largest |x - centre| as bits; a NaN among the x is in their sum.
  __device__ uint32_t largest(float centre) const {
    if (isnan(sum)) return magnitude_bits(__uint_as_float(0x7FC00000));
    return max(magnitude_bits(__fsub_rn(high, centre)), magnitude_bits(__fsub_rn(low, centre)));
  }
};

template <int HEAD_DIM>
__global__ void __launch_bounds__(BALANCE_PARTS * HEAD_DIM)
    finish_balance(const float* q_partials, const float* k_partials, const float* v_partials, float* k_mean_gmem,
                   float* balance_gmem, float* v_factor_gmem, float* v_scale_gmem, int group_size, int q_chunks,
                   int k_chunks, double per_key, const int* q_lengths, const int* k_lengths, int chunk_rows) {
  __shared__ double sums_smem[BALANCE_PARTS][HEAD_DIM];
  __shared__ float extremes_smem[2][BALANCE_PARTS][HEAD_DIM];
  const int channel = threadIdx.x % HEAD_DIM, part = threadIdx.x / HEAD_DIM;
  const int64_t kv_head = int64_t(blockIdx.y) * gridDim.x + blockIdx.x;

  int q_valid = q_chunks, k_valid = k_chunks;
  if constexpr (Shape::HAS_LENGTHS) {
    const int num_keys = k_lengths[blockIdx.y];
    q_valid = (q_lengths[blockIdx.y] + chunk_rows - 1) / chunk_rows;
    k_valid = (num_keys + chunk_rows - 1) / chunk_rows;
    per_key = num_keys == 0 ? 0. : __drcp_rn(num_keys);
  }
  Extremes<HEAD_DIM> q, k, v;  // q's heads are neighbours: their chunks are one list
  q.add(q_partials + kv_head * group_size * q_chunks * 4 * HEAD_DIM + channel, group_size, q_chunks, q_valid, part);
  k.add(k_partials + kv_head * k_chunks * 4 * HEAD_DIM + channel, 1, k_chunks, k_valid, part);
  v.add(v_partials + kv_head * k_chunks * 4 * HEAD_DIM + channel, 1, k_chunks, k_valid, part);
  q.combine(sums_smem, extremes_smem, channel, part);
  k.combine(sums_smem, extremes_smem, channel, part);
  v.combine(sums_smem, extremes_smem, channel, part);
  if (part != 0) return;

  const float mean = float(k.sum * per_key);
  const uint32_t q_bits = q.largest(0.f), k_bits = isnan(mean) ? INFINITE_BITS : k.largest(mean);
  const float q_amax = __uint_as_float(q_bits), k_amax = __uint_as_float(k_bits);
  const bool usable = q_bits < INFINITE_BITS && k_bits < INFINITE_BITS && q_amax >= ZERO_GROUP && k_amax >= ZERO_GROUP;
  k_mean_gmem[kv_head * HEAD_DIM + channel] = mean;
  float* balance = balance_gmem + kv_head * 2 * HEAD_DIM + channel;
  balance[0] = usable ? __fsqrt_rn(__fdiv_rn(q_amax, k_amax)) : 1.f;
  balance[HEAD_DIM] = usable ? __fsqrt_rn(__fdiv_rn(k_amax, q_amax)) : 1.f;
  const GroupScale v_group(v.largest(0.f), E4M3_MAX);
  v_factor_gmem[kv_head * HEAD_DIM + channel] = v_group.factor;
  v_scale_gmem[kv_head * HEAD_DIM + channel] = v_group.scale;
}
