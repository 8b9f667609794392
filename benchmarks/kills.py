"""Kills small runs at random instants, and at every write, and holds what they become against undisturbed runs.

python benchmarks/kills.py --kills 100    # SIGKILL at random instants: dar, grpo, ppo, dpo; 1 and 2 processes
python benchmarks/kills.py --older        # the same of dar with train.reuse, rollout.ahead, rollout.resample, adaptive α and β
python benchmarks/kills.py --writes       # before and after every write, sync, rename and removal of one run
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

tests = Path(__file__).resolve().parents[1] / "tests"
sys.path[:0] = [str(tests), str(tests / "support")]

from conftest import save_tiny
from killing import Case, Disturbed, Zygote, at_random

ADAPTIVE = {"kl_budget": 0.05, "alpha_rate": 0.05, "epsilon": 0.3}
AHEAD = {"reuse": [1, 2], "ahead": 1, "settings": ADAPTIVE}
RESAMPLE = {"reuse": [1, 2], "resample": 2, "function": "coarse", "settings": ADAPTIVE}
CASES = [(algo, processes, {}) for algo in ("dar", "grpo", "ppo", "dpo") for processes in (1, 2)]
OLDER = [("dar", processes, changes) for changes in (AHEAD, AHEAD | {"ahead": 2}, RESAMPLE) for processes in (1, 2)]


def total(results: list[Disturbed]) -> dict[str, int]:
    return {
        "runs": len(results),
        "kills": sum(r.kills for r in results),
        "runs that end otherwise than undisturbed": sum(bool(r.different) for r in results),
        "labels bought twice": sum(r.bought_twice for r in results),
        "kills after which something was unreadable": sum(len(r.unreadable) for r in results),
    }


def campaign(zygote: Zygote, folder: Path, model: Path, kills: int, cases: list) -> list[Disturbed]:
    results: list[Disturbed] = []
    for number, (algo, processes, changes) in enumerate(cases):
        case = Case(zygote, folder / str(number), model, algo, processes, **changes)
        mine, wanted = [], kills / len(cases)
        while sum(r.kills for r in mine) < wanted:
            mine.append(case.disturbed(at_random(1000 * number + len(mine), case.seconds, 4)))
        print(json.dumps({"algo": algo, "processes": processes, **changes, **total(mine)}), flush=True)
        results += mine
    return results


def every_write(zygote: Zygote, folder: Path, model: Path, stride: int) -> list[Disturbed]:
    case = Case(zygote, folder / "writes", model, "dar", 1)
    results = []
    for point in range(0, case.writes, stride):
        results.append(case.disturbed(iter([{"kill_at": point}])))
        if results[-1].bought_twice:
            print(json.dumps({"point": point, "of": case.writes, "bought_twice": results[-1].bought_twice}), flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--older", action="store_true")
    parser.add_argument("--writes", action="store_true")
    parser.add_argument("--stride", type=int, default=1, help="with --writes: try every so many")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder, zygote = Path(place), Zygote()
        (folder / "tiny").mkdir()
        model = save_tiny(folder / "tiny", "llama")
        if chosen.writes:
            results = every_write(zygote, folder, model, chosen.stride)
        else:
            results = campaign(zygote, folder, model, chosen.kills, OLDER if chosen.older else CASES)
        zygote.close()
    print(json.dumps(total(results)))


if __name__ == "__main__":
    main()
