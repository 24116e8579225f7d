// Where each sequence of a packed batch begins and how long it is, from the caller's running sums.
//
// cu_seqlens_q, cu_seqlens_k int32 [batch + 1]; seqlens_k int32 [batch]: lengths alone, of a paged cache (cu_seqlens_k
// is then null). sequences int32 [5, batch]: rows of q, rows of k, first row of q, first row of k, and how many every
// q_sample-th rows of q are. Whatever the sums are, no sequence leaves [0, total) or is longer than max_seqlen: what
// follows needs no check.
// Grid: one CTA of 256 threads.
#include "tile/types.cuh"

constexpr int LOCATE_THREADS = 256;

struct Located {
  int first, length;

  __device__ Located(const int* sums, int index, int total, int longest) {
    first = max(0, min(sums[index], total));
    length = min(max(first, min(sums[index + 1], total)) - first, longest);
  }
};

__global__ void __launch_bounds__(LOCATE_THREADS)
    locate_sequences(const int* cu_seqlens_q, const int* cu_seqlens_k, const int* seqlens_k, int* sequences_gmem,
                     int batch, int total_q, int total_k, int max_seqlen_q, int max_seqlen_k, int q_sample) {
#pragma unroll 1
  for (int i = threadIdx.x; i < batch; i += LOCATE_THREADS) {
    const Located q(cu_seqlens_q, i, total_q, max_seqlen_q);
    sequences_gmem[i] = q.length;
    sequences_gmem[2 * batch + i] = q.first;
    sequences_gmem[4 * batch + i] = (q.length + q_sample - 1) / q_sample;
    if (seqlens_k != nullptr) {
      sequences_gmem[batch + i] = max(0, min(seqlens_k[i], max_seqlen_k));
      sequences_gmem[3 * batch + i] = 0;
    } else {
      const Located k(cu_seqlens_k, i, total_k, max_seqlen_k);
      sequences_gmem[batch + i] = k.length;
      sequences_gmem[3 * batch + i] = k.first;
    }
  }
}
