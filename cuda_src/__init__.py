"""CUDA sources, compiled at run time by ``salekit.jit``. This package holds data only."""
