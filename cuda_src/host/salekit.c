/* The host side of exported kernels: what salekit's Python stages compute and launch, call by call (see salekit.h).
 * Each part names the Python module that it mirrors; a test holds every launch and argument byte to it. */
#include "salekit.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
  TILE_ROWS = 64,
  KEY_BLOCK = 32,
  CODE_TILE_ROWS = 128,
  DENSE_BLOCK_Q = 128,
  MAX_SEQLEN = 1 << 30,
  MAX_GRID_YZ = 65535,
  MAX_ARGUMENTS = 24,
  ELEMENT_BYTES = 2,
  WORKSPACE_ALIGNMENT = 256,
  BUFFER_ALIGNMENT = 512
};

/* --- kernels ------------------------------------------------------------------------------------------------------ */
/* Those that only differ in a template argument follow each other. */
enum {
  REDUCE_CHANNELS,
  FINISH_CHANNELS,
  QUANTIZE_INT8_K,
  QUANTIZE_INT8_Q,
  QUANTIZE_INT8_Q_PRUNED,
  QUANTIZE_INT8_Q_SPARSE,
  QUANTIZE_INT4_Q,
  QUANTIZE_INT4_K,
  ANCHORS,                                /* 1, 2 heads at once */
  ANCHORS_SM90 = ANCHORS + 2,             /* 3 to 6 slots */
  LIMITS_FLOAT = ANCHORS_SM90 + 4,
  LIMITS_INT,
  ESTIMATE_INT8,                          /* block_q 64, 128; so are those below */
  ESTIMATE_INT4 = ESTIMATE_INT8 + 2,
  ESTIMATE_INT8_SM90 = ESTIMATE_INT4 + 2, /* dense q, then sparse q */
  ESTIMATE_INT4_SM90 = ESTIMATE_INT8_SM90 + 4,
  INT4_BOUNDS = ESTIMATE_INT4_SM90 + 2,
  COARSEN,                                /* blocks of 64, 128 keys */
  ATTEND_SM80 = COARSEN + 2,
  ATTEND_SM90 = ATTEND_SM80 + 2,          /* all keys at once, then in segments */
  ATTEND_INT8_FP8 = ATTEND_SM90 + 4,
  FINISH_BALANCE = ATTEND_INT8_FP8 + 2,
  QUANTIZE_BALANCED_Q,
  QUANTIZE_BALANCED_K,
  QUANTIZE_E4M3,
  FILL_VISIBLE,
  NUM_SLOTS
};

/* The names, with @H head_dim, @E element, @B bits and @C format of int4 codes. */
static const char *const SLOT_NAMES[NUM_SLOTS] = {
    [REDUCE_CHANNELS] = "reduce_channels<@H, @E>",
    [FINISH_CHANNELS] = "finish_channels<@H>",
    [QUANTIZE_INT8_K] = "quantize_int8<@H, @E, 0>",
    [QUANTIZE_INT8_Q] = "quantize_int8<@H, @E, 1>",
    [QUANTIZE_INT8_Q_PRUNED] = "quantize_int8<@H, @E, 2>",
    [QUANTIZE_INT8_Q_SPARSE] = "quantize_int8_sparse<@H, @E>",
    [QUANTIZE_INT4_Q] = "quantize_int4_q<@H, @E, @B>",
    [QUANTIZE_INT4_K] = "quantize_int4_k<@H, @E, @B>",
    [ANCHORS] = "anchor_statistics<@H, @E, 1>",
    [ANCHORS + 1] = "anchor_statistics<@H, @E, 2>",
    [ANCHORS_SM90] = "anchor_statistics_sm90<@H, @E, 3>",
    [ANCHORS_SM90 + 1] = "anchor_statistics_sm90<@H, @E, 4>",
    [ANCHORS_SM90 + 2] = "anchor_statistics_sm90<@H, @E, 5>",
    [ANCHORS_SM90 + 3] = "anchor_statistics_sm90<@H, @E, 6>",
    [LIMITS_FLOAT] = "row_limits<false>",
    [LIMITS_INT] = "row_limits<true>",
    [ESTIMATE_INT8] = "estimate_sm80<@H, Int8, 64>",
    [ESTIMATE_INT8 + 1] = "estimate_sm80<@H, Int8, 128>",
    [ESTIMATE_INT4] = "estimate_sm80<@H, @C, 64>",
    [ESTIMATE_INT4 + 1] = "estimate_sm80<@H, @C, 128>",
    [ESTIMATE_INT8_SM90] = "estimate_int8_sm90<@H, 64, false>",
    [ESTIMATE_INT8_SM90 + 1] = "estimate_int8_sm90<@H, 128, false>",
    [ESTIMATE_INT8_SM90 + 2] = "estimate_int8_sm90<@H, 64, true>",
    [ESTIMATE_INT8_SM90 + 3] = "estimate_int8_sm90<@H, 128, true>",
    [ESTIMATE_INT4_SM90] = "estimate_int4_sm90<@H, 64>",
    [ESTIMATE_INT4_SM90 + 1] = "estimate_int4_sm90<@H, 128>",
    [INT4_BOUNDS] = "prepare_int4_bounds",
    [COARSEN] = "coarsen_mask<2>",
    [COARSEN + 1] = "coarsen_mask<4>",
    [ATTEND_SM80] = "attend_sm80<@H, 64, @E, 1>",
    [ATTEND_SM80 + 1] = "attend_sm80<@H, 128, @E, 1>",
    [ATTEND_SM90] = "attend_sm90<@H, @E, 64, false>",
    [ATTEND_SM90 + 1] = "attend_sm90<@H, @E, 128, false>",
    [ATTEND_SM90 + 2] = "attend_sm90<@H, @E, 64, true>",
    [ATTEND_SM90 + 3] = "attend_sm90<@H, @E, 128, true>",
    [ATTEND_INT8_FP8] = "attend_int8_fp8_sm90<@H, @E, 64>",
    [ATTEND_INT8_FP8 + 1] = "attend_int8_fp8_sm90<@H, @E, 128>",
    [FINISH_BALANCE] = "finish_balance<@H>",
    [QUANTIZE_BALANCED_Q] = "quantize_balanced<@H, @E, false>",
    [QUANTIZE_BALANCED_K] = "quantize_balanced<@H, @E, true>",
    [QUANTIZE_E4M3] = "quantize_e4m3<@H, @E>",
    [FILL_VISIBLE] = "fill_visible",
};

struct salekit_context {
  const salekit_export *exported;
  int multiprocessors;
  CUmodule *modules;
  CUfunction *functions;    /* of exported->kernels */
  int kernel_of[NUM_SLOTS]; /* index into exported->kernels, or -1 */
};

/* --- errors ------------------------------------------------------------------------------------------------------- */
static salekit_status fail(char *error, salekit_status status, const char *format, ...) {
  if (error != NULL) {
    va_list list;
    va_start(list, format);
    vsnprintf(error, SALEKIT_ERROR_BYTES, format, list);
    va_end(list);
  }
  return status;
}

static const char *cuda_name(CUresult result) {
  const char *name = NULL;
  return cuGetErrorName(result, &name) == CUDA_SUCCESS && name != NULL ? name : "an unknown error";
}

static salekit_status fail_cuda(char *error, const char *what, CUresult result) {
  return fail(error, SALEKIT_CUDA, "%s failed with %s (%d)", what, cuda_name(result), (int)result);
}

/* --- numbers ------------------------------------------------------------------------------------------------------ */
static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; } /* a >= 0 */
static int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
static int64_t floor_to(int64_t a, int64_t b) { return (a >= 0 ? a / b : -ceil_div(-a, b)) * b; }
static int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

/* --- plans.py ----------------------------------------------------------------------------------------------------- */
typedef struct plan {
  const salekit_export *exported;
  salekit_problem problem; /* estimator resolved, counts clamped */
  int is_empty, is_hopper;
  int has_wgmma_dim; /* on Hopper, of WGMMA_HEAD_DIMS: its kernels for anchors, int4 and int8-fp8 take it */
  int is_low_bit, is_int4, is_pruned, holds_tested_rows;
  int64_t batch, seqlen_q, seqlen_k, num_heads, num_kv_heads, head_dim, group_size, offset;
  int64_t padded_q, padded_k, padded_dim, num_q_blocks, num_words, code_row_bytes;
  salekit_shape shape;
  salekit_row_map q_rows;
  float softmax_scale;
} plan;

static salekit_row_map row_map_of_q(const plan *p) {
  const int64_t stride = p->problem.query_stride, block_q = p->problem.block_q;
  if (!p->holds_tested_rows) {
    const salekit_row_map identity = {1, 0, 0, (int32_t)p->seqlen_q, (int32_t)p->padded_q};
    return identity;
  }
  const int64_t tested_whole = min_of(p->problem.full_rows, p->seqlen_q);
  const int64_t first_full = tested_whole > 0 ? (p->seqlen_q - tested_whole) / block_q : p->num_q_blocks;
  const int64_t strided_rows = min_of(first_full * block_q, p->seqlen_q);
  const int64_t first_position = round_up(ceil_div(strided_rows, stride), CODE_TILE_ROWS);
  const int64_t positions = first_position + round_up(p->seqlen_q - strided_rows, CODE_TILE_ROWS);
  const salekit_row_map map = {(int32_t)stride, (int32_t)(first_full * block_q), (int32_t)first_position,
                               (int32_t)p->seqlen_q, (int32_t)positions};
  return map;
}

static int is_one_of(int value, int a, int b, int c) { return value == a || value == b || value == c; }

static salekit_status check_count(const char *name, int value, char *error) {
  return value >= 0 ? SALEKIT_OK : fail(error, SALEKIT_ARGUMENT, "%s: got %d; wants an integer >= 0", name, value);
}

static salekit_status check_problem(const salekit_problem *x, char *error) {
  const struct {
    const char *name;
    int value, largest;
  } counts[] = {{"batch", x->batch, MAX_GRID_YZ},
                {"seqlen_q", x->seqlen_q, MAX_SEQLEN},
                {"seqlen_k", x->seqlen_k, MAX_SEQLEN},
                {"num_heads", x->num_heads, MAX_GRID_YZ},
                {"num_kv_heads", x->num_kv_heads, MAX_GRID_YZ},
                {"full_rows", x->full_rows, 2147483647},
                {"sink", x->sink, 2147483647},
                {"local", x->local, 2147483647},
                {"dense_below", x->dense_below, 2147483647}};
  for (size_t i = 0; i < sizeof counts / sizeof *counts; ++i) {
    const salekit_status status = check_count(counts[i].name, counts[i].value, error);
    if (status != SALEKIT_OK) return status;
    if (counts[i].value > counts[i].largest)
      return fail(error, SALEKIT_ARGUMENT, "%s: got %d; wants at most %d", counts[i].name, counts[i].value,
                  counts[i].largest);
  }
  if (x->num_heads < 1 || x->num_kv_heads < 1 || x->num_heads % x->num_kv_heads != 0)
    return fail(error, SALEKIT_ARGUMENT, "num_kv_heads: got %d for %d heads; wants a positive number that divides them",
                x->num_kv_heads, x->num_heads);
  if (x->causal != 0 && x->causal != 1)
    return fail(error, SALEKIT_ARGUMENT, "causal: got %d; wants 0 or 1", x->causal);
  if (!(x->softmax_scale == 0 || (x->softmax_scale >= 1e-37 && x->softmax_scale <= 1e37)))
    return fail(error, SALEKIT_ARGUMENT, "softmax_scale: got %g; wants 0 (the default) or 1e-37 to 1e37",
                x->softmax_scale);
  if (x->estimator < SALEKIT_AUTO || x->estimator > SALEKIT_INT8_SP24)
    return fail(error, SALEKIT_ARGUMENT, "estimator: got %d; wants SALEKIT_AUTO, _INT4, _INT8 or _INT8_SP24",
                x->estimator);
  if (x->attend != SALEKIT_EXACT && x->attend != SALEKIT_INT8_FP8)
    return fail(error, SALEKIT_ARGUMENT, "attend: got %d; wants SALEKIT_EXACT or SALEKIT_INT8_FP8", x->attend);
  if (!is_one_of(x->block_q, 64, 128, 128) || !is_one_of(x->block_k, 32, 64, 128))
    return fail(error, SALEKIT_ARGUMENT, "block_q, block_k: got %d, %d; wants 64 or 128 by 32, 64 or 128", x->block_q,
                x->block_k);
  if (!is_one_of(x->query_stride, 1, 2, 4))
    return fail(error, SALEKIT_ARGUMENT, "query_stride: got %d; wants 1, 2 or 4", x->query_stride);
  /* CTAs of the largest grids; what is smaller cannot overflow. */
  const int64_t q_tiles = (int64_t)x->batch * x->num_heads * ceil_div(x->seqlen_q, TILE_ROWS);
  const int64_t k_tiles = (int64_t)x->batch * x->num_kv_heads * ceil_div(x->seqlen_k, TILE_ROWS);
  if (max_of(q_tiles, k_tiles) > INT32_MAX ||
      q_tiles * ceil_div(x->seqlen_k, 32 * KEY_BLOCK) / 256 >= INT32_MAX)
    return fail(error, SALEKIT_ARGUMENT, "batch, heads and lengths: a grid would have more than 2^31 - 1 blocks");
  return SALEKIT_OK;
}

static salekit_status make_plan(plan *p, const salekit_export *exported, const salekit_problem *given, char *error) {
  const salekit_status status = check_problem(given, error);
  if (status != SALEKIT_OK) return status;
  memset(p, 0, sizeof *p);
  p->exported = exported;
  p->problem = *given;
  salekit_problem *x = &p->problem;
  if (x->estimator == SALEKIT_AUTO) x->estimator = exported->auto_estimator;
  x->full_rows = (int)min_of(x->full_rows, MAX_SEQLEN);
  x->sink = (int)min_of(x->sink, MAX_SEQLEN);
  x->local = (int)min_of(x->local, MAX_SEQLEN);
  p->is_empty = x->batch == 0 || x->seqlen_q == 0 || x->seqlen_k == 0;
  p->is_hopper = strcmp(exported->arch, "sm_90a") == 0;
  p->has_wgmma_dim = p->is_hopper && (exported->head_dim == 64 || exported->head_dim == 128);
  p->is_low_bit = x->attend == SALEKIT_INT8_FP8;
  if (p->is_low_bit && !p->has_wgmma_dim)
    return fail(error, SALEKIT_ARGUMENT,
                "attend: SALEKIT_INT8_FP8 is built for sm_90a with head_dim 64 and 128, these kernels are for %s, %d",
                exported->arch, exported->head_dim);
  p->is_int4 = x->estimator == SALEKIT_INT4;
  p->is_pruned = x->estimator == SALEKIT_INT8_SP24;
  p->holds_tested_rows = p->is_hopper && !p->is_int4 && x->query_stride > 1;
  p->batch = x->batch;
  p->seqlen_q = x->seqlen_q;
  p->seqlen_k = x->seqlen_k;
  p->num_heads = x->num_heads;
  p->num_kv_heads = x->num_kv_heads;
  p->head_dim = exported->head_dim;
  p->group_size = p->num_heads / p->num_kv_heads;
  p->offset = p->seqlen_k - p->seqlen_q;
  p->padded_q = round_up(p->seqlen_q, CODE_TILE_ROWS);
  p->padded_k = round_up(p->seqlen_k, CODE_TILE_ROWS);
  p->num_q_blocks = ceil_div(p->seqlen_q, x->block_q);
  p->num_words = ceil_div(ceil_div(p->seqlen_k, x->block_k), 32);
  p->padded_dim = p->head_dim <= 64 ? 64 : p->head_dim <= 128 ? 128 : 256;
  p->code_row_bytes = p->padded_dim * (p->is_int4 ? exported->int4_code_bits : 8) / 8;
  p->softmax_scale = (float)(x->softmax_scale != 0 ? x->softmax_scale : exported->softmax_scale);
  p->shape.batch = x->batch;
  p->shape.seqlen_q = x->seqlen_q;
  p->shape.seqlen_k = x->seqlen_k;
  p->shape.num_heads = x->num_heads;
  p->shape.num_kv_heads = x->num_kv_heads;
  p->shape.causal = x->causal;
  p->shape.sink_end = (int32_t)min_of(p->seqlen_k, round_up(x->sink, KEY_BLOCK));
  p->shape.local = (int)min_of(x->local, p->seqlen_q + p->seqlen_k + TILE_ROWS); /* farther is as far */
  p->shape.query_stride = x->query_stride;
  p->shape.full_rows = x->full_rows;
  p->q_rows = row_map_of_q(p);
  return SALEKIT_OK;
}

/* --- attend_grid.py: segments ------------------------------------------------------------------------------------- */
enum { RUN_BLOCKS = 16, SEGMENT_GRAIN = 1024 * KEY_BLOCK, SEGMENTED_ITEMS = 512 };
static const int64_t WHOLE_BYTES = (int64_t)80 << 20, SEGMENT_BYTES = (int64_t)32 << 20;

/* Walks over the segments of a KV head: keys [start, end). */
typedef struct segment_walk {
  int64_t count, next, start, end;
} segment_walk;

/* round(index * seqlen_k / count / SEGMENT_GRAIN) * SEGMENT_GRAIN, half to even. */
static int64_t segment_start(const plan *p, int64_t count, int64_t index) {
  const int64_t numerator = index * p->seqlen_k, denominator = count * SEGMENT_GRAIN;
  int64_t quotient = numerator / denominator;
  const int64_t twice = 2 * (numerator % denominator);
  if (twice > denominator || (twice == denominator && quotient % 2 == 1)) ++quotient;
  return quotient * SEGMENT_GRAIN;
}

static void find_segment_end(const plan *p, segment_walk *walk) {
  walk->end = p->seqlen_k;
  for (; walk->next < walk->count; ++walk->next) {
    const int64_t start = segment_start(p, walk->count, walk->next);
    if (start > walk->start) {
      walk->end = min_of(start, p->seqlen_k);
      break;
    }
  }
}

static segment_walk first_segment(const plan *p) {
  const int64_t num_bytes = p->seqlen_k * p->head_dim * 2 * ELEMENT_BYTES;
  const int64_t num_items = p->group_size * ceil_div(p->seqlen_q, DENSE_BLOCK_Q);
  const int is_whole = num_bytes <= WHOLE_BYTES || num_items < SEGMENTED_ITEMS;
  segment_walk walk = {is_whole ? 1 : ceil_div(num_bytes, SEGMENT_BYTES), 1, 0, 0};
  find_segment_end(p, &walk);
  return walk;
}

static int next_segment(const plan *p, segment_walk *walk) {
  if (walk->end >= p->seqlen_k) return 0;
  walk->start = walk->end;
  find_segment_end(p, walk);
  return 1;
}

static int64_t count_segments(const plan *p) {
  int64_t count = 1;
  for (segment_walk walk = first_segment(p); next_segment(p, &walk);) ++count;
  return count;
}

/* Query blocks of a head that see keys from `start` on, in whole runs. */
static int64_t segment_blocks(const plan *p, int64_t start) {
  const int64_t num_q_blocks = ceil_div(p->seqlen_q, DENSE_BLOCK_Q);
  const int64_t unseen = p->problem.causal && start > 0 ? max_of(0, (start - p->offset) / DENSE_BLOCK_Q) : 0;
  return min_of(num_q_blocks, round_up(max_of(0, num_q_blocks - unseen), RUN_BLOCKS));
}

static int64_t carried_bytes(const plan *p) {
  int64_t num_items = 0;
  for (segment_walk walk = first_segment(p); next_segment(p, &walk);)
    num_items = max_of(num_items, p->group_size * segment_blocks(p, walk.start));
  return num_items * DENSE_BLOCK_Q * 2 * (p->head_dim / 8 + 1) * 4 * 4;
}

/* --- workspace ---------------------------------------------------------------------------------------------------- */
enum { REDUCE_ROWS = 512, KEY_BOUNDS_FLOATS = 148, LOW_BIT_Q_SAMPLE = 8, BALANCE_PARTS = 8 };

/* Of attend with SALEKIT_INT8_FP8. */
typedef struct low_bit_buffers {
  CUdeviceptr q_partials, k_partials, v_partials, k_mean, balance, v_factor, v_scale;
  CUdeviceptr q_scale, row_shift, k_scale, q_codes, k_codes, v_codes;
} low_bit_buffers;

typedef struct buffers {
  CUdeviceptr words;                                          /* from estimate to attend */
  CUdeviceptr fine, k_partials, q_partials, k_mean, q_mean;   /* until the mask is made */
  CUdeviceptr rms, k_amax, k_scale, q_scale, q_codes, k_codes;
  CUdeviceptr correction, bounds, m, l, limits;
  CUdeviceptr next_items, carried;                            /* in attend, where those were */
  low_bit_buffers low;
} buffers;

static CUdeviceptr take(CUdeviceptr *end, int64_t num_bytes) {
  const CUdeviceptr start = *end;
  *end += (CUdeviceptr)round_up(num_bytes, BUFFER_ALIGNMENT);
  return start;
}

static void lay_out_low_bit(const plan *p, CUdeviceptr *end, low_bit_buffers *low) {
  const int64_t q_heads = p->batch * p->num_heads, kv_heads = p->batch * p->num_kv_heads, row = p->head_dim * 4;
  const int64_t k_chunks = ceil_div(p->seqlen_k, REDUCE_ROWS);
  low->q_partials = take(end, q_heads * ceil_div(ceil_div(p->seqlen_q, LOW_BIT_Q_SAMPLE), REDUCE_ROWS) * 4 * row);
  low->k_partials = take(end, kv_heads * k_chunks * 4 * row);
  low->v_partials = take(end, kv_heads * k_chunks * 4 * row);
  low->k_mean = take(end, kv_heads * row);
  low->balance = take(end, kv_heads * 2 * row);
  low->v_factor = take(end, kv_heads * row);
  low->v_scale = take(end, kv_heads * row);
  low->q_scale = take(end, q_heads * p->padded_q * 4);
  low->row_shift = take(end, q_heads * p->padded_q * 4);
  low->k_scale = take(end, kv_heads * p->padded_k / KEY_BLOCK * 4 * 4);
  low->q_codes = take(end, q_heads * p->padded_q * p->head_dim);
  low->k_codes = take(end, kv_heads * p->padded_k * p->head_dim);
  low->v_codes = take(end, kv_heads * (p->padded_k / KEY_BLOCK) * (p->head_dim / 8 + 1) * 2 * 8 * 16);
}

static CUdeviceptr max_address(CUdeviceptr a, CUdeviceptr b) { return a > b ? a : b; }

/* Where everything lies from `base` on; the end. */
static CUdeviceptr lay_out(const plan *p, CUdeviceptr base, buffers *b) {
  const int is_dense = p->problem.seqlen_k <= p->problem.dense_below;
  const int64_t q_heads = p->batch * p->num_heads, kv_heads = p->batch * p->num_kv_heads, row = p->head_dim * 4;
  memset(b, 0, sizeof *b);
  CUdeviceptr end = base;
  if (p->is_empty) return end;
  if (!is_dense) b->words = take(&end, q_heads * p->num_q_blocks * p->num_words * 4);
  CUdeviceptr estimated = end;
  if (!is_dense) {
    const int64_t positions = p->q_rows.num_positions;
    /* Sums of channels, then m and l, then what estimate writes: one after the other in the same place. */
    CUdeviceptr summed = estimated, limited = estimated;
    b->k_partials = take(&summed, kv_heads * ceil_div(p->seqlen_k, REDUCE_ROWS) * 4 * row);
    if (p->is_int4) b->q_partials = take(&summed, q_heads * ceil_div(p->seqlen_q, REDUCE_ROWS) * 4 * row);
    b->m = take(&limited, q_heads * p->seqlen_q * 4);
    b->l = take(&limited, q_heads * p->seqlen_q * 4);
    b->fine = b->words;
    if (p->problem.block_k != KEY_BLOCK)
      b->fine = take(&estimated, q_heads * p->num_q_blocks * ceil_div(p->seqlen_k, 32 * KEY_BLOCK) * 4);
    if (p->is_int4 && p->has_wgmma_dim)
      b->bounds = take(&estimated, q_heads * p->padded_k / CODE_TILE_ROWS * KEY_BOUNDS_FLOATS * 4);
    estimated = max_address(estimated, max_address(summed, limited));
    b->k_mean = take(&estimated, kv_heads * row);
    b->limits = take(&estimated, q_heads * positions * 4);
    b->k_codes = take(&estimated, kv_heads * p->padded_k * p->code_row_bytes);
    if (p->is_int4) {
      b->q_mean = take(&estimated, q_heads * row);
      b->q_codes = take(&estimated, q_heads * p->padded_q * p->code_row_bytes);
      b->q_scale = take(&estimated, q_heads * p->padded_q / 2 * 4);
      b->k_scale = take(&estimated, kv_heads * p->padded_k / 8 * 4);
      b->correction = take(&estimated, q_heads * p->padded_k * 4);
    } else {
      if (p->is_pruned) b->rms = take(&estimated, kv_heads * row);
      b->k_amax = take(&estimated, kv_heads * 4);
      b->k_scale = take(&estimated, kv_heads * 4);
      b->q_scale = take(&estimated, q_heads * positions * 4);
      const int is_sparse = p->is_pruned && p->is_hopper;
      b->q_codes = take(&estimated, is_sparse ? q_heads * (positions / 64) * ceil_div(p->head_dim, 64) * 5 * 128 * 4
                                              : q_heads * positions * p->code_row_bytes);
    }
  }
  CUdeviceptr attended = end;
  if (p->is_hopper) {
    const int64_t num_segments = is_dense || p->is_low_bit ? 1 : count_segments(p);
    b->next_items = take(&attended, num_segments > 1 ? kv_heads * num_segments * 4 : 4);
    if (num_segments > 1) b->carried = take(&attended, carried_bytes(p));
    if (p->is_low_bit) lay_out_low_bit(p, &attended, &b->low);
  }
  return max_address(estimated, attended);
}

/* --- launches ----------------------------------------------------------------------------------------------------- */
/* A call on its way: `status` stays at the first failure, after which nothing is launched any more. */
typedef struct run {
  const salekit_context *context;
  const plan *p;
  const salekit_call *call;
  const buffers *b;
  salekit_visitor visit; /* NULL: only find out whether all kernels are there */
  void *user;
  char *error;
  salekit_status status;
} run;

typedef struct argument {
  void *value;
  size_t num_bytes;
} argument;

#define ARG(x) {(void *)&(x), sizeof(x)}
#define INT_ARG(x) {(void *)&(int32_t){(int32_t)(x)}, 4}
#define LAUNCH(r, slot, x, y, z, threads, ...)                                           \
  do {                                                                                   \
    const argument list[] = {__VA_ARGS__};                                               \
    _Static_assert(sizeof list / sizeof *list <= MAX_ARGUMENTS, "a launch's arguments"); \
    launch(r, slot, x, y, z, threads, list, (int)(sizeof list / sizeof *list));          \
  } while (0)

/* What calls here never have: a cap of scores, sink logits, and with a cap the shift of each row's scores. */
static const float NO_SOFTCAP = 0, NO_CAP_FACTOR = 0;
static const CUdeviceptr NO_SINKS = 0, NO_SHIFT = 0;

/* Calls here are of sequences of one length: kernels get no lengths of each. */
static const CUdeviceptr NO_LENGTHS = 0;

static void visit(run *r, const salekit_launch *what, const char *name) {
  if (r->visit == NULL) return;
  const CUresult result = r->visit(r->user, what);
  if (result != CUDA_SUCCESS) r->status = fail_cuda(r->error, name, result);
}

static void launch(run *r, int slot, int64_t x, int64_t y, int64_t z, int64_t threads, const argument *list,
                   int count) {
  if (r->status != SALEKIT_OK) return;
  const int index = r->context->kernel_of[slot];
  if (index < 0) {
    r->status = fail(r->error, SALEKIT_MISSING, "the call needs %s, which this export does not hold: export its "
                     "estimator and block, too", SLOT_NAMES[slot]);
    return;
  }
  void *arguments[MAX_ARGUMENTS];
  size_t num_bytes[MAX_ARGUMENTS];
  for (int i = 0; i < count; ++i) {
    arguments[i] = list[i].value;
    num_bytes[i] = list[i].num_bytes;
  }
  salekit_launch what = {0};
  what.kernel = &r->context->exported->kernels[index];
  what.function = r->context->functions[index];
  what.grid[0] = (unsigned)x;
  what.grid[1] = (unsigned)y;
  what.grid[2] = (unsigned)z;
  what.threads = (unsigned)threads;
  what.num_arguments = count;
  what.arguments = arguments;
  what.argument_bytes = num_bytes;
  visit(r, &what, what.kernel->name);
}

static void fill_zeros(run *r, CUdeviceptr address, int64_t num_bytes) {
  if (r->status != SALEKIT_OK) return;
  salekit_launch what = {0};
  what.fill_address = address;
  what.fill_bytes = (size_t)num_bytes;
  visit(r, &what, "a fill");
}

/* --- tensor_map.py ------------------------------------------------------------------------------------------------ */
static int can_encode(salekit_tensor x, int64_t batch, int64_t rows, int64_t heads) {
  const int64_t sizes[] = {batch, rows, heads}, strides[] = {x.stride_batch, x.stride_row, x.stride_head};
  for (int i = 0; i < 3; ++i)
    if (sizes[i] != 1 && (strides[i] <= 0 || strides[i] >= ((int64_t)1 << 40) / ELEMENT_BYTES)) return 0;
  return 1;
}

static CUtensorMap tensor_map(run *r, salekit_tensor x, int64_t rows, int64_t heads, int box_rows, int row_step) {
  CUtensorMap map; /* aligned by its type */
  memset(&map, 0, sizeof map);
  if (r->status != SALEKIT_OK || r->visit == NULL) return map;
  const int64_t batch = r->p->batch, whole = r->p->head_dim * ELEMENT_BYTES;
  rows = ceil_div(rows, row_step);
  const cuuint64_t sizes[] = {(cuuint64_t)r->p->head_dim, (cuuint64_t)rows, (cuuint64_t)heads, (cuuint64_t)batch};
  const cuuint64_t strides[] = {(cuuint64_t)(rows > 1 ? x.stride_row * ELEMENT_BYTES * row_step : whole),
                                (cuuint64_t)(heads > 1 ? x.stride_head * ELEMENT_BYTES : whole),
                                (cuuint64_t)(batch > 1 ? x.stride_batch * ELEMENT_BYTES : whole)};
  const cuuint32_t box[] = {64, (cuuint32_t)box_rows, 1, 1}, steps[] = {1, 1, 1, 1};
  const CUresult result = cuTensorMapEncodeTiled(
      &map, r->p->exported->is_bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4,
      (void *)(uintptr_t)x.pointer, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) r->status = fail_cuda(r->error, "cuTensorMapEncodeTiled", result);
  return map;
}

static CUtensorMap q_map(run *r, int box_rows, int row_step) {
  return tensor_map(r, r->call->q, r->p->seqlen_q, r->p->num_heads, box_rows, row_step);
}

static CUtensorMap kv_map(run *r, salekit_tensor x, int box_rows) {
  return tensor_map(r, x, r->p->seqlen_k, r->p->num_kv_heads, box_rows, 1);
}

/* --- quantize.py -------------------------------------------------------------------------------------------------- */
/* What reduce_channels knows of each head's channels. */
static void channel_partials(run *r, salekit_tensor x, int64_t rows, int64_t heads, CUdeviceptr partials) {
  LAUNCH(r, REDUCE_CHANNELS, ceil_div(rows, REDUCE_ROWS), heads, r->p->batch, 256, ARG(x), ARG(partials),
         INT_ARG(rows), ARG(NO_LENGTHS));
}

/* Mean and, where not null, rms, largest deviation and int8 scale of each head's channels. */
static void channel_statistics(run *r, salekit_tensor x, int64_t rows, int64_t heads, CUdeviceptr partials,
                               CUdeviceptr mean, CUdeviceptr rms, CUdeviceptr amax, CUdeviceptr scale) {
  const int64_t chunks = ceil_div(rows, REDUCE_ROWS);
  const double per_row = 1.0 / (double)rows, per_chunk_row = 1.0 / REDUCE_ROWS;
  const double per_last_row = 1.0 / (double)(rows - (chunks - 1) * REDUCE_ROWS);
  channel_partials(r, x, rows, heads, partials);
  LAUNCH(r, FINISH_CHANNELS, heads, r->p->batch, 1, 4 * r->p->head_dim, ARG(partials), ARG(mean), ARG(rms), ARG(amax),
         ARG(scale), INT_ARG(chunks), INT_ARG(REDUCE_ROWS), INT_ARG(rows), ARG(per_row), ARG(per_chunk_row),
         ARG(per_last_row), ARG(NO_LENGTHS));
}

static void quantize_int4(run *r) {
  const plan *p = r->p;
  const buffers *b = r->b;
  channel_statistics(r, r->call->k, p->seqlen_k, p->num_kv_heads, b->k_partials, b->k_mean, 0, 0, 0);
  channel_statistics(r, r->call->q, p->seqlen_q, p->num_heads, b->q_partials, b->q_mean, 0, 0, 0);
  LAUNCH(r, QUANTIZE_INT4_Q, p->padded_q / CODE_TILE_ROWS, p->num_heads, p->batch, 256, ARG(r->call->q),
         ARG(b->q_codes), ARG(b->q_scale), ARG(b->q_mean), INT_ARG(p->seqlen_q), INT_ARG(p->padded_q),
         ARG(NO_LENGTHS));
  LAUNCH(r, QUANTIZE_INT4_K, p->padded_k / CODE_TILE_ROWS, p->num_kv_heads, p->batch, 2 * p->padded_dim,
         ARG(r->call->k), ARG(b->k_codes), ARG(b->k_scale), ARG(b->correction), ARG(b->k_mean), ARG(b->q_mean),
         INT_ARG(p->seqlen_k), INT_ARG(p->padded_k), INT_ARG(p->group_size), ARG(NO_LENGTHS));
}

static void quantize_int8(run *r) {
  const plan *p = r->p;
  const buffers *b = r->b;
  const int64_t rows = 256 / (p->padded_dim / 8) * 4; /* of a CTA */
  const salekit_row_map k_rows = {1, 0, 0, (int32_t)p->seqlen_k, (int32_t)p->padded_k};
  channel_statistics(r, r->call->k, p->seqlen_k, p->num_kv_heads, b->k_partials, b->k_mean, b->rms, b->k_amax,
                     b->k_scale);
  const int64_t positions = p->q_rows.num_positions, q_ctas = positions / rows;
  if (p->is_pruned && p->is_hopper)
    LAUNCH(r, QUANTIZE_INT8_Q_SPARSE, positions / max_of(rows, 64), p->num_heads, p->batch, 256, ARG(r->call->q),
           ARG(b->q_codes), ARG(b->q_scale), ARG(b->rms), ARG(p->q_rows), INT_ARG(p->group_size));
  else
    LAUNCH(r, p->is_pruned ? QUANTIZE_INT8_Q_PRUNED : QUANTIZE_INT8_Q, q_ctas, p->num_heads, p->batch, 256,
           ARG(r->call->q), ARG(b->q_codes), ARG(b->q_scale), ARG(b->rms), ARG(p->q_rows),
           INT_ARG(p->is_pruned ? p->group_size : 1), ARG(NO_LENGTHS));
  LAUNCH(r, QUANTIZE_INT8_K, p->padded_k / rows, p->num_kv_heads, p->batch, 256, ARG(r->call->k), ARG(b->k_codes),
         ARG(b->k_amax), ARG(b->k_mean), ARG(k_rows), INT_ARG(1), ARG(NO_LENGTHS));
}

/* --- anchors.py --------------------------------------------------------------------------------------------------- */
/* 64-key slots that the local range of a tile takes in anchor_statistics_sm90. */
static int64_t local_slots(const plan *p) {
  const int64_t first = floor_to(p->offset - p->problem.local, KEY_BLOCK);
  const int64_t end = p->offset + TILE_ROWS + (p->problem.causal ? 0 : p->problem.local);
  return max_of(3, ceil_div(end - first, 64));
}

static void anchor_statistics(run *r) {
  const plan *p = r->p;
  const buffers *b = r->b;
  const int64_t num_tiles = ceil_div(p->seqlen_q, TILE_ROWS), slots = local_slots(p);
  if (p->has_wgmma_dim && p->shape.sink_end <= KEY_BLOCK && slots <= 6 &&
      can_encode(r->call->q, p->batch, p->seqlen_q, p->num_heads) &&
      can_encode(r->call->k, p->batch, p->seqlen_k, p->num_kv_heads)) {
    const CUtensorMap rows = q_map(r, TILE_ROWS, 1);
    const CUtensorMap tested = q_map(r, TILE_ROWS / p->q_rows.stride, p->q_rows.stride);
    const CUtensorMap keys = kv_map(r, r->call->k, 64), sink = kv_map(r, r->call->k, KEY_BLOCK);
    const int64_t jobs = p->batch * p->num_heads * num_tiles;
    LAUNCH(r, ANCHORS_SM90 + (int)slots - 3, min_of(r->context->multiprocessors, jobs), 1, 1, 416, ARG(rows),
           ARG(tested), ARG(keys), ARG(sink), ARG(b->k_mean), ARG(b->m), ARG(b->l), ARG(p->shape), ARG(p->q_rows),
           ARG(p->softmax_scale));
    return;
  }
  int heads_each = 4; /* of one KV head, that a CTA takes */
  while (p->group_size % heads_each != 0) --heads_each;
  const int stride = p->holds_tested_rows ? p->problem.query_stride : 1;
  const int slot = p->head_dim <= 128 && heads_each % (2 * stride) == 0 ? ANCHORS + 1 : ANCHORS;
  LAUNCH(r, slot, num_tiles, p->num_heads / heads_each, p->batch, 128, ARG(r->call->q), ARG(r->call->k),
         ARG(b->k_mean), ARG(b->m), ARG(b->l), ARG(p->shape), ARG(p->q_rows), INT_ARG(heads_each),
         ARG(p->softmax_scale), ARG(NO_SOFTCAP), ARG(NO_CAP_FACTOR), ARG(NO_SINKS),
         ARG(NO_SHIFT));
}

static void row_limits(run *r) {
  const plan *p = r->p;
  const buffers *b = r->b;
  const float threshold = r->call->thresholds != 0 ? 0.0f : r->call->threshold;
  LAUNCH(r, p->is_int4 ? LIMITS_FLOAT : LIMITS_INT, p->q_rows.num_positions / CODE_TILE_ROWS, p->num_heads, p->batch,
         128, ARG(b->m), ARG(b->l), ARG(b->q_scale), ARG(b->k_scale), ARG(r->call->thresholds), ARG(threshold),
         ARG(b->limits), ARG(p->shape), ARG(p->q_rows), INT_ARG(p->problem.block_q), ARG(p->softmax_scale),
         ARG(NO_SOFTCAP), ARG(NO_SHIFT));
}

/* --- estimate.py -------------------------------------------------------------------------------------------------- */
static void estimate(run *r) {
  const plan *p = r->p;
  const buffers *b = r->b;
  const int wide = p->problem.block_q == 128;
  const int64_t heads = p->batch * p->num_heads;
  const CUdeviceptr none = 0;
  if (p->has_wgmma_dim && p->is_int4) {
    LAUNCH(r, INT4_BOUNDS, p->padded_k / CODE_TILE_ROWS, p->num_heads, p->batch, CODE_TILE_ROWS, ARG(b->k_scale),
           ARG(b->correction), ARG(b->bounds), ARG(p->shape));
    LAUNCH(r, ESTIMATE_INT4_SM90 + wide, ceil_div(p->seqlen_q, 256) * heads, 1, 1, 384, ARG(b->q_codes),
           ARG(b->k_codes), ARG(b->limits), ARG(b->q_scale), ARG(b->k_scale), ARG(b->correction), ARG(b->bounds),
           ARG(b->fine), ARG(p->shape), ARG(p->softmax_scale));
  } else if (p->is_hopper && !p->is_int4) {
    LAUNCH(r, ESTIMATE_INT8_SM90 + 2 * p->is_pruned + wide, ceil_div(p->q_rows.num_positions, 256) * heads, 1, 1, 384,
           ARG(b->q_codes), ARG(b->k_codes), ARG(b->limits), ARG(b->fine), ARG(p->shape), ARG(p->q_rows));
  } else {
    const CUdeviceptr *groups[] = {&none, &none, &none};
    if (p->is_int4) {
      groups[0] = &b->q_scale;
      groups[1] = &b->k_scale;
      groups[2] = &b->correction;
    }
    LAUNCH(r, (p->is_int4 ? ESTIMATE_INT4 : ESTIMATE_INT8) + wide, ceil_div(p->seqlen_q, CODE_TILE_ROWS) * heads, 1, 1,
           128, ARG(b->q_codes), ARG(b->k_codes), ARG(b->limits), ARG(*groups[0]), ARG(*groups[1]), ARG(*groups[2]),
           ARG(b->fine), ARG(p->shape), ARG(p->softmax_scale));
  }
  if (p->problem.block_k != KEY_BLOCK) {
    const int64_t num_rows = heads * p->num_q_blocks;
    LAUNCH(r, p->problem.block_k == 64 ? COARSEN : COARSEN + 1, ceil_div(num_rows * p->num_words, 256), 1, 1, 256,
           ARG(b->fine), ARG(b->words), ARG(num_rows), INT_ARG(ceil_div(p->seqlen_k, 32 * KEY_BLOCK)),
           INT_ARG(p->num_words));
  }
}

/* --- attend_grid.py: how attention kernels are launched ----------------------------------------------------------- */
/* A mask bit stands for 2 ** this many 32-key blocks. words: of the mask; 0: dense. */
static int expand_log2_of(const plan *p, CUdeviceptr words) {
  return words == 0 || p->problem.block_k == 32 ? 0 : p->problem.block_k == 64 ? 1 : 2;
}

typedef struct persistent_grid {
  int64_t num_items, num_ctas;
  CUdeviceptr next_item; /* the counter that deals out further items, or 0 */
} persistent_grid;

static persistent_grid make_persistent_grid(run *r) {
  persistent_grid grid;
  grid.num_items = r->p->batch * r->p->num_heads * ceil_div(r->p->seqlen_q, DENSE_BLOCK_Q);
  grid.num_ctas = min_of(grid.num_items, r->context->multiprocessors);
  grid.next_item = grid.num_items == grid.num_ctas ? 0 : r->b->next_items;
  if (grid.next_item != 0) fill_zeros(r, grid.next_item, 4);
  return grid;
}

/* --- low_bit.py --------------------------------------------------------------------------------------------------- */
static void quantize_balanced(run *r, int slot, salekit_tensor x, int64_t rows, int64_t heads, int64_t padded,
                              CUdeviceptr codes, CUdeviceptr scale, CUdeviceptr shift) {
  const low_bit_buffers *low = &r->b->low;
  LAUNCH(r, slot, padded / CODE_TILE_ROWS, heads, r->p->batch, 128, ARG(x), ARG(codes), ARG(scale), ARG(shift),
         ARG(low->k_mean), ARG(low->balance), INT_ARG(rows), INT_ARG(padded), INT_ARG(heads / r->p->num_kv_heads),
         ARG(NO_LENGTHS));
}

static void quantize_low_bit(run *r, CUdeviceptr row_shift) {
  const plan *p = r->p;
  const salekit_call *call = r->call;
  const low_bit_buffers *low = &r->b->low;
  const int64_t sampled_rows = ceil_div(p->seqlen_q, LOW_BIT_Q_SAMPLE);
  const double per_row = 1.0 / (double)p->seqlen_k;
  salekit_tensor sampled = call->q;
  sampled.stride_row *= LOW_BIT_Q_SAMPLE;
  channel_partials(r, sampled, sampled_rows, p->num_heads, low->q_partials);
  channel_partials(r, call->k, p->seqlen_k, p->num_kv_heads, low->k_partials);
  channel_partials(r, call->v, p->seqlen_k, p->num_kv_heads, low->v_partials);
  LAUNCH(r, FINISH_BALANCE, p->num_kv_heads, p->batch, 1, BALANCE_PARTS * p->head_dim, ARG(low->q_partials),
         ARG(low->k_partials), ARG(low->v_partials), ARG(low->k_mean), ARG(low->balance), ARG(low->v_factor),
         ARG(low->v_scale), INT_ARG(p->group_size), INT_ARG(ceil_div(sampled_rows, REDUCE_ROWS)),
         INT_ARG(ceil_div(p->seqlen_k, REDUCE_ROWS)), ARG(per_row), ARG(NO_LENGTHS), ARG(NO_LENGTHS),
         INT_ARG(REDUCE_ROWS));
  quantize_balanced(r, QUANTIZE_BALANCED_Q, call->q, p->seqlen_q, p->num_heads, p->padded_q, low->q_codes,
                    low->q_scale, row_shift);
  quantize_balanced(r, QUANTIZE_BALANCED_K, call->k, p->seqlen_k, p->num_kv_heads, p->padded_k, low->k_codes,
                    low->k_scale, 0);
  LAUNCH(r, QUANTIZE_E4M3, p->padded_k / CODE_TILE_ROWS, p->num_kv_heads, p->batch, 128, ARG(call->v),
         ARG(low->v_codes), ARG(low->v_factor), INT_ARG(p->seqlen_k), INT_ARG(p->padded_k));
}

/* words: of the mask; 0: dense. */
static void attend_low_bit(run *r, CUdeviceptr words) {
  const plan *p = r->p;
  const salekit_call *call = r->call;
  const low_bit_buffers *low = &r->b->low;
  const CUdeviceptr row_shift = call->lse != 0 ? low->row_shift : 0;
  const int expand_log2 = expand_log2_of(p, words);
  quantize_low_bit(r, row_shift);
  const persistent_grid grid = make_persistent_grid(r);
  LAUNCH(r, ATTEND_INT8_FP8 + (words == 0 || p->problem.block_q == 128), grid.num_ctas, 1, 1, 384, ARG(low->q_codes),
         ARG(low->k_codes), ARG(low->v_codes), ARG(low->q_scale), ARG(low->k_scale), ARG(low->v_scale), ARG(row_shift),
         ARG(call->out), ARG(call->lse), ARG(words), ARG(expand_log2), ARG(grid.next_item), ARG(p->shape),
         ARG(p->softmax_scale));
}

/* --- attend.py ---------------------------------------------------------------------------------------------------- */
/* words: of the mask; 0: dense. */
static void attend_sm90(run *r, CUdeviceptr words) {
  const plan *p = r->p;
  const buffers *b = r->b;
  const salekit_call *call = r->call;
  const CUtensorMap q = q_map(r, DENSE_BLOCK_Q, 1);
  const CUtensorMap k = kv_map(r, call->k, KEY_BLOCK), v = kv_map(r, call->v, KEY_BLOCK);
  const int tile_keys = p->head_dim <= 128 ? 128 : p->head_dim == 192 ? 96 : 64; /* SM90_TILE_KEYS */
  const CUtensorMap k_wide = kv_map(r, call->k, tile_keys), v_wide = kv_map(r, call->v, tile_keys);
  const int expand_log2 = expand_log2_of(p, words);
  const int slot = ATTEND_SM90 + (words == 0 || p->problem.block_q == 128);
  const int64_t num_q_blocks = ceil_div(p->seqlen_q, DENSE_BLOCK_Q);
  const int64_t num_segments = words == 0 ? 1 : count_segments(p);
  if (num_segments == 1) {
    const persistent_grid grid = make_persistent_grid(r);
    const salekit_segment whole = {0, (int32_t)grid.num_items, 0, INT32_MAX};
    const CUdeviceptr carried = 0;
    LAUNCH(r, slot, grid.num_ctas, 1, 1, 384, ARG(q), ARG(k), ARG(v), ARG(k_wide), ARG(v_wide), ARG(call->out),
           ARG(call->lse), ARG(words), ARG(expand_log2), ARG(grid.next_item), ARG(p->shape), ARG(p->softmax_scale),
           ARG(whole), ARG(carried), ARG(NO_SOFTCAP), ARG(NO_CAP_FACTOR), ARG(NO_SINKS));
    return;
  }
  const int64_t num_kv_heads = p->batch * p->num_kv_heads;
  fill_zeros(r, b->next_items, num_kv_heads * num_segments * 4);
  CUdeviceptr next_item = b->next_items;
  for (int64_t kv_head = 0; kv_head < num_kv_heads; ++kv_head) {
    segment_walk walk = first_segment(p);
    do {
      const int64_t num_items = p->group_size * segment_blocks(p, walk.start);
      const salekit_segment segment = {(int32_t)(kv_head * p->group_size * num_q_blocks), (int32_t)num_items,
                                       (int32_t)(walk.start / KEY_BLOCK), (int32_t)ceil_div(walk.end, KEY_BLOCK)};
      LAUNCH(r, slot + 2, min_of(num_items, r->context->multiprocessors), 1, 1, 384, ARG(q), ARG(k), ARG(v),
             ARG(k_wide), ARG(v_wide), ARG(call->out), ARG(call->lse), ARG(words), ARG(expand_log2), ARG(next_item),
             ARG(p->shape), ARG(p->softmax_scale), ARG(segment), ARG(b->carried),
             ARG(NO_SOFTCAP), ARG(NO_CAP_FACTOR), ARG(NO_SINKS));
      next_item += 4;
    } while (next_segment(p, &walk));
  }
}

/* The row stride of a single row may be anything, and absent rows need aligned addresses, too. */
static salekit_tensor of_rows(salekit_tensor x, int64_t rows) {
  if (rows == 1) x.stride_row = 0;
  return x;
}

static void attend_sm80(run *r, CUdeviceptr words) {
  const plan *p = r->p;
  const salekit_call *call = r->call;
  const salekit_tensor q = of_rows(call->q, p->seqlen_q), out = of_rows(call->out, p->seqlen_q);
  const salekit_tensor k = of_rows(call->k, p->seqlen_k), v = of_rows(call->v, p->seqlen_k);
  const int expand_log2 = expand_log2_of(p, words);
  const int64_t block_q = words == 0 ? DENSE_BLOCK_Q : p->problem.block_q;
  const int64_t cta_rows = p->head_dim > 128 ? 64 : block_q, threads = p->head_dim > 128 ? 128 : block_q;
  LAUNCH(r, block_q == 128 ? ATTEND_SM80 + 1 : ATTEND_SM80,
         p->batch * p->num_heads * ceil_div(p->seqlen_q, cta_rows), 1, 1, threads, ARG(q), ARG(k), ARG(v), ARG(out),
         ARG(call->lse), ARG(words), ARG(expand_log2), ARG(p->shape), ARG(p->softmax_scale), ARG(NO_SOFTCAP),
         ARG(NO_CAP_FACTOR), ARG(NO_SINKS));
}

static void attend(run *r, CUdeviceptr words) {
  const plan *p = r->p;
  const salekit_call *call = r->call;
  if (p->is_low_bit)
    attend_low_bit(r, words);
  else if (p->is_hopper && can_encode(call->q, p->batch, p->seqlen_q, p->num_heads) &&
      can_encode(call->k, p->batch, p->seqlen_k, p->num_kv_heads) &&
      can_encode(call->v, p->batch, p->seqlen_k, p->num_kv_heads))
    attend_sm90(r, words);
  else
    attend_sm80(r, words);
}

/* --- pipeline.py -------------------------------------------------------------------------------------------------- */
static void fill_visible(run *r) {
  const plan *p = r->p;
  const int64_t num_rows = p->batch * p->num_heads * p->num_q_blocks;
  LAUNCH(r, FILL_VISIBLE, ceil_div(num_rows * p->num_words, 256), 1, 1, 256, ARG(r->call->mask), ARG(p->shape),
         INT_ARG(p->problem.block_q), INT_ARG(p->problem.block_k), ARG(num_rows), INT_ARG(p->num_words));
}

static void run_stages(run *r) {
  const plan *p = r->p;
  const int is_dense = p->problem.seqlen_k <= p->problem.dense_below ||
                       (r->call->thresholds == 0 && r->call->threshold == 0);
  if (is_dense) {
    attend(r, 0);
    if (r->call->mask != 0) fill_visible(r);
    return;
  }
  if (p->is_int4)
    quantize_int4(r);
  else
    quantize_int8(r);
  anchor_statistics(r);
  row_limits(r);
  estimate(r);
  attend(r, r->b->words);
}

/* --- arrays.py: what can be called -------------------------------------------------------------------------------- */
static salekit_status check_tensor(const char *name, salekit_tensor x, int64_t batch, int64_t rows, int64_t heads,
                                   int is_output, char *error) {
  const int64_t sizes[] = {batch, rows, heads}, strides[] = {x.stride_batch, x.stride_row, x.stride_head};
  if (batch * rows * heads == 0) return SALEKIT_OK;
  if (x.pointer == 0 || x.pointer % 16 != 0)
    return fail(error, SALEKIT_ARGUMENT, "%s: got the address 0x%llx; wants one on a multiple of 16", name,
                (unsigned long long)x.pointer);
  for (int i = 0; i < 3; ++i) {
    if (sizes[i] <= 1) continue;
    if (strides[i] % 8 != 0)
      return fail(error, SALEKIT_ARGUMENT, "%s: got a stride of %lld elements; wants multiples of 8", name,
                  (long long)strides[i]);
    if (is_output && strides[i] <= 0)
      return fail(error, SALEKIT_ARGUMENT, "%s: got a stride of %lld; wants memory of its own for each element", name,
                  (long long)strides[i]);
  }
  return SALEKIT_OK;
}

static salekit_status check_call(const plan *p, const salekit_call *call, size_t workspace_bytes, char *error) {
  salekit_status status = check_tensor("q", call->q, p->batch, p->seqlen_q, p->num_heads, 0, error);
  if (status == SALEKIT_OK) status = check_tensor("k", call->k, p->batch, p->seqlen_k, p->num_kv_heads, 0, error);
  if (status == SALEKIT_OK) status = check_tensor("v", call->v, p->batch, p->seqlen_k, p->num_kv_heads, 0, error);
  if (status == SALEKIT_OK) status = check_tensor("out", call->out, p->batch, p->seqlen_q, p->num_heads, 1, error);
  if (status != SALEKIT_OK) return status;
  if (call->thresholds == 0 && !(call->threshold >= 0))
    return fail(error, SALEKIT_ARGUMENT, "threshold: got %g; wants a number >= 0", (double)call->threshold);
  if (call->thresholds % 4 != 0 || call->lse % 4 != 0 || call->mask % 4 != 0)
    return fail(error, SALEKIT_ARGUMENT, "thresholds, lse, mask: want addresses on multiples of 4");
  if (call->workspace_bytes < workspace_bytes)
    return fail(error, SALEKIT_ARGUMENT, "workspace_bytes: got %zu; wants at least %zu", call->workspace_bytes,
                workspace_bytes);
  if (workspace_bytes > 0 && (call->workspace == 0 || call->workspace % WORKSPACE_ALIGNMENT != 0))
    return fail(error, SALEKIT_ARGUMENT, "workspace: got the address 0x%llx; wants one on a multiple of %d",
                (unsigned long long)call->workspace, (int)WORKSPACE_ALIGNMENT);
  return SALEKIT_OK;
}

/* --- the public functions ----------------------------------------------------------------------------------------- */
void salekit_defaults(salekit_problem *problem) {
  memset(problem, 0, sizeof *problem);
  problem->causal = 1;
  problem->estimator = SALEKIT_AUTO;
  problem->block_q = 128;
  problem->block_k = 32;
  problem->query_stride = 1;
  problem->full_rows = 1024;
  problem->sink = 32;
  problem->local = 128;
  problem->dense_below = 8192;
}

size_t salekit_mask_words(const salekit_problem *problem) {
  if (check_problem(problem, NULL) != SALEKIT_OK) return 0;
  return (size_t)((int64_t)problem->batch * problem->num_heads * ceil_div(problem->seqlen_q, problem->block_q) *
                  ceil_div(ceil_div(problem->seqlen_k, problem->block_k), 32));
}

size_t salekit_workspace_bytes(const salekit_export *exported, const salekit_problem *problem) {
  plan p;
  buffers b;
  return make_plan(&p, exported, problem, NULL) == SALEKIT_OK ? (size_t)lay_out(&p, 0, &b) : 0;
}

/* A slot's name for an export: "attend_sm90<128, BFloat16, 64, false>". */
static void expand_name(const salekit_export *exported, const char *name, char *target, size_t room) {
  char head_dim[16];
  size_t length = 0;
  snprintf(head_dim, sizeof head_dim, "%d", exported->head_dim);
  for (; *name != '\0' && length + 1 < room; ++name) {
    const char letter[] = {*name, '\0'};
    const char *part = letter;
    if (*name == '@') {
      ++name;
      part = *name == 'H'   ? head_dim
             : *name == 'E' ? (exported->is_bfloat16 ? "BFloat16" : "Half")
             : *name == 'B' ? (exported->int4_code_bits == 4 ? "4" : "8")
                            : (exported->int4_code_bits == 4 ? "Int4" : "Int4InBytes");
    }
    length += (size_t)snprintf(target + length, room - length, "%s", part);
  }
}

static salekit_status load_kernel(salekit_context *context, const char *folder, int index, char *error) {
  const salekit_kernel *kernel = &context->exported->kernels[index];
  const size_t room = strlen(folder) + strlen(kernel->file) + 2;
  char *path = malloc(room);
  if (path == NULL) return fail(error, SALEKIT_MEMORY, "no memory for a path");
  snprintf(path, room, "%s/%s", folder, kernel->file);
  CUresult result = cuModuleLoad(&context->modules[index], path);
  salekit_status status = SALEKIT_OK;
  if (result != CUDA_SUCCESS) {
    context->modules[index] = NULL;
    status = fail(error, SALEKIT_FILE, "%s: cannot be loaded: %s (%d)", path, cuda_name(result), (int)result);
  }
  free(path);
  if (status != SALEKIT_OK) return status;
  result = cuModuleGetFunction(&context->functions[index], context->modules[index], kernel->symbol);
  if (result != CUDA_SUCCESS)
    return fail(error, SALEKIT_FILE, "%s: has no function %s: %s (%d)", kernel->file, kernel->symbol, cuda_name(result),
                (int)result);
  if (kernel->dynamic_shared_bytes > 48 * 1024) {
    result = cuFuncSetAttribute(context->functions[index], CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                                kernel->dynamic_shared_bytes);
    if (result != CUDA_SUCCESS) return fail_cuda(error, "cuFuncSetAttribute", result);
  }
  return SALEKIT_OK;
}

static salekit_status check_gpu(const salekit_export *exported, int *multiprocessors, char *error) {
  CUdevice device;
  int major = 0, minor = 0;
  CUresult result = cuCtxGetDevice(&device);
  if (result != CUDA_SUCCESS)
    return fail(error, SALEKIT_GPU, "no CUDA context is current in this thread: %s (%d)", cuda_name(result),
                (int)result);
  result = cuDeviceGetAttribute(&major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device);
  if (result == CUDA_SUCCESS)
    result = cuDeviceGetAttribute(&minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device);
  if (result == CUDA_SUCCESS)
    result = cuDeviceGetAttribute(multiprocessors, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, device);
  if (result != CUDA_SUCCESS) return fail_cuda(error, "cuDeviceGetAttribute", result);
  if (major != exported->capability_major ||
      (exported->is_exact || (major == 8 && minor == 7) ? minor != exported->capability_minor : minor < exported->capability_minor))
    return fail(error, SALEKIT_GPU, "the kernels are for %s, this GPU has compute capability %d.%d: export for it",
                exported->arch, major, minor);
  return SALEKIT_OK;
}

salekit_status salekit_load(salekit_context **context, const salekit_export *exported, const char *folder,
                            char *error) {
  *context = NULL;
  int multiprocessors = 0;
  salekit_status status = check_gpu(exported, &multiprocessors, error);
  if (status != SALEKIT_OK) return status;
  salekit_context *made = calloc(1, sizeof *made);
  if (made == NULL) return fail(error, SALEKIT_MEMORY, "no memory for a context");
  made->exported = exported;
  made->multiprocessors = multiprocessors;
  made->modules = calloc((size_t)exported->num_kernels + 1, sizeof *made->modules);
  made->functions = calloc((size_t)exported->num_kernels + 1, sizeof *made->functions);
  if (made->modules == NULL || made->functions == NULL)
    status = fail(error, SALEKIT_MEMORY, "no memory for a context");
  for (int i = 0; status == SALEKIT_OK && i < exported->num_kernels; ++i) status = load_kernel(made, folder, i, error);
  for (int slot = 0; slot < NUM_SLOTS; ++slot) {
    char name[128];
    expand_name(exported, SLOT_NAMES[slot], name, sizeof name);
    made->kernel_of[slot] = -1;
    for (int i = 0; i < exported->num_kernels; ++i)
      if (strcmp(exported->kernels[i].name, name) == 0) made->kernel_of[slot] = i;
  }
  if (status != SALEKIT_OK) {
    salekit_free(made);
    return status;
  }
  *context = made;
  return SALEKIT_OK;
}

void salekit_free(salekit_context *context) {
  if (context == NULL) return;
  for (int i = 0; context->modules != NULL && i < context->exported->num_kernels; ++i)
    if (context->modules[i] != NULL) cuModuleUnload(context->modules[i]);
  free(context->modules);
  free(context->functions);
  free(context);
}

/* Plan, check and lay out; then whether all kernels are there. */
static salekit_status prepare(run *r, plan *p, buffers *b) {
  salekit_status status = make_plan(p, r->context->exported, &r->call->problem, r->error);
  if (status != SALEKIT_OK) return status;
  const CUdeviceptr base = r->call->workspace;
  status = check_call(p, r->call, (size_t)(lay_out(p, base, b) - base), r->error);
  if (status != SALEKIT_OK || p->is_empty) return status;
  if (r->call->mask != 0) {
    if (b->fine == b->words) b->fine = r->call->mask;
    b->words = r->call->mask;
  }
  r->p = p;
  r->b = b;
  run_stages(r);
  return r->status;
}

salekit_status salekit_visit_launches(const salekit_context *context, const salekit_call *call, salekit_visitor visit,
                                      void *user, char *error) {
  plan p;
  buffers b;
  run r = {context, NULL, call, NULL, NULL, user, error, SALEKIT_OK};
  if (context == NULL || call == NULL)
    return fail(error, SALEKIT_ARGUMENT, "%s: got NULL; wants %s", context == NULL ? "context" : "call",
                context == NULL ? "one that salekit_load has loaded" : "a call");
  const salekit_status status = prepare(&r, &p, &b);
  if (status != SALEKIT_OK || p.is_empty) return status;
  r.visit = visit;
  run_stages(&r);
  return r.status;
}

static CUresult submit(void *user, const salekit_launch *what) {
  const CUstream stream = *(CUstream *)user;
  if (what->kernel == NULL) return cuMemsetD8Async(what->fill_address, 0, what->fill_bytes, stream);
  return cuLaunchKernel(what->function, what->grid[0], what->grid[1], what->grid[2], what->threads, 1, 1,
                        (unsigned)what->kernel->dynamic_shared_bytes, stream, (void **)what->arguments, NULL);
}

/* A call without rows or keys: zeros in out, -inf in lse. */
static salekit_status fill_empty(const salekit_call *call, int64_t head_dim, CUstream stream, char *error) {
  const salekit_problem *x = &call->problem;
  const salekit_tensor out = call->out;
  CUresult result = CUDA_SUCCESS;
  if (x->batch == 0 || x->seqlen_q == 0) return SALEKIT_OK;
  const size_t pitch = (size_t)(x->seqlen_q > 1 ? out.stride_row : head_dim) * ELEMENT_BYTES;
  for (int64_t batch = 0; batch < x->batch; ++batch) {
    for (int64_t head = 0; head < x->num_heads && result == CUDA_SUCCESS; ++head) {
      const int64_t first = batch * out.stride_batch + head * out.stride_head;
      result = cuMemsetD2D16Async(out.pointer + (CUdeviceptr)(first * ELEMENT_BYTES), pitch, 0, (size_t)head_dim,
                                  (size_t)x->seqlen_q, stream);
    }
  }
  if (result == CUDA_SUCCESS && call->lse != 0)
    result = cuMemsetD32Async(call->lse, 0xff800000u, (size_t)((int64_t)x->batch * x->num_heads * x->seqlen_q), stream);
  return result == CUDA_SUCCESS ? SALEKIT_OK : fail_cuda(error, "a fill", result);
}

salekit_status salekit_sparse_attention(const salekit_context *context, const salekit_call *call, CUstream stream,
                                        char *error) {
  const salekit_status status = salekit_visit_launches(context, call, submit, &stream, error);
  if (status != SALEKIT_OK) return status;
  const salekit_problem *x = &call->problem;
  if (x->batch == 0 || x->seqlen_q == 0 || x->seqlen_k == 0)
    return fill_empty(call, context->exported->head_dim, stream, error);
  return SALEKIT_OK;
}
