"""q, k and v from files: ``.safetensors``, ``.npz``, and the sample that ships with salekit."""

from __future__ import annotations

import io
import math
import os
import re
from importlib import resources
from pathlib import Path
from typing import Any, BinaryIO, Callable, Iterable, Iterator

import numpy as np

from .arrays import BFLOAT16, LAYOUTS
from .call_checks import as_arrays
from .errors import FileFormatError, SalekitError
from .untrusted_files import Npz, open_plain, parse_json

SAMPLE = "data/qkv_sample_layer15_4k.safetensors"
NAMES = ("q", "k", "v")
MAX_HEADER_BYTES = 8 * 2**20  # of a safetensors file: some 80,000 tensors
MAX_AXES = 64  # NumPy's; the product of many more sizes would take hours
_DTYPES = {"F16": np.dtype(np.float16), "BF16": BFLOAT16}
_VOID = np.dtype("V2")  # unlike records of 2 bytes, of a field or more
_BITS = {  # of all dtypes that the format has
    4: ("F4",),
    6: ("F6_E2M3", "F6_E3M2"),
    8: ("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E5M2FNUZ", "F8_E4M3FNUZ"),
    16: ("I16", "U16", "F16", "BF16"),
    32: ("I32", "U32", "F32"),
    64: ("I64", "U64", "F64", "C64"),
}
_BITS_OF = {name: bits for bits, names in _BITS.items() for name in names}


def load_sample() -> dict[str, np.ndarray]:
    """The built-in sample: real q [1, 4096, 2, 128] and k, v [1, 4096, 1, 128], bfloat16, bshd.

    4,096 tokens of public-domain prose through layer 15 of Qwen2.5-Coder-1.5B, after RoPE.
    """
    data = np.frombuffer(resources.files("salekit").joinpath(SAMPLE).read_bytes(), np.uint8)
    q, k, v, _ = _of_safetensors(*_parse_safetensors(io.BytesIO(data), data.size, lambda: data, SAMPLE), SAMPLE)
    return {"q": q, "k": k, "v": v}


def load_qkv(
    path: str | Path, layer: int | str | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, str]]:
    """(q, k, v, metadata) of a ``.safetensors`` or ``.npz`` file, as bshd views, float16 or bfloat16.

    The file holds tensors named q, k and v. Its metadata (safetensors: the header's; npz: JSON in an entry
    ``__meta__``, which may be missing) says ``layout`` = "bshd" (default) or "bhsd". In an npz a 2-byte void dtype,
    which is how NumPy writes ml_dtypes.bfloat16, is bfloat16. Pickles are never loaded.
    layer: of a file that has those of layers, ``layers.12.q`` and so on (any prefix before the dot), the one to load.
    The arrays of a safetensors file stay in it until they are used: a file that is cut meanwhile ends the process.
    Raises FileFormatError, with the path, when the file is missing, truncated, or not this, in bounded memory: see
    docs/edges.md.
    """
    path = Path(path)
    if layer is not None:
        ((_, of_layer),) = iter_layers(path, str(layer))
        return of_layer
    try:
        if path.suffix == ".safetensors":
            return _of_safetensors(*_map_safetensors(path), str(path))
        if path.suffix == ".npz":
            return _load_npz(path)
    except OSError as error:
        raise FileFormatError(f"{path}: cannot be read: {error.strerror or error}") from error
    raise FileFormatError(f"{path}: got the suffix {path.suffix!r}; wants .safetensors or .npz")


def load_layers(path: str | Path) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, str]]]:
    """Every layer of a file, by name, each as :func:`load_qkv` gives it.

    ``layers.12.q`` (any prefix before the dot) belongs to layer "12", a plain ``q`` to layer "0". FileFormatError.
    """
    return dict(iter_layers(path))


def iter_layers(
    path: str | Path, only: str | None = None
) -> Iterator[tuple[str, tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, str]]]]:
    """The same layer by layer, so that a long dump need not fit in memory; the names are checked before the first.

    only: the one layer to read. FileFormatError where there is none of that name.
    """
    path = Path(path)
    try:
        layers, metadata, read = _find_layers(path)
        if only is not None and only not in layers:
            raise FileFormatError(f"{path}: has no layer {only}; holds {_listed(layers)}")
        for layer in sorted(layers, key=int) if only is None else [only]:
            tensors = read(set(layers[layer].values()))
            tensors = {tensor: tensors[key] for tensor, key in layers[layer].items()}
            yield layer, _check(tensors, metadata, list(tensors), f"{path}, layer {layer}")
    except OSError as error:
        raise FileFormatError(f"{path}: cannot be read: {error.strerror or error}") from error


def holds_layers(path: str | Path) -> bool:
    """Whether a file's tensors are those of layers, and not plain q, k and v. FileFormatError."""
    try:
        layers, *_ = _find_layers(Path(path))
    except OSError as error:
        raise FileFormatError(f"{path}: cannot be read: {error.strerror or error}") from error
    return any(tensor != key for of in layers.values() for tensor, key in of.items())


def _find_layers(path: Path) -> tuple[dict[str, dict[str, str]], Any, Callable[[set[str]], dict[str, np.ndarray]]]:
    """(by layer and tensor, the entry; the file's metadata; what reads entries) of a file."""
    if path.suffix == ".safetensors":
        entries, metadata = _map_safetensors(path)
        names = list(entries)
        read = lambda keys: {key: _safetensors_array(str(path), key, entries[key]) for key in keys}  # noqa: E731
    elif path.suffix == ".npz":
        with Npz(path) as archive:
            names, metadata = archive.names, archive.metadata()
        read = lambda keys: _npz_tensors(path, keys)  # noqa: E731
    else:
        raise FileFormatError(f"{path}: got the suffix {path.suffix!r}; wants .safetensors or .npz")
    layers: dict[str, dict[str, str]] = {}
    for key in names:
        if _layer_of(key) is None:
            continue
        layer, tensor = _layer_of(key)
        if tensor in layers.setdefault(layer, {}):
            raise FileFormatError(f"{path}: holds {tensor} of layer {layer} twice")
        layers[layer][tensor] = key
    if not layers:
        raise FileFormatError(f"{path}: has no tensors named q, k and v, or layers.N.q and so on")
    for layer, of in layers.items():
        _check_names(of, list(of), f"{path}, layer {layer}")
    return layers, metadata, read


def _listed(layers: Iterable[str]) -> str:
    return ", ".join(sorted(layers, key=int))


def _layer_of(key: str) -> tuple[str, str] | None:
    """(layer, tensor) of an entry's name, or None for what is neither."""
    match = re.fullmatch(r"(?:(?:.*\.)?(\d{1,6})\.)?([qkv])", key)
    return (str(int(match[1] or 0)), match[2]) if match else None


def _map_safetensors(path: Path) -> tuple[dict[str, Any], Any]:
    """(entries, metadata) of a file; their data stay there until they are used."""
    with open_plain(path) as file:
        num_bytes = os.fstat(file.fileno()).st_size
        return _parse_safetensors(file, num_bytes, lambda: np.memmap(file, np.uint8, "r"), str(path))


def _parse_safetensors(
    file: BinaryIO, num_bytes: int, whole: Callable[[], np.ndarray], name: str
) -> tuple[dict[str, Any], Any]:
    """({tensor: {dtype, shape, data}}, metadata) of a file of so many bytes, which ``whole`` gives, checked as the
    format has it: the tensors' bytes lie one after another, without a gap, from the header's end to the file's."""

    def wrong(what: str) -> FileFormatError:
        return FileFormatError(f"{name}: is not a whole safetensors file: {what}")

    size = int.from_bytes(file.read(8), "little")
    if num_bytes < 8 or size > num_bytes - 8:
        raise wrong(f"it has {num_bytes} bytes and a header of {size if num_bytes >= 8 else 'none'}")
    if size > MAX_HEADER_BYTES:
        raise wrong(f"its header has {size} bytes; wants at most {MAX_HEADER_BYTES}")
    try:
        text = file.read(size).decode("utf-8")
    except UnicodeDecodeError as error:
        raise wrong(f"its header is not UTF-8: {error.reason}") from error
    if not text.startswith("{"):
        raise wrong("its header is not a JSON object")
    header = parse_json(text, f"{name}: the header of a safetensors file")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise wrong("its metadata are not texts")
    data, entries, ends = whole()[8 + size :], {}, []
    for key, entry in header.items():
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise wrong(f"{key}: wants a dtype, a shape and data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _BITS_OF:
            raise wrong(f"{key}: got dtype {dtype!r}")
        if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            raise wrong(f"{key}: got shape {shape!r} and data_offsets {offsets!r}")
        if len(shape) > MAX_AXES:
            raise wrong(f"{key}: has {len(shape)} axes; wants at most {MAX_AXES}")
        first, end = offsets
        if math.prod(shape) * _BITS_OF[dtype] != 8 * (end - first):
            raise wrong(f"{key}: got {end - first} bytes for {dtype} of shape {shape}")
        entries[key] = {"dtype": dtype, "shape": shape, "data": data[first:end]}
        ends.append((first, end, key))
    place = 0
    for first, end, key in sorted(ends):
        if first != place:
            raise wrong(f"{key}: starts at byte {first}; the tensor before it ends at {place}")
        place = end
    if place != data.size:
        raise wrong(f"its tensors have {place} bytes, {data.size} are there")
    return entries, metadata


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(x) is int and 0 <= x < 2**63 for x in values)


def _of_safetensors(entries: dict[str, Any], metadata: Any, name: str):
    tensors = {key: _safetensors_array(name, key, entries[key]) for key in NAMES if key in entries}
    return _check(tensors, metadata, list(entries), name)


def _safetensors_array(name: str, key: str, entry: dict[str, Any]) -> np.ndarray:
    dtype = _DTYPES.get(entry["dtype"])
    if dtype is None:
        raise FileFormatError(f"{name}: {key}: got dtype {entry['dtype']}; wants {' or '.join(_DTYPES)}")
    try:
        return np.frombuffer(entry["data"], dtype).reshape(entry["shape"])
    except ValueError as error:  # more axes than NumPy has, or an empty array that is too large
        raise FileFormatError(f"{name}: {key}: got shape {entry['shape']}: {error}") from error


def _load_npz(path: Path):
    with Npz(path) as archive:
        tensors = _as_tensors(archive.arrays(name for name in NAMES if name in archive.names))
        return _check(tensors, archive.metadata(), archive.names, str(path))


def _npz_tensors(path: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    with Npz(path) as archive:
        return _as_tensors(archive.arrays(names))


def _as_tensors(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """With what NumPy writes for bfloat16 as that."""
    return {key: x.view(BFLOAT16) if x.dtype == _VOID else x for key, x in tensors.items()}


def _check_names(tensors: dict, found: list, name: str) -> None:
    missing = [key for key in NAMES if key not in tensors]
    if len(missing) == len(NAMES) and (layers := {of[0] for key in found if (of := _layer_of(key))}):
        raise FileFormatError(f"{name}: holds layers, {_listed(layers)}; wants the one to load, as layer= or --layer")
    if missing:
        raise FileFormatError(f"{name}: has no tensor {missing[0]!r}; got {sorted(found)}, wants q, k and v")


def _check(tensors: dict, metadata: Any, found: list, name: str):
    _check_names(tensors, found, name)
    if not isinstance(metadata, dict):
        raise FileFormatError(f"{name}: got metadata {metadata!r}; wants a JSON object")
    layout = metadata.get("layout", "bshd")
    if not isinstance(layout, str) or layout not in LAYOUTS:
        raise FileFormatError(f"{name}: got layout {layout!r} in the metadata; wants one of {', '.join(LAYOUTS)}")
    try:
        q, k, v = (np.ascontiguousarray(tensors[key]) for key in NAMES)
        q, k, v = as_arrays(q, k, v, layout)
    except SalekitError as error:
        raise FileFormatError(f"{name}: {error}") from error
    return q, k, v, {**metadata, "layout": "bshd"}
