"""A GGUF model of the Llama or Qwen2 family: its shapes, its weights, and its forward pass on NumPy or CuPy arrays.

The same lines run both: ``xp`` is the array module. Weights, hidden states and sums are float32; on a GPU products
round their inputs to TF32 (10 bits of fraction, the range of float32), for Qwen2's activations overflow float16. q, k,
v and the cache are bfloat16, as salekit takes them.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Callable

import ml_dtypes
import numpy as np

from salekit.arrays import import_cupy
from salekit.errors import ArgumentError, FileFormatError

from .tokenizer import Tokenizer

INTERLEAVED = {"llama": True, "qwen2": False}  # RoPE's pairs: (0, 1), (2, 3) or (0, d/2), (1, d/2 + 1)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FFN_ROWS = 4096  # tokens that go through a feed-forward part at once: its width is several times the model's
DEQUANTIZED = 2**18  # weights that one thread dequantises at once, so that its temporaries stay in its cache


def array_module(use_gpu: bool) -> Any:
    """NumPy or CuPy."""
    if not use_gpu:
        return np
    os.environ.setdefault("CUPY_TF32", "1")  # CuPy reads it at its first product
    return import_cupy()


class Cache:
    """k and v of every layer, bfloat16 [1, room, num_kv_heads, head_dim] each; ``length`` tokens are there."""

    def __init__(self, model: "Model", room: int):
        shape = (1, room, model.num_kv_heads, model.head_dim)
        self.length, self.room = 0, room
        self.keys, self.values = ([model.xp.empty(shape, BFLOAT16) for _ in range(model.num_layers)] for _ in "kv")


class Model:
    """A GGUF file. A weight is dequantised and moved to where ``xp`` computes when it is first asked for."""

    def __init__(self, path: str | Path, xp: Any = np):
        from gguf import GGUFReader

        self.path, self.xp = Path(path), xp
        try:
            reader = GGUFReader(path)
        except (OSError, ValueError) as error:
            raise FileFormatError(f"{path}: cannot be read as GGUF: {error}") from error
        self._fields = reader.fields
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._weights: dict[str, Any] = {}
        family = self._value("general.architecture")
        if family not in INTERLEAVED:
            raise FileFormatError(f"{path}: got a model of family {family!r}; wants {' or '.join(INTERLEAVED)}")
        if "rope_freqs.weight" in self._tensors or self._value(f"{family}.rope.scaling.type", "none") != "none":
            raise FileFormatError(f"{path}: scales RoPE's frequencies; wants a model that does not")
        self.interleaved = INTERLEAVED[family]
        self.context = self._value(f"{family}.context_length")
        self.num_layers = self._value(f"{family}.block_count")
        self.num_heads = self._value(f"{family}.attention.head_count")
        self.num_kv_heads = self._value(f"{family}.attention.head_count_kv")
        self.head_dim = self._value(f"{family}.embedding_length") // self.num_heads
        if self._value(f"{family}.attention.key_length", self.head_dim) != self.head_dim:
            raise FileFormatError(f"{path}: has heads of their own width; wants embedding_length / head_count")
        self.rope_base = self._value(f"{family}.rope.freq_base")
        self.epsilon = self._value(f"{family}.attention.layer_norm_rms_epsilon")
        self.tokenizer = Tokenizer(*(self._value(f"tokenizer.ggml.{name}") for name in ("tokens", "merges", "pre")))

    def _value(self, name: str, default: Any = None) -> Any:
        if name in self._fields:
            return self._fields[name].contents()
        if default is None:
            raise FileFormatError(f"{self.path}: has no {name}")
        return default

    def weight(self, name: str) -> Any:
        """float32, [outputs, inputs] of a matrix."""
        if name not in self._weights:
            if name not in self._tensors:
                raise FileFormatError(f"{self.path}: has no tensor {name}")
            self._weights[name] = self.xp.asarray(self._dequantized(self._tensors[name]))
        return self._weights[name]

    def _dequantized(self, tensor: Any) -> np.ndarray:
        from gguf.quants import dequantize

        rows = max(1, DEQUANTIZED * len(tensor.data) // max(1, int(tensor.n_elements)))
        parts = [tensor.data[start : start + rows] for start in range(0, len(tensor.data), rows)]
        try:
            with ThreadPoolExecutor() as pool:
                parts = list(pool.map(lambda part: np.asarray(dequantize(part, tensor.tensor_type), np.float32), parts))
        except NotImplementedError as error:
            kind = tensor.tensor_type.name
            raise FileFormatError(f"{self.path}: {tensor.name}: gguf cannot dequantise {kind}") from error
        return np.concatenate(parts)

    def load(self, tick: Callable[[], None] = lambda: None) -> None:
        """Every weight, with a call of ``tick`` after each; otherwise they come as they are needed."""
        for name in self._tensors:
            self.weight(name)
            tick()

    @property
    def num_tensors(self) -> int:
        return len(self._tensors)

    def cache(self, room: int) -> Cache:
        return Cache(self, room)

    def forward(
        self, ids: list[int], attend: Callable[..., Any], cache: Cache | None = None, num_layers: int | None = None
    ) -> Any:
        """Hidden states after the last layer (or after ``num_layers``), float32 [len(ids), width].

        attend(layer, q, k, v): attention of q [1, len(ids), num_heads, head_dim], the last of the queries, over
        k and v [1, tokens so far, num_kv_heads, head_dim], bfloat16, causal; it returns what is like q.
        cache: of the tokens before; the new ones are added. A new one by default.
        """
        tokens = len(ids)
        cache = cache or self.cache(tokens)
        start, end = cache.length, cache.length + tokens
        if end > min(cache.room, self.context):
            raise ArgumentError(f"ids: got {end} tokens; wants at most {min(cache.room, self.context)}")
        x = self.weight("token_embd.weight")[self.xp.asarray(ids)]
        rotation = [part[start:end] for part in self._rotation]
        for layer in range(self.num_layers if num_layers is None else num_layers):
            name = f"blk.{layer}"
            normed = self._norm(x, f"{name}.attn_norm")
            q, k, v = (
                self._linear(normed, f"{name}.attn_{of}").reshape(1, tokens, -1, self.head_dim) for of in "qkv"
            )
            q, k = (rotate(each, *rotation, self.interleaved) for each in (q, k))
            keys, values = cache.keys[layer], cache.values[layer]
            keys[:, start:end], values[:, start:end] = k.astype(BFLOAT16), v.astype(BFLOAT16)
            out = attend(layer, q.astype(BFLOAT16), keys[:, :end], values[:, :end])
            x += self._linear(out.reshape(tokens, -1).astype(np.float32), f"{name}.attn_output")
            for first in range(0, tokens, FFN_ROWS):
                rows = x[first : first + FFN_ROWS]
                normed = self._norm(rows, f"{name}.ffn_norm")
                gate, up = (self._linear(normed, f"{name}.ffn_{of}") for of in ("gate", "up"))
                rows += self._linear(gated(gate, up), f"{name}.ffn_down")
        cache.length = end
        return x

    def logits(self, hidden: Any) -> Any:
        """float32 [rows, vocabulary] of the next token, of hidden states as ``forward`` gives them."""
        name = "output.weight" if "output.weight" in self._tensors else "token_embd.weight"
        return self._norm(hidden, "output_norm") @ self.weight(name).T

    def _linear(self, x: Any, name: str) -> Any:
        y = x @ self.weight(f"{name}.weight").T
        if f"{name}.bias" in self._tensors:
            y += self.weight(f"{name}.bias")
        return y

    def _norm(self, x: Any, name: str) -> Any:
        scale = 1 / self.xp.sqrt(self.xp.square(x).mean(axis=-1, keepdims=True) + self.epsilon)
        return x * scale * self.weight(f"{name}.weight")

    @cached_property
    def _rotation(self) -> tuple[Any, Any]:
        """Cosine and sine of each position and pair, float32 [context, 1, head_dim / 2]."""
        frequencies = self.rope_base ** (-np.arange(0, self.head_dim, 2) / self.head_dim)
        angles = (np.arange(self.context)[:, None] * frequencies)[:, None]
        return tuple(self.xp.asarray(f(angles).astype(np.float32)) for f in (np.cos, np.sin))


def rotate(x: Any, cos: Any, sin: Any, interleaved: bool) -> Any:
    """RoPE: turns each pair of channels of x, [1, tokens, heads, head_dim], by its angle."""
    half = x.shape[-1] // 2
    first, second = (slice(0, None, 2), slice(1, None, 2)) if interleaved else (slice(half), slice(half, None))
    a, b, out = x[..., first], x[..., second], x.copy()
    out[..., first], out[..., second] = a * cos - b * sin, a * sin + b * cos
    return out


def gated(gate: Any, up: Any) -> Any:
    """silu(gate) * up, in gate's memory. One kernel on the GPU: NumPy's four passes would take as long as a product."""
    if not isinstance(gate, np.ndarray):
        return _gated_kernel()(gate, up, gate)
    with np.errstate(over="ignore"):  # exp of a large negative gate: 0 all the same
        gate /= 1 + np.exp(-gate)
    gate *= up
    return gate


@lru_cache(maxsize=1)
def _gated_kernel() -> Any:
    return import_cupy().ElementwiseKernel(
        "float32 gate, float32 up", "float32 out", "out = gate / (1 + expf(-gate)) * up", "gated"
    )
