// Products of codes in tiles by mma.sync: the rows of a CTA, key tiles through a ring, 32-key blocks of scores.
//
// A CTA of 128 threads has a code tile of 128 query rows of a head, a warp 32 of them, and walks over key tiles of 64
// keys. Scores of a warp's 16-row tile and a 32-key block come as tile/votes.cuh wants them.
#pragma once
#include "ptx/cp_async.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/mma.cuh"
#include "tile/shape.cuh"
#include "tile/swizzle.cuh"

struct Int8 {
  static constexpr int BITS = 8;
  static constexpr bool GROUPED = false;
};
struct Int4 {
  static constexpr int BITS = 4;
  static constexpr bool GROUPED = true;
};
struct Int4InBytes {
  static constexpr int BITS = 8;
  static constexpr bool GROUPED = true;
};

constexpr int PRODUCT_THREADS = 128;
constexpr int PRODUCT_TILE_K = 64;
constexpr int PRODUCT_BLOCKS = PRODUCT_TILE_K / KEY_BLOCK;  // 32-key blocks of a tile
constexpr int PRODUCT_TILES_PER_WORD = 32 / PRODUCT_BLOCKS;

// The key tiles in flight, with the corrections and scales of their keys where scales are grouped, and what each warp
// found: of the last finished 32 blocks and of the 32 before.
template <int ROW_BYTES, bool GROUPED, typename Found>
struct KeyRing {
  // Three CTAs have to fit in the 100 KB of sm_86 and sm_89, two where rows are 256 bytes.
  static constexpr int STAGES = ROW_BYTES == 256 ? 2 : ROW_BYTES == 128 ? 3 : 4;
  alignas(128) uint8_t K_smem[STAGES][PRODUCT_TILE_K * ROW_BYTES];
  alignas(16) float correction_smem[STAGES][GROUPED ? PRODUCT_TILE_K : 4];
  alignas(16) float k_scale_smem[STAGES][GROUPED ? PRODUCT_TILE_K / 8 : 4];
  Found found[2][PRODUCT_THREADS / 32];
};

// Which rows of which head a CTA and a warp have: the rows that see most first.
struct CodeRows {
  int num_code_tiles, code_tile;
  int head, kv_head;  // of all batches
  int warp_row;       // first of the warp's 32
  int num_tiles;      // key tiles that the code tile sees

  template <bool WINDOWED = false>
  __device__ __forceinline__ static CodeRows of(const Shape& shape) {
    CodeRows rows(shape);
    if (WINDOWED) {
      const Shape sequence = shape.of_sequence(rows.head / shape.num_heads);
      rows.num_tiles = ceil_div(sequence.visible_end<true>(rows.last_row()), PRODUCT_TILE_K);
    }
    return rows;
  }

  __device__ __forceinline__ int last_row() const { return (code_tile + 1) * CODE_TILE_ROWS - 1; }

  __device__ __forceinline__ explicit CodeRows(const Shape& shape) {
    const int num_heads_all = shape.batch * shape.num_heads;
    num_code_tiles = ceil_div(shape.seqlen_q, CODE_TILE_ROWS);
    code_tile = num_code_tiles - 1 - blockIdx.x / num_heads_all;
    head = blockIdx.x % num_heads_all;
    kv_head = head / shape.num_heads * shape.num_kv_heads + head % shape.num_heads / shape.group_size();
    warp_row = code_tile * CODE_TILE_ROWS + threadIdx.x / 32 * 32;
    const Shape sequence = shape.of_sequence(head / shape.num_heads);
    num_tiles = ceil_div(sequence.visible_keys((code_tile + 1) * CODE_TILE_ROWS - 1), PRODUCT_TILE_K);
  }
};

template <int BITS>
__device__ __forceinline__ void mma_codes(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (BITS == 8)
    mma_m16n8k32_s8(d, a, b0, b1);
  else
    mma_m16n8k64_s4(d, a, b0, b1);
}

// Found: what a warp finds in 32 key blocks.
template <int HEAD_DIM, typename Format, typename Found>
struct CodeProducts {
  static constexpr int ROW_BYTES = padded_dim(HEAD_DIM) * Format::BITS / 8;
  static constexpr int STEPS = ROW_BYTES / 32;  // products along head_dim: 32 bytes each, whatever the code's width
  static constexpr int TILE_BYTES = PRODUCT_TILE_K * ROW_BYTES;
  static constexpr int M_TILES = 2;  // 16-row tiles of a warp
  static constexpr int CTAS = ROW_BYTES == 256 ? 2 : 3;  // of a multiprocessor, to the compiler
  // Key fragments come by ldmatrix, 64 bytes of 8 keys at a time (32 bytes of 16 keys for 32-byte rows).
  static constexpr int LOADS = KEY_BLOCK * ROW_BYTES / 512;
  static constexpr int LOADS_PER_ROW = ROW_BYTES >= 128 ? ROW_BYTES / 64 : 1;
  static constexpr int LOAD_ROWS = ROW_BYTES == 32 ? 16 : 8;
  using Ring = KeyRing<ROW_BYTES, Format::GROUPED, Found>;

  uint32_t a[M_TILES][STEPS][4];
  uint32_t lane_byte[LOADS_PER_ROW];

  // Query fragments: lane l has rows l/4 and l/4 + 8, bytes 4*(l%4) and 4*(l%4) + 16 of each 32-byte step.
  __device__ __forceinline__ void load_query(const uint8_t* q_codes_gmem, const CodeRows& rows) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint8_t* q_tile =
        q_codes_gmem + (int64_t(rows.head) * rows.num_code_tiles + rows.code_tile) * (CODE_TILE_ROWS * ROW_BYTES);
#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
      for (int step = 0; step < STEPS; ++step)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          int row = warp * 32 + m * 16 + lane / 4 + i % 2 * 8;
          int byte = step * 32 + i / 2 * 16 + lane % 4 * 4;
          a[m][step][i] = *reinterpret_cast<const uint32_t*>(q_tile + swizzle<ROW_BYTES>(row * ROW_BYTES + byte));
        }
  }

  // Only a key's position among 8 enters the swizzle, so that a lane's addresses differ by constants.
  __device__ __forceinline__ void place_lane() {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int part = 0; part < LOADS_PER_ROW; ++part) {
      if constexpr (ROW_BYTES == 32)
        lane_byte[part] = swizzle<ROW_BYTES>((lane / 16 * 8 + lane % 8) * ROW_BYTES + lane / 8 % 2 * 16);
      else
        lane_byte[part] = swizzle<ROW_BYTES>(lane % 8 * ROW_BYTES + (part * 4 + lane / 8) * 16);
    }
  }

  // Copies key tile `tile` to its stage; always commits a group, so that groups count tiles.
  __device__ static __forceinline__ void load_tile(Ring& ring, int tile, const CodeRows& rows,
                                                   const uint8_t* k_codes_gmem, const float* k_scale_gmem,
                                                   const float* correction_gmem, const Shape& shape) {
    if (tile < rows.num_tiles) {
      const int stage = tile % Ring::STAGES;
      const uint8_t* k_tiles = k_codes_gmem + int64_t(rows.kv_head) * shape.padded_k() * ROW_BYTES;
#pragma unroll
      for (int byte = threadIdx.x * 16; byte < TILE_BYTES; byte += PRODUCT_THREADS * 16)
        cp_async_16(shared_address(ring.K_smem[stage]) + byte, k_tiles + int64_t(tile) * TILE_BYTES + byte);
      if constexpr (Format::GROUPED) {
        const int chunk = threadIdx.x;
        if (chunk < PRODUCT_TILE_K / 4)
          cp_async_16(shared_address(ring.correction_smem[stage] + chunk * 4),
                      correction_gmem + int64_t(rows.head) * shape.padded_k() + tile * PRODUCT_TILE_K + chunk * 4);
        else if (chunk < PRODUCT_TILE_K / 4 + PRODUCT_TILE_K / 32)
          cp_async_16(shared_address(ring.k_scale_smem[stage] + (chunk - PRODUCT_TILE_K / 4) * 4),
                      k_scale_gmem + int64_t(rows.kv_head) * (shape.padded_k() / 8) + tile * (PRODUCT_TILE_K / 8) +
                          (chunk - PRODUCT_TILE_K / 4) * 4);
      }
    }
    cp_async_commit();
  }

  // e[m][4n + ..] becomes the 16 x 8 product of row tile m and keys 8n .. of 32-key block `block` of a stage.
  __device__ __forceinline__ void multiply(int (&e)[M_TILES][16], const Ring& ring, int stage, int block) const {
    const uint32_t block_address = shared_address(ring.K_smem[stage]) + block * KEY_BLOCK * ROW_BYTES;
    if constexpr (ROW_BYTES == 256)  // not all of a block's keys fit the registers at once
      multiply_wide(e, block_address);
    else
      multiply_at_once(e, block_address);
  }

  __device__ __forceinline__ void multiply_at_once(int (&e)[M_TILES][16], uint32_t block_address) const {
    uint32_t b[LOADS][4];
#pragma unroll
    for (int i = 0; i < LOADS; ++i)
      ldmatrix_x4(b[i], block_address + lane_byte[i % LOADS_PER_ROW] + i / LOADS_PER_ROW * LOAD_ROWS * ROW_BYTES);
#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
      for (int i = 0; i < 16; ++i) e[m][i] = 0;
#pragma unroll
    for (int step = 0; step < STEPS; ++step)
#pragma unroll
      for (int n = 0; n < 4; ++n)
#pragma unroll
        for (int m = 0; m < M_TILES; ++m) {
          constexpr int WORDS = 2 * STEPS;
          const int at = n * WORDS + step * 2;
          mma_codes<Format::BITS>(reinterpret_cast<int(&)[4]>(e[m][4 * n]), a[m][step], b[at / 4][at % 4],
                                  b[at / 4][at % 4 + 1]);
        }
  }

  // The same, 64 bytes of the rows at a time.
  __device__ __forceinline__ void multiply_wide(int (&e)[M_TILES][16], uint32_t block_address) const {
#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
      for (int i = 0; i < 16; ++i) e[m][i] = 0;
#pragma unroll
    for (int part = 0; part < LOADS_PER_ROW; ++part) {
      uint32_t b[4][4];
#pragma unroll
      for (int n = 0; n < 4; ++n) ldmatrix_x4(b[n], block_address + lane_byte[part] + n * 8 * ROW_BYTES);
#pragma unroll
      for (int step = 0; step < 2; ++step)
#pragma unroll
        for (int n = 0; n < 4; ++n)
#pragma unroll
          for (int m = 0; m < M_TILES; ++m)
            mma_codes<Format::BITS>(reinterpret_cast<int(&)[4]>(e[m][4 * n]), a[m][part * 2 + step], b[n][2 * step],
                                    b[n][2 * step + 1]);
    }
  }

  // The corrections of the lane's eight columns of a block, and the scale that they share.
  __device__ static __forceinline__ float load_groups(float (&corrections)[8], const Ring& ring, int stage,
                                                      int block) {
    const int quad = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      float2 pair = *reinterpret_cast<const float2*>(
          &ring.correction_smem[stage][block * KEY_BLOCK + n * 8 + quad * 2]);
      corrections[2 * n] = pair.x;
      corrections[2 * n + 1] = pair.y;
    }
    return ring.k_scale_smem[stage][block * 4 + quad];
  }
};
