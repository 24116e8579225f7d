// What the attention kernels of Hopper share: work items, the ring of key tiles, who fetches what, how a warpgroup's
// output is stored. A CTA attends 128 query rows of one head at a time to tiles of four selected 32-key slots (fewer with
// large head dims).
// Warpgroup 0 produces: its warp 0 hands out work items and fetches K, its warp 1 fetches Q and V. Warpgroups 1 and 2
// consume, 64 rows each.
#pragma once
#include "ptx/mbarrier.cuh"
#include "tile/shape.cuh"
#include "tile/slot_walker.cuh"
#include "tile/tensor_view.cuh"

constexpr int ATTEND_BLOCK_Q = 128;
constexpr int ATTEND_SLOTS = 4;
constexpr int ATTEND_TILE_K = ATTEND_SLOTS * KEY_BLOCK;
constexpr int ATTEND_RUN = 16;   // neighbouring query blocks of a head before the next head
constexpr int TURN_BARRIER = 2;  // named barriers 2 and 3: the turns of the two consumers
constexpr int ITEM_SLOTS = 2;    // work items on their way from the warp that fetches K to all others
constexpr int CONSUMER_WARPS = 8;
constexpr int ITEM_READERS = CONSUMER_WARPS + 1;  // and the warp that fetches V

struct WorkItem {
  int index;  // -1: there is no more work
  int num_tiles;
};

// The part of a call that a launch attends: work items [first_item, first_item + num_items), key blocks [first_block,
// end_block). Mirrors salekit/attend_grid.py.
struct Segment {
  int first_item, num_items, first_block, end_block;

  static __device__ Segment whole(const Shape& shape) {
    return {0, shape.batch * shape.num_heads * ceil_div(shape.seqlen_q, ATTEND_BLOCK_Q), 0, 0x7FFFFFFF};
  }
};

// Which rows of which head a work item is. Items are KV-head-major, longest rows first; a run of neighbouring query
// blocks of one head comes before the next head: they share K and V in the L2.
struct Rows {
  int batch, head, kv_head, q_block;

  __device__ Rows(const Shape& shape, int item) {
    const int num_q_blocks = ceil_div(shape.seqlen_q, ATTEND_BLOCK_Q);
    const int group = shape.group_size();
    const int kv_index = item / (group * num_q_blocks);
    const int within = item % (group * num_q_blocks);
    const int run = within / (group * ATTEND_RUN);
    const int in_run = within % (group * ATTEND_RUN);
    const int run_width = min(ATTEND_RUN, num_q_blocks - run * ATTEND_RUN);
    q_block = num_q_blocks - 1 - (run * ATTEND_RUN + in_run % run_width);
    batch = kv_index / shape.num_kv_heads;
    kv_head = kv_index % shape.num_kv_heads;
    head = kv_head * group + in_run / run_width;
  }

  // Blocks up to the last that some row sees.
  template <bool WINDOWED = false>
  __device__ int num_visible(const Shape& shape) const {
    const Shape sequence = shape.of_sequence(batch);
    if (Shape::HAS_LENGTHS && q_block * ATTEND_BLOCK_Q >= sequence.seqlen_q) return 0;
    return ceil_div(sequence.visible_end<WINDOWED>((q_block + 1) * ATTEND_BLOCK_Q - 1), KEY_BLOCK);
  }

  template <int MASK_ROWS, bool WINDOWED>
  __device__ SlotWalker<MASK_ROWS, WINDOWED> walker(const Shape& shape, const Segment& segment,
                                                    const uint32_t* mask_gmem, int expand_log2) const {
    using Walker = SlotWalker<MASK_ROWS, WINDOWED>;
    constexpr int NUM_ROWS = Walker::NUM_ROWS;
    const uint32_t* mask_rows[NUM_ROWS] = {};
    if (mask_gmem != nullptr) {
      const int num_mask_rows = ceil_div(shape.seqlen_q, MASK_ROWS);
      const int num_words = ceil_div(ceil_div(shape.seqlen_k, KEY_BLOCK << expand_log2), 32);
#pragma unroll
      for (int r = 0; r < NUM_ROWS; ++r) {
        const int row = q_block * NUM_ROWS + r;
        if (row < num_mask_rows)
          mask_rows[r] = mask_gmem + (int64_t(batch * shape.num_heads + head) * num_mask_rows + row) * num_words;
      }
    }
    const int end_block = min(num_visible<WINDOWED>(shape), segment.end_block);
    if constexpr (WINDOWED) {  // a call with a window is one segment
      const int begin = shape.of_sequence(batch).visible_begin<true>(q_block * ATTEND_BLOCK_Q) / KEY_BLOCK;
      return Walker(mask_rows, expand_log2, begin / 1024 * 1024, end_block, begin);
    }
    return Walker(mask_rows, expand_log2, segment.first_block, end_block);
  }
};

// Barriers of Q, of STAGES tiles of K and V, and of the work items. What products read, each warp releases; what lanes
// read, those lanes: what comes next is then ordered by the stage's barrier alone, as racecheck sees it.
template <int STAGES, int SLOTS = ATTEND_SLOTS>
struct AttendRing {
  alignas(16) SlotTile tiles[STAGES];
  alignas(8) uint64_t k_full[STAGES], k_empty[STAGES], v_full[STAGES], v_empty[STAGES];
  uint64_t q_full, q_empty, item_full[ITEM_SLOTS], item_empty[ITEM_SLOTS];
  WorkItem items[ITEM_SLOTS];

  // By one thread, before the block's first __syncthreads.
  __device__ void init() {
    for (int stage = 0; stage < STAGES; ++stage) {
      mbarrier_init(&k_full[stage], 1);
      mbarrier_init(&v_full[stage], 1);
      mbarrier_init(&k_empty[stage], 32 * CONSUMER_WARPS);  // each lane, for what it has read of `tiles`
      mbarrier_init(&v_empty[stage], CONSUMER_WARPS);
    }
    mbarrier_init(&q_full, 1);
    mbarrier_init(&q_empty, CONSUMER_WARPS);
    for (int slot = 0; slot < ITEM_SLOTS; ++slot) {
      mbarrier_init(&item_full[slot], 1);
      mbarrier_init(&item_empty[slot], ITEM_READERS);
    }
    mbarrier_init_fence();
  }
};

// Where a warp is in the ring of work items.
struct ItemCursor {
  int slot = 0;
  uint32_t phase = 0;

  __device__ __forceinline__ void advance() {
    if (++slot == ITEM_SLOTS) slot = 0, phase ^= 1;
  }

  // For all but the warp that hands them out: the next work item.
  template <int STAGES, int SLOTS>
  __device__ __forceinline__ WorkItem receive(AttendRing<STAGES, SLOTS>& ring) {
    mbarrier_wait(&ring.item_full[slot], phase);
    WorkItem item = {};
    if (threadIdx.x % 32 == 0) {  // it says for its warp that the item was read, and is the one that reads
      item = ring.items[slot];
      mbarrier_arrive(&ring.item_empty[slot]);
    }
    advance();
    return {__shfl_sync(~0u, item.index, 0), __shfl_sync(~0u, item.num_tiles, 0)};
  }
};

// A tile's slots, the first of four left out that it has not.
template <int SLOTS>
struct SlotStarts {
  int first[SLOTS];

  __device__ explicit SlotStarts(int4 slots) {
    const int all[4] = {slots.x, slots.y, slots.z, slots.w};
#pragma unroll
    for (int i = 0; i < SLOTS; ++i) first[i] = all[4 - SLOTS + i];
  }
};

// An absent slot repeats the last one: its scores are masked, and 0 * v must not meet stale NaNs.
template <int SLOTS>
struct SlotKeys {
  int first[SLOTS];
  bool are_neighbours;

  __device__ explicit SlotKeys(int4 slots) {
    const SlotStarts<SLOTS> starts(slots);
#pragma unroll
    for (int i = 0; i < SLOTS; ++i) first[i] = starts.first[i] < 0 ? slots.w : starts.first[i];
    are_neighbours = starts.first[0] >= 0 && slots.w - starts.first[0] == (SLOTS - 1) * KEY_BLOCK;
  }
};

// For warp 0: hands out the segment's work items from the counter `next_item` (zero before the launch; null when there
// is a CTA for each item) and fetches their K. load_k(rows, keys, stage), called by one lane, starts the copies of a tile.
// Waits are for whole warps, here and below: a diverged warp would spin instead of sleeping.
template <int MASK_ROWS, bool WINDOWED = false, int STAGES, int SLOTS, typename LoadK>
__device__ __forceinline__ void hand_out_items(AttendRing<STAGES, SLOTS>& ring, const Shape& shape,
                                               const Segment& segment, const uint32_t* mask_gmem, int expand_log2,
                                               uint32_t* next_item, LoadK load_k) {
  const bool elected = threadIdx.x % 32 == 0;
  ItemCursor cursor;
  int stage = 0;
  uint32_t phase = 1;
  int item = blockIdx.x;
  while (true) {
    mbarrier_wait(&ring.item_empty[cursor.slot], cursor.phase ^ 1);
    if (item >= segment.num_items) {
      if (elected) {
        ring.items[cursor.slot].index = -1;
        mbarrier_arrive(&ring.item_full[cursor.slot]);
      }
      break;
    }
    int following = 0;  // on its way while this item's tiles are fetched
    if (elected) following = next_item == nullptr ? segment.num_items : gridDim.x + atomicAdd(next_item, 1);
    const Rows rows(shape, segment.first_item + item);
    auto walker = rows.walker<MASK_ROWS, WINDOWED>(shape, segment, mask_gmem, expand_log2);
    const int num_tiles = ceil_div(walker.count(), SLOTS);
    if (elected) {
      ring.items[cursor.slot] = {segment.first_item + item, num_tiles};
      mbarrier_arrive(&ring.item_full[cursor.slot]);
    }
    cursor.advance();
    for (int t = 0; t < num_tiles; ++t) {
      const SlotTile tile = walker.template next<SLOTS>();
      mbarrier_wait(&ring.k_empty[stage], phase);
      if (elected) {
        ring.tiles[stage] = tile;
        load_k(rows, SlotKeys<SLOTS>(tile.first_key), stage);
      }
      __syncwarp();
      if (++stage == STAGES) stage = 0, phase ^= 1;
    }
    item = __shfl_sync(~0u, following, 0);
  }
}

// For warp 1: fetches Q by load_q(rows) and V by load_v(rows, keys, stage), called by one lane.
template <int MASK_ROWS, bool WINDOWED = false, int STAGES, int SLOTS, typename LoadQ, typename LoadV>
__device__ __forceinline__ void fetch_queries_and_values(AttendRing<STAGES, SLOTS>& ring, const Shape& shape,
                                                         const Segment& segment, const uint32_t* mask_gmem,
                                                         int expand_log2, LoadQ load_q, LoadV load_v) {
  const bool elected = threadIdx.x % 32 == 0;
  ItemCursor cursor;
  int stage = 0;
  uint32_t phase = 1, q_phase = 1;
  for (WorkItem item = cursor.receive(ring); item.index >= 0; item = cursor.receive(ring)) {
    const Rows rows(shape, item.index);
    mbarrier_wait(&ring.q_empty, q_phase);
    q_phase ^= 1;
    if (elected) load_q(rows);
    auto walker = rows.walker<MASK_ROWS, WINDOWED>(shape, segment, mask_gmem, expand_log2);
    for (int t = 0; t < item.num_tiles; ++t) {
      const SlotTile tile = walker.template next<SLOTS>();
      mbarrier_wait(&ring.v_empty[stage], phase);
      if (elected) load_v(rows, SlotKeys<SLOTS>(tile.first_key), stage);
      __syncwarp();
      if (++stage == STAGES) stage = 0, phase ^= 1;
    }
  }
}

// Scores of keys before a row's first become -inf. A slot has 16 of a lane's scores.
template <int NUM_SCORES>
__device__ __forceinline__ void mask_scores_before(float (&s)[NUM_SCORES], int4 slots, int begin_upper,
                                                   int begin_lower) {
  const SlotStarts<NUM_SCORES / 16> starts(slots);
#pragma unroll
  for (int j = 0; j < NUM_SCORES / 4; ++j) {
    const int key = starts.first[j / 4] + (j % 4) * 8 + (threadIdx.x % 4) * 2;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (key + i < begin_upper) s[4 * j + i] = -INFINITY;
      if (key + i < begin_lower) s[4 * j + 2 + i] = -INFINITY;
    }
  }
}

// Scores of slots that are not selected and of keys beyond a row's limit become -inf.
template <int NUM_SCORES>
__device__ __forceinline__ void mask_scores(float (&s)[NUM_SCORES], int4 slots, uint32_t selected, int visible_upper,
                                            int visible_lower) {
  constexpr int SLOTS = NUM_SCORES / 16;
  const SlotStarts<SLOTS> starts(slots);
#pragma unroll
  for (int j = 0; j < NUM_SCORES / 4; ++j) {
    const bool absent = (selected >> (4 - SLOTS + j / 4) & 1) == 0;
    const int key = starts.first[j / 4] + (j % 4) * 8 + (threadIdx.x % 4) * 2;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (absent | (key + i >= visible_upper)) s[4 * j + i] = -INFINITY;
      if (absent | (key + i >= visible_lower)) s[4 * j + 2 + i] = -INFINITY;
    }
  }
}

// Keeps the arithmetic that x >= 0 comes from before the waits that follow: ptxas moves waits up, not over branches.
__device__ __forceinline__ void computed_before(float x) {
  if (x < 0.f) __nanosleep(1);
}

// Transposes a 4 x 4 matrix of words among four neighbouring lanes: lane t's word c becomes lane c's word t.
__device__ __forceinline__ void transpose_quad(uint32_t (&w)[4]) {
  const bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t got = __shfl_xor_sync(~0u, odd ? w[i] : w[i + 1], 1);
    w[i] = odd ? got : w[i];
    w[i + 1] = odd ? w[i + 1] : got;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t got = __shfl_xor_sync(~0u, high ? w[i] : w[i + 2], 2);
    w[i] = high ? got : w[i];
    w[i + 2] = high ? w[i + 2] : got;
  }
}

// Stores row r (0: upper, 1: lower) of what a lane holds of 64 rows' accumulators, the first HEAD_DIM columns, times
// `factor`, 16 bytes at a time.
template <int HEAD_DIM, typename Element, int N>
__device__ __forceinline__ void store_row(uint16_t* out_row, bool present, const float (&o)[N], int r, float factor) {
  out_row += threadIdx.x % 4 * 8;
#pragma unroll
  for (int j = 0; j < HEAD_DIM / 8; j += 4) {  // 32 columns at a time: a lane comes to hold 8 neighbours
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      words[i] = Element::pack(o[4 * (j + i) + 2 * r] * factor, o[4 * (j + i) + 2 * r + 1] * factor);
    transpose_quad(words);
    if (present) *reinterpret_cast<uint4*>(out_row + j * 8) = {words[0], words[1], words[2], words[3]};
  }
}
