"""Attention of other libraries on salekit's inputs. The only file here that imports torch, and only when asked."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Callable

import numpy as np

FLEX_BLOCK = 128  # FlexAttention's default sparse block; finer ones lose most of its speed
E4M3_MAX = 448.0
FA3_MODULES = ("fa3_fwd_interface", "flash_attn_interface")  # the wheel fa3-fwd, and the authors' own build
FA3_PACKAGES = ("fa3-fwd", "flash-attn-3")


class NotAvailable(Exception):
    """A rival that is not installed, or does not take this input; the text says which."""


@dataclass(frozen=True)
class Rival:
    """name: of its rows; version: of the library; prepare(q, k, v, bits): a function without arguments that attends.

    q, k, v are torch tensors [1, seqlen, heads, head_dim] in CuPy's memory; bits is None, or for ``masked`` rivals bool
    [heads, seqlen / 128, seqlen / 128], NumPy, the causal blocks to attend to.
    """

    name: str
    version: str
    prepare: Callable[..., Callable[[], Any]]
    masked: bool = False
    note: str = ""


def find(names: tuple[str, ...]) -> tuple[list[Rival], dict[str, str], list[str]]:
    """The rivals of these names that are installed, the versions of what they need, and why others are left out."""
    try:
        import torch
    except ImportError as error:
        return [], {}, [f"no PyTorch ({error}): every rival is left out"]
    if not torch.cuda.is_available():
        return [], {"torch": torch.__version__}, ["PyTorch sees no GPU: every rival is left out"]
    torch.set_grad_enabled(False)
    versions = {
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "cudnn": str(torch.backends.cudnn.version()),
        "triton": _version("triton"),
    }
    found, notes = [], []
    for name in names:
        try:
            found.append(RIVALS[name]())
        except NotAvailable as error:
            notes.append(f"{name}: {error}")
    versions |= {rival.name: rival.version for rival in found if rival.name.startswith("fa3")}
    return found, versions, notes


def as_torch(array: Any) -> Any:
    """A torch tensor in the memory of a CuPy array, float16 or bfloat16 (whose bits go through int16)."""
    import torch

    dtype = {"float16": torch.float16, "bfloat16": torch.bfloat16}[array.dtype.name]
    return torch.from_dlpack(array.view(np.int16)).view(dtype)


def last_rows(out: Any, head: int, rows: int) -> np.ndarray:
    """float64 [rows, head_dim] of a torch output, bshd."""
    return out[0, -rows:, head].double().cpu().numpy()


def is_torch(out: Any) -> bool:
    return type(out).__module__.partition(".")[0] == "torch"


def release_memory() -> None:
    """Give what PyTorch holds in reserve back to the GPU, where it has been imported."""
    import sys

    if "torch" in sys.modules:
        sys.modules["torch"].cuda.empty_cache()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


# --- PyTorch's own -------------------------------------------------------------------------------------------------
def _sdpa(name: str, backend: str, version: str) -> Rival:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    chosen = getattr(SDPBackend, backend)

    def prepare(q, k, v, bits):
        queries, keys, values = (x.transpose(1, 2) for x in (q, k, v))

        def attend():
            with sdpa_kernel(chosen):
                out = torch.nn.functional.scaled_dot_product_attention(
                    queries, keys, values, is_causal=True, enable_gqa=True
                )
            return out.transpose(1, 2)

        return attend

    return Rival(name, version, prepare)


def _torch_fa2() -> Rival:
    import torch

    return _sdpa("torch-fa2", "FLASH_ATTENTION", f"torch {torch.__version__}")


def _torch_cudnn() -> Rival:
    import torch

    return _sdpa("torch-cudnn", "CUDNN_ATTENTION", f"torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}")


# --- FlashAttention-3 ----------------------------------------------------------------------------------------------
def _fa3_function() -> tuple[Callable[..., Any], str]:
    for module in FA3_MODULES:
        try:
            function = importlib.import_module(module).flash_attn_func
        except ImportError:
            continue
        version = next((f"{package} {_version(package)}" for package in FA3_PACKAGES if _version(package)), module)
        return function, version
    raise NotAvailable("no FlashAttention-3 (pip install fa3-fwd)")


def _fa3() -> Rival:
    function, version = _fa3_function()

    def prepare(q, k, v, bits):
        return lambda: _first(function(q, k, v, causal=True))

    return Rival("fa3", version, prepare)


def _fa3_fp8() -> Rival:
    function, version = _fa3_function()

    def prepare(q, k, v, bits):
        (q8, q_scale), (k8, k_scale), (v8, v_scale) = (_to_e4m3(x, k.shape[2]) for x in (q, k, v))
        descale = dict(q_descale=q_scale, k_descale=k_scale, v_descale=v_scale)
        return lambda: _first(function(q8, k8, v8, causal=True, **descale))

    return Rival("fa3-fp8", version, prepare, note="its inputs are e4m3 already: converting them is not timed")


def _to_e4m3(x: Any, kv_heads: int) -> tuple[Any, Any]:
    """(e4m3 codes like x, float32 scales [batch, kv_heads]), one scale for the whole tensor."""
    import torch

    scale = x.abs().amax().float() / E4M3_MAX
    codes = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    for head in range(x.shape[2]):  # head by head, for the float32 copy of a long tensor is large
        codes[:, :, head] = (x[:, :, head].float() / scale).to(torch.float8_e4m3fn)
    return codes, scale.expand(x.shape[0], kv_heads).contiguous()


def _first(result: Any) -> Any:
    return result[0] if isinstance(result, tuple) else result


# --- FlexAttention -------------------------------------------------------------------------------------------------
def _flex() -> Rival:
    import torch

    try:
        from torch.nn.attention.flex_attention import flex_attention
    except ImportError as error:
        raise NotAvailable(f"no FlexAttention in torch {torch.__version__} ({error})") from None
    compiled = torch.compile(flex_attention, dynamic=False)

    def prepare(q, k, v, bits):
        if bits is None:
            raise NotAvailable(f"no mask of {FLEX_BLOCK}x{FLEX_BLOCK} blocks at this length")
        mask = _flex_mask(torch.from_numpy(bits).to(q.device), q.shape[1])
        queries, keys, values = (x.transpose(1, 2) for x in (q, k, v))

        def attend():
            return compiled(queries, keys, values, block_mask=mask, enable_gqa=True).transpose(1, 2)

        attend()  # compiles for this length
        torch.cuda.synchronize()
        return attend

    return Rival("flex-128x128", f"torch {torch.__version__}, triton {_version('triton')}", prepare, masked=True)


def _flex_mask(bits: Any, seqlen: int) -> Any:
    """FlexAttention's BlockMask of bool [heads, blocks, blocks]: blocks on the diagonal are causal inside."""
    import torch
    from torch.nn.attention.flex_attention import BlockMask

    diagonal = torch.eye(bits.shape[-1], dtype=torch.bool, device=bits.device)
    return BlockMask.from_kv_blocks(
        *_ordered(bits & diagonal),
        *_ordered(bits & ~diagonal),
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=lambda batch, head, query, key: query >= key,
        seq_lengths=(seqlen, seqlen),
    )


def _ordered(bits: Any) -> tuple[Any, Any]:
    """(int32 [1, heads, rows], int32 [1, heads, rows, columns]): how many are set, and which, those first."""
    import torch

    counts = bits.sum(dim=-1, dtype=torch.int32)
    indices = torch.argsort(bits.to(torch.uint8), dim=-1, descending=True, stable=True).to(torch.int32)
    return counts[None].contiguous(), indices[None].contiguous()


RIVALS: dict[str, Callable[[], Rival]] = {
    "torch-fa2": _torch_fa2,
    "torch-cudnn": _torch_cudnn,
    "fa3": _fa3,
    "fa3-fp8": _fa3_fp8,
    "flex-128x128": _flex,
}
