"""How torch behaves on a CPU: to be said before it is imported, which is when its threads are made."""

from __future__ import annotations

import os

SPINS = "5000"  # some 20 microseconds
KERNELS = "64"  # more than the shapes of one step of a model


def tune() -> None:
    """Unless the environment says otherwise, OpenMP's threads spin for a moment before they sleep: woken anew for every
    small operation they are no help at all, and spinning for long makes runs that share a machine crawl. And few of
    oneDNN's kernels are kept: it prepares one for every shape of matrix and by default keeps 1,024, which took 50 MB
    more with each online batch and saved no time (docs/LOG.md)."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(cache, KERNELS)
