"""Seconds of an online batch with a judge that takes its time, waited for and sampled ahead (rollout.ahead), in turn.

    python benchmarks/ahead.py [--seconds 0.3 1 3] [--repeats 2] [--batches 4] [--ahead 1] [--out FILE.json]

Each run is `dualign train` on SmolLM2 with 8 completions a batch and a local judge of that many seconds a call, two
calls at once. The first batch is left out: it has nothing to overlap with. Reported: seconds of a batch, all
phases together, those spent waiting for labels, and the mean reward of the last batch, which staleness could cost.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import dualign
from dualign.config import build, load

SERVER = Path(__file__).resolve().parents[1] / "tests" / "support" / "fault_server.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, nargs="+", default=[0.3, 1.0, 3.0])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--ahead", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found = []
    for latency in options.seconds:
        for repeat in range(options.repeats):
            for ahead in (0, options.ahead) if repeat % 2 == 0 else (options.ahead, 0):
                found.append(one(latency, ahead, options.batches, repeat))
                print(json.dumps(found[-1]), flush=True)
    for latency in options.seconds:
        waiting, sampled_ahead = (
            [r for r in found if r["latency"] == latency and bool(r["ahead"]) is ahead] for ahead in (False, True)
        )
        told = [f"{name} {statistics.mean(r['batch'] for r in runs):.1f} s a batch, "
                f"{statistics.mean(r['label'] for r in runs):.1f} s of them waiting"
                for name, runs in (("waited for:", waiting), ("ahead:", sampled_ahead))]  # fmt: skip
        print(f"{latency} s a call: {'; '.join(told)}")
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


def one(latency: float, ahead: int, batches: int, seed: int) -> dict[str, Any]:
    command = [sys.executable, str(SERVER), "--latency", str(latency)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    url = server.stdout.readline().split()[-1]
    try:
        with tempfile.TemporaryDirectory() as folder:
            config = load(
                "quickstart",
                [
                    f"run.dir={folder}/run", f"run.seed={seed}", "run.preview=0", "model.precision=fp32",
                    f"train.online_batches={batches + 1}", "train.online_batch=8", "train.update_size=8",
                    "rollout.k=4", "rollout.max_new_tokens=24",
                    f"rollout.ahead={ahead}", "data.eval=null",
                ],
            )  # fmt: skip
            judge = {"type": "judge", "base_url": url, "model": "m", "rubric": "helpfulness", "concurrency": 2}
            judge["cache"] = f"{folder}/cache.sqlite"
            tree = config.model_dump(mode="json") | {"reward": [judge], "witness": None}
            dualign.train(build(tree), quiet=True)
            records = dualign.Run.open(f"{folder}/run").metrics()
    finally:
        server.terminate()
    kept = records[1:]
    return {
        "latency": latency,
        "ahead": ahead,
        "seed": seed,
        "batch": statistics.mean(sum(r["seconds"].values()) for r in kept),
        "label": statistics.mean(r["seconds"].get("label", 0.0) for r in kept),
        "reward": kept[-1]["reward"],
    }


if __name__ == "__main__":
    main()
