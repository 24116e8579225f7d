"""A split model on ONNX Runtime: its parts as sessions, salekit between them, on one set of buffers and one stream."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime
from onnx import ModelProto, TensorProto, helper

import salekit
from salekit.arrays import LAYOUTS, import_cupy, in_layout
from salekit.errors import ArgumentError, GpuError

from .split import Site, fix_sizes, shape_of, split

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)  # NumPy has none; ONNX Runtime takes it by its number in ONNX


class Device:
    """Where the sessions run: memory, providers and, on a GPU, the one stream that everything is ordered on."""

    def __init__(self, cuda: bool, wait: bool = True):
        """wait: each run of a session ends with the host waiting for the stream, as ONNX Runtime has it. Without that
        ONNX Runtime 1.31 aborts the process where a session ends that had temporary memory of the host, as one of plain
        operators has. Raises GpuError when ``cuda`` and ONNX Runtime or CuPy has no GPU."""
        self.type, self.id, self.stream = "cpu", 0, None
        self.providers: list[Any] = ["CPUExecutionProvider"]
        self.run_options = onnxruntime.RunOptions()
        if not cuda:
            return
        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise GpuError("this onnxruntime has no CUDA: pip uninstall onnxruntime; pip install onnxruntime-gpu")
        if hasattr(onnxruntime, "preload_dlls"):
            onnxruntime.preload_dlls()  # CUDA and cuDNN from NVIDIA's wheels, where they are installed
        cupy = import_cupy()
        self.type, self.id = "cuda", cupy.cuda.Device().id
        self.stream = cupy.cuda.Stream(non_blocking=True)
        # All sessions launch on this stream, as salekit does, so nothing else has to order them.
        options = {"device_id": str(self.id), "user_compute_stream": str(self.stream.ptr)}
        self.providers = [("CUDAExecutionProvider", options), "CPUExecutionProvider"]
        if not wait:
            self.run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> Any:
        if self.stream is None:
            return np.empty(shape, dtype)
        with self.stream:  # CuPy's pool orders memory by stream
            return import_cupy().empty(shape, dtype)

    def write(self, array: Any, values: np.ndarray) -> None:
        if self.stream is None:
            np.copyto(array, values)
        else:
            array.set(np.ascontiguousarray(values, array.dtype), stream=self.stream)
            self.stream.synchronize()

    def read(self, array: Any) -> np.ndarray:
        return array.copy() if self.stream is None else array.get(stream=self.stream)

    def current(self) -> Any:
        return nullcontext() if self.stream is None else self.stream

    def synchronize(self) -> None:
        if self.stream is not None:
            self.stream.synchronize()

    def session(self, model: ModelProto) -> onnxruntime.InferenceSession:
        settings = onnxruntime.SessionOptions()
        settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        # Threads that spin after a run would take the cores from what computes next, another session or salekit.
        settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            session = onnxruntime.InferenceSession(model.SerializeToString(), settings, providers=self.providers)
        except Exception as error:  # ONNX Runtime's errors have no class in common
            raise ArgumentError(f"model: ONNX Runtime does not take it: {str(error).strip()}") from error
        if self.stream is not None and session.get_providers()[0] != "CUDAExecutionProvider":
            raise GpuError(  # it only warns and goes on on the CPU
                "onnxruntime-gpu does not find CUDA or cuDNN, or not the versions it wants: "
                'pip install "onnxruntime-gpu[cuda,cudnn]"'
            )
        return session


def operators_on_cpu(session: onnxruntime.InferenceSession) -> list[str] | None:
    """The operators that a session runs on the CPU; None where ONNX Runtime is too old to say."""
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return None
    pieces = [x for x in session.get_provider_graph_assignment_info() if x.ep_name == "CPUExecutionProvider"]
    return sorted({node.op_type for piece in pieces for node in piece.get_nodes()})


def address(array: Any) -> int:
    return array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr


class Bound:
    """A session whose inputs and outputs are arrays given by name: it reads and writes them in place."""

    def __init__(self, model: ModelProto, buffers: dict[str, Any], device: Device):
        self.session, self.device = device.session(model), device
        self.inputs = [value.name for value in model.graph.input]
        self.outputs = [value.name for value in model.graph.output]
        self.binding = self.session.io_binding()
        self._held = [buffers[name] for name in (*self.inputs, *self.outputs)]  # ONNX Runtime knows addresses alone
        for bind, names in ((self.binding.bind_input, self.inputs), (self.binding.bind_output, self.outputs)):
            for name in names:
                array = buffers[name]
                kind = TensorProto.BFLOAT16 if array.dtype == BFLOAT16 else array.dtype
                bind(name, device.type, device.id, kind, list(array.shape), address(array))

    def run(self) -> None:
        self.session.run_with_iobinding(self.binding, self.device.run_options)


class Whole:
    """The model as it is. ``buffers`` has its inputs and outputs by name."""

    def __init__(self, model: ModelProto, sizes: dict[str, int], device: Device):
        self.buffers: dict[str, Any] = {}
        model = fix_sizes(model, sizes)
        for value in (*model.graph.input, *model.graph.output):
            allocate(self.buffers, value, device)
        self.bound = Bound(model, self.buffers, device)

    def run(self) -> None:
        self.bound.run()


class SplitModel:
    """The model with salekit in the place of its attentions.

    ``buffers`` has every tensor at a cut by name, allocated once. ONNX Runtime's parts and salekit write and read those
    and nothing is copied between them.
    """

    def __init__(self, model: ModelProto, sites: list[Site], head_dim: int, sizes: dict[str, int], device: Device):
        pieces = split(model, sites, sizes)
        self.device, self.sites, self.pieces = device, sites, pieces
        self.buffers: dict[str, Any] = {}
        parts = [part for part in pieces.parts if part is not None]
        for piece in (*parts, *pieces.attentions):
            for value in (*piece.graph.input, *piece.graph.output):
                allocate(self.buffers, value, device)
        self.parts = [None if part is None else Bound(part, self.buffers, device) for part in pieces.parts]
        self.views = [
            {role: _heads(self.buffers[name], name, head_dim, site.layout) for role, name in roles(site).items()}
            for site in sites
        ]

    def run(self, thresholds: Any = 0.008, return_masks: bool = False, **options: Any) -> list[Any]:
        """Runs it; the outputs are in ``buffers``. options: those of ``salekit.sparse_attention``. On a GPU it returns
        before the stream is done. Returns the masks, if asked for."""
        masks = []
        with self.device.current():
            for index, part in enumerate(self.parts):
                if part is not None:
                    part.run()
                if index < len(self.sites):
                    found = self.attend(index, thresholds=thresholds, return_mask=return_masks, **options)
                    masks += found[1:] if return_masks else []
        return masks

    def attend(self, index: int, **options: Any) -> Any:
        """Attention ``index`` alone, on what is in the buffers."""
        view = self.views[index]
        return salekit.sparse_attention(
            view["q"], view["k"], view["v"], out=view["out"], stream=self.device.stream, **options
        )

    def attention_by_runtime(self, index: int) -> Any:
        """What ONNX Runtime's own nodes make of the q, k and v that are in the buffers: an array like out."""
        out = self.sites[index].out
        result = self.device.empty(self.buffers[out].shape, self.buffers[out].dtype)
        bound = Bound(self.pieces.attentions[index], {**self.buffers, out: result}, self.device)
        bound.run()
        self.device.synchronize()  # while the session is there
        return result


def roles(site: Site) -> dict[str, str]:
    return {"q": site.q, "k": site.k, "v": site.v, "out": site.out}


def allocate(buffers: dict[str, Any], value: Any, device: Device) -> None:
    """A buffer of the type and shape of ``value``, under its name, where there is none yet."""
    if value.name not in buffers:
        kind = value.type.tensor_type.elem_type
        dtype = BFLOAT16 if kind == TensorProto.BFLOAT16 else np.dtype(helper.tensor_dtype_to_np_dtype(kind))
        buffers[value.name] = device.empty(shape_of(value), dtype)


def _heads(array: Any, name: str, head_dim: int, layout: str) -> Any:
    """A view [batch, seqlen, heads, head_dim]."""
    if layout not in LAYOUTS:
        raise ArgumentError(f"site.layout: got {layout!r}; wants one of {', '.join(map(repr, LAYOUTS))}")
    if array.ndim == 3 and array.shape[2] % head_dim == 0:
        return array.reshape(*array.shape[:2], -1, head_dim)
    if array.ndim == 4 and array.shape[3] == head_dim:
        return in_layout(array, layout)
    raise ArgumentError(
        f"site: {name!r} has shape {array.shape}; wants [batch, seqlen, heads * head_dim] or four axes, "
        f"layout {layout!r}, with head_dim {head_dim}"
    )
