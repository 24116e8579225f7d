"""salekit: SALE's sparse prefill attention (arXiv 2505.24179) as stand-alone CUDA kernels with a NumPy twin.

Importing salekit needs no GPU and does not import CuPy.
"""

from pathlib import Path as _Path

__version__ = "0.1.0"

# In a bare checkout cli/ and cuda_src/ lie beside this folder; an installed package has them inside.
if not (_Path(__file__).parent / "cuda_src").is_dir():
    __path__.append(str(_Path(__file__).parent.parent))

# The modules quantize, estimate, block_scores and attend share a name with their function. They are all loaded here,
# once, so that ``salekit.quantize`` is the function from then on, with the checks of stages.py;
# ``from salekit.quantize import ...`` still finds the module.
from . import errors  # noqa: E402
from .attention import (  # noqa: E402
    dense_attention,
    plan,
    sparse_attention,
    sparse_attention_varlen,
    varlen_workspace_bytes,
)
from .attention_plan import AttentionPlan  # noqa: E402
from .block_mask import BlockMask  # noqa: E402
from .block_scores import scores_plan  # noqa: E402
from .call_checks import make_plan  # noqa: E402
from .data_files import load_qkv, load_sample  # noqa: E402
from .dlpack import as_dlpack  # noqa: E402
from .errors import (  # noqa: E402
    ArgumentError,
    CompileError,
    DtypeError,
    FileFormatError,
    GpuError,
    OutOfMemoryError,
    SalekitError,
)
from .key_statistics import KeyStatistics, key_statistics  # noqa: E402
from .merge import merge_attention_states  # noqa: E402
from .plans import Plan  # noqa: E402
from .stages import (  # noqa: E402
    anchor_statistics,
    attend,
    block_scores,
    estimate,
    mask_from_scores,
    quantize,
    row_limits,
)
from .thresholds import load_thresholds, save_thresholds  # noqa: E402
from .workspaces import clear_workspaces  # noqa: E402

__all__ = [
    "ArgumentError", "AttentionPlan", "BlockMask", "CompileError", "DtypeError", "FileFormatError", "GpuError",
    "KeyStatistics", "OutOfMemoryError", "Plan", "SalekitError", "__version__", "anchor_statistics", "as_dlpack",
    "attend", "block_scores", "clear_workspaces", "dense_attention", "errors", "estimate", "key_statistics", "load_qkv",
    "load_sample", "load_thresholds", "make_plan", "mask_from_scores", "merge_attention_states", "plan", "quantize",
    "row_limits", "save_thresholds", "scores_plan", "sparse_attention", "sparse_attention_varlen",
    "varlen_workspace_bytes",
]
