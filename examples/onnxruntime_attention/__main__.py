"""salekit in the place of an ONNX graph's attention, by IO binding: ``python -m examples.onnxruntime_attention``."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any, Callable

import numpy as np
from onnx import numpy_helper
from salekit.cli.main import exit_code_of

from salekit.errors import ArgumentError, SalekitError

from . import check, model, sessions

ACCURACY_FAILED = 5


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.onnxruntime_attention", description=__doc__)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: CUDA where it is")
    parser.add_argument("--graph", choices=tuple(model.OPSETS), default="ops", help="attention in the graph: plain "
                        "operators, the operator Attention of opset 23, or ONNX Runtime's GroupQueryAttention; default "
                        "%(default)s")
    parser.add_argument("--layers", type=int, default=1, help="default %(default)s")
    parser.add_argument("--seqlen", type=int, help="tokens; default 4096 on a GPU, 1024 on the twin")
    parser.add_argument("--heads", type=int, default=8, help="query heads (default %(default)s)")
    parser.add_argument("--kv-heads", type=int, default=2, help="default %(default)s")
    parser.add_argument("--head-dim", type=int, choices=(64, 128), default=64, help="default %(default)s")
    parser.add_argument("--dtype", choices=tuple(model.DTYPES), default="float16", help="default %(default)s; ONNX "
                        "Runtime has bfloat16 on GPUs alone")
    parser.add_argument("--tau", type=float, default=0.008, help="threshold of all heads (default %(default)s)")
    parser.add_argument("--no-wait", action="store_true", help="on a GPU the host does not wait for each part; not for "
                        "--graph ops, see the README")
    parser.add_argument("--runs", type=int, default=5, help="timed runs; the median counts (default %(default)s)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    try:
        code = run(options)
    except SalekitError as error:
        print(f"onnxruntime_attention: error: {error}", file=sys.stderr)
        code = int(exit_code_of(error))
    sys.exit(code)


def run(options: argparse.Namespace) -> int:
    if not options.tau >= 0:
        raise ArgumentError(f"--tau: got {options.tau:g}; wants a number >= 0 or inf")
    device = sessions.Device(has_cuda() if options.device == "auto" else options.device == "cuda",
                             wait=not options.no_wait)
    on_gpu = device.stream is not None
    seqlen = options.seqlen if options.seqlen is not None else 4096 if on_gpu else 1024
    if seqlen < 1 or options.runs < 1:
        raise ArgumentError(f"--seqlen, --runs: got {seqlen} and {options.runs}; wants at least 1 of each")
    sizes = {"batch": 1, "seqlen": seqlen}
    where = "the CPU, salekit on the NumPy twin: times say nothing of a GPU"
    if on_gpu:
        where = "CUDA, salekit on the same stream"
    print(f"onnxruntime {sessions.onnxruntime.__version__} on {where}")
    print(f"layers: {options.layers}; {seqlen} tokens, {options.heads} query and {options.kv_heads} KV heads of "
          f"{options.head_dim}, {options.dtype}; attention in the graph: {options.graph}\n")
    graph = model.build(
        options.layers, options.heads, options.kv_heads, options.head_dim, options.dtype, options.graph
    )
    whole = sessions.Whole(graph, sizes, device)
    cut = sessions.SplitModel(graph, model.sites(options.layers), options.head_dim, sizes, device)
    ids = model.token_ids(1, seqlen)
    for buffers in (whole.buffers, cut.buffers):
        device.write(buffers["ids"], ids)
    describe(cut)
    if on_gpu:
        parts = [(f"part {index}", part) for index, part in enumerate(cut.parts) if part is not None]
        for name, bound in (("the whole graph", whole.bound), *parts):
            found = sessions.operators_on_cpu(bound.session)
            print(f"operators of {name} on the CPU: {'not known' if found is None else ', '.join(found) or 'none'}")

    whole_ms, _ = timed(whole.run, device, options.runs)
    want = device.read(whole.buffers["hidden"])
    print(f"\n{'':38}{'ms, median':>12}{'error':>10}{'density':>10}")
    print(f"{'the whole graph, ONNX Runtime alone':38}{whole_ms:12.2f}{0:10.5f}{1:10.3f}")
    verdicts: list[bool] = []
    for tau in (0.0, options.tau):
        settings = {"thresholds": tau, "dense_below": 0}
        milliseconds, host = timed(lambda: cut.run(**settings), device, options.runs)
        got = device.read(cut.buffers["hidden"])
        masks = cut.run(return_masks=True, **settings)
        device.synchronize()  # what follows is on another stream
        density = np.mean([mask.density().mean() for mask in masks])
        error = check.relative_error(got, want)
        print(f"{f'cut, salekit at tau {tau:g}':38}{milliseconds:12.2f}{error:10.5f}{float(density):10.3f}")
        if tau == 0:
            verdicts = verify(cut, graph, got, want)
    print("error: of the whole output against the whole graph's, relative, in the Euclidean norm\n")
    if on_gpu:
        print(f"the host is done with a run at tau {options.tau:g} after {host:.2f} ms")
    alone = [timed(lambda: cut.attend(i, thresholds=options.tau, dense_below=0), device, options.runs)[0]
             for i in range(options.layers)]
    print(f"attention alone at tau {options.tau:g}: " + ", ".join(f"{each:.2f} ms" for each in alone))
    print("\n".join(text for _, text in verdicts))
    return 0 if all(passed for passed, _ in verdicts) else ACCURACY_FAILED


def describe(cut: sessions.SplitModel) -> None:
    """Who writes and who reads which memory."""
    for index, part in enumerate(cut.parts):
        if part is not None:
            print(f"part {index}: reads {', '.join(part.inputs)}; writes {', '.join(part.outputs)}")
        if index < len(cut.sites):
            names, view = sessions.roles(cut.sites[index]), cut.views[index]
            places = ", ".join(f"{names[role]} at {sessions.address(view[role]):#x}" for role in view)
            print(f"salekit: {places}")


def verify(
    cut: sessions.SplitModel, graph: Any, got: np.ndarray, want: np.ndarray
) -> list[tuple[bool, str]]:
    """At tau 0: each attention against ONNX Runtime's nodes on the same q, k, v, and a single layer from end to end."""
    read, lines = cut.device.read, []
    for index, view in enumerate(cut.views):
        q, k, v, out = (read(view[role]) for role in ("q", "k", "v", "out"))
        theirs = read(cut.attention_by_runtime(index)).reshape(out.shape)
        errors, tolerance = check.attention_errors(out, theirs), check.attention_tolerance(q, k, v)
        passed = bool((errors <= tolerance).all())
        lines.append((passed, f"tau 0, attention {index} on the same q, k, v: a row of a head is off by at most "
                      f"{errors.max():.2g}, may be by {tolerance.min():.2g}: {'ok' if passed else 'FAILED'}"))
    if len(cut.views) == 1:
        weights = next(numpy_helper.to_array(x) for x in graph.graph.initializer if x.name == "layer.0.o.weight")
        errors, tolerance = check.row_errors(got, want), check.layer_tolerance(q, k, v, out, weights, want)
        passed = bool((errors <= tolerance).all())
        lines.append((passed, f"tau 0, from end to end: a row is off by at most {errors.max():.2g}, may be by "
                      f"{tolerance.min():.2g}: {'ok' if passed else 'FAILED'}"))
    return lines


def has_cuda() -> bool:
    if "CUDAExecutionProvider" not in sessions.onnxruntime.get_available_providers():
        return False
    try:
        import cupy

        return cupy.cuda.runtime.getDeviceCount() > 0
    except Exception:  # no CuPy, no driver and no GPU all come as different errors
        return False


def timed(call: Callable, device: sessions.Device, runs: int) -> tuple[float, float]:
    """Median milliseconds until the result is there, and until the call returns, after a first call."""
    samples = []
    for index in range(runs + 1):
        device.synchronize()
        started = time.perf_counter()
        call()
        returned = time.perf_counter()
        device.synchronize()
        samples.append(((time.perf_counter() - started) * 1e3, (returned - started) * 1e3))
    whole, host = zip(*samples[1:])
    return statistics.median(whole), statistics.median(host)


if __name__ == "__main__":
    main()
