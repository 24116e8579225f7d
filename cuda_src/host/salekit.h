/* salekit without Python: sparse prefill attention (SALE, arXiv 2505.24179) on compiled kernels, with the CUDA driver.
 *
 * `salekit export` writes this file, salekit.c, a folder of cubins, and of these a table and a description,
 * salekit_<tag>.c and .h: for one architecture, head_dim and dtype. C11 and libcuda (driver 525 or newer) are all that
 * is needed. Nothing allocates GPU memory, nothing synchronises, calls can be captured into CUDA graphs. Any number of
 * threads may use a loaded context at once; calls that can run at the same time need workspaces of their own.
 *
 * Every function that can fail returns a salekit_status and writes one line to `error`, which is NULL or has room for
 * SALEKIT_ERROR_BYTES characters.
 */
#ifndef SALEKIT_H
#define SALEKIT_H

#include <cuda.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define SALEKIT_ERROR_BYTES 512

#ifdef __cplusplus
#define SALEKIT_ASSERT static_assert
#else
#define SALEKIT_ASSERT _Static_assert
#endif

typedef enum salekit_status {
  SALEKIT_OK = 0,
  SALEKIT_ARGUMENT = 1, /* an argument cannot work; nothing was launched */
  SALEKIT_GPU = 2,      /* the kernels are for another GPU */
  SALEKIT_FILE = 3,     /* a cubin cannot be loaded */
  SALEKIT_MISSING = 4,  /* the call needs a kernel that was not exported; nothing was launched */
  SALEKIT_CUDA = 5,     /* the driver refused: the text has its error */
  SALEKIT_MEMORY = 6    /* no host memory */
} salekit_status;

/* --- records that kernels take by value --------------------------------------------------------------------------- */

/* A tensor [batch, rows, heads, head_dim], 16 bits an element; strides count elements, the last axis is contiguous.
 * Address on 16 bytes, strides multiples of 8 (those of an axis of size 1 do not count). */
typedef struct salekit_tensor {
  uint64_t pointer;
  int64_t stride_batch, stride_row, stride_head;
} salekit_tensor;

/* Of a call. sink_end: anchor keys [0, sink_end). */
typedef struct salekit_shape {
  int32_t batch, seqlen_q, seqlen_k, num_heads, num_kv_heads, causal, sink_end, local, query_stride, full_rows;
} salekit_shape;

/* Which query rows are tested, and at which position their codes, scales and limits are. Rows before first_full_row are
 * held one in `stride`, the others all. */
typedef struct salekit_row_map {
  int32_t stride, first_full_row, first_full_position, num_rows, num_positions;
} salekit_row_map;

/* What one launch of attend_sm90 attends: work items (128 query rows of a head) and blocks of 32 keys. */
typedef struct salekit_segment {
  int32_t first_item, num_items, first_block, end_block;
} salekit_segment;

/* --- what was exported -------------------------------------------------------------------------------------------- */

typedef struct salekit_kernel {
  const char *name;   /* C++ template with its arguments */
  const char *file;   /* cubin, relative to the export's folder */
  const char *symbol; /* for cuModuleGetFunction */
  int dynamic_shared_bytes;
  int static_shared_bytes;
  int registers; /* a thread */
} salekit_kernel;

typedef struct salekit_export {
  const char *arch; /* "sm_90a", ... */
  int capability_major, capability_minor;
  int is_exact;    /* runs on this capability alone; otherwise on newer minors, too */
  int head_dim;    /* 64, 96, 128, 192 or 256 */
  int is_bfloat16; /* otherwise float16 */
  int int4_code_bits;
  int auto_estimator;
  double softmax_scale; /* head_dim ** -0.5 */
  int num_kernels;
  const salekit_kernel *kernels;
} salekit_export;

/* --- calls -------------------------------------------------------------------------------------------------------- */

/* SALEKIT_AUTO: the arch's: int4 where tensor cores multiply it, otherwise int8. */
enum { SALEKIT_AUTO = 0, SALEKIT_INT4 = 1, SALEKIT_INT8 = 2, SALEKIT_INT8_SP24 = 3 };

/* SALEKIT_INT8_FP8: int8 products of q and k, e4m3 products of p and v; on sm_90a with head_dim 64 and 128 alone. */
enum { SALEKIT_EXACT = 0, SALEKIT_INT8_FP8 = 1 };

/* Sizes and options of a call; the options are those of salekit.sparse_attention in Python. */
typedef struct salekit_problem {
  int batch, seqlen_q, seqlen_k, num_heads, num_kv_heads;
  int causal;           /* query i sees keys j <= i + seqlen_k - seqlen_q */
  double softmax_scale; /* 0: head_dim ** -0.5 */
  int estimator;
  int attend;
  int block_q, block_k; /* of the mask: 64 or 128 by 32, 64 or 128 */
  int query_stride;     /* 1, 2 or 4 */
  int full_rows, sink, local;
  int dense_below; /* up to this many keys a call is dense */
} salekit_problem;

/* Everything of a call. q, out: num_heads heads of seqlen_q rows; k, v: num_kv_heads heads of seqlen_k rows. */
typedef struct salekit_call {
  salekit_problem problem;
  salekit_tensor q, k, v, out;
  float threshold;        /* tau, >= 0, of every head; 0: dense; INFINITY: anchors alone */
  CUdeviceptr thresholds; /* or float [num_heads] on the GPU, read when the call runs; 0: `threshold` counts */
  CUdeviceptr lse;        /* float [batch, num_heads, seqlen_q], natural log, or 0 */
  CUdeviceptr mask;       /* uint32 [batch, num_heads, ceil(seqlen_q / block_q), words], or 0: salekit_mask_words */
  CUdeviceptr workspace;  /* on 256 bytes; what it holds does not matter */
  size_t workspace_bytes; /* at least salekit_workspace_bytes */
} salekit_call;

/* The options' defaults; sizes 0. */
void salekit_defaults(salekit_problem *problem);

/* uint32 words of the mask: bit j % 32 of word j / 32 of a row is key block j. 0 for a problem that is refused. */
size_t salekit_mask_words(const salekit_problem *problem);

/* Bytes that a call needs between its stages. 0 for one without rows or keys, or that is refused. */
size_t salekit_workspace_bytes(const salekit_export *exported, const salekit_problem *problem);

typedef struct salekit_context salekit_context;

/* Load the cubins in `folder` into the CUDA context that is current in this thread. `exported` has to outlive the
 * salekit context. Fails with SALEKIT_GPU where the kernels cannot run. */
salekit_status salekit_load(salekit_context **context, const salekit_export *exported, const char *folder, char *error);

/* Unload them, once all calls are done. NULL is fine. */
void salekit_free(salekit_context *context);

/* Queue a call on a stream of the CUDA context that `context` was loaded into, which has to be current. */
salekit_status salekit_sparse_attention(const salekit_context *context, const salekit_call *call, CUstream stream,
                                        char *error);

/* What a call launches, one after the other: a kernel, or with `kernel` NULL zeros for fill_bytes at fill_address. */
typedef struct salekit_launch {
  const salekit_kernel *kernel;
  CUfunction function;
  unsigned grid[3];
  unsigned threads; /* of a block, in x */
  int num_arguments;
  void *const *arguments; /* as cuLaunchKernel takes them */
  const size_t *argument_bytes;
  CUdeviceptr fill_address;
  size_t fill_bytes;
} salekit_launch;

/* Called with each launch, whose arguments are valid until it returns; anything but CUDA_SUCCESS ends the call. */
typedef CUresult (*salekit_visitor)(void *user, const salekit_launch *launch);

/* Like salekit_sparse_attention, but the launches go to `visit`: into nodes of a CUDA graph, or to a runtime in another
 * language. A call without rows or keys has no launches, but fills that only salekit_sparse_attention does. */
salekit_status salekit_visit_launches(const salekit_context *context, const salekit_call *call, salekit_visitor visit,
                                      void *user, char *error);

#ifdef __cplusplus
}
#endif

#endif
