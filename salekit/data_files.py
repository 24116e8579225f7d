"""q, k and v from files: ``.safetensors``, ``.npz``, and the sample that ships with salekit."""

from __future__ import annotations

import json
import math
import re
from importlib import resources
from pathlib import Path
from typing import Any, Callable, Iterator

import numpy as np
from safetensors import SafetensorError, deserialize, safe_open

from .arrays import BFLOAT16, LAYOUTS, as_arrays
from .errors import FileFormatError, SalekitError

SAMPLE = "data/qkv_sample_layer15_4k.safetensors"
NAMES = ("q", "k", "v")
_DTYPES = {"F16": np.dtype(np.float16), "BF16": BFLOAT16}


def load_sample() -> dict[str, np.ndarray]:
    """The built-in sample: real q [1, 4096, 2, 128] and k, v [1, 4096, 1, 128], bfloat16, bshd.

    4,096 tokens of public-domain prose through layer 15 of Qwen2.5-Coder-1.5B, after RoPE.
    """
    data = resources.files("salekit").joinpath(SAMPLE).read_bytes()
    q, k, v, _ = _parse_safetensors(data, SAMPLE)
    return {"q": q, "k": k, "v": v}


def load_qkv(path: str | Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, str]]:
    """(q, k, v, metadata) of a ``.safetensors`` or ``.npz`` file, as bshd views, float16 or bfloat16.

    The file holds tensors named q, k and v. Its metadata (safetensors: the header's; npz: JSON in an entry
    ``__meta__``, which may be missing) says ``layout`` = "bshd" (default) or "bhsd". In an npz a 2-byte void dtype,
    which is how NumPy writes ml_dtypes.bfloat16, is bfloat16. Pickles are never loaded.
    Raises FileFormatError, with the path, when the file is missing, truncated, or not this.
    """
    path = Path(path)
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

    only: the one layer to read.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            entries, metadata = _map_safetensors(path)
            names = list(entries)
            read = lambda keys: {key: _safetensors_array(str(path), key, entries[key]) for key in keys}  # noqa: E731
        elif path.suffix == ".npz":
            names = []
            _, metadata = _npz_entries(path, lambda key: False, names)
            read = lambda keys: _npz_entries(path, keys.__contains__)[0]  # noqa: E731
        else:
            raise FileFormatError(f"{path}: got the suffix {path.suffix!r}; wants .safetensors or .npz")
        layers: dict[str, dict[str, str]] = {}  # by layer and tensor, the entry
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
        for layer in sorted(layers, key=int) if only is None else [only]:
            tensors = read(set(layers[layer].values()))
            tensors = {tensor: tensors[key] for tensor, key in layers[layer].items()}
            yield layer, _check(tensors, metadata, list(tensors), f"{path}, layer {layer}")
    except OSError as error:
        raise FileFormatError(f"{path}: cannot be read: {error.strerror or error}") from error


def _layer_of(key: str) -> tuple[str, str] | None:
    """(layer, tensor) of an entry's name, or None for what is neither."""
    match = re.fullmatch(r"(?:(?:.*\.)?(\d{1,6})\.)?([qkv])", key)
    return (str(int(match[1] or 0)), match[2]) if match else None


def _parse_safetensors(data: bytes, name: str):
    try:
        entries = dict(deserialize(data))
        # deserialize() has checked the header; it does not return the metadata.
        header = json.loads(data[8:8 + int.from_bytes(data[:8], "little")])
    except (SafetensorError, ValueError) as error:
        raise FileFormatError(f"{name}: is not a whole safetensors file: {error}") from error
    return _of_safetensors(entries, header.get("__metadata__") or {}, name)


def _of_safetensors(entries: dict[str, Any], metadata: Any, name: str):
    tensors = {key: _safetensors_array(name, key, entries[key]) for key in NAMES if key in entries}
    return _check(tensors, metadata, list(entries), name)


def _map_safetensors(path: Path) -> tuple[dict[str, Any], Any]:
    """(entries as ``deserialize`` gives them, metadata); their data stay in the file until they are used."""
    with open(path, "rb") as file:
        try:
            with safe_open(path, framework="numpy") as checked:  # the header, and that the file is whole
                metadata = checked.metadata() or {}
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        except (SafetensorError, ValueError) as error:
            raise FileFormatError(f"{path}: is not a whole safetensors file: {error}") from error
    data = np.memmap(path, np.uint8, "r")[8 + size:]
    entries = {}
    for key, entry in header.items():
        if key != "__metadata__":
            first, end = entry["data_offsets"]
            entries[key] = {"dtype": entry["dtype"], "shape": entry["shape"], "data": data[first:end]}
    return entries, metadata


def _safetensors_array(name: str, key: str, entry: dict[str, Any]) -> np.ndarray:
    dtype = _DTYPES.get(entry["dtype"])
    if dtype is None:
        raise FileFormatError(f"{name}: {key}: got dtype {entry['dtype']}; wants {' or '.join(_DTYPES)}")
    if math.prod(entry["shape"]):
        return np.frombuffer(entry["data"], dtype).reshape(entry["shape"])
    return np.empty(entry["shape"], dtype)


def _load_npz(path: Path):
    found: list[str] = []
    tensors, metadata = _npz_entries(path, lambda key: key in NAMES, found)
    return _check(tensors, metadata, found, str(path))


def _npz_entries(path: Path, wanted: Callable[[str], bool], found: list[str] | None = None):
    """(arrays of the wanted names, metadata); ``found`` gets all names."""
    found = [] if found is None else found
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise FileFormatError(f"{path}: is not an npz archive")
        with archive:
            found += archive.files
            tensors = {key: archive[key] for key in found if wanted(key)}
            metadata = json.loads(str(archive["__meta__"][()])) if "__meta__" in found else {}
    except FileFormatError:
        raise
    except FileNotFoundError as error:
        raise FileFormatError(f"{path}: cannot be read: {error.strerror}") from error
    except Exception as error:  # NumPy's parsers of damaged headers raise a dozen unrelated types
        raise FileFormatError(f"{path}: is not a whole npz file: {error}") from error
    for key, x in tensors.items():
        if not isinstance(x, np.ndarray):
            raise FileFormatError(f"{path}: {key}: is not an array")
        if x.dtype.kind == "V" and x.dtype.itemsize == 2:
            tensors[key] = x.view(BFLOAT16)
    return tensors, metadata


def _check_names(tensors: dict, found: list, name: str) -> None:
    missing = [key for key in NAMES if key not in tensors]
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
