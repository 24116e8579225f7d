"""Random calls that try to break the library: drawn from a seed, checked in float64, shrunk, and replayed from files.

``cases`` draws them and makes their arrays, ``calls`` makes the calls, ``oracle`` knows in float64 what has to come out
and how far roundings may move it, ``checking`` compares, ``shrinking`` makes a failing case small, ``running`` runs
many in several processes (``salekit fuzz``, docs/fuzz.md).
"""

from .cases import Case, draw, load, make_arrays, save
from .checking import check_case

__all__ = ["Case", "check_case", "draw", "load", "make_arrays", "save"]
