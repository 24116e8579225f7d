"""Marker ``gpu``: skipped without a usable GPU; ``alone``: skipped in a worker of pytest-xdist, for it times
or fills the GPU.

A clean run of all ``gpu`` tests leaves bench/results/gpu-suite.json. Hypothesis draws the same cases in each run, and
new ones with ``--hypothesis-profile explore``.
"""

from __future__ import annotations

import json
import os
import signal
import time
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import pytest

# Before anything imports NumPy: the twin's products are small, and threads that wait for more take the cores.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# A script's job in the background ignores Ctrl-C, and so would the processes that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

with suppress(ImportError):  # which the GPU tests do without
    from hypothesis import settings

    settings.register_profile("explore", deadline=None, derandomize=False, print_blob=True)
    settings.register_profile("salekit", deadline=None, derandomize=True)
    settings.load_profile("salekit")

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "bench" / "results" / "gpu-suite.json"


@lru_cache(maxsize=1)
def gpu_problem() -> str | None:
    """Why GPU tests cannot run here, or None."""
    from salekit.plans import arch_of

    try:
        import cupy

        if cupy.cuda.runtime.getDeviceCount() == 0:
            return "no GPU"
        capability = cupy.cuda.Device().compute_capability
    except Exception as error:  # a missing package, driver or GPU all come as different errors
        return f"no usable GPU: {error}"
    if arch_of(int(capability[:-1]), int(capability[-1])) is None:
        return f"compute capability {capability} is not supported"
    return None


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a GPU that salekit supports")
    config.addinivalue_line("markers", "alone: times or fills the GPU, so nothing else may use it")
    config.stash[_COUNTS] = {"passed": 0, "failed": 0, "skipped": 0}
    config.stash[_START] = time.time()


_COUNTS = pytest.StashKey[dict]()
_START = pytest.StashKey[float]()


def pytest_collection_modifyitems(config, items):
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_items and gpu_problem():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason=gpu_problem()))
    if hasattr(config, "workerinput"):
        for item in items:
            if item.get_closest_marker("alone"):
                item.add_marker(pytest.mark.skip(reason="wants the GPU alone: run it without workers"))


class _Counter:
    def __init__(self, counts):
        self.counts = counts

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.counts["failed"] += 1
        elif report.when == "call" and report.passed:
            self.counts["passed"] += 1
        elif report.skipped:
            self.counts["skipped"] += 1


def pytest_sessionstart(session):
    session.config.pluginmanager.register(_Counter(session.config.stash[_COUNTS]), "salekit-counter")


def pytest_sessionfinish(session, exitstatus):
    config = session.config
    is_whole = not config.option.keyword and all(Path(arg).is_dir() for arg in config.args)
    is_worker = hasattr(config, "workerinput")  # of pytest-xdist: what runs the workers counts for all
    if config.option.markexpr != "gpu" or not is_whole or is_worker or gpu_problem():
        return
    counts = config.stash[_COUNTS]
    if exitstatus != 0 or counts["failed"] or not counts["passed"]:
        return
    import cupy
    import numpy

    import salekit
    from salekit.jit import device_arch, sources_hash

    runtime = cupy.cuda.runtime
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    RECORD.write_text(json.dumps({
        "schema": 1,
        "cuda_src_hash": sources_hash(),
        "gpu": runtime.getDeviceProperties(cupy.cuda.Device().id)["name"].decode(),
        "arch": device_arch(),
        "versions": {
            "salekit": salekit.__version__,
            "cupy": cupy.__version__,
            "numpy": numpy.__version__,
            "nvrtc": ".".join(map(str, cupy.cuda.nvrtc.getVersion())),
            "driver": runtime.driverGetVersion(),
        },
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "seconds": round(time.time() - config.stash[_START], 1),
        **counts,
    }, indent=2) + "\n")
