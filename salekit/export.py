"""Export: kernels as cubins with a C host side (cuda_src/host), for programs without Python.

The C host side computes what the Python stages launch, for any shape; what it has to know of the compiled kernels is in
a table that :func:`export` generates.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import textwrap
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, product
from pathlib import Path
from typing import Any, Callable, Iterable, Sequence

import numpy as np

from . import __version__, jit
from .arrays import TENSOR_VIEW
from .attend_grid import SEGMENT
from .catalog import call_specs
from .errors import ArgumentError, FileFormatError
from .plans import (
    BLOCKS,
    DTYPES,
    ESTIMATORS,
    HEAD_DIMS,
    LOW_BIT_ARCHS,
    LOW_BIT_HEAD_DIMS,
    QUERY_STRIDES,
    ROW_MAP,
    SHAPE_RECORD,
    SUPPORTED_ARCHS,
    Plan,
    default_softmax_scale,
    resolve_estimator,
)
from .untrusted_files import read_json
from .written_files import write

SCHEMA = 1
KIND = "salekit-export"
HOST_FILES = ("salekit.h", "salekit.c", "CMakeLists.txt", "main.cpp")
RECORDS = {  # structs of salekit.h, which kernels take by value
    "salekit_tensor": TENSOR_VIEW,
    "salekit_shape": SHAPE_RECORD,
    "salekit_row_map": ROW_MAP,
    "salekit_segment": SEGMENT,
}
_SHORT = {"float16": "fp16", "bfloat16": "bf16"}
_LENGTHS = (2**14, 2**20)  # the keys of the longer are attended in segments
_LOCALS = (128, 192, 256, 320)  # each takes another number of slots in anchor_statistics_sm90
_HASH_DIGITS = 12
_WIDTH = 120  # of a line in the generated header


@dataclass(frozen=True)
class Target:
    """What one export is for. Raises ArgumentError when no kernels are."""

    arch: str
    head_dim: int
    dtype: str  # "float16" | "bfloat16"
    estimators: tuple[str, ...] = ESTIMATORS
    blocks: tuple[tuple[int, int], ...] = BLOCKS

    def __post_init__(self) -> None:
        for name, values, choices in (
            ("arch", (self.arch,), SUPPORTED_ARCHS),
            ("head_dim", (self.head_dim,), HEAD_DIMS),
            ("dtype", (self.dtype,), DTYPES),
            ("estimators", self.estimators, ESTIMATORS),
            ("blocks", self.blocks, BLOCKS),
        ):
            bad = [value for value in values if value not in choices]
            if bad or not values:
                got = repr(bad[0]) if bad else "none"
                raise ArgumentError(f"{name}: got {got}; wants of {', '.join(map(str, choices))}")

    @property
    def tag(self) -> str:
        """In the names of files and of C objects."""
        return f"{self.arch}_d{self.head_dim}_{_SHORT[self.dtype]}"

    def specs(self) -> list[jit.KernelSpec]:
        """Every kernel that a call may launch, each once."""
        found: dict[jit.KernelSpec, None] = {}
        # The mask's blocks and the length decide other kernels than the query stride, the group and the local range.
        by_block = product(self.estimators, self.blocks, (1,), (1,), _LENGTHS, _LOCALS[:1])
        by_stride = product(self.estimators, self.blocks[:1], QUERY_STRIDES, (1, 2, 3, 4), _LENGTHS[:1], _LOCALS)
        for estimator, (block_q, block_k), stride, group, length, local in chain(by_block, by_stride):
            plan = Plan(
                1, length, length, group, 1, self.head_dim, self.dtype, default_softmax_scale(self.head_dim),
                estimator=estimator, block_q=block_q, block_k=block_k, query_stride=stride, local=local,
                arch=self.arch,
            )
            has_low_bits = self.arch in LOW_BIT_ARCHS and self.head_dim in LOW_BIT_HEAD_DIMS
            for attend in ("exact", "int8-fp8") if has_low_bits else ("exact",):
                found.update(dict.fromkeys(call_specs(plan.replace(attend=attend))))
        return [spec for spec in found if is_called(spec)]


def is_called(spec: jit.KernelSpec) -> bool:
    """Whether the C host side launches it: thresholds come from the GPU or as one number, statistics of keys are not
    given."""
    takes_statistics = spec.source == "quantize_int8" and spec.template[-1] == "3"
    return spec.source != "store_floats" and not takes_statistics


@dataclass(frozen=True)
class Exported:
    """One kernel of an export."""

    spec: jit.KernelSpec
    file: str
    compiled: jit.Compiled


def export(
    folder: str | Path, target: Target, force: bool = False, advance: Callable[[], Any] = lambda: None
) -> dict[str, Any]:
    """Compile what ``target`` asks for and write it, with the C host side, to ``folder``. Needs NVRTC and no GPU.

    folder: new or empty; with ``force``, what an earlier export wrote there goes, and files may be written over. A
    failure leaves no new file there.
    advance: called once for each kernel that is compiled.
    Returns what ``salekit_<tag>.json`` there holds. Raises ArgumentError, CompileError, GpuError (no NVRTC), OSError.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not force:
        raise ArgumentError(f"{folder}: exists and is not an empty folder; wants a new one, or force (--force)")
    kernels = _compile(target, advance)
    earlier = _earlier_files(folder)  # a damaged list stops here, before anything is written
    report = _report(target, kernels)
    contents: dict[str, str | bytes] = {kernel.file: kernel.compiled.cubin for kernel in kernels}
    for name in HOST_FILES:
        contents[name] = (jit.source_root() / "host" / name).read_text().replace("@TAG@", target.tag)
    own = {"h": header(target, kernels), "c": table(target, kernels), "json": json.dumps(report, indent=2) + "\n"}
    contents.update((f"salekit_{target.tag}.{suffix}", text) for suffix, text in own.items())
    _write_all(folder, contents)
    for name in set(earlier) - set(contents):
        (folder / name).unlink(missing_ok=True)
    return report


def _write_all(folder: Path, contents: dict[str, str | bytes]) -> None:
    """All files, or no new one and no new folder."""
    cubins = folder / "cubins"
    folders = [path for path in (cubins, *cubins.parents) if not path.exists()]
    files = [path for path in (folder / name for name in contents) if not path.exists()]
    try:
        cubins.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            write(folder / name, content)
    except BaseException:
        with suppress(OSError):
            for path in files:
                path.unlink(missing_ok=True)
            for path in folders:
                path.rmdir()
        raise


def _compile(target: Target, advance: Callable[[], Any]) -> list[Exported]:
    def compile_one(spec: jit.KernelSpec) -> Exported:
        compiled = jit.compile_kernel(spec, target.arch)
        digest = hashlib.sha256(compiled.cubin).hexdigest()[:_HASH_DIGITS]
        # The hash: a program that was built for other kernels of this name does not find its own, and says so.
        name = "-".join((spec.source, *spec.template, digest))
        advance()
        return Exported(spec, f"cubins/{name}.cubin", compiled)

    specs = target.specs()
    jit.nvrtc_version()  # loaded here, before threads use it; GpuError without it
    with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:
        return list(pool.map(compile_one, specs))


def _earlier_files(folder: Path) -> list[str]:
    """What earlier exports to this folder wrote, by their lists."""
    names: list[str] = []
    for path in sorted(folder.glob("salekit_*.json")):
        content = read_json(path)
        try:
            files = list(content["files"]) if content["kind"] == KIND else []
        except (KeyError, TypeError) as error:
            raise FileFormatError(f"{path}: is not the list of an export: {error}") from None
        if not all(isinstance(name, str) and re.fullmatch(r"(cubins/)?[\w-][\w.-]*", name) for name in files):
            raise FileFormatError(f"{path}: lists files outside of its folder")
        names += files
    return names


def _report(target: Target, kernels: Sequence[Exported]) -> dict[str, Any]:
    own = [f"salekit_{target.tag}.{suffix}" for suffix in ("h", "c", "json")]
    return {
        "schema": SCHEMA,
        "kind": KIND,
        "salekit": __version__,
        "nvrtc": ".".join(map(str, jit.nvrtc_version())),
        "tag": target.tag,
        "arch": target.arch,
        "head_dim": target.head_dim,
        "dtype": target.dtype,
        "estimators": list(target.estimators),
        "blocks": [list(block) for block in target.blocks],
        "records": {
            name: {
                "bytes": dtype.itemsize,
                "fields": [[field, str(dtype[field]), offset] for field, offset in _fields(dtype)],
            }
            for name, dtype in RECORDS.items()
        },
        "kernels": [
            {
                "name": kernel.spec.expression,
                "file": kernel.file,
                "symbol": kernel.compiled.lowered_name,
                "dynamic_shared_bytes": kernel.compiled.info.dynamic_shared_bytes,
                "static_shared_bytes": kernel.compiled.info.static_shared_bytes,
                "registers": kernel.compiled.info.registers,
            }
            for kernel in kernels
        ],
        "files": [*HOST_FILES, *own, *(kernel.file for kernel in kernels)],
    }


def _fields(dtype: np.dtype) -> list[tuple[str, int]]:
    return [(name, dtype.fields[name][1]) for name in dtype.names]


# --- the generated C -----------------------------------------------------------------------------------------------
def header(target: Target, kernels: Iterable[Exported]) -> str:
    """``salekit_<tag>.h``: the layout of the records, what the kernels' sources say of them, and the export's name."""
    guard = f"SALEKIT_{target.tag.upper()}_H"
    about = (
        f"Written by salekit {__version__} (NVRTC {'.'.join(map(str, jit.nvrtc_version()))}): kernels for "
        f"{target.arch}, head_dim {target.head_dim}, {target.dtype}; {', '.join(target.estimators)}; blocks of "
        f"{', '.join(f'{q}x{k}' for q, k in target.blocks)}. What each kernel takes is below, as its source says it: "
        "TensorView is salekit_tensor, Shape salekit_shape, RowMap salekit_row_map, Segment salekit_segment, TensorMap "
        "CUtensorMap, and pointers are CUdeviceptr. salekit_visit_launches gives a call's launches with all arguments."
    )
    parts = [
        textwrap.fill(about, _WIDTH, initial_indent="// ", subsequent_indent="// "),
        f"#ifndef {guard}\n#define {guard}\n",
        '#include "salekit.h"\n',
        '#ifdef __cplusplus\nextern "C" {\n#endif\n',
        f"extern const salekit_export salekit_{target.tag};  // for salekit_load\n",
        "#ifdef __cplusplus\n}\n#endif\n",
        "// The records as these kernels were compiled with them.",
        *(_assertion(name, dtype) for name, dtype in RECORDS.items()),
        "",
        *(_contract(source) for source in dict.fromkeys(kernel.spec.source for kernel in kernels)),
        "#endif\n",
    ]
    return "\n".join(parts)


def table(target: Target, kernels: Iterable[Exported]) -> str:
    """``salekit_<tag>.c``: what the host side has to know of the compiled kernels."""
    rows = [_row(kernel) for kernel in kernels]
    capability = re.fullmatch(r"sm_(\d+)(\d)(a?)", target.arch)
    scale = default_softmax_scale(target.head_dim)
    int4 = Plan(1, 1, 1, 1, 1, target.head_dim, target.dtype, scale, estimator="int4", arch=target.arch)
    facts = {
        "arch": _text(target.arch),
        "capability_major": capability[1],
        "capability_minor": capability[2],
        "is_exact": int(bool(capability[3]) or target.arch == "sm_87"),
        "head_dim": target.head_dim,
        "is_bfloat16": int(target.dtype == "bfloat16"),
        "int4_code_bits": int4.code_bits,
        "auto_estimator": "SALEKIT_" + resolve_estimator("auto", target.arch).upper().replace("-", "_"),
        "softmax_scale": repr(scale),
        "num_kernels": len(rows),
        "kernels": "KERNELS",
    }
    parts = [
        f'#include "salekit_{target.tag}.h"\n',
        "// name, file, symbol; bytes of dynamic and of static shared memory, registers a thread",
        "static const salekit_kernel KERNELS[] = {",
        *rows,
        "};\n",
        f"const salekit_export salekit_{target.tag} = {{",
        *(f"    .{name} = {value}," for name, value in facts.items()),
        "};\n",
    ]
    return "\n".join(parts)


def _text(value: str) -> str:
    return json.dumps(value)  # a C string literal, too


def _row(kernel: Exported) -> str:
    info, names = kernel.compiled.info, (kernel.spec.expression, kernel.file, kernel.compiled.lowered_name)
    numbers = (info.dynamic_shared_bytes, info.static_shared_bytes, info.registers)
    return f"    {{{', '.join([*map(_text, names), *map(str, numbers)])}}},"


def _assertion(name: str, dtype: np.dtype) -> str:
    checks = [f"sizeof({name}) == {dtype.itemsize}"]
    checks += [f"offsetof({name}, {field}) == {offset}" for field, offset in _fields(dtype)]
    joined = " &&\n                   ".join(checks)
    return f'SALEKIT_ASSERT({joined},\n               "{name} is not what the kernels take");'


def _contract(source: str) -> str:
    """The head comment and the signature of a kernel's source, as comments."""
    text = (jit.source_root() / "kernels" / f"{source}.cu").read_text()
    comment = text[: text.index("#include")].rstrip()
    signature = re.search(rf"\b{source}\(([^{{]*?)\)\s*{{", text)
    call = f"{source}({' '.join(signature[1].split())})"
    wrapped = textwrap.fill(call, _WIDTH, initial_indent="// ", subsequent_indent="//     ")
    return f"{wrapped}\n//\n{comment}\n"
