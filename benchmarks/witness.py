"""How often a witness speaks that has nothing to say, and how soon one that has: simulated runs.

    python benchmarks/witness.py [--runs 1000] [--seed 0]

Each simulated run has 40 online batches with looks at every fourth and held-out evaluations at every eighth, α 0.05 and
the defaults of `witness`: 64 labels of π_0's batch, 16 of each later one, one a prompt. "sd" is that of a prompt's
label. The reward rises by 2 sd after π_0, so that only the witness decides. Prints tables in Markdown.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))

from dualign.annotate.agreement import wilson
from simulated_witness import CASES, Case, fallen, first_spoken

LABELS: dict[str, dict[str, int]] = {
    "batches and 53 held out": {},
    "batches alone": {"heldout": 0},
    "batches alone, of 8 prompts": {"heldout": 0, "prompts_0": 8, "prompts": 8},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    print("| H0 holds: | false alarms | 95 % interval |\n|---|---|---|")
    for case in CASES:
        print(f"| {case.name} | {rate(case, a.runs, a.seed)} |")
    print("\n| the witness | labels | spoke | 95 % interval | median batch of 40 |\n|---|---|---|---|---|")
    for effect in (0.25, 0.5, 1.0, 2.0):
        for gradual in (False, True):
            for name, more in LABELS.items():
                case = fallen(effect, gradual, **more)
                when = first_spoken(case, a.runs, a.seed)
                median = f"{40 * np.nanmedian(when):.0f}" if np.isfinite(when).any() else "–"
                print(f"| {case.name} | {name} | {rate(case, a.runs, a.seed)} | {median} |")


def rate(case: Case, runs: int, seed: int) -> str:
    spoke = int(np.isfinite(first_spoken(case, runs, seed)).sum())
    low, high = wilson(spoke, runs)
    return f"{spoke / runs:.1%} | {low:.1%} to {high:.1%}"


if __name__ == "__main__":
    main()
