"""Small mutations of the kernels, by which bench/mutations.py measures the tests: each is a slip that changes a result.

Written before any of them was run. At least two for each kernel that a call launches. Left out are
measure_products.cu and measure_products_sm90.cu, which measure the GPU's ceilings, and fill_workload.cu, which makes
a benchmark's inputs: no output of a call is theirs. Left out, too, are slips that may hang a GPU for ever (an arrival
that a barrier waits for, a wait that keeps a ring's producer and consumer within a phase of each other) and those
that write outside of an array.
"""

from __future__ import annotations

from typing import NamedTuple

LEFT_OUT = ("fill_workload", "measure_products", "measure_products_sm90")


class Mutation(NamedTuple):
    """kernel: whose results change; file: in cuda_src, may be a header of that kernel; before: occurs in it once;
    first: arguments of pytest, files without their folder, for the tests that are about the mutated code."""

    kernel: str
    name: str
    file: str
    before: str
    after: str
    kind: str
    words: str
    first: str

    @property
    def label(self) -> str:
        return f"{self.kernel}:{self.name}"


MUTATIONS: list[Mutation] = []


def mutate(kernel: str, name: str, kind: str, words: str, before: str, after: str, first: str, file: str = "") -> None:
    MUTATIONS.append(Mutation(kernel, name, file or f"kernels/{kernel}.cu", before, after, kind, words, first))


# --- anchors -------------------------------------------------------------------------------------------------------
ANCHORS = "test_kernel_quantize.py -k 'anchor_statistics'"
ANCHORS_SM80 = "test_kernel_scores.py -k 'anchor_statistics_follow_the_twin'"
mutate("anchor_statistics", "one-key-more", "flipped comparison", "a row counts the key after its last visible one",
       "% 2 >= visible[c / 2])", "% 2 > visible[c / 2])", ANCHORS_SM80)
mutate("anchor_statistics", "unscaled-shift", "lost scale", "what the mean adds is taken off without softmax_scale",
       "CAPPED ? top : top - softmax_scale * shift[r]", "CAPPED ? top : top - shift[r]", ANCHORS_SM80)
mutate("anchor_statistics", "no-wait-for-keys", "dropped wait", "keys that do not stay are read while they are copied",
       "load_blocks(begin);\n        cp_async_commit();\n        cp_async_wait<0>();\n",
       "load_blocks(begin);\n        cp_async_commit();\n", ANCHORS_SM80)
mutate("anchor_statistics", "kv-head", "wrong head under GQA", "heads take KV heads in turn, not in groups",
       "kv_head = first_head / shape.group_size();", "kv_head = first_head % shape.num_kv_heads;",
       "test_kernel_quantize.py -k 'anchor_statistics_of_tested_rows'")
mutate("anchor_statistics_sm90", "sink-twice", "key counted twice", "sink keys in the local range's slots count again",
       "masked = key < sequence.sink_end || key + SLOT_KEYS > least_limit;", "masked = key + SLOT_KEYS > least_limit;",
       ANCHORS)
mutate("anchor_statistics_sm90", "no-rescale", "rescale forgotten", "the sum so far stays relative to the old maximum",
       "float even = sum[r] * ex2(__fmul_ru(top[r], scale_log2) - base), odd = 0;", "float even = sum[r], odd = 0;",
       ANCHORS)
mutate("anchor_statistics_sm90", "row-stride", "wrong stride", "tested rows are taken for neighbours",
       "((1 << rows_log2) - 1)) * stride;", "((1 << rows_log2) - 1));", ANCHORS)
mutate("anchor_statistics_sm90", "top-left", "wrong causal offset", "local slots begin as if the first row were key 0",
       "return (shape.offset() - shape.local) & -KEY_BLOCK;", "return -shape.local & -KEY_BLOCK;", ANCHORS)

# --- limits --------------------------------------------------------------------------------------------------------
LIMITS = "test_kernel_quantize.py -k 'limits_follow_the_twin'"
mutate("row_limits", "no-sum", "lost term", "y = m + ln(tau), without l",
       "logf(__fmul_rn(tau, l))", "logf(tau)", LIMITS)
mutate("row_limits", "full-rows", "flipped comparison", "a block that ends where the full rows begin is full, too",
       "block_end > shape.seqlen_q - shape.full_rows;", "block_end >= shape.seqlen_q - shape.full_rows;", LIMITS)
mutate("row_limits", "kv-head", "wrong head under GQA", "the scale of k is another KV head's",
       "shape.num_kv_heads + head / shape.group_size()];", "shape.num_kv_heads + head % shape.num_kv_heads];", LIMITS)
mutate("row_limits", "shift-sign", "wrong sign", "the shift is added to an uncapped limit, not taken off",
       "y = uncap(y, softcap) - shift;", "y = uncap(y, softcap) + shift;",
       "test_kernel_scores.py -k 'limits_follow_the_twin'")
mutate("row_limits", "rows-twice", "wrong bound of a tail", "padding of the strided part holds rows of the full part",
       "return row < num_rows && (row < first_full_row || !strided) ? row : -1;", "return row < num_rows ? row : -1;",
       LIMITS, "tile/row_map.cuh")

# --- quantisation --------------------------------------------------------------------------------------------------
INT8, INT4 = (f"test_kernel_quantize.py -k 'codes_and_scales_follow_the_twin and {name}'" for name in ("int8", "int4"))
SP24 = "test_kernel_quantize.py -k 'ties_keep_the_lower or (codes_and_scales_follow_the_twin and int8-sp24)'"
PARTS = "test_kernel_serving.py -k 'statistics_in_parts or statistics_of_no_keys'"
mutate("quantize_int8", "absent-keys", "wrong bound of a tail", "keys past the end get codes of minus the mean",
       "present[step] ? group.factor : 0.f;", "group.factor;", INT8)
mutate("quantize_int8", "no-lower-clamp", "lost bound", "by given statistics, keys far below the mean are not clamped",
       "fmaxf(-largest, fminf(largest, value[step][i]))", "fminf(largest, value[step][i])",
       "test_kernel_serving.py -k 'fewer_keys_clamp'")
mutate("quantize_int8", "infinite-key", "flipped comparison", "an infinite key is clamped, where its code has to be 0",
       "magnitude_bits(value[step][i]) < INFINITE_BITS\n", "magnitude_bits(value[step][i]) <= INFINITE_BITS\n",
       "test_kernel_serving.py -k 'fewer_keys_clamp'")
mutate("quantize_int8_sparse", "ties", "flipped comparison", "of four equal weights not the first two are kept",
       "both_left = fminf(weight[0], weight[1]) >= fmaxf(weight[2], weight[3]);",
       "both_left = fminf(weight[0], weight[1]) > fmaxf(weight[2], weight[3]);", SP24, "tile/codes.cuh")
mutate("quantize_int8_sparse", "metadata-place", "wrong stride", "metadata of rows + 8 and of dims + 32 swap places",
       "quad + high + 2 * part)[chunk % 4]", "quad + 2 * high + part)[chunk % 4]", SP24)
mutate("quantize_int8_sparse", "kv-head", "wrong head under GQA", "rows are pruned by another KV head's rms",
       "(gridDim.y / group_size) + blockIdx.y / group_size;",
       "(gridDim.y / group_size) + blockIdx.y % (gridDim.y / group_size);",
       SP24)
mutate("quantize_int8_sparse", "no-sync", "dropped sync", "codes are stored while other warps still write them",
       "__syncthreads();\n  uint4* target", "uint4* target", SP24)
mutate("quantize_int4_q", "second-row", "wrong bound of a tail", "row r + 8 is read when row r is there",
       "if (rows[r] < seqlen && has_dims)", "if (rows[0] < seqlen && has_dims)", INT4)
mutate("quantize_int4_q", "not-smoothed", "lost term", "the mean of q is not taken off",
       "value[r][i] = __fsub_rn(value[r][i], mean[i]);", "value[r][i] = __fsub_rn(value[r][i], 0.f);", INT4)
mutate("quantize_int4_k", "head-order", "wrong head under GQA", "corrections are of heads a KV head's number apart",
       "const int64_t q_head = head * group_size + h;",
       "const int64_t q_head = int64_t(blockIdx.z) * gridDim.y * group_size + h * gridDim.y + blockIdx.y;", INT4)
mutate("quantize_int4_k", "scale-of-8", "wrong bound", "scales take the largest value to 8, where codes end at 7",
       "scale(max_over_lanes<CHUNKS>(amax), 7.f);", "scale(max_over_lanes<CHUNKS>(amax), 8.f);", INT4)
mutate("quantize_int4_k", "one-key-more", "off by one", "the row after the last key gets a code",
       "if (key < seqlen && has_dims)", "if (key <= seqlen && has_dims)", INT4)
mutate("prepare_int4_bounds", "not-moved", "lost bound", "corrections are products as they come, not upper bounds",
       "corrected = moved_up(weighted);", "corrected = weighted;", "test_kernel_estimate.py -k 'ties_of_corrections'")
mutate("prepare_int4_bounds", "kv-head", "wrong head under GQA", "scales are another KV head's",
       "shape.num_kv_heads + blockIdx.y / shape.group_size();", "shape.num_kv_heads + blockIdx.y % shape.num_kv_heads;",
       "test_kernel_estimate.py -k 'batch_and_groups and int4-wgmma'")
mutate("prepare_int4_bounds", "signed-reach", "lost sign rule", "the reach of corrections is that of a negative number",
       "__float_as_uint(weighted) & 0x7FFFFFFF;", "__float_as_uint(weighted);",
       "test_kernel_estimate.py -k 'large_corrections and int4-wgmma'")

# --- statistics ----------------------------------------------------------------------------------------------------
mutate("reduce_channels", "full-last-chunk", "last chunk counted fully", "the sum adds the first row once for 512 rows",
       "fmaf(float(num_rows), origin, total)", "fmaf(float(REDUCE_ROWS), origin, total)", INT8)
mutate("reduce_channels", "about-first-row", "lost term", "deviations are about the chunk's first row, not its mean",
       "fmaxf(0.f, squares - total * (total / num_rows))", "squares", PARTS)
mutate("reduce_channels", "no-sync", "dropped sync", "parts are summed while other warps still write them",
       "__syncthreads();\n\n  if (threadIdx.x >= HEAD_DIM) return;", "if (threadIdx.x >= HEAD_DIM) return;", INT8)
mutate("finish_channels", "full-last-chunk", "last chunk counted fully", "the last chunk's mean weighs as 512 rows",
       "last ? seqlen - chunk * chunk_rows : chunk_rows;", "chunk_rows;",
       "test_kernel_quantize.py -k 'channel_statistics'")
mutate("finish_channels", "one-sided", "lost term", "the largest deviation is looked for above the mean alone",
       "max(magnitude_bits(__fsub_rn(high, mean)), magnitude_bits(__fsub_rn(low, mean)));",
       "magnitude_bits(__fsub_rn(high, mean));", INT8)
mutate("finish_channels", "chunks-of-lengths", "wrong bound of a tail", "a sequence's last, partial chunk is left out",
       "num_chunks = (seqlen + chunk_rows - 1) / chunk_rows;", "num_chunks = seqlen / chunk_rows;",
       "test_kernel_serving.py -k 'packed_is_each_sequence_alone and int8'")
mutate("combine_key_statistics", "full-last-chunk", "last chunk counted fully", "the last chunk is as long as others",
       "last_rows = rows_b - (num_chunks - 1) * chunk_rows;", "last_rows = chunk_rows;", PARTS)
mutate("combine_key_statistics", "means-apart", "lost term", "that the means of both parts differ adds no deviation",
       "of_a(3) + rows_a * offset * offset;", "of_a(3);", PARTS)

# --- low-bit attention's codes -------------------------------------------------------------------------------------
LOW_CODES = "test_kernel_low_bit.py -k 'codes_are_the_twins'"
mutate("finish_balance", "inverse", "wrong factor", "k is multiplied by what q should be",
       "balance[0] = usable ? __fsqrt_rn(__fdiv_rn(q_amax, k_amax)) : 1.f;",
       "balance[0] = usable ? __fsqrt_rn(__fdiv_rn(k_amax, q_amax)) : 1.f;", LOW_CODES)
mutate("finish_balance", "nan", "NaN rule dropped", "a NaN does not count as the largest value of its channel",
       "if (isnan(sum)) return magnitude_bits(__uint_as_float(0x7FC00000));\n", "",
       "test_kernel_low_bit.py -k 'not_finite'")
mutate("finish_balance", "one-chunk-more", "off by one", "the chunk after a sequence's last counts",
       "chunk % num_chunks >= valid)", "chunk % num_chunks > valid)", "test_kernel_serving.py -k 'low_bit_is_each'")
mutate("quantize_balanced", "absent-keys", "wrong bound of a tail", "rows past the end count in a block's scale",
       "if (first_row + step * STEP_ROWS >= seqlen) continue;\n", "", LOW_CODES)
mutate("quantize_balanced", "q-for-k", "wrong factor", "q is balanced as k, and k as q",
       "(IS_K ? 0 : 1)", "(IS_K ? 1 : 0)", LOW_CODES)
mutate("quantize_balanced", "kv-head", "wrong head under GQA", "mean and balance are another KV head's",
       "(gridDim.y / group_size) + blockIdx.y / group_size;",
       "(gridDim.y / group_size) + blockIdx.y % (gridDim.y / group_size);",
       LOW_CODES)
mutate("quantize_e4m3", "key-order", "wrong stride", "keys lie in their own order, not in that of the scores",
       "pair / 8 * 128 + pair % 4 * 4 + pair / 4 % 2 * 2;", "pair / 8 * 128 + pair % 8 * 2;", LOW_CODES)
mutate("quantize_e4m3", "one-key-more", "off by one", "the row after the last key gets codes",
       "if (key < seqlen) words[step][i]", "if (key <= seqlen) words[step][i]", LOW_CODES)

# --- estimation ----------------------------------------------------------------------------------------------------
ESTIMATE = "test_kernel_estimate.py -k '{}'"
mutate("estimate_int8_sm90", "ragged", "flipped comparison", "absent keys of a last block that is not full may vote",
       "ragged = !shape.causal &&", "ragged = shape.causal &&", ESTIMATE.format("absent_keys and int8-wgmma"))
mutate("estimate_int8_sm90", "equal-score", "flipped comparison", "a score votes that only equals its threshold",
       "tops[0] > thresholds[0] ||", "tops[0] >= thresholds[0] ||", ESTIMATE.format("equal_scores and int8-wgmma"))
mutate("estimate_int8_sm90", "ragged-pair", "last chunk counted fully", "pruned rows take a ragged tile as a full one",
       "tile + 2 <= num_tiles - int(ragged);", "tile + 2 <= num_tiles;", ESTIMATE.format("absent_keys and sp24"))
mutate("estimate_int8_sm90", "strided-parts", "wrong stride", "a strided mask row's votes are as many as a full one's",
       "parts = (strided ? BLOCK_Q / map.stride : BLOCK_Q) / 16;", "parts = BLOCK_Q / 16;",
       ESTIMATE.format("query_stride and int8-wgmma"))
mutate("estimate_int8_sm90", "kv-head", "wrong head under GQA", "codes of k are another KV head's",
       "head % shape.num_heads / shape.group_size();", "head % shape.num_kv_heads;",
       ESTIMATE.format("batch_and_groups and int8-wgmma"))
mutate("estimate_int4_sm90", "limit-of-row", "wrong row", "rows 8 further have the limit of the first",
       "limits_gmem[at + 8] : INFINITY;", "limits_gmem[at] : INFINITY;", ESTIMATE.format("test_shapes and int4-wgmma"))
mutate("estimate_int4_sm90", "half-of-open", "wrong row", "open blocks of the lower rows are decided by the upper rows",
       "group_vote_of(half)(", "group_vote_of(0)(", ESTIMATE.format("close_calls and int4-wgmma"))
mutate("estimate_int4_sm90", "bounds-out-of-reach", "lost bound", "bounds decide where they do not hold",
       "hold ? votes : 15 * POSSIBLE_VOTE);", "votes);", ESTIMATE.format("int4-wgmma and (odd_groups or large_corr)"))
mutate("estimate_int4_sm90", "store-words", "off by one", "words are stored 31 too early, and lost",
       "word % ESTIMATE_VOTE_WORDS == ESTIMATE_VOTE_WORDS - 1 ||", "word % ESTIMATE_VOTE_WORDS == 0 ||",
       ESTIMATE.format("long_rows and int4-wgmma"))
mutate("estimate_int4_sm90", "no-sync", "dropped sync", "words are stored while other warps still write their votes",
       "bar_sync(1 + warpgroup, 128);\n          store_words", "store_words",
       ESTIMATE.format("int4-wgmma and (test_shapes or close_calls)"))
mutate("estimate_sm80", "present", "wrong bound of a tail", "a block counts as full with its first key",
       "num_present >= KEY_BLOCK) {\n#pragma", "num_present > 0) {\n#pragma",
       ESTIMATE.format("absent_keys and int8-mma"))
mutate("estimate_sm80", "limit-of-row", "wrong row", "rows 8 further have the threshold of the first",
       "thresholds[m][1] = limits[row + 8];", "thresholds[m][1] = limits[row];",
       ESTIMATE.format("test_shapes and int8-mma"))
mutate("estimate_sm80", "window-edge", "off by one", "the first key that a window shows may not vote",
       "begin[r] = sequence.visible_begin<WINDOWED>(row) - first_key;",
       "begin[r] = sequence.visible_begin<WINDOWED>(row) - first_key + 1;",
       "test_kernel_scores.py -k 'windowed_masks and int8'")
mutate("estimate_sm80", "words-before", "off by one", "the last word before a window is not cleared",
       "word < first_word; word += PRODUCT_THREADS", "word < first_word - 1; word += PRODUCT_THREADS",
       "test_kernel_scores.py -k 'windowed_masks and int8'")
mutate("estimate_sm80", "no-sync", "dropped sync", "the last word is stored while other warps still write their votes",
       "  __syncthreads();\n  const int words_done", "  const int words_done",
       ESTIMATE.format("test_shapes and int8-mma"))
mutate("estimate_sm80", "nan-limit", "NaN rule dropped", "a limit that is not a number votes for nothing",
       "  if (isnan(x)) return SELECT_ALL;\n", "", ESTIMATE.format("int4-bytes and (odd_groups or broken_groups)"),
       "tile/votes.cuh")
mutate("estimate_sm80", "invisible", "lost bound", "rows vote for blocks that only the tile's other rows see",
       "bits = votes & visible_bits<WINDOWED>(shape, q_block * BLOCK_Q, BLOCK_Q, word);", "bits = votes;",
       ESTIMATE.format("test_shapes and int8-mma"), "tile/mask_bits.cuh")
mutate("estimate_sm80", "corrections-of", "wrong head under GQA", "corrections are those of the KV head's number",
       "correction_gmem + int64_t(rows.head) *", "correction_gmem + int64_t(rows.kv_head) *",
       ESTIMATE.format("batch_and_groups and int4-bytes"), "tile/code_products.cuh")
SCORES = "test_kernel_block_scores.py -k '{}'"
mutate("block_scores", "nan-scale", "NaN rule dropped", "a group of codes that is not finite has no score",
       "return isnan(unit) || score > LARGEST_SCORE ?", "return score > LARGEST_SCORE ?", SCORES.format("odd_groups"))
mutate("block_scores", "fold", "off by one", "a coarse block takes in the one next to it",
       "step < fold; step *= 2", "step <= fold; step *= 2", SCORES.format("test_blocks_and_lengths"))
mutate("block_scores", "last-warp", "lost term", "the last 32 of 128 rows do not count",
       "fmaxf(best, fmaxf(of_warp[2].score[lane], of_warp[3].score[lane]));", "fmaxf(best, of_warp[2].score[lane]);",
       SCORES.format("test_shapes"))

# --- masks ---------------------------------------------------------------------------------------------------------
mutate("mask_from_scores", "anchors", "lost term", "anchors are not set where tau is infinite",
       " || score == INFINITY;", ";", SCORES.format("masks_of_scores"))
mutate("mask_from_scores", "tau-of-head", "wrong head", "taus go round the rows, not the heads",
       "row / num_q_blocks % shape.num_heads]", "row % shape.num_heads]", SCORES.format("masks_of_scores"))
mutate("mask_from_scores", "one-block-more", "off by one", "the next row's first block is the block after the last",
       "if (block < num_visible)", "if (block <= num_visible)", SCORES.format("masks_of_scores"))
mutate("mask_from_scores", "future", "wrong bound", "blocks that no row of theirs sees are set",
       "if (block < num_visible)", "if (block < num_k_blocks)", SCORES.format("masks_of_scores"))
mutate("coarsen_mask", "next-row", "off by one", "the next row's first word belongs to a row's last",
       "if (word * FACTOR + i >= fine_words) break;", "if (word * FACTOR + i > fine_words) break;",
       ESTIMATE.format("test_blocks and int8-wgmma"))
mutate("coarsen_mask", "even-blocks", "lost term", "of two blocks only the first counts",
       "x = (x | x >> 1) & 0x55555555u;", "x = x & 0x55555555u;", ESTIMATE.format("test_blocks and int8-wgmma"))
VISIBLE = "test_kernel_scores.py -k 'mask_of_a_dense_call'"
mutate("fill_visible", "first-row", "wrong row", "a block of rows sees what its first row sees",
       "(q_block * block_q + block_q - 1);", "(q_block * block_q);", VISIBLE)
mutate("fill_visible", "31-blocks", "off by one", "of 31 blocks of a word 32 are visible",
       "blocks >= 32 ? 0xffffffffu", "blocks >= 31 ? 0xffffffffu", VISIBLE)
mutate("fill_visible", "window-row", "wrong row", "a block of rows begins where its last row's window begins",
       "shape.visible_begin<true>(q_block * block_q) / block_k",
       "shape.visible_begin<true>(q_block * block_q + block_q - 1) / block_k", VISIBLE)

# --- attention -----------------------------------------------------------------------------------------------------
ATTEND = "test_kernel_attend.py -k '{}'"
FEATURES = "test_kernel_scores.py -k '(dense_attention or random_masks) and {}'"
mutate("attend_sm80", "one-key-more", "flipped comparison", "odd keys just past a row's limit count",
       "if (left <= 1) scores", "if (left < 1) scores", ATTEND.format("sm80 and dense_lengths"))
mutate("attend_sm80", "empty-row", "lost rule", "a row without a key is 0 / 0",
       "inverse = sum == 0.f ? 0.f : factor / sum;", "inverse = factor / sum;", ATTEND.format("sm80 and random_masks"))
mutate("attend_sm80", "kv-head", "wrong head under GQA", "values are another KV head's",
       "smem.v_gmem = v.row<const uint16_t>(work.batch, 0, work.head / shape.group_size());",
       "smem.v_gmem = v.row<const uint16_t>(work.batch, 0, work.head % shape.num_kv_heads);",
       ATTEND.format("sm80 and batch_and_groups"))
mutate("attend_sm80", "no-wait", "dropped wait", "a tile is multiplied while it is copied",
       "    cp_async_wait<0>();\n    __syncthreads();\n    if (STAGES == 1) {",
       "    __syncthreads();\n    if (STAGES == 1) {", ATTEND.format("sm80 and (random_masks or dense_lengths)"))
mutate("attend_sm80", "unscaled-sink", "lost scale", "a sink logit meets scores without softmax_scale",
       "        top *= value_scale;\n", "", FEATURES.format("sinks and sm80"))
mutate("attend_sm80", "window-edge", "off by one", "the first odd key that a window shows does not count",
       "if (before > 1) scores", "if (before > 0) scores", FEATURES.format("window and sm80"))
mutate("attend_sm80", "no-rescale", "rescale forgotten", "the sum so far stays relative to the old maximum",
       "sum[m][r] = fmaf(sum[m][r], rescale[r], even + odd);", "sum[m][r] += even + odd;",
       ATTEND.format("sm80 and random_masks"), "tile/online_softmax.cuh")
mutate("attend_sm80", "left-over", "off by one", "a block left over from a list of blocks is lost when it is refilled",
       "if (lane == 0 && left_ > 0) list_.blocks[begin] = left_over;\n", "(void)left_over;\n",
       ATTEND.format("sm80 and list_is_refilled"), "tile/block_walker.cuh")
mutate("attend_sm90", "negative-scores", "lost term", "no raise where a lane's scores are all negative",
       "needed |= (__int_as_float(bits) > limit) | ((bits < 0) & !(limit >= 0.f));",
       "needed |= __int_as_float(bits) > limit;", ATTEND.format("sm90 and far_below_zero"))
mutate("attend_sm90", "segment-rescale", "rescale forgotten", "what a row carries is not rescaled in later segments",
       "        if (!is_first) {", "        if (is_first) {", "test_kernel_segments.py -k 'few_rows or keys_in_some'")
mutate("attend_sm90", "last-segment", "flipped comparison", "a row that ends with a segment waits for the next",
       "num_visible <= segment.end_block;", "num_visible < segment.end_block;",
       "test_kernel_segments.py -k 'few_rows or keys_in_some'")
mutate("attend_sm90", "slot-of-mask", "wrong bound", "a tile is masked when its last slot but one reaches the limit",
       "tile.first_key.w + KEY_BLOCK > visible_to_all", "tile.first_key.z + KEY_BLOCK > visible_to_all",
       ATTEND.format("sm90 and random_masks"))
mutate("attend_sm90", "no-wait-for-q", "dropped wait", "scores are taken before a work item's queries are there",
       "      mbarrier_wait(&ring.q_full, q_phase);\n", "", ATTEND.format("sm90 and (more_work or batch_and_groups)"))
mutate("attend_sm90", "unscaled-lse", "lost scale", "lse has the maximum of raw scores",
       "fmaf(top, FEATURES & SINKS ? 1.f : value_scale, sum == 0.f ? 0.f : logf(sum));",
       "top + (sum == 0.f ? 0.f : logf(sum));",
       ATTEND.format("sm90 and random_masks"))
mutate("attend_sm90", "window-row", "wrong row", "whether a tile needs the window is asked of the first row",
       "visible_begin<WINDOWED>(first_row + ATTEND_BLOCK_Q - 1))", "visible_begin<WINDOWED>(first_row))",
       FEATURES.format("window and sm90"))
mutate("attend_sm90", "coarse-bits", "wrong stride", "all words of a coarse mask's word are its first",
       "uint32_t part = bits >> ((word & ((1 << expand_log2) - 1)) * width);", "uint32_t part = bits;",
       ATTEND.format("sm90 and (block_k_does or all_selected)"), "tile/slot_walker.cuh")
mutate("attend_sm90", "top-left", "wrong causal offset", "row 0 sees key 0 alone, however many keys there are",
       "__device__ int offset() const { return seqlen_k - seqlen_q; }", "__device__ int offset() const { return 0; }",
       ATTEND.format("sm90 and masked_lengths"), "tile/shape.cuh")
DIMS = "test_kernel_head_dims.py -k '{}'"
mutate("attend_sm90", "first-slots", "off by one", "tiles of three or two slots take the first of four",
       "first[i] = all[4 - SLOTS + i];", "first[i] = all[i];", DIMS.format("attention and sm90"),
       "tile/attend_ring.cuh")
mutate("attend_sm90", "selected-slots", "wrong stride", "slots of smaller tiles are masked by the bits of absent ones",
       "(selected >> (4 - SLOTS + j / 4) & 1)", "(selected >> (j / 4) & 1)", DIMS.format("attention and sm90"),
       "tile/attend_ring.cuh")
mutate("attend_sm90", "last-dims", "wrong bound of a tail", "of 96 dims the last 32 are not fetched",
       "HALVES = ceil_div(HEAD_DIM, 64);", "HALVES = HEAD_DIM / 64;", DIMS.format("attention and sm90"))
mutate("estimate_int8_sm90", "second-half", "wrong stride", "second halves of 256-byte rows are those of others",
       "return step / 4 * (1024 / 16)", "return step / 4 * (2048 / 16)", DIMS.format("masks_are or long_rows"),
       "ptx/wgmma.cuh")
mutate("quantize_int8_sparse", "second-part", "off by one", "of 64 rows of 256 dims the first 32 are quantised twice",
       "first_row = part_row + threadIdx.x / CHUNKS;", "first_row = threadIdx.x / CHUNKS;",
       DIMS.format("codes_and_scales"))
LOW = "test_kernel_low_bit.py -k '{}'"
mutate("attend_int8_fp8_sm90", "no-rescale", "rescale forgotten", "outputs so far stay relative to the old base",
       "          if (raised) output.rescale(state.rescale);\n", "", LOW.format("rise_late or test_masks"))
mutate("attend_int8_fp8_sm90", "lse-exponent", "lost term", "lse forgets that p is held 2 ** 6 times too large",
       "(state.base[r] - P_EXPONENT + log2f(sum[r]))", "(state.base[r] + log2f(sum[r]))", LOW.format("test_dense"))
mutate("attend_int8_fp8_sm90", "last-slot", "wrong bound", "a tile is masked when its last slot begins after the limit",
       "tile.first_key.w + KEY_BLOCK > visible_to_all", "tile.first_key.w > visible_to_all", LOW.format("test_dense"))
mutate("attend_int8_fp8_sm90", "scale-of-slot", "lost scale", "all slots of a tile have the scale of the first",
       "smem.k_scales[of_stage][slot].x;", "smem.k_scales[of_stage][0].x;", LOW.format("test_masks"))
mutate("attend_int8_fp8_sm90", "sum-left", "off by one", "what was moved of the sum of p is not collected",
       "for (int j = 0; j < HEAD_DIM / 8 + 1; ++j) output.collect(j);",
       "for (int j = 0; j < HEAD_DIM / 8; ++j) output.collect(j);", LOW.format("test_dense or long_sums"))
mutate("attend_int8_fp8_sm90", "lower-limit", "flipped comparison", "rows 8 further see the key after their last",
       "if (absent | (key + i >= visible_lower))", "if (absent | (key + i > visible_lower))",
       LOW.format("test_dense"), "tile/attend_ring.cuh")

# --- pools ---------------------------------------------------------------------------------------------------------
POOLS = "test_kernel_pools.py -k '{}'"
mutate("mean_queries", "last-row-again", "wrong bound of a tail", "the last row stands in for rows that are not there",
       "INFINITE_BITS || row >= end) continue;", "INFINITE_BITS) continue;",
       POOLS.format("random_masks or test_lengths"))
mutate("mean_queries", "infinite-row", "flipped comparison", "a row with an infinity counts",
       "max_over_lanes<CHUNKS>(largest) >= INFINITE_BITS", "max_over_lanes<CHUNKS>(largest) > INFINITE_BITS",
       POOLS.format("not_finite"))
mutate("measure_keys", "keys-not-values", "wrong operand", "keys are searched for what is not finite, not values",
       "magnitude_bits(y[j])", "magnitude_bits(x[j])", POOLS.format("not_finite"))
mutate("measure_keys", "half-a-norm", "off by one", "half of a key's channels are in its norm",
       "step < CHUNKS; step *= 2", "step < CHUNKS / 2; step *= 2", POOLS.format("random_masks"))
mutate("measure_keys", "infinite-value", "flipped comparison", "an infinite value is not noticed",
       "__syncthreads_or(largest >= INFINITE_BITS)", "__syncthreads_or(largest > INFINITE_BITS)",
       POOLS.format("not_finite"))
mutate("pool_skipped", "norm", "lost scale", "the mean of squared norms is their sum",
       "      norm[r] *= factor[r];\n", "", POOLS.format("portable and random_masks"))
mutate("pool_skipped", "one-key-more", "off by one", "the key after the last is pooled as a key of 0",
       "lane % 4 * 2 + i % 2 >= present) s", "lane % 4 * 2 + i % 2 > present) s",
       POOLS.format("portable and test_lengths"))
mutate("pool_skipped", "infinite-values", "NaN rule dropped", "values that are not finite are pooled",
       "      drop_infinite<HEAD_DIM, Element>(reinterpret_cast<uint8_t*>(smem.V_smem), threadIdx.x);\n", "",
       POOLS.format("portable and not_finite"))
mutate("pool_skipped", "kv-head", "wrong head under GQA", "a CTA keeps the first KV head's keys for the next one",
       "if (seen && kv_index != held) {", "if (seen && held < 0) {", POOLS.format("portable and heads_and_batches"))
mutate("pool_skipped", "last-seen-slot", "flipped comparison", "the last slot that all rows see is not pooled",
       "end <= seen) slots", "end < seen) slots", POOLS.format("portable and test_lengths"), "tile/pools.cuh")
mutate("pool_skipped_sm90", "norm", "lost scale", "the mean of squared norms is their sum",
       "norm[r] = quad_sum(norm[r]) * factor[r];", "norm[r] = quad_sum(norm[r]);",
       POOLS.format("random_masks and not portable"))
mutate("pool_skipped_sm90", "one-key-more", "off by one", "the key after the last is pooled as a key of 0",
       "if (i / 4 * 8 + i % 2 >= present)", "if (i / 4 * 8 + i % 2 > present)",
       POOLS.format("test_lengths and not portable"))
mutate("pool_skipped_sm90", "no-sync", "dropped sync", "pooled values overwrite pooled keys on their way out",
       "    // Then pooled values take theirs.\n    bar_sync(WARPGROUP_BARRIER + consumer, 128);\n",
       "    // Then pooled values take theirs.\n", POOLS.format("random_masks and not portable"))
mutate("pool_skipped_sm90", "infinite-even", "flipped comparison", "infinite values of even channels are pooled",
       "if ((word & 0x7FFF) >= Element::INFINITE)", "if ((word & 0x7FFF) > Element::INFINITE)",
       POOLS.format("not_finite and not portable"))
mutate("attend_pools", "mass", "lost term", "the pools' mass is their largest score alone",
       "softmax.max[m][r] + __log2f(sum);", "softmax.max[m][r];", POOLS.format("random_masks and not portable"))
mutate("attend_pools", "one-pool-more", "off by one", "a pool that is not there counts",
       "if (j * 8 + i % 2 >= left)", "if (j * 8 + i % 2 > left)", POOLS.format("random_masks and not portable"))
mutate("attend_pools", "second-order", "lost bound", "the second order of even pools has no limit",
       "terms.x + fminf(distance[m][r] * terms.y, MOST_SECOND_ORDER));", "terms.x + distance[m][r] * terms.y);",
       POOLS.format("large_scores and not portable"))
mutate("attend_pools", "lse-base", "lost scale", "lse stays a power of two",
       "(base + __log2f(ours + theirs)) * (1.f / LOG2_E);", "base + __log2f(ours + theirs);",
       POOLS.format("random_masks and not portable"))

# --- serving, what is around a call --------------------------------------------------------------------------------
SERVING = "test_kernel_serving.py -k '{}'"
mutate("gather_sequences", "one-row-more", "off by one", "a sequence ends with its neighbour's first row",
       "present = row < lengths_gmem[batch];", "present = row <= lengths_gmem[batch];", SERVING.format("neighbours"))
mutate("gather_sequences", "page-0", "flipped comparison", "page 0 counts as a page that there is not",
       "present = page >= 0 &&", "present = page > 0 &&", SERVING.format("page_sizes"))
mutate("scatter_sequences", "last-row", "off by one", "a sequence's last row is not copied",
       "if (of_sequence >= lengths_gmem[batch]) return;", "if (of_sequence >= lengths_gmem[batch] - 1) return;",
       SERVING.format("packed_dense"))
mutate("scatter_sequences", "lse-stride", "wrong stride", "heads of lse are as far apart as in the padded array",
       "target_lse[int64_t(head) * total + packed]", "target_lse[int64_t(head) * max_seqlen + packed]",
       SERVING.format("packed_dense"))
mutate("locate_sequences", "longest", "off by one", "a sequence as long as the longest loses its last row",
       "max(first, min(sums[index + 1], total)) - first, longest);",
       "max(first, min(sums[index + 1], total)) - first, longest - 1);", SERVING.format("packed_dense"))
mutate("locate_sequences", "keys-of-queries", "wrong operand", "keys lie where queries lie",
       "k(cu_seqlens_k, i, total_k, max_seqlen_k);", "k(cu_seqlens_q, i, total_k, max_seqlen_k);",
       SERVING.format("packed_dense"))
mutate("locate_sequences", "sampled-rows", "wrong bound of a tail", "the last sampled row of q is left out",
       "(q.length + q_sample - 1) / q_sample;", "q.length / q_sample;", SERVING.format("low_bit_is_each"))
MERGE = "test_kernel_serving.py -k 'merge_is_the_twin'"
mutate("merge_states", "lse", "lost term", "lse is the larger of the two",
       "top + logf(sum) : -INFINITY;", "top : -INFINITY;", MERGE)
mutate("merge_states", "empty-side", "NaN rule dropped", "the output of a side without a key counts, times 0",
       "if (has_a) load_eight", "load_eight", MERGE)
mutate("merge_states", "odd-channel", "wrong operand", "odd channels take the even channel of side b",
       "share_b * y[2 * i + 1])", "share_b * y[2 * i])", MERGE)
SUMS = "test_kernel_block_scores.py -k 'output_sums'"
mutate("compare_outputs", "kept", "lost bound", "a row keeps more than all of its mass",
       "of_all == -INFINITY || kept > 1 ? 1 : kept;", "of_all == -INFINITY ? 1 : kept;", SUMS)
mutate("compare_outputs", "half-the-lanes", "off by one", "odd lanes' sums are lost",
       "lanes > 0; lanes /= 2", "lanes > 1; lanes /= 2", SUMS)
TAUS = "test_pipeline.py -k 'thresholds_per_head or all_selected'"
mutate("store_floats", "last-value", "off by one", "the last value is not written",
       "int(threadIdx.x) < count", "int(threadIdx.x) < count - 1", TAUS)
mutate("store_floats", "first-value", "wrong operand", "every value is the first",
       "values.value[threadIdx.x]", "values.value[0]", TAUS)
