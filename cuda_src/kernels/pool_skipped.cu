// Pools the keys and values that the mask skips, weighted as each block's mean query would: one pool for what is skipped
// of 128 keys (docs/skipped-mass.md).
//
// For mean query q' and the skipped keys j of a group that all rows of the block see, with w = softmax(scale * q'.k_j):
// key sum w_j k_j, value sum w_j v_j, bias logsumexp(scale * q'.k_j) - scale * q'.key, spread scale^2 / 2 times the
// variance of the k_j by w, the same for all channels. Bias and spread are given in powers of two. A pool of nothing has
// key and value 0 and bias -inf. Elements of v that are not finite count as 0.
// mean [batch * num_kv_heads * queries, HEAD_DIM] in the order of tile/pools.cuh; k, v [batch, seqlen_k, num_kv_heads,
// HEAD_DIM] views; mask uint32 [batch, num_heads, num_q_blocks, num_words].
// Grid: (groups of 128 keys, runs of POOL_RUN strips) CTAs of 128 threads; a CTA keeps the group's keys and values and
// takes 64 mean queries at a time, a warp 16 of them. Nothing is pooled where a strip's last block does not see the group.
#include "ptx/ex2.cuh"
#include "tile/pools.cuh"
#include "tile/tensor_view.cuh"
#include "tile/warp_products.cuh"

constexpr int POOL_THREADS = 128;
constexpr int POOL_HALF = 64;                  // mean queries at a time: half a strip
constexpr int POOL_TILES = POOL_KEYS / 8;      // n8 tiles of the scores
constexpr int POOL_STEPS = POOL_KEYS / 16;     // of the products with keys and values

template <int HEAD_DIM>
struct PoolStorage {
  // Of each warp its own rows, and next to them those that come next; what it stores, too.
  alignas(128) uint16_t Q_smem[2][POOL_HALF * HEAD_DIM];
  alignas(128) uint16_t K_smem[POOL_KEYS * HEAD_DIM];
  alignas(128) uint16_t V_smem[POOL_KEYS * HEAD_DIM];
  alignas(16) float norms_smem[POOL_KEYS];  // |k_j|^2
};

// |k_j|^2 of this thread's key.
template <int HEAD_DIM, typename Element>
__device__ __forceinline__ float squared_norm(const uint8_t* tile, int row) {
  float sum = 0;
#pragma unroll
  for (int chunk = 0; chunk < HEAD_DIM / 8; ++chunk) {
    const uint4 words = *reinterpret_cast<const uint4*>(tile + chunk_offset<HEAD_DIM>(row, chunk));
    auto add = [&](uint32_t word) {
      const float2 x = unpack<Element>(word);
      sum = fmaf(x.x, x.x, fmaf(x.y, x.y, sum));
    };
    add(words.x), add(words.y), add(words.z), add(words.w);
  }
  return sum;
}

// Elements of this thread's row that are not finite become 0.
template <int HEAD_DIM, typename Element>
__device__ __forceinline__ void drop_infinite(uint8_t* tile, int row) {
#pragma unroll
  for (int chunk = 0; chunk < HEAD_DIM / 8; ++chunk) {
    uint4* place = reinterpret_cast<uint4*>(tile + chunk_offset<HEAD_DIM>(row, chunk));
    const uint4 words = *place;
    auto finite = [](uint32_t word) {
      if ((word & 0x7FFF) >= Element::INFINITE) word &= 0xFFFF0000;
      return (word >> 16 & 0x7FFF) >= Element::INFINITE ? word & 0xFFFF : word;
    };
    const uint4 clean = {finite(words.x), finite(words.y), finite(words.z), finite(words.w)};
    if (clean.x != words.x || clean.y != words.y || clean.z != words.z || clean.w != words.w) *place = clean;
  }
}

// This warp's 16 rows, times factor, through its rows of shared memory to where their pools lie. Returns of this lane's
// two rows what the products of the rounded elements with the rows before, and the sums of squares of the unrounded ones
// are, over the quad.
template <int HEAD_DIM, typename Element>
__device__ __forceinline__ void finish_rows(float (&o)[HEAD_DIM / 8][4], const float (&factor)[2], uint8_t* rows_smem,
                                            float (&dot)[2], float (&squares)[2]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    dot[r] = squares[r] = 0;
#pragma unroll
    for (int n = 0; n < HEAD_DIM / 8; ++n) {
      uint32_t* place =
          reinterpret_cast<uint32_t*>(rows_smem + chunk_offset<HEAD_DIM>(lane / 4 + 8 * r, n) + lane % 4 * 4);
      const float low = o[n][2 * r] * factor[r], high = o[n][2 * r + 1] * factor[r];
      squares[r] = fmaf(low, low, fmaf(high, high, squares[r]));
      const float2 before = unpack<Element>(*place);
      *place = Element::pack(low, high);
      const float2 now = unpack<Element>(*place);
      dot[r] = fmaf(before.x, now.x, fmaf(before.y, now.y, dot[r]));
    }
    dot[r] = quad_sum(dot[r]);
    squares[r] = quad_sum(squares[r]);
  }
}

// The warp's rows go to pools `stride` elements apart; those from `present` on do not.
template <int HEAD_DIM>
__device__ __forceinline__ void store_rows(uint16_t* pools_gmem, int64_t stride, int present,
                                           const uint8_t* rows_smem) {
  constexpr int CHUNKS = HEAD_DIM / 8;
  const int lane = threadIdx.x % 32;
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 16; i += 32 / CHUNKS) {
    const int row = i + lane / CHUNKS, chunk = lane % CHUNKS;
    if (row < present)
      *reinterpret_cast<uint4*>(pools_gmem + row * stride + chunk * 8) =
          *reinterpret_cast<const uint4*>(rows_smem + chunk_offset<HEAD_DIM>(row, chunk));
  }
  __syncwarp();
}

template <int HEAD_DIM, int BLOCK_Q, typename Element>
__global__ void __launch_bounds__(POOL_THREADS, 2)
    pool_skipped(const uint16_t* mean_gmem, TensorView k, TensorView v, const uint32_t* mask_gmem, int expand_log2,
                 uint16_t* pool_keys_gmem, uint16_t* pool_values_gmem, PoolTerms* terms_gmem, Shape shape,
                 float softmax_scale, int first_strip, int num_strips, int padded_pools) {
  using Query = PoolQuery<BLOCK_Q>;
  extern __shared__ __align__(128) uint8_t dynamic_smem[];
  PoolStorage<HEAD_DIM>& smem = *reinterpret_cast<PoolStorage<HEAD_DIM>*>(dynamic_smem);
  const int group = blockIdx.x, first_key = group * POOL_KEYS;
  const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * 16;
  const uint32_t k_smem = shared_address(smem.K_smem), v_smem = shared_address(smem.V_smem);
  const int present = shape.seqlen_k - first_key;
  const float scale_log2 = softmax_scale * LOG2_E;
  const int begin = blockIdx.y * POOL_RUN * 2, end = min(begin + POOL_RUN * 2, num_strips * 2);  // half strips

  // Starts the copy of this warp's mean queries.
  auto load_queries = [&](int half) {
    if (half < end) {
      const Query first(shape, first_strip + half / 2, half % 2 * POOL_HALF + warp_row);
      load_rows<HEAD_DIM, 32, 16>(lane, shared_address(smem.Q_smem[half % 2]) + warp_row * HEAD_DIM * 2,
                                  mean_gmem + first.index * HEAD_DIM, HEAD_DIM, Query::count(shape) - first.number);
    }
    cp_async_commit();
  };

  int held = -1;  // the KV head whose keys and values are there
  load_queries(begin);
#pragma unroll 1
  for (int half = begin; half < end; ++half) {
    const Query first(shape, first_strip + half / 2, 0);
    const int num_queries = min(POOL_STRIP, Query::count(shape) - first.number);
    const int kv_index = first.batch * shape.num_kv_heads + first.kv_head;
    const bool seen = first_key < Query(shape, first_strip + half / 2, num_queries - 1).visible_to_all(shape);
    if (seen && kv_index != held) {
      __syncthreads();
      load_rows<HEAD_DIM, POOL_THREADS, POOL_KEYS>(
          threadIdx.x, k_smem, k.row<const uint16_t>(first.batch, first_key, first.kv_head), k.stride_row, present);
      load_rows<HEAD_DIM, POOL_THREADS, POOL_KEYS>(
          threadIdx.x, v_smem, v.row<const uint16_t>(first.batch, first_key, first.kv_head), v.stride_row, present);
      cp_async_commit();
      cp_async_wait<0>();
      __syncthreads();
      drop_infinite<HEAD_DIM, Element>(reinterpret_cast<uint8_t*>(smem.K_smem), threadIdx.x);
      smem.norms_smem[threadIdx.x] =
          squared_norm<HEAD_DIM, Element>(reinterpret_cast<const uint8_t*>(smem.K_smem), threadIdx.x);
      drop_infinite<HEAD_DIM, Element>(reinterpret_cast<uint8_t*>(smem.V_smem), threadIdx.x);
      __syncthreads();
      held = kv_index;
    }
    cp_async_wait<0>();
    __syncwarp();
    load_queries(half + 1);
    if (!seen) continue;

    // Weights, from the scores of skipped keys.
    const int row = half % 2 * POOL_HALF + warp_row;  // of the strip: this warp's first
    const uint32_t q_smem = shared_address(smem.Q_smem[half % 2]) + warp_row * HEAD_DIM * 2;
    uint8_t* rows_smem = reinterpret_cast<uint8_t*>(smem.Q_smem[half % 2]) + warp_row * HEAD_DIM * 2;
    uint32_t skipped[2];
#pragma unroll
    for (int r = 0; r < 2; ++r)
      skipped[r] = skipped_slots(Query(shape, first_strip + half / 2, row + lane / 4 + 8 * r), mask_gmem, expand_log2,
                                 group, shape);
    float s[1][POOL_TILES][4];
    multiply_qk<HEAD_DIM, Element>(s, q_smem, k_smem);
    // Keys that are not pooled score -inf.
    if (present < POOL_KEYS) {
#pragma unroll
      for (int j = 0; j < POOL_TILES; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (j * 8 + lane % 4 * 2 + i % 2 >= present) s[0][j][i] = -INFINITY;
    }
    float base[2], total[2], norm[2];  // base: the largest score, as a power of two
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int slot = 0; slot < POOL_SLOTS; ++slot)
        if (!(skipped[r] >> slot & 1))
#pragma unroll
          for (int j = slot * 4; j < slot * 4 + 4; ++j) s[0][j][2 * r] = s[0][j][2 * r + 1] = -INFINITY;
      float top = s[0][0][2 * r];
#pragma unroll
      for (int j = 0; j < POOL_TILES; ++j) top = fmaxf(top, fmaxf(s[0][j][2 * r], s[0][j][2 * r + 1]));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
      base[r] = top == -INFINITY ? 0.f : __fmul_ru(top, scale_log2);
#pragma unroll
      for (int j = 0; j < POOL_TILES; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) s[0][j][2 * r + i] = ex2(fmaf(s[0][j][2 * r + i], scale_log2, -base[r]));
    }
    // The sums are those of the rounded weights, which the products use.
    uint32_t p[POOL_STEPS][1][4];
#pragma unroll
    for (int step = 0; step < POOL_STEPS; ++step) round_p<Element>(p[step][0], s[0], step);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      total[r] = norm[r] = 0;
#pragma unroll
      for (int j = 0; j < POOL_TILES; ++j) {
        const float2 weight = unpack<Element>(p[j / 2][0][j % 2 * 2 + r]);
        const float2 squares = *reinterpret_cast<const float2*>(&smem.norms_smem[j * 8 + lane % 4 * 2]);
        total[r] += weight.x + weight.y;
        norm[r] = fmaf(weight.x, squares.x, fmaf(weight.y, squares.y, norm[r]));
      }
      total[r] = quad_sum(total[r]);
      norm[r] = quad_sum(norm[r]);
    }
    float factor[2], mass[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      factor[r] = total[r] == 0.f ? 0.f : 1.f / total[r];
      norm[r] *= factor[r];
      mass[r] = pool_mass(total[r], base[r]);
    }
    const int64_t stride = int64_t(padded_pools) * HEAD_DIM;
    const int64_t place = (int64_t(half / 2) * POOL_STRIP + row) * padded_pools + group;  // of the first row's pool

    float o[1][HEAD_DIM / 8][4], dot[2], squares[2];
    clear(o);
    multiply_pv<HEAD_DIM, Element>(o, p, k_smem);
    finish_rows<HEAD_DIM, Element>(o[0], factor, rows_smem, dot, squares);
    store_rows<HEAD_DIM>(pool_keys_gmem + place * HEAD_DIM, stride, num_queries - row, rows_smem);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int own = lane / 4 + 8 * r;
      if (lane % 4 == 0 && row + own < num_queries)
        terms_gmem[place + int64_t(own) * padded_pools] =
            pool_terms(mass[r], dot[r], norm[r], squares[r], HEAD_DIM, softmax_scale);
    }

    clear(o);
    multiply_pv<HEAD_DIM, Element>(o, p, v_smem);
    finish_rows<HEAD_DIM, Element>(o[0], factor, rows_smem, dot, squares);
    store_rows<HEAD_DIM>(pool_values_gmem + place * HEAD_DIM, stride, num_queries - row, rows_smem);
  }
}
