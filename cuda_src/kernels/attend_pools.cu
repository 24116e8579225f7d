// Adds the pools of skipped keys to an attention's output: out and lse over the selected keys become those over selected
// keys and pools (docs/skipped-mass.md).
//
// A row of q that is not finite keeps its output. A pool joins any other row's softmax like a key, its score raised by bias + min(MOST_SECOND_ORDER, |q - q'|^2 * spread), q' the
// mean query of the row's block. q, out [batch, seqlen_q, num_heads, HEAD_DIM] views; lse float32 [batch, num_heads,
// seqlen_q], natural log; mean, pools and terms as pool_skipped leaves them.
// Grid: the mean queries of the launch's strips, the last ones first; a CTA of BLOCK_Q threads has the rows of one block,
// a warp 32 of them.
#include "tile/online_softmax.cuh"
#include "tile/pools.cuh"
#include "tile/tensor_view.cuh"
#include "tile/warp_products.cuh"

constexpr int POOL_TILE = 32;  // pools of a tile
constexpr int POOL_STAGES = 2;
constexpr int WARP_ROWS = 32;
constexpr int ROW_TILES = WARP_ROWS / 16;

template <int HEAD_DIM, int BLOCK_Q>
struct AttendPoolsStorage {
  alignas(128) uint16_t Q_smem[BLOCK_Q * HEAD_DIM];  // what the pools contribute too, at the end
  alignas(128) uint16_t K_smem[POOL_STAGES][POOL_TILE * HEAD_DIM];
  alignas(128) uint16_t V_smem[POOL_STAGES][POOL_TILE * HEAD_DIM];
  alignas(16) PoolTerms terms_smem[POOL_STAGES][POOL_TILE];
  // Of each row: |q - q'|^2; at the end, what the output so far is multiplied by.
  float rows_smem[BLOCK_Q];
};

// Starts a tile's copies. Pools from num_pools on are keys and values of 0; their terms are not looked at.
template <int HEAD_DIM, int BLOCK_Q>
__device__ __forceinline__ void load_pools(AttendPoolsStorage<HEAD_DIM, BLOCK_Q>& smem, int stage,
                                           const uint16_t* pool_keys_gmem, const uint16_t* pool_values_gmem,
                                           const PoolTerms* terms_gmem, int64_t first_pool, int num_pools) {
  load_rows<HEAD_DIM, BLOCK_Q, POOL_TILE>(threadIdx.x, shared_address(smem.K_smem[stage]),
                                          pool_keys_gmem + first_pool * HEAD_DIM, HEAD_DIM, num_pools);
  load_rows<HEAD_DIM, BLOCK_Q, POOL_TILE>(threadIdx.x, shared_address(smem.V_smem[stage]),
                                          pool_values_gmem + first_pool * HEAD_DIM, HEAD_DIM, num_pools);
  if (threadIdx.x < POOL_TILE / 2)
    cp_async_16(shared_address(&smem.terms_smem[stage][2 * threadIdx.x]), terms_gmem + first_pool + 2 * threadIdx.x);
}

// |q - q'|^2 of the warp's rows.
template <int HEAD_DIM, typename Element>
__device__ __forceinline__ void square_distances(float* distances_smem, const uint8_t* rows_smem,
                                                 const uint16_t* mean_gmem) {
  const int lane = threadIdx.x % 32;
  float distance[ROW_TILES][2] = {};
  for (int chunk = 0; chunk < HEAD_DIM / 8; ++chunk) {
    const float2 mean = unpack<Element>(*reinterpret_cast<const uint32_t*>(mean_gmem + chunk * 8 + lane % 4 * 2));
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const uint32_t offset = chunk_offset<HEAD_DIM>(16 * m + 8 * r + lane / 4, chunk) + lane % 4 * 4;
        const float2 x = unpack<Element>(*reinterpret_cast<const uint32_t*>(rows_smem + offset));
        distance[m][r] = fmaf(x.x - mean.x, x.x - mean.x, fmaf(x.y - mean.y, x.y - mean.y, distance[m][r]));
      }
  }
#pragma unroll
  for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int step = 1; step < 4; step *= 2) distance[m][r] += __shfl_xor_sync(~0u, distance[m][r], step);
      if (lane % 4 == 0) distances_smem[16 * m + 8 * r + lane / 4] = distance[m][r];
    }
  __syncwarp();
}

template <int HEAD_DIM, int BLOCK_Q, typename Element>
__global__ void __launch_bounds__(BLOCK_Q, 256 / BLOCK_Q)
    attend_pools(TensorView q, TensorView out, float* lse_gmem, const uint16_t* mean_gmem,
                 const uint16_t* pool_keys_gmem, const uint16_t* pool_values_gmem, const PoolTerms* terms_gmem,
                 Shape shape, float softmax_scale, int first_strip, int padded_pools) {
  using Storage = AttendPoolsStorage<HEAD_DIM, BLOCK_Q>;
  constexpr int KEY_TILES = POOL_TILE / 8;
  extern __shared__ __align__(128) uint8_t dynamic_smem[];
  Storage& smem = *reinterpret_cast<Storage*>(dynamic_smem);
  const int place = gridDim.x - 1 - blockIdx.x;  // among the launch's mean queries
  const PoolQuery<BLOCK_Q> query(shape, first_strip + place / POOL_STRIP, place % POOL_STRIP);
  const int num_pools = ceil_div(query.visible_to_all(shape), POOL_KEYS);
  if (num_pools == 0) return;

  const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * WARP_ROWS;
  const uint32_t q_smem = shared_address(smem.Q_smem) + warp_row * HEAD_DIM * 2;
  uint8_t* rows_smem = reinterpret_cast<uint8_t*>(smem.Q_smem) + warp_row * HEAD_DIM * 2;
  const int64_t first_pool = int64_t(place) * padded_pools;
  const int num_rows = min(BLOCK_Q, shape.seqlen_q - query.first_row());
  load_rows<HEAD_DIM, BLOCK_Q, BLOCK_Q>(threadIdx.x, shared_address(smem.Q_smem),
                                        q.row<const uint16_t>(query.batch, query.first_row(), query.head),
                                        q.stride_row, num_rows);
  cp_async_commit();
  // Of tile `tile`, if there is one; one group of copies in any case.
  auto load_tile = [&](int tile, int stage) {
    const int first = tile * POOL_TILE;
    if (first < num_pools)
      load_pools(smem, stage, pool_keys_gmem, pool_values_gmem, terms_gmem, first_pool + first, num_pools - first);
    cp_async_commit();
  };
#pragma unroll
  for (int tile = 0; tile < POOL_STAGES - 1; ++tile) load_tile(tile, tile);
  cp_async_wait<POOL_STAGES - 1>();
  __syncthreads();
  square_distances<HEAD_DIM, Element>(smem.rows_smem + warp_row, rows_smem, mean_gmem + query.index * HEAD_DIM);

  const float scale_log2 = softmax_scale * LOG2_E;
  float o[ROW_TILES][HEAD_DIM / 8][4];
  clear(o);
  OnlineSoftmax<ROW_TILES> softmax;
  int stage = 0;
#pragma unroll 1
  for (int tile = 0; tile * POOL_TILE < num_pools; ++tile) {
    // This tile is there, and every warp is done with the one before.
    cp_async_wait<POOL_STAGES - 2>();
    __syncthreads();
    load_tile(tile + POOL_STAGES - 1, stage == 0 ? POOL_STAGES - 1 : stage - 1);

    float s[ROW_TILES][KEY_TILES][4];
    multiply_qk<HEAD_DIM, Element>(s, q_smem, shared_address(smem.K_smem[stage]));
    float distance[ROW_TILES][2];
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) distance[m][r] = smem.rows_smem[warp_row + 16 * m + 8 * r + lane / 4];
#pragma unroll
    for (int j = 0; j < KEY_TILES; ++j) {
      const float4 terms = *reinterpret_cast<const float4*>(&smem.terms_smem[stage][j * 8 + lane % 4 * 2]);
#pragma unroll
      for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          s[m][j][2 * r] = fmaf(s[m][j][2 * r], scale_log2,
                                terms.x + fminf(distance[m][r] * terms.y, MOST_SECOND_ORDER));
          s[m][j][2 * r + 1] = fmaf(s[m][j][2 * r + 1], scale_log2,
                                    terms.z + fminf(distance[m][r] * terms.w, MOST_SECOND_ORDER));
        }
    }
    const int left = num_pools - tile * POOL_TILE - lane % 4 * 2;
    if (left < POOL_TILE) {  // absent pools
#pragma unroll
      for (int j = 0; j < KEY_TILES; ++j)
#pragma unroll
        for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            if (j * 8 + i % 2 >= left) s[m][j][i] = -INFINITY;
    }
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m) {
      float rescale[2];
      const bool moved = softmax.update(m, s[m], 1.f, rescale);
      if (__any_sync(~0u, moved)) {  // else they are all 1
#pragma unroll
        for (int n = 0; n < HEAD_DIM / 8; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) o[m][n][i] *= rescale[i / 2];
      }
    }
    uint32_t p[POOL_TILE / 16][ROW_TILES][4];
#pragma unroll
    for (int step = 0; step < POOL_TILE / 16; ++step)
#pragma unroll
      for (int m = 0; m < ROW_TILES; ++m) round_p<Element>(p[step][m], s[m], step);
    multiply_pv<HEAD_DIM, Element>(o, p, shared_address(smem.V_smem[stage]));
    if (++stage == POOL_STAGES) stage = 0;
  }

  // Merge: each row's outputs by their share of the mass.
  cp_async_wait<0>();
  float* own_lse_gmem = lse_gmem + int64_t(query.batch * shape.num_heads + query.head) * shape.seqlen_q + query.first_row();
#pragma unroll
  for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = warp_row + 16 * m + 8 * r + lane / 4;
      const float sum = softmax.total(m, r);
      const float before = row < num_rows ? own_lse_gmem[row] * LOG2_E : -INFINITY;
      const float pools = sum == 0.f ? -INFINITY : softmax.max[m][r] + __log2f(sum);
      const float top = fmaxf(before, pools);
      const float base = top == -INFINITY ? 0.f : top;
      const float ours = ex2(before - base), theirs = ex2(pools - base);
      const float inverse = 1.f / (ours + theirs);  // of NaN if the row is
      const bool unchanged = pools == -INFINITY || !isfinite(smem.rows_smem[row]);
      const float add = unchanged ? 0.f : theirs * inverse / sum;
      __syncwarp();
      if (lane % 4 == 0) {
        smem.rows_smem[row] = unchanged ? 1.f : ours * inverse;
        if (row < num_rows && !unchanged) own_lse_gmem[row] = (base + __log2f(ours + theirs)) * (1.f / LOG2_E);
      }
#pragma unroll
      for (int n = 0; n < HEAD_DIM / 8; ++n)
        *reinterpret_cast<uint32_t*>(reinterpret_cast<uint8_t*>(smem.Q_smem) + chunk_offset<HEAD_DIM>(row, n) +
                                     lane % 4 * 4) =
            Element::pack(unchanged ? 0.f : o[m][n][2 * r] * add, unchanged ? 0.f : o[m][n][2 * r + 1] * add);
    }
  __syncwarp();
  constexpr int CHUNKS = HEAD_DIM / 8;
  uint16_t* out_gmem = out.row<uint16_t>(query.batch, query.first_row(), query.head);
#pragma unroll
  for (int i = 0; i < WARP_ROWS; i += 32 / CHUNKS) {
    const int row = warp_row + i + lane / CHUNKS, chunk = lane % CHUNKS;
    if (row >= num_rows) continue;
    const float keep = smem.rows_smem[row];
    const uint4 added = *reinterpret_cast<const uint4*>(reinterpret_cast<uint8_t*>(smem.Q_smem) +
                                                        chunk_offset<HEAD_DIM>(row, chunk));
    uint4* target = reinterpret_cast<uint4*>(out_gmem + row * out.stride_row + chunk * 8);
    uint4 data = *target;
    auto merge = [&](uint32_t& word, uint32_t addend) {
      const float2 x = unpack<Element>(word), y = unpack<Element>(addend);
      word = Element::pack(fmaf(x.x, keep, y.x), fmaf(x.y, keep, y.y));
    };
    merge(data.x, added.x), merge(data.y, added.y), merge(data.z, added.z), merge(data.w, added.w);
    *target = data;
  }
}
