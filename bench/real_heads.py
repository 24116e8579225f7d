"""Post-RoPE q, k and v of chosen layers of a GGUF model (Llama or Qwen2 family) over a text, by NumPy alone.

    python bench/real_heads.py MODEL.gguf TEXT.txt --tokens 8192 --layers 3,9,15 -o heads.safetensors

The file holds bfloat16 ``layers.N.q`` [1, tokens, heads, head_dim] and so on, as ``salekit calibrate`` reads them. It
is replaced, whole, each time a wanted layer is there; the layers after the last one run for the mean negative
log-likelihood of the text, which shows whether the forward pass is right. Weights are dequantised (package
``gguf``), everything else is float32.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

ROWS = 128  # query rows of a tile of attention
SCORED = 2048  # at most so many positions, evenly spread, count in the likelihood: the last layer is the largest
INTERLEAVED = {"llama": True, "qwen2": False}  # RoPE's pairs: (0, 1), (2, 3) or (0, d/2), (1, d/2 + 1)

# How a text falls into words before the merges, by ``tokenizer.ggml.pre``. [^\W\d_] is a letter.
_LETTER, _OTHER = r"[^\W\d_]", r"(?:[^\s\w]|_)"
_GPT2 = rf"'(?:[stmd]|re|ve|ll)| ?{_LETTER}+| ?\d+| ?{_OTHER}+|\s+(?!\S)|\s+"
_QWEN2 = rf"'(?i:[stmd]|re|ve|ll)|(?:[^\S\r\n]|{_OTHER})?{_LETTER}+|\d| ?{_OTHER}+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORDS = {"smollm": (r"\d|\D+", _GPT2), "qwen2": (_QWEN2,)}


def byte_letters() -> list[str]:
    """The printable letter that stands for each byte in a GPT-2 vocabulary: itself where it is one, else from 256 on."""
    own = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in own]
    return [chr(byte) if byte in own else chr(256 + others.index(byte)) for byte in range(256)]


class Tokenizer:
    """Byte-pair encoding with a GGUF's own tokens and merges. Special tokens are text like any other."""

    def __init__(self, tokens: list[str], merges: list[str], pre: str):
        if pre not in WORDS:
            raise SystemExit(f"tokenizer.ggml.pre: got {pre!r}; wants one of {', '.join(WORDS)}")
        self.tokens = tokens
        self._ids = {token: index for index, token in enumerate(tokens)}
        self._ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
        self._patterns = [re.compile(pattern) for pattern in WORDS[pre]]
        self._letters = byte_letters()
        self._known: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        words = [text]
        for pattern in self._patterns:
            words = [found for word in words for found in pattern.findall(word)]
        return [token for word in words for token in self._word(word)]

    def decode(self, ids: list[int]) -> str:
        byte_of = {letter: byte for byte, letter in enumerate(self._letters)}
        return bytes(byte_of[letter] for index in ids for letter in self.tokens[index]).decode()

    def _word(self, word: str) -> list[int]:
        if word not in self._known:
            parts = [self._letters[byte] for byte in word.encode()]
            while len(parts) > 1:  # merge the pair that was learned first
                ranks = [self._ranks.get(pair, len(self._ranks)) for pair in pairwise(parts)]
                best = min(range(len(ranks)), key=ranks.__getitem__)
                if ranks[best] == len(self._ranks):
                    break
                parts[best : best + 2] = [parts[best] + parts[best + 1]]
            self._known[word] = [self._ids[part] for part in parts]
        return self._known[word]


class Model:
    """Shapes and weights of a GGUF file; a weight is dequantised when it is asked for."""

    def __init__(self, path: str):
        from gguf import GGUFReader

        reader = GGUFReader(path)
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        fields = reader.fields
        family = fields["general.architecture"].contents()
        if family not in INTERLEAVED:
            raise SystemExit(f"{path}: got a model of family {family!r}; wants {' or '.join(INTERLEAVED)}")

        def value(name):
            return fields[f"{family}.{name}"].contents()

        self.num_layers = value("block_count")
        self.num_heads, self.num_kv_heads = value("attention.head_count"), value("attention.head_count_kv")
        self.head_dim = value("embedding_length") // self.num_heads
        self.rope_base, self.epsilon = value("rope.freq_base"), value("attention.layer_norm_rms_epsilon")
        self.interleaved = INTERLEAVED[family]
        self.tokenizer = Tokenizer(
            *(fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges", "pre"))
        )

    def weight(self, name: str) -> np.ndarray | None:
        """float32, [outputs, inputs] of a matrix; None for one that the model does not have."""
        from gguf.quants import dequantize

        tensor = self._tensors.get(name)
        return None if tensor is None else np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32)

    def linear(self, x: np.ndarray, name: str) -> np.ndarray:
        y = x @ self.weight(f"{name}.weight").T
        bias = self.weight(f"{name}.bias")
        return y if bias is None else y + bias

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + self.epsilon) * self.weight(f"{name}.weight")


def rope(x: np.ndarray, base: float, interleaved: bool) -> np.ndarray:
    """Rotates each pair of channels of x, [tokens, heads, head_dim], by position * base ** (-2 pair / head_dim)."""
    tokens, _, dim = x.shape
    angle = np.arange(tokens)[:, None] * base ** (-np.arange(0, dim, 2) / dim)
    cos, sin = (f(angle)[:, None].astype(np.float32) for f in (np.cos, np.sin))
    pairs = (slice(0, None, 2), slice(1, None, 2)) if interleaved else (slice(dim // 2), slice(dim // 2, None))
    a, b = (x[..., pair] for pair in pairs)
    out = np.empty_like(x)
    out[..., pairs[0]], out[..., pairs[1]] = a * cos - b * sin, a * sin + b * cos
    return out


def causal_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """[tokens, heads, head_dim] each (fewer heads of k and v); tile by tile."""
    tokens, heads, dim = q.shape
    out = np.empty_like(q)
    keys, values = (np.ascontiguousarray(x.transpose(1, 0, 2)) for x in (k, v))
    later = np.triu(np.full((ROWS, ROWS), -np.inf, np.float32), 1)
    for head in range(heads):
        kv = head * k.shape[1] // heads
        for start in range(0, tokens, ROWS):
            end = min(start + ROWS, tokens)
            scores = q[start:end, head] * np.float32(dim**-0.5) @ keys[kv, :end].T
            scores[:, start:] += later[: end - start, : end - start]
            scores -= scores.max(axis=1, keepdims=True)
            np.exp(scores, out=scores)
            out[start:end, head] = scores @ values[kv, :end] / scores.sum(axis=1, keepdims=True)
    return out


def prefill(model: Model, ids: list[int]) -> Iterator[tuple[np.ndarray, ...]]:
    """(q, k, v) of each layer, [tokens, heads, head_dim], and last, alone, the hidden states after the last norm."""
    x = model.weight("token_embd.weight")[ids]
    tokens = len(ids)
    for layer in range(model.num_layers):
        name = f"blk.{layer}"
        normed = model.norm(x, f"{name}.attn_norm")
        q, k, v = (model.linear(normed, f"{name}.attn_{of}").reshape(tokens, -1, model.head_dim) for of in "qkv")
        q, k = (rope(each, model.rope_base, model.interleaved) for each in (q, k))
        yield q, k, v
        x = x + model.linear(causal_attention(q, k, v).reshape(tokens, -1), f"{name}.attn_output")
        normed = model.norm(x, f"{name}.ffn_norm")
        gate = model.linear(normed, f"{name}.ffn_gate")
        with np.errstate(over="ignore"):  # exp of a large negative gate: 0 all the same
            gate /= 1 + np.exp(-gate)
        x = x + model.linear(gate * model.linear(normed, f"{name}.ffn_up"), f"{name}.ffn_down")
    yield (model.norm(x, "output_norm"),)


def mean_nll(model: Model, hidden: np.ndarray, ids: list[int]) -> float:
    """Mean negative log-likelihood of a next token, in nats, over at most SCORED positions."""
    positions = np.unique(np.linspace(0, len(ids) - 2, min(SCORED, len(ids) - 1)).round().astype(int))
    matrix = model.weight("output.weight")
    matrix = model.weight("token_embd.weight") if matrix is None else matrix
    total = 0.0
    for some in np.array_split(positions, -(-positions.size // 256)):
        logits = hidden[some] @ matrix.T
        top = logits.max(axis=1)
        lse = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
        total += float((lse - logits[np.arange(some.size), np.asarray(ids)[some + 1]]).sum())
    return total / positions.size


def write(tensors: dict[str, np.ndarray], path: Path) -> None:
    part = path.with_suffix(".part")
    save_file(tensors, part, {"layout": "bshd"})
    os.replace(part, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--layers", default="0", help="comma separated, from 0")
    parser.add_argument("--kv-heads", help="comma separated: these and the query heads that share them (default all)")
    parser.add_argument("--no-nll", action="store_true", help="stop after the last wanted layer")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    model = Model(options.model)
    layers = {int(layer) for layer in options.layers.split(",")}
    if not layers <= set(range(model.num_layers)):
        parser.error(f"--layers: got {options.layers}; the model has {model.num_layers}")
    kv_heads = [int(head) for head in options.kv_heads.split(",")] if options.kv_heads else range(model.num_kv_heads)
    group = model.num_heads // model.num_kv_heads
    heads = [head for head in range(model.num_heads) if head // group in set(kv_heads)]
    ids = model.tokenizer.encode(Path(options.text).read_bytes().decode())[: options.tokens]
    if len(ids) < options.tokens:
        parser.error(f"{options.text}: has {len(ids)} tokens; wants {options.tokens}")
    tensors, started = {}, time.perf_counter()
    for layer, results in enumerate(prefill(model, ids)):
        if layer in layers:
            for name, x, some in zip("qkv", results, (heads, list(kv_heads), list(kv_heads))):
                tensors[f"layers.{layer}.{name}"] = np.ascontiguousarray(x[None, :, some]).astype(ml_dtypes.bfloat16)
            write(tensors, options.output)
            if layer == max(layers) and options.no_nll:
                return
        seconds = time.perf_counter() - started
        print(f"{layer} of {model.num_layers} layers, {seconds:.0f} s", file=sys.stderr, flush=True)
    nll = mean_nll(model, results[0], ids)
    print(json.dumps({"file": str(options.output), "tokens": len(ids), "layers": sorted(layers), "mean_nll": nll}))


if __name__ == "__main__":
    main()
