"""dualign beside TRL at equal work: seconds per online batch by phase, useful tokens per second, peak memory.

    python benchmarks/against_trl.py [--repeats 5] [--batches 2] [--only dualign-dar trl-grpo] [--k 4] [--tokens 48]
        [--precision fp32]
    python benchmarks/against_trl.py --scaling --repeats 1 --batches 1 --prompts 4 --only dualign-grpo trl-grpo

Both get the same model, prompts, temperature, lengths, reward function (which costs nothing), Adafactor at 1e-5, fp32
weights under bf16 autocast (fp32 all through, where the processor has no units for bf16), and two updates per online
batch; GRPO with a KL term to π_0 of equal β, so both score π_t and π_0. All else is each library's own default:
dualign's processes set what its command line sets (`dualign.common.cpu`), TRL's nothing; TRL has gradient
checkpointing on and dualign off, so GRPO is also measured the other way round. Every run is a process of its own; the
order turns round with each repeat; a run's first online batch is warm-up.
"""

from __future__ import annotations

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from common import RESULTS, machine, save, spread, table

SYSTEMS: dict[str, list[str]] = {  # dualign: overrides of the quickstart; TRL: the trainer, checkpointing
    "dualign-grpo": ["algo.name=grpo"],
    "dualign-rloo": ["algo.name=rloo"],
    "dualign-grpo-checkpointing": ["algo.name=grpo", "model.gradient_checkpointing=true"],
    "dualign-dar": ["algo.name=dar", "algo.skip_below=0"],
    "dualign-dar-skip": ["algo.name=dar", "algo.skip_below=1e-3"],
    "dualign-dar-fast": ["algo.name=dar", "algo.skip_below=1e-3", "rollout.log_probs=recorded"],
    "trl-grpo": ["GRPO"],
    "trl-grpo-nocheckpointing": ["GRPO", "off"],
    "trl-rloo": ["RLOO"],
}
PHASES = ("sample", "label", "score", "update")
RANDOM = "random weights, vocabulary "  # a model made for the occasion


@dataclass(frozen=True)
class Work:
    """What one run does, `batches` times after the warm-up."""

    model: str = "smollm2-135m-instruct"
    prompts: int = 16
    k: int = 4
    tokens: int = 48
    batches: int = 2
    precision: str = "bf16"


# --- the parent: it starts runs and makes tables, and never imports torch (a child's peak memory would begin with it)


def run(system: str, work: Work, python: str = sys.executable) -> dict[str, Any]:
    """One run in its own process. Raises SystemExit with its last words if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        command = [python, str(Path(__file__).with_name("one_run.py")), system, json.dumps(asdict(work)), folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{system} failed:\n{done.stderr[-3000:]}")
        return json.loads(Path(folder, "result.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def repeated(systems: list[str], work: Work, repeats: int) -> Iterator[dict[str, list[Any]]]:
    """Yields the runs by system, one more of each every time, in an order that alternates."""
    found: dict[str, list[Any]] = {}
    for repeat in range(repeats):
        for system in reversed(systems) if repeat % 2 else systems:
            result = run(system, work)
            found.setdefault(system, []).append(result)
            print(
                f"{repeat + 1}/{repeats} {system}: {result['seconds']:.2f} s, {result['peak_mb']:.0f} MB, "
                f"{result['tokens']:.0f} tokens",
                flush=True,
            )
        yield found


def figures(runs: dict[str, list[Any]]) -> str:
    """One row per system: medians over its runs, with the least and the greatest."""
    rows = []
    for system, found in runs.items():
        phases = [f"{statistics.median(r['phases'].get(p, 0.0) for r in found):.2f}" for p in PHASES]
        speed = spread([r["tokens"] / r["seconds"] for r in found], 1)
        rows.append([system, spread([r["seconds"] for r in found]), *phases, speed, spread(peaks(found), 0)])
    return table(["", "s per online batch", *PHASES, "useful tokens/s", "peak MB"], rows)


def peaks(found: list[Any]) -> list[float]:
    return [r["peak_mb"] for r in found]


def ratios(runs: dict[str, list[Any]]) -> str:
    """dualign / TRL, run by run of the same repeat."""
    rows = []
    for ours in (s for s in runs if s.startswith("dualign")):
        for theirs in (s for s in runs if s.startswith("trl")):
            pairs = list(zip(runs[ours], runs[theirs], strict=False))
            seconds = [a["seconds"] / b["seconds"] for a, b in pairs]
            speed = [a["tokens"] / a["seconds"] / (b["tokens"] / b["seconds"]) for a, b in pairs]
            memory = [a["peak_mb"] / b["peak_mb"] for a, b in pairs]
            rows.append([f"{ours} / {theirs}", spread(seconds), spread(speed), spread(memory)])
    return table(["", "time", "useful tokens/s", "peak memory"], rows)


def limit(runs: dict[str, list[Any]]) -> str:
    """Time over what the arithmetic would take at the best rate of products measured after any run."""
    ours = {system: found for system, found in runs.items() if system.startswith("dualign")}
    rate = max((r["tflop_per_second"] for found in ours.values() for r in found), default=0.0)
    rows = []
    for system, found in ours.items():
        tflop, bound = [r["tflop"] for r in found], [r["tflop"] / rate for r in found]
        over = [r["seconds"] / b for r, b in zip(found, bound, strict=True)]
        rows.append([system, spread(tflop), f"{rate:.2f}", spread(bound), spread(over)])
    return table(["", "TFLOP per online batch", "TFLOP/s measured", "limit, s", "time / limit"], rows)


def axes(work: Work) -> dict[str, list[dict[str, Any]]]:
    """What is varied around `work`, one thing at a time."""
    n, p = work.prompts * work.k, work.prompts
    return {
        f"completions per prompt ({n} in all)": [{"k": k, "prompts": n // k} for k in (2, 4, 8, 16) if n // 2 % k == 0],
        "tokens per completion": [{"tokens": t} for t in (16, 32, 64, 128)],
        "completions per online batch": [{"prompts": x} for x in (p // 2, p, 2 * p, 4 * p) if x],
        "vocabulary": [{"model": f"{RANDOM}{v}"} for v in (49152, 98304, 151936, 262144)],
    }


def position(axis: str, change: dict[str, Any], work: Work) -> int:
    """Where a point stands on its axis."""
    if "model" in change:
        return int(change["model"].removeprefix(RANDOM))
    if axis == "completions per online batch":
        return int(change["prompts"] * work.k)
    return int(change.get("k") or change["tokens"])


def scaling(systems: list[str], work: Work, repeats: int, out: Path) -> None:
    from plots import plot_scaling

    record: dict[str, Any] = {"machine": machine(), "work": asdict(work), "axes": {}}
    tables = []
    for axis, changes in axes(work).items():
        points = record["axes"][axis] = []
        for change in changes:
            *_, runs = repeated(systems, replace(work, **change), repeats)
            points.append({"at": position(axis, change, work), "runs": runs})
            tables.append(f"## {axis}: {points[-1]['at']}\n\n{figures(runs)}\n\n{ratios(runs)}")
            page = save("scaling", record, "\n\n".join(tables), out)
    print("\n".join(str(p) for p in [page, *plot_scaling(page.with_suffix(".json"))]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batches", type=int, default=2, help="online batches counted in each run")
    parser.add_argument("--only", nargs="+", choices=SYSTEMS, metavar="SYSTEM", help=", ".join(SYSTEMS))
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--k", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="of both libraries")
    parser.add_argument("--scaling", action="store_true", help="vary K, length, batch and vocabulary instead")
    parser.add_argument("--out", type=Path, default=RESULTS)
    o = parser.parse_args()
    work = Work(prompts=o.prompts, k=o.k, tokens=o.tokens, batches=o.batches, precision=o.precision)
    if o.scaling:
        scaling(o.only or ["dualign-grpo", "dualign-dar", "trl-grpo"], work, o.repeats, o.out)
        return
    about = machine()
    for runs in repeated(list(o.only or SYSTEMS), work, o.repeats):
        # saved after each, so that an interrupted benchmark leaves what it has
        tables = "\n\n".join([figures(runs), ratios(runs), limit(runs)])
        page = save("against_trl", {"machine": about, "work": asdict(work), "runs": runs}, tables, o.out)
    print(f"{tables}\n{page}")


if __name__ == "__main__":
    main()
