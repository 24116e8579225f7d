"""Compile, cache, load and launch kernels: NVRTC with an explicit ``-arch``, a cache on disk, CuPy's module loader."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import tempfile
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from . import forks, guards, memory, programs
from .errors import ArgumentError, CacheWarning, CompileError, GpuError
from .plans import SUPPORTED_ARCHS, arch_of
from .private_files import make_private, read_private, why_not_private

CACHE_VERSION = 1
FLAGS = ("-std=c++17", "--ptxas-options=-v")
CACHING_NVRTC = (12, 9)  # from this version on NVRTC keeps machine code itself, and then gives no log
OLDEST_NVRTC = (12, 2)  # 12.0 does not take the kernels' inline assembly
DEFAULT_CACHE_BYTES = 512 * 2**20
_UNFINISHED = ".new-"  # how a file is called until it is whole
_UNFINISHED_SECONDS = 3600  # nothing takes that long to write
_OWN_NAME = re.compile(r"[0-9a-f]{16}-[0-9a-f]{64}\.cubin|[0-9a-f]{64}\.json|\.new-.*")
_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.M)
INSTALL_HINT = 'install CuPy and NVRTC with: pip install "salekit[cuda12]" (or "salekit[cuda13]" for a CUDA 13 driver)'
NO_CACHE_DIR = "there is no kernel cache, for this user has no home folder; set HOME or SALEKIT_CACHE_DIR"
DRIVER_HINT = "install NVIDIA's driver, 525 or newer (580 for CUDA 13)"


@dataclass(frozen=True)
class KernelSpec:
    """One instance of a kernel template: the file and function ``source``, its C++ template arguments as text, and the
    C++ type whose sizeof is its dynamic shared memory (None: none). lengths: for sequences with lengths of their own
    (SEQUENCE_LENGTHS of tile/shape.cuh); window: for calls with a window (KEY_WINDOW there)."""

    source: str
    template: tuple[str, ...] = ()
    storage: str | None = None
    lengths: bool = False
    window: bool = False

    @property
    def expression(self) -> str:
        return f"{self.source}<{', '.join(self.template)}>" if self.template else self.source

    @property
    def label(self) -> str:
        """What to call it in a list."""
        return self.expression + " with lengths" * self.lengths + " with a window" * self.window


@dataclass(frozen=True)
class KernelInfo:
    """What the compiler reports. Bytes, except registers (per thread) and compile_seconds."""

    registers: int
    static_shared_bytes: int
    dynamic_shared_bytes: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int
    warnings: tuple[str, ...]
    compile_seconds: float


@dataclass(frozen=True)
class Compiled:
    """A cubin. path: the cache's file, which another process may remove to make room; None where it has none."""

    path: Path | None
    lowered_name: str
    info: KernelInfo
    cubin: bytes = field(repr=False)


# --- sources -------------------------------------------------------------------------------------------------------
@lru_cache(maxsize=1)
def source_root() -> Path:
    """The folder of the CUDA sources, as installed or in a checkout."""
    return Path(str(resources.files("salekit.cuda_src")))


@lru_cache(maxsize=None)
def _read(name: str) -> str:
    try:
        return (source_root() / name).read_text()
    except OSError as error:
        raise CompileError(f"kernel source {name} is missing from the installation: {error}") from None


@lru_cache(maxsize=None)
def _headers(name: str) -> tuple[tuple[str, str], ...]:
    """(name, text) of a file and of all that it includes, in order of first inclusion."""
    found: dict[str, str] = {}
    pending = [name]
    while pending:
        current = pending.pop()
        if current not in found:
            found[current] = _read(current)
            pending += _INCLUDE.findall(found[current])
    return tuple(sorted(found.items()))


def sources_hash() -> str:
    """sha256 over every file of cuda_src, names included."""
    digest = hashlib.sha256()
    for path in sorted(source_root().rglob("*.cu*")):
        digest.update(path.relative_to(source_root()).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


# --- NVRTC ---------------------------------------------------------------------------------------------------------
@lru_cache(maxsize=1)
def _nvrtc():
    try:
        from cupy.cuda import nvrtc

        nvrtc.getVersion()
    except Exception as error:  # CuPy raises several kinds when it or NVRTC is missing or broken
        raise GpuError(
            f"NVRTC cannot be used ({type(error).__name__}: {str(error).splitlines()[0][:120]}); {INSTALL_HINT}"
        ) from None
    return nvrtc


@lru_cache(maxsize=1)
def nvrtc_version() -> tuple[int, int]:
    return tuple(_nvrtc().getVersion())


def _flags() -> tuple[str, ...]:
    return FLAGS + (("--no-cache",) if nvrtc_version() >= CACHING_NVRTC else ())


def check_nvrtc(arch: str) -> None:
    """CompileError when NVRTC is older than the kernels, or than ``arch``."""
    known, version = _nvrtc().getSupportedArchs(), nvrtc_version()
    if version < OLDEST_NVRTC:
        problem = "is too old for salekit's kernels"
    elif int(re.sub(r"\D", "", arch)) not in known:
        problem = f"does not know {arch} (it knows sm_{min(known)} to sm_{max(known)})"
    else:
        return
    raise CompileError(
        f"NVRTC {version[0]}.{version[1]} {problem}; install a newer one: "
        'pip install --upgrade nvidia-cuda-nvrtc-cu12 (or "salekit[cuda13]" for a CUDA 13 driver)'
    )


def _unit(spec: KernelSpec) -> str:
    defines = ("#define SEQUENCE_LENGTHS\n" if spec.lengths else "") + ("#define KEY_WINDOW\n" if spec.window else "")
    return f'{defines}#include "kernels/{spec.source}.cu"\n#include "tile/shared_bytes.cuh"\n'


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    return int(match.group(1)) if match else 0


def parse_log(log: str, lowered_name: str) -> dict:
    """Registers, shared memory, stack, spills of one function, and every warning, from NVRTC's and ptxas' log."""
    start = log.find(f"Function properties for {lowered_name}")
    if start < 0:
        start = log.find(lowered_name)
    end = log.find("Compiling entry function", start)
    section = log[start : end if end > 0 else None]
    warnings = [
        line.strip()
        for line in log.splitlines()
        if "warning" in line.lower() or "serializ" in line.lower() or "Potential Performance Loss" in line
    ]
    return dict(
        registers=_number(r"Used (\d+) registers", section),
        static_shared_bytes=_number(r"(\d+) bytes smem", section),
        stack_bytes=_number(r"(\d+) bytes stack frame", section),
        spill_store_bytes=_number(r"(\d+) bytes spill stores", section),
        spill_load_bytes=_number(r"(\d+) bytes spill loads", section),
        warnings=tuple(dict.fromkeys(warnings)),
    )


def _compile_program(nvrtc, program, flags: tuple[str, ...], what: str) -> None:
    """CompileError with the log; GpuError where NVRTC lacks a library of its own."""
    try:
        nvrtc.compileProgram(program, flags)
    except nvrtc.NVRTCError:
        log = nvrtc.getProgramLog(program)
        if "libnvrtc-builtins" not in log:
            raise CompileError(f"{what}:\n{log}") from None
        package = "nvidia-cuda-nvrtc-cu12" if nvrtc_version()[0] == 12 else "nvidia-cuda-nvrtc"
        raise GpuError(
            f"NVRTC is installed in part ({log.strip().splitlines()[0][:120]}); install it again with: "
            f"pip install --force-reinstall {package}"
        ) from None


@forks.compiling()
def check_compiler() -> None:
    """GpuError or CompileError unless NVRTC compiles an empty kernel, which takes a twentieth of a second."""
    nvrtc = _nvrtc()
    program = nvrtc.createProgram("__global__ void empty() {}", "empty.cu", [], [])
    try:
        _compile_program(nvrtc, program, _flags(), "an empty kernel")
    finally:
        nvrtc.destroyProgram(program)


@forks.compiling()
def _compile(spec: KernelSpec, arch: str) -> tuple[bytes, str, KernelInfo]:
    nvrtc = _nvrtc()
    headers = [item for item in _headers(f"kernels/{spec.source}.cu") + _headers("tile/shared_bytes.cuh")]
    names = dict(headers)
    program = nvrtc.createProgram(
        _unit(spec),
        f"{spec.source}.unit.cu",
        [text.encode() for text in names.values()],
        [name.encode() for name in names],
    )
    try:
        nvrtc.addNameExpression(program, spec.expression)
        storage = f"shared_bytes<(unsigned)sizeof({spec.storage})>" if spec.storage else None
        if storage:
            nvrtc.addNameExpression(program, storage)
        started = time.perf_counter()
        _compile_program(nvrtc, program, (f"-arch={arch}", *_flags()), f"{spec.expression} for {arch}")
        seconds = time.perf_counter() - started
        lowered = _text(nvrtc.getLoweredName(program, spec.expression))
        dynamic = _number(r"ILj(\d+)E", _text(nvrtc.getLoweredName(program, storage))) if storage else 0
        info = KernelInfo(
            dynamic_shared_bytes=dynamic,
            compile_seconds=round(seconds, 3),
            **parse_log(nvrtc.getProgramLog(program), lowered),
        )
        return nvrtc.getCUBIN(program), lowered, info
    finally:
        nvrtc.destroyProgram(program)


def _text(name) -> str:
    return name.decode() if isinstance(name, bytes) else name


# --- cache ---------------------------------------------------------------------------------------------------------
_locks: dict[str, threading.Lock] = {}
_locks_guard = threading.Lock()


def _renew_locks() -> None:
    """In a forked child: a thread that is not there may have held them."""
    global _locks_guard
    _locks_guard = threading.Lock()
    _locks.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks)


def cache_dir() -> Path | None:
    """``SALEKIT_CACHE_DIR``, else ``salekit`` in the user's cache folder, absolute; None for a user without a home."""
    chosen = os.environ.get("SALEKIT_CACHE_DIR")
    if not chosen:
        chosen = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache"), "salekit")
    if chosen.startswith("~") and os.environ.get("HOME") == "":
        return None
    found = os.path.expanduser(chosen)
    return None if found.startswith("~") else Path(os.path.abspath(found))


def private_cache_dir() -> Path | None:
    """:func:`cache_dir`, or None when there is none, or another user could write there: what it holds is then neither
    read nor added to. A CacheWarning says so, once."""
    folder = cache_dir()
    if folder is None:
        _warn(f"{NO_CACHE_DIR}; kernels are compiled anew in each process")
        return None
    problem = why_not_private(folder)
    if problem is None:
        return folder
    _warn(
        f"the kernel cache {folder} is not used, for {problem}, and whoever can write a compiled kernel can run code "
        "here; kernels are compiled anew in each process until it is private (chmod go-w), or SALEKIT_CACHE_DIR names "
        "a folder that is"
    )
    return None


@lru_cache(maxsize=None)
def _warn(text: str) -> None:
    warnings.warn(text, CacheWarning, stacklevel=2)


_unwritten: dict[str, Compiled] = {}  # by key: what this process compiled and the cache does not take


@lru_cache(maxsize=None)
def cache_key(spec: KernelSpec, arch: str) -> str:
    """sha256 of all that decides the cubin: sources with everything they include, names, flags, NVRTC, arch."""
    digest = hashlib.sha256()
    parts = [
        str(CACHE_VERSION),
        _unit(spec),
        spec.expression,
        str(spec.storage),
        arch,
        repr(_flags()),
        repr(nvrtc_version()),
    ]
    for name, text in _headers(f"kernels/{spec.source}.cu") + _headers("tile/shared_bytes.cuh"):
        parts += [name, text]
    for part in parts:
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()


def _load_entry(folder: Path, key: str) -> Compiled | None:
    """The entry of this key, or None when there is none or it is damaged. The cubin's name carries its own hash, and
    the record its key and a hash of itself: whatever is changed or moved to another's place is not believed."""
    try:
        record = json.loads(read_private(folder / f"{key}.json"))
        if record["key"] != key or record.pop("record_sha256") != _record_hash(record):
            return None
        path = folder / f"{key[:16]}-{record['cubin_sha256']}.cubin"
        cubin = read_private(path)
        if hashlib.sha256(cubin).hexdigest() != record["cubin_sha256"]:
            return None
        info = KernelInfo(**{**record["info"], "warnings": tuple(record["info"]["warnings"])})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    now = time.time()
    with suppress(OSError):  # a cache that can only be read
        for used in (path, folder / f"{key}.json"):
            os.utime(used, (now, now))
    return Compiled(path, record["lowered_name"], info, cubin)


def _record_hash(record: dict) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def write_file(path: Path, data: bytes) -> None:
    """Write a file that appears at once, whole."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=_UNFINISHED)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def _store_entry(folder: Path, key: str, cubin: bytes, lowered: str, info: KernelInfo) -> Compiled:
    sha = hashlib.sha256(cubin).hexdigest()
    path = folder / f"{key[:16]}-{sha}.cubin"
    write_file(path, cubin)
    record = {"key": key, "lowered_name": lowered, "cubin_sha256": sha, "info": asdict(info)}
    record["record_sha256"] = _record_hash(record)
    write_file(folder / f"{key}.json", json.dumps(record).encode())
    _trim(folder, {path.name, f"{key}.json"})
    return Compiled(path, lowered, info, cubin)


def _store(key: str, cubin: bytes, lowered: str, info: KernelInfo) -> Compiled:
    """Into the cache, or else into this process's memory."""
    folder = private_cache_dir()
    if folder is not None:
        try:
            make_private(folder)
            if problem := why_not_private(folder):  # it may have come into being since it was looked at
                raise PermissionError(problem)
            return _store_entry(folder, key, cubin, lowered, info)
        except OSError as error:  # read-only or full
            _warn(
                f"the kernel cache {folder} cannot be written ({error.strerror or error}); kernels that it does not "
                "hold are compiled anew in each process. Make room there, or set SALEKIT_CACHE_DIR"
            )
    _unwritten[key] = Compiled(None, lowered, info, cubin)
    return _unwritten[key]


def cache_bound() -> int:
    text = os.environ.get("SALEKIT_CACHE_MAX_BYTES", str(DEFAULT_CACHE_BYTES))
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise ArgumentError(f"SALEKIT_CACHE_MAX_BYTES: got {text!r}; wants a number of bytes")
    return int(text)


def _trim(folder: Path, keep: set[str]) -> None:
    """Remove the entries used longest ago until the cache fits its bound, but not what ``keep`` names, and files that
    processes which are long gone left unfinished. Files of other names are not the cache's."""
    bound = cache_bound()
    files = []
    for path in folder.iterdir():
        with suppress(OSError):
            status = path.lstat()
            if not stat.S_ISREG(status.st_mode) or not _OWN_NAME.fullmatch(path.name):
                continue
            if path.name.startswith(_UNFINISHED):
                if time.time() - status.st_mtime > _UNFINISHED_SECONDS:
                    path.unlink()
                continue
            files.append((status.st_mtime, status.st_size, path))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files, key=lambda item: item[0]):
        if total <= bound:
            return
        if path.name not in keep:
            with suppress(OSError):
                path.unlink()
                total -= size


def compile_kernel(spec: KernelSpec, arch: str, cache: bool = True) -> Compiled:
    """Compile for ``arch``, or take it from the cache. Needs no GPU. Raises CompileError with the compiler's log,
    GpuError when CuPy or NVRTC is missing or cannot work here, ArgumentError for a bound of the cache that is none."""
    cache_bound()  # said by every call, not by the first that stores
    key = cache_key(spec, arch)
    with _locks_guard:
        lock = _locks.setdefault(key, threading.Lock())
    with lock:
        if cache:
            folder = private_cache_dir()
            entry = _load_entry(folder, key) if folder else None
            if entry := entry or _unwritten.get(key):
                return entry
        check_nvrtc(arch)
        built = _compile(spec, arch)
        return _store(key, *built)


def precompile(specs, arch: str, cache: bool = True) -> list[Compiled]:
    """Compile many kernels in parallel (NVRTC runs without the interpreter lock)."""
    with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:
        return list(pool.map(lambda spec: compile_kernel(spec, arch, cache), specs))


# --- load and launch -----------------------------------------------------------------------------------------------
@lru_cache(maxsize=None)
def _arch_of_device(device: int) -> str:
    import cupy

    with memory.for_a_context(device):
        capability = cupy.cuda.Device(device).compute_capability
    arch = arch_of(int(capability[:-1]), int(capability[-1]))
    if arch is None:
        known = ", ".join(re.sub(r"sm_(\d+)(\d)a?", r"\1.\2", each) for each in SUPPORTED_ARCHS)
        number = f"{capability[:-1]}.{capability[-1]}"
        raise GpuError(f"GPU {device} has compute capability {number}; salekit has kernels for {known}")
    return arch


def device_arch() -> str:
    """The -arch of CuPy's current device. Raises GpuError without a GPU or with one older than sm_80."""
    forks.check()
    try:
        import cupy

        device = cupy.cuda.runtime.getDevice()
    except Exception as error:
        hint = "; " + INSTALL_HINT if isinstance(error, ImportError) else ""
        if "cudaErrorInsufficientDriver" in str(error):  # none, or an old one
            hint = "; " + DRIVER_HINT
        raise GpuError(
            f"no usable GPU ({type(error).__name__}: {str(error).splitlines()[0][:120]}){hint}"
        ) from None
    return _arch_of_device(device)


@lru_cache(maxsize=None)
def _multiprocessors_of_device(device: int) -> int:
    import cupy

    return cupy.cuda.Device(device).attributes["MultiProcessorCount"]


def multiprocessors() -> int:
    """How many multiprocessors CuPy's current device has."""
    import cupy

    return _multiprocessors_of_device(cupy.cuda.runtime.getDevice())


_MAX_DYNAMIC_SHARED_BYTES = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


def _load(compiled: Compiled) -> tuple[Any, Any]:
    """(module, function) of a cubin. Not with CuPy's RawModule: it remembers a module that found no memory, and all
    launches from that fail."""
    from cupy.cuda import driver, function

    module = function.Module()
    module.load(compiled.cubin)
    loaded = module.get_function(compiled.lowered_name)
    if compiled.info.dynamic_shared_bytes > 48 * 1024:
        driver.funcSetAttribute(loaded.ptr, _MAX_DYNAMIC_SHARED_BYTES, compiled.info.dynamic_shared_bytes)
    return module, loaded


def _load_with_room(compiled: Compiled) -> tuple[Any, Any]:
    """The same, with what CuPy's pool holds unused, if it takes that: the driver has its own memory for code."""
    import cupy

    try:
        return _load(compiled)
    except cupy.cuda.driver.CUDADriverError as error:
        if not memory.is_short(error):
            raise
    cupy.get_default_memory_pool().free_all_blocks()
    return _load(compiled)


class Kernel:
    """A loaded kernel. Call it with grid, block (threads) and arguments; it runs on CuPy's current stream or is noted
    by the program that this thread records."""

    def __init__(self, compiled: Compiled, name: str = "a kernel"):
        import cupy

        self.name, self.info = name, compiled.info
        try:
            self._module, self._function = _load_with_room(compiled)
        except cupy.cuda.driver.CUDADriverError as error:
            if memory.is_short(error):
                size = len(compiled.cubin)
                raise memory.explained(error, size, "a kernel's code", "Free memory") from None
            version = cupy.cuda.runtime.driverGetVersion()
            raise GpuError(
                f"the driver (CUDA {version // 1000}.{version % 1000 // 10}) does not load {compiled.lowered_name}, "
                f"compiled by NVRTC {'.'.join(map(str, nvrtc_version()))}: {error}; update the driver, or install an "
                "NVRTC that is no newer than it"
            ) from error

    def __call__(self, grid, block, args: tuple) -> None:
        grid = grid if isinstance(grid, tuple) else (grid,)
        block = block if isinstance(block, tuple) else (block,)
        recorder = programs.active()
        if recorder is not None:
            recorder.launch(self._function, grid, block, self.info.dynamic_shared_bytes, args, self.name)
        else:
            self._function(grid, block, args, shared_mem=self.info.dynamic_shared_bytes)
            if guards.is_on():
                from cupy.cuda import get_current_stream

                guards.check(self.name, get_current_stream().ptr)

    @property
    def handle(self) -> int:
        """The driver's ``CUfunction``."""
        return self._function.ptr

    def blocks_per_multiprocessor(self, threads: int) -> int:
        """How many blocks of that many threads a multiprocessor holds at once, by the driver."""
        from cupy.cuda import driver

        return driver.occupancyMaxActiveBlocksPerMultiprocessor(self.handle, threads, self.info.dynamic_shared_bytes)


_loaded: dict[tuple, Kernel] = {}
# By GPU: a module that a second thread loads in vain would be unloaded, which captures do not survive.
_loading: dict[int, threading.Lock] = {}


def get_kernel(spec: KernelSpec, arch: str | None = None) -> Kernel:
    """The kernel for CuPy's current device, compiled at most once and loaded once per device."""
    forks.check()
    import cupy

    key = (spec, cupy.cuda.runtime.getDevice())
    kernel = _loaded.get(key)
    if kernel is None:
        compiled = compile_kernel(spec, arch or device_arch())
        with _loading.setdefault(key[1], threading.Lock()):
            kernel = _loaded.get(key) or _loaded.setdefault(key, Kernel(compiled, spec.label))
    return kernel


def loaded_kernels() -> dict[int, tuple[KernelSpec, Kernel]]:
    """The kernels that are loaded on CuPy's current device, by their handles."""
    import cupy

    current = cupy.cuda.runtime.getDevice()
    return {kernel.handle: (spec, kernel) for (spec, device), kernel in list(_loaded.items()) if device == current}
