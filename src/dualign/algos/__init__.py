"""Every system by name. Adding one: its file here, one line below, a recipe, a golden row, a row in docs/equations.md."""

from dualign.algos.base import Algorithm, Batch, Columns, Stats
from dualign.algos.dar import DAR

ALGORITHMS: dict[str, type[Algorithm]] = {
    "dar": DAR,
}

__all__ = ["ALGORITHMS", "Algorithm", "Batch", "Columns", "Stats"]
