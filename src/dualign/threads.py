"""How OpenMP's threads wait: to be said before torch is imported, which is when they are made."""

from __future__ import annotations

import os


def spin_briefly() -> None:
    """Has OpenMP's threads spin for some 20 microseconds before they sleep, unless the environment says otherwise: woken
    anew for every small operation they are no help at all, and spinning for long makes runs that share a machine crawl
    (docs/LOG.md, "Spinning threads")."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "5000")
