"""Kills small runs at random instants, and at every write, and holds what they become against undisturbed runs.

python benchmarks/kills.py --kills 100    # SIGKILL at random instants: dar, grpo, ppo, dpo; 1 and 2 processes
python benchmarks/kills.py --writes       # before and after every write, sync, rename and removal of one run
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))

from conftest import _save
from killing import Case, Disturbed, Zygote, at_random

CASES = [(algo, processes) for algo in ("dar", "grpo", "ppo", "dpo") for processes in (1, 2)]


def total(results: list[Disturbed]) -> dict[str, int]:
    return {
        "runs": len(results),
        "kills": sum(r.kills for r in results),
        "runs that end otherwise than undisturbed": sum(bool(r.different) for r in results),
        "labels bought twice": sum(r.bought_twice for r in results),
        "kills after which something was unreadable": sum(len(r.unreadable) for r in results),
    }


def campaign(zygote: Zygote, folder: Path, model: Path, kills: int) -> list[Disturbed]:
    results: list[Disturbed] = []
    for number, (algo, processes) in enumerate(CASES):
        case, mine, wanted = Case(zygote, folder / f"{algo}{processes}", model, algo, processes), [], kills / len(CASES)
        while sum(r.kills for r in mine) < wanted:
            mine.append(case.disturbed(at_random(1000 * number + len(mine), case.seconds, 4)))
        print(json.dumps({"algo": algo, "processes": processes, **total(mine)}), flush=True)
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
    parser.add_argument("--writes", action="store_true")
    parser.add_argument("--stride", type=int, default=1, help="with --writes: try every so many")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder, zygote = Path(place), Zygote()
        (folder / "tiny").mkdir()
        model = _save(folder / "tiny", "llama")
        if chosen.writes:
            results = every_write(zygote, folder, model, chosen.stride)
        else:
            results = campaign(zygote, folder, model, chosen.kills)
        zygote.close()
    print(json.dumps(total(results)))


if __name__ == "__main__":
    main()
