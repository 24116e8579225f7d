"""Programs: the launches of a call, recorded once and replayed with other addresses.

Stage functions allocate with ``arrays.empty`` or ``arrays.zeros`` and launch through ``jit.get_kernel``. While a
:class:`Recorder` is active in the thread, an allocation is a *symbol*, a CuPy array at an address that no memory has,
and a launch is noted instead of run. :class:`Program` then does what a linker does: it lays the arguments of all
launches out in one image, finds the symbols' addresses in it, gives the symbols that live in the workspace an offset
there (those that are never in use together share memory), and before a run writes the real addresses into the image.

So in a recorded stage every array on the GPU has to come from the caller or from those two functions (another one as an
argument is an error, at recording), nothing but those two and kernels may touch memory, and no value on the GPU may
decide what is launched. What the workspace holds at the start of a call is undefined.
"""

from __future__ import annotations

import math
import sys
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any, Iterable, Iterator, Sequence

import numpy as np

from . import guards, memory, nvtx
from .errors import GpuError
from .graphs import LaunchGraph, stream_priority

# Symbol addresses: in no GPU's address space, and NaN when read as a float64 or as the second of two float32, so that
# no argument that is data looks like one.
_TAG = 0x7FF5
_TAG_SHIFT, _SYMBOL_SHIFT = 48, 40
_FIRST_SYMBOL = _TAG << _TAG_SHIFT
_MAX_SYMBOLS = 1 << (_TAG_SHIFT - _SYMBOL_SHIFT)
_MIDDLE = 1 << (_SYMBOL_SHIFT - 1)  # a symbol's address lies in the middle of its TiB: views may start before it
_IMAGE_ALIGNMENT = 64  # of a CUtensorMap
WORKSPACE_ALIGNMENT = 512
_MIN_GRAPH = 3  # operations from which on a graph is launched faster than they are
_MAX_GRAPHS = 4  # of a program, one for each stream: launches of one graph wait for each other

WORKSPACE = 0  # the port of every symbol that is not a port of its own


class Deferred:
    """A kernel argument of ``num_bytes`` bytes that is computed from an address when a program is linked."""

    num_bytes: int
    address: int  # a symbol's

    def write(self, address: int, target: int) -> None:
        """Write the argument for the data at ``address`` to the host memory at ``target``."""
        raise NotImplementedError


class Parameter:
    """A kernel argument of ``count`` float32 values that each run of a program may change.

    group: which of the run's values: 0, the thresholds; 1, the sink logits.
    """

    def __init__(self, count: int, group: int = 0):
        self.count = count
        self.group = group


class ScalarParameter(Parameter, float):
    """One float32 that passes for a float in the stages."""

    def __new__(cls) -> "ScalarParameter":
        return float.__new__(cls, 1.0)

    def __init__(self) -> None:
        Parameter.__init__(self, 1)


def float32(value: float) -> Any:
    """``value`` as a float32 kernel argument; a parameter of a program stays one."""
    return value if isinstance(value, Parameter) else np.float32(value)


@dataclass
class _Symbol:
    """Memory that a program refers to. first, last: the operations that use it; port, offset: where it is linked."""

    num_bytes: int
    address: int
    first: int = -1
    last: int = -1
    port: int = WORKSPACE
    offset: int = 0


@dataclass(frozen=True)
class Launch:
    """A kernel (the driver's handle), and the address of the addresses of its arguments."""

    function: int
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    params: int


@dataclass(frozen=True)
class Fill:
    """Zeros for ``num_bytes`` at the address that a word of the image holds."""

    word: int
    num_bytes: int


@dataclass(frozen=True)
class _Noted:
    """A launch, or with ``function`` None a fill with zeros of the first argument's memory."""

    function: int | None
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    args: tuple
    num_bytes: int = 0
    owner: Any = None  # what the function lives as long as
    stage: str = ""
    name: str = "a fill"


_active = threading.local()


def active() -> "Recorder | None":
    """The recorder of this thread, or None when launches run."""
    return getattr(_active, "recorder", None)


@contextmanager
def stage(name: str) -> Iterator[None]:
    """What runs inside belongs to this stage: launches are noted with its name; those that run are in an NVTX range
    of that name, where those are on (``salekit.nvtx``)."""
    recorder = active()
    if recorder is None:
        with nvtx.span(name):
            yield
        return
    outer, recorder.stage = recorder.stage, name
    try:
        yield
    finally:
        recorder.stage = outer


class Recorder:
    """Notes what the stages launch and allocate in this thread (a context manager). stage: whose turn it is."""

    def __init__(self, device: int):
        self.device = device
        self.stage = ""
        self.symbols: list[_Symbol] = []
        self.noted: list[_Noted] = []

    def __enter__(self) -> "Recorder":
        if active() is not None:
            raise RuntimeError("a program is being recorded already")
        _active.recorder = self
        return self

    def __exit__(self, *_: Any) -> None:
        _active.recorder = None

    def array(self, shape: Sequence[int], dtype: Any, strides: Sequence[int] | None = None) -> Any:
        """A CuPy array whose memory is a new symbol."""
        import cupy

        if len(self.symbols) == _MAX_SYMBOLS:
            raise RuntimeError(f"a program has more than {_MAX_SYMBOLS} arrays")
        address = _FIRST_SYMBOL + (len(self.symbols) << _SYMBOL_SHIFT) + _MIDDLE
        num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
        self.symbols.append(_Symbol(num_bytes, address))
        memory = cupy.cuda.UnownedMemory(address, _MIDDLE, self, self.device)
        return cupy.ndarray(tuple(shape), dtype, cupy.cuda.MemoryPointer(memory, 0), strides)

    def zeros(self, shape: Sequence[int], dtype: Any) -> Any:
        """Like :meth:`array`; a run fills it with zeros at this point."""
        array = self.array(shape, dtype)
        if array.size:
            self.noted.append(_Noted(None, (0, 0, 0), (0, 0, 0), 0, (array,), array.nbytes, stage=self.stage))
        return array

    def launch(
        self, function: Any, grid: tuple, block: tuple, shared_bytes: int, args: tuple, name: str = "a kernel"
    ) -> None:
        """Note a launch of ``function``, which has the driver's handle as ``ptr``."""
        grid, block = ((*sizes, 1, 1)[:3] for sizes in (grid, block))
        for arg in args:
            if is_gpu_array(arg):
                check_symbol(arg)
        self.noted.append(_Noted(function.ptr, grid, block, shared_bytes, args, 0, function, self.stage, name))


def is_gpu_array(x: Any) -> bool:
    """Whether ``x``, of any type, is a CuPy array."""
    cupy = sys.modules.get("cupy")
    return cupy is not None and isinstance(x, cupy.ndarray)


def check_symbol(array: Any) -> None:
    """RuntimeError when a program is recorded and ``array`` is memory that the program would not know of."""
    if active() is not None and array.data.ptr >> _TAG_SHIFT != _TAG:
        raise RuntimeError(
            f"a recorded stage uses an array of shape {array.shape} that arrays.empty or arrays.zeros did not make"
        )


def is_symbol(array: Any) -> bool:
    return array.data.ptr >> _TAG_SHIFT == _TAG


# --- the image ---------------------------------------------------------------------------------------------------
def _argument_bytes(arg: Any) -> bytes:
    if isinstance(arg, Deferred):
        return bytes(arg.num_bytes)
    if isinstance(arg, Parameter):
        return bytes(4 * arg.count)
    if isinstance(arg, np.generic) or (isinstance(arg, np.ndarray) and arg.size == 1):
        return arg.tobytes()
    if is_gpu_array(arg):
        return arg.data.ptr.to_bytes(8, "little")
    raise TypeError(f"a recorded kernel got an argument of {type(arg).__name__}; wants a NumPy scalar or a CuPy array")


class _Image:
    """Argument bytes of all operations, each on a multiple of 8 bytes, in memory that does not move."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self.size = 0

    def add(self, data: bytes, alignment: int = 8) -> int:
        """Offset of ``data`` in the image."""
        padding = -self.size % alignment
        self.pieces.append(bytes(padding) + data)
        offset = self.size + padding
        self.size = offset + len(data)
        return offset

    def build(self) -> np.ndarray:
        data = b"".join(self.pieces)
        raw = np.zeros(len(data) + 8 + _IMAGE_ALIGNMENT, np.uint8)
        start = -raw.ctypes.data % _IMAGE_ALIGNMENT
        image = raw[start : start + len(data) + -len(data) % 8]
        image[: len(data)] = np.frombuffer(data, np.uint8)
        return image


_bound = threading.local()


def bind_context(device: int) -> None:
    """Make the current device's context this thread's: the runtime does that in its first call, the driver does not."""
    devices = _bound.__dict__.setdefault("devices", set())
    if device not in devices:
        from cupy.cuda import runtime

        runtime.memGetInfo()
        devices.add(device)


class Gpu:
    """What a program asks of the driver."""

    def __init__(self) -> None:
        from cupy.cuda import driver, runtime

        self.launch, self.fill, self.replay = driver.launchKernel, runtime.memsetAsync, runtime.graphLaunch

    def graph(self, program: "Program", stream: int) -> LaunchGraph | None:
        """A graph of the program's operations for a stream; None where the driver has none, or the stream a priority,
        which a graph would not have."""
        try:
            return LaunchGraph(program) if stream_priority(stream) == 0 else None
        except GpuError as error:
            if memory.is_short(error):
                raise
            return None


class Program:
    """A recorded call. Not for two threads at a time: link, write values, submit under one lock.

    recorder: what was recorded. ports: arrays (symbols) whose addresses each run gets from outside, in this order;
    every other symbol lies in the workspace.
    workspace_bytes: its size. operations: the launches and fills. stages: that of each. versions: for each of them, how
    often its arguments changed. parameters, other_parameters: a float32 view for each :class:`Parameter` of group 0 and
    of group 1, in the order of their launches.
    """

    def __init__(self, recorder: Recorder, ports: Iterable[Any]):
        image = _Image()
        deferred: list[tuple[int, int, Deferred]] = []  # offset of the address, of the argument, the argument
        parameters: list[tuple[int, int, Parameter]] = []  # operation, offset
        offsets: list[list[int]] = []
        starts: list[int] = []
        for index, noted in enumerate(recorder.noted):
            starts.append(image.size)
            offsets.append([])
            for arg in noted.args:
                is_deferred = isinstance(arg, Deferred)
                offset = image.add(_argument_bytes(arg), _IMAGE_ALIGNMENT if is_deferred else 8)
                offsets[-1].append(offset)
                if is_deferred:
                    deferred.append((image.add(arg.address.to_bytes(8, "little")), offset, arg))
                elif isinstance(arg, Parameter):
                    parameters.append((index, offset, arg))
        self._image = image.build()
        self._words = memoryview(self._image).cast("Q")
        base = self._image.ctypes.data
        self.versions = [0] * len(starts)
        self.parameters, self.other_parameters = (
            tuple(self._image[at : at + 4 * x.count].view(np.float32) for _, at, x in parameters if x.group == group)
            for group in (0, 1)
        )
        self._parameter_operations = [[at for at, _, x in parameters if x.group == group] for group in (0, 1)]
        self._values: list[Any] = [None, None]  # of each group
        targets = {offset // 8: (base + target, arg) for offset, target, arg in deferred}
        self._link_symbols(recorder, list(ports), starts, targets)
        self._linked: list[int] = [0] * len(self._places)

        self._params = np.array([base + offset for each in offsets for offset in each], np.uint64)
        self._owners = [noted.owner for noted in recorder.noted]
        self.stages = [noted.stage for noted in recorder.noted]
        self.operations: list[Launch | Fill] = []
        params = self._params.ctypes.data
        for noted, arguments in zip(recorder.noted, offsets):
            if noted.function is None:
                self.operations.append(Fill(arguments[0] // 8, noted.num_bytes))
            else:
                self.operations.append(Launch(noted.function, noted.grid, noted.block, noted.shared_bytes, params))
            params += 8 * len(arguments)
        self._has_fills = any(isinstance(operation, Fill) for operation in self.operations)
        self._calls: tuple[int | None, list[tuple]] = (None, [])
        self._names = [noted.name for noted in recorder.noted]
        self._graphs: dict[int, LaunchGraph | None] = {}
        # A graph is one launch without stages: with ranges, each operation is launched by itself.
        self._ranges = nvtx.functions()
        self._min_graph = _MIN_GRAPH if self._ranges is None else len(self.operations) + 1

    def _link_symbols(
        self, recorder: Recorder, ports: list[Any], starts: list[int], deferred: dict[int, tuple[int, Deferred]]
    ) -> None:
        """Find the symbols' addresses in the image and decide what each is to become."""
        where = np.flatnonzero(self._image.view(np.uint64) >> np.uint64(_TAG_SHIFT) == _TAG)
        operations = (np.searchsorted(np.array(starts, np.int64), where * 8, side="right") - 1).tolist()
        addresses = [self._words[word] for word in where]
        symbols = [recorder.symbols[(address - _FIRST_SYMBOL) >> _SYMBOL_SHIFT] for address in addresses]
        for operation, symbol in zip(operations, symbols):
            symbol.first = operation if symbol.first < 0 else symbol.first
            symbol.last = operation
        for port, array in enumerate(ports, start=WORKSPACE + 1):
            recorder.symbols[(array.data.ptr - _FIRST_SYMBOL) >> _SYMBOL_SHIFT].port = port
        in_workspace = [x for x in recorder.symbols if x.port == WORKSPACE and x.first >= 0]
        self._guarded = in_workspace if guards.is_on() else None
        self.workspace_bytes = _layout(in_workspace) if self._guarded is None else _layout_with_bands(in_workspace)
        # for each port: (word of the image, what to add to the port's address, operation, deferred argument or None)
        self._places: list[list[tuple]] = [[] for _ in range(WORKSPACE + 1 + len(ports))]
        for word, address, operation, symbol in zip(where.tolist(), addresses, operations, symbols):
            addend = address - symbol.address + symbol.offset
            self._places[symbol.port].append((word, addend, operation, deferred.get(word)))

    def link(self, *addresses: int) -> None:
        """Write the workspace's address and those of the ports into the image."""
        words, versions = self._words, self.versions
        for port, address in enumerate(addresses):
            if address == self._linked[port]:
                continue
            self._linked[port] = 0  # until all of it is written
            if self._has_fills:
                self._calls = (None, [])  # they hold addresses
            for word, addend, operation, deferred in self._places[port]:
                words[word] = address + addend
                versions[operation] += 1
                if deferred is not None:
                    target, argument = deferred
                    argument.write(address + addend, target)
            self._linked[port] = address

    def write_values(self, values: float | np.ndarray, group: int = 0) -> None:
        """Write a group's parameters: each of them a float, or an array from the first to the last. An array that is
        passed again must hold what it held."""
        parameters, last = (self.parameters, self.other_parameters)[group], self._values[group]
        if values is last or not parameters or (isinstance(values, float) and values == last):
            return
        is_array = isinstance(values, np.ndarray)
        if is_array and isinstance(last, np.ndarray) and values.tobytes() == last.tobytes():
            return
        start = 0
        for parameter, operation in zip(parameters, self._parameter_operations[group]):
            part = values[start : start + parameter.size] if is_array else values
            parameter[: part.size if is_array else None] = part
            start += parameter.size
            self.versions[operation] += 1
        self._values[group] = values

    def address(self, fill: "Fill") -> int:
        return self._words[fill.word]

    def submit(self, gpu: Any, stream: int, is_captured: bool = False) -> None:
        """Launch it all on a stream (a ``cudaStream_t``) of the current device: as a graph of its own, where that pays.

        is_captured: whether the stream is in capture mode, which wants the launches themselves.
        """
        if self._guarded is not None and not is_captured:
            self._submit_guarded(gpu, stream)
            return
        if not is_captured and len(self.operations) >= self._min_graph:
            graph = self._graphs.get(stream)
            if graph is None and stream not in self._graphs and len(self._graphs) < _MAX_GRAPHS:
                graph = self._graphs[stream] = gpu.graph(self, stream)
            if graph is not None:
                if graph.versions != self.versions:
                    graph.update(self)
                gpu.replay(graph.executable, stream)
                return
        if stream != self._calls[0]:
            self._calls = (stream, self._calls_on(gpu, stream))
        for function, arguments in self._calls[1]:
            function(*arguments)

    def _submit_guarded(self, gpu: Any, stream: int) -> None:
        """One operation after the other, each followed by a look at all bands (``salekit.guards``)."""
        base = self._linked[WORKSPACE]
        if self.workspace_bytes:
            gpu.fill(base, guards.PATTERN, self.workspace_bytes, stream)
        bands = [
            (start - guards.BAND, start + num_bytes, f"a piece of workspace of {num_bytes} bytes")
            for start, num_bytes in ((base + x.offset, x.num_bytes) for x in self._guarded)
        ]
        for name, (function, arguments) in zip(self._names, self.calls(gpu, stream)):
            function(*arguments)
            guards.check(name, stream, bands)

    def _calls_on(self, gpu: Any, stream: int) -> list[tuple]:
        calls = self.calls(gpu, stream)
        if self._ranges is None:
            return calls
        push, pop = self._ranges
        ranged: list[tuple] = []
        for name, of_stage in groupby(zip(self.stages, calls), key=itemgetter(0)):
            ranged += [(push, (name or "salekit",)), *(call for _, call in of_stage), (pop, ())]
        return ranged

    def calls(self, gpu: Any, stream: int) -> list[tuple]:
        """For each operation (function, arguments), which launches it on a stream, as the program is linked now."""
        return [
            (gpu.fill, (self.address(x), 0, x.num_bytes, stream))
            if isinstance(x, Fill)
            else (gpu.launch, (x.function, *x.grid, *x.block, x.shared_bytes, stream, x.params, 0))
            for x in self.operations
        ]


def _layout(symbols: list[_Symbol]) -> int:
    """Give each symbol an offset such that those in use together do not overlap; the bytes that takes."""
    placed: list[_Symbol] = []
    total = 0
    for symbol in sorted(symbols, key=lambda x: -x.num_bytes):
        size = _round_up(symbol.num_bytes)
        for other in placed:  # by offset: the first gap that is wide enough
            if other.first > symbol.last or symbol.first > other.last:
                continue
            if symbol.offset + size <= other.offset:
                break
            symbol.offset = max(symbol.offset, other.offset + _round_up(other.num_bytes))
        total = max(total, symbol.offset + size)
        placed.append(symbol)
        placed.sort(key=lambda x: x.offset)
    return total


def _layout_with_bands(symbols: list[_Symbol]) -> int:
    """The same with a band before and after each symbol, none of which shares memory."""
    total = guards.BAND
    for symbol in symbols:
        symbol.offset = total
        total += _round_up(symbol.num_bytes + guards.BAND)
    return total


def _round_up(num_bytes: int) -> int:
    return -(-num_bytes // WORKSPACE_ALIGNMENT) * WORKSPACE_ALIGNMENT
