"""Chunked prefill of two sequences through a paged cache, on the built-in sample. See README.md."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Callable

import numpy as np

import salekit
from salekit import jit
from salekit.sequences import PAGE_SIZES

OPTIONS = dict(estimator="int8", dense_below=0)
MOST_TOKENS = 4096  # the sample's


class PagedCache:
    """Keys and values of sequences in pages [num_pages, page_size, num_kv_heads, head_dim], NumPy's or CuPy's."""

    def __init__(self, xp, num_pages: int, page_size: int, num_sequences: int, like: np.ndarray):
        shape = (num_pages, page_size, *like.shape[1:])
        self.k, self.v = (xp.asarray(np.zeros(shape, like.dtype)) for _ in range(2))
        self.page_size = page_size
        self.free = list(np.random.default_rng(0).permutation(num_pages))  # pages of a sequence are anywhere
        self.table = np.full((num_sequences, num_pages // num_sequences), -1, np.int32)
        self.lengths = np.zeros(num_sequences, np.int32)

    def append(self, sequence: int, k: np.ndarray, v: np.ndarray) -> None:
        """Put keys and values [rows, num_kv_heads, head_dim] behind those of the sequence."""
        done = 0
        while done < len(k):
            page, row = divmod(int(self.lengths[sequence]), self.page_size)
            if row == 0:
                self.table[sequence, page] = self.free.pop()
            count = min(self.page_size - row, len(k) - done)
            for pages, x in ((self.k, k), (self.v, v)):
                write(pages[self.table[sequence, page], row : row + count], x[done : done + count])
            self.lengths[sequence] += count
            done += count


def write(target, values: np.ndarray) -> None:
    if isinstance(target, np.ndarray):
        target[...] = values
    else:
        target.set(np.ascontiguousarray(values))


def to_host(x) -> np.ndarray:
    return (x if isinstance(x, np.ndarray) else x.get()).astype(np.float32)


def prefill(xp, sequences, chunk: int, page_size: int, statistics, quiet: bool = False):
    """Outputs of each sequence, [rows, num_heads, head_dim] float32, chunk by chunk; one call a step for all of them.

    statistics: KeyStatistics of the whole sequences, or None: those of the keys so far, kept from chunk to chunk.
    """
    num_pages = len(sequences) * max(-(-len(k) // page_size) for _, k, _ in sequences)
    cache = PagedCache(xp, num_pages, page_size, len(sequences), sequences[0][1])
    outputs = [[] for _ in sequences]
    so_far = [None] * len(sequences)
    step = 0
    while any(cache.lengths[i] < len(k) for i, (_, k, _) in enumerate(sequences)):
        # The second sequence comes in smaller pieces, as a scheduler might have it; a finished one has no rows.
        pieces = []
        for i, (q, k, v) in enumerate(sequences):
            begin = int(cache.lengths[i])
            end = min(begin + max(1, chunk // (i + 1)), len(k))
            pieces.append(q[begin:end])
            cache.append(i, k[begin:end], v[begin:end])
            if statistics is None and end > begin:
                new = xp.asarray(np.ascontiguousarray(k[None, begin:end]))
                so_far[i] = salekit.key_statistics(new) if begin == 0 else so_far[i].update(new)
        given = statistics or salekit.KeyStatistics.stack(so_far)
        rows = [len(piece) for piece in pieces]
        sums = np.concatenate([[0], np.cumsum(rows)]).astype(np.int32)
        packed = xp.asarray(np.concatenate(pieces))
        started = time.perf_counter()
        out = salekit.sparse_attention_varlen(
            packed, cache.k, cache.v, xp.asarray(sums), None, max(rows), int(cache.lengths.max()),
            block_table=xp.asarray(cache.table), seqlens_k=xp.asarray(cache.lengths), k_statistics=given, **OPTIONS,
        )
        out = to_host(out)
        if not quiet:
            ms = 1e3 * (time.perf_counter() - started)
            print(f"  step {step}: rows {rows}, keys {cache.lengths.tolist()}, {ms:.1f} ms with the copy to the host")
        for i, begin in enumerate(sums[:-1]):
            outputs[i].append(out[begin : sums[i + 1]])
        step += 1
    return [np.concatenate(parts) for parts in outputs]


def relative(got, want) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def number(least: int, most: int | None = None) -> Callable[[str], int]:
    """What reads an option's whole number from this range."""
    wants = f"a number from {least} on" if most is None else f"a number from {least} to {most}"

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least or (most is not None and value > most):
            raise argparse.ArgumentTypeError(f"got {text!r}; wants {wants}")
        return value

    return read


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", choices=("numpy", "cuda"), default="numpy")
    parser.add_argument(
        "--tokens", type=number(1, MOST_TOKENS), default=1500, help=f"of the first sequence, at most {MOST_TOKENS}"
    )
    parser.add_argument("--chunk", type=number(1), default=512)
    parser.add_argument("--page-size", type=int, choices=PAGE_SIZES, default=64)
    try:
        run(parser.parse_args())
    except salekit.GpuError as error:
        print(f"serving_shapes.py: error: {error}", file=sys.stderr)
        return 3
    except salekit.SalekitError as error:
        print(f"serving_shapes.py: error: {error}", file=sys.stderr)
        return 1
    return 0


def run(args: argparse.Namespace) -> None:
    if args.backend == "cuda":
        jit.device_arch()  # GpuError without a GPU
        import cupy as xp
    else:
        xp = np

    sample = salekit.load_sample()
    q, k, v = (sample[name][0] for name in "qkv")
    second = max(1, args.tokens // 2 + 1)
    sequences = [tuple(x[:n] for x in (q, k, v)) for n in (args.tokens, second)]
    print(f"two sequences of {args.tokens} and {second} tokens, {args.backend}, pages of {args.page_size}")
    whole = [salekit.key_statistics(xp.asarray(np.ascontiguousarray(k[None]))) for _, k, _ in sequences]

    def one_call(i: int, **options):
        return to_host(
            salekit.sparse_attention(
                *(xp.asarray(np.ascontiguousarray(x[None])) for x in sequences[i]), **OPTIONS, **options
            )
        )[0]

    dense = [one_call(i, thresholds=0.0) for i in range(2)]
    print("chunks, with the statistics of the keys so far:")
    so_far = prefill(xp, sequences, args.chunk, args.page_size, None)
    given = prefill(xp, sequences, args.chunk, args.page_size, salekit.KeyStatistics.stack(whole), quiet=True)
    for i in range(2):
        alone = one_call(i, k_statistics=whole[i])
        print(
            f"sequence {i}: relative difference from dense attention: one call {relative(alone, dense[i]):.4f}, chunks "
            f"{relative(so_far[i], dense[i]):.4f}"
        )
        print(
            f"sequence {i}: chunks and one call, given the same statistics, differ by {relative(given[i], alone):.2e}"
        )

    # Two halves of the keys, attended apart and merged: what devices that share a sequence do.
    half = args.tokens // 2
    rows, keys, values = (xp.asarray(np.ascontiguousarray(x[None])) for x in sequences[0])
    first = salekit.dense_attention(rows[:, half:], keys[:, :half], values[:, :half], causal=False, return_lse=True)
    later = salekit.dense_attention(rows[:, half:], keys[:, half:], values[:, half:], return_lse=True)
    merged, _ = salekit.merge_attention_states(*first, *later)
    print(f"merged halves differ from dense attention by {relative(to_host(merged)[0], dense[0][half:]):.2e}")


if __name__ == "__main__":
    sys.exit(main())
