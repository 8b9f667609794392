"""AlpacaEval 2.0 (Dubois et al. 2024, arXiv 2404.04475): one answer to each of 805 instructions against a baseline's.

Outputs are written in AlpacaEval's JSON, so the official package runs on them unchanged. Our own path judges the same
pairs with any annotator; its numbers are not the leaderboard's, whose annotator, prompt and weights are its own.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dualign.errors import UserError
from dualign.eval.outputs import Answer, Outputs, grouped, read
from dualign.intervals import bracket, too_few
from dualign.types import Prompt

BASELINES = ("reference_gpt4_1106_preview", "reference_text_davinci_003")  # AlpacaEval 2's, AlpacaEval 1's


def baseline(prompts: Sequence[Prompt], column: str | None, file: Path | None) -> Outputs:
    """The baseline's answers: an AlpacaEval JSON file, or a column of the instructions. Raises UserError."""
    if file is not None:
        return Outputs(file.stem, grouped(read(file)))
    name = column or next((c for c in BASELINES if c in prompts[0].columns), None)
    if name is None or any(not isinstance(p.columns.get(name), str) for p in prompts):
        raise UserError(
            f"the instructions have no column {name or ' or '.join(BASELINES)}: name the baseline's outputs with "
            "--reference FILE.json, or their column with --column"
        )
    return Outputs(name.removeprefix("reference_"), grouped(Answer(p, str(p.columns[name])) for p in prompts))


def write_outputs(path: Path, outputs: Outputs) -> None:
    """AlpacaEval's format: a list of {instruction, output, generator, dataset}."""
    from dualign.runs import write_text

    rows = [
        {"instruction": a.prompt.text, "output": a.text, "generator": outputs.name,
         "dataset": str(a.prompt.columns.get("subset", "alpaca_eval"))}
        for a in outputs
    ]  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(rows, ensure_ascii=False, indent=1) + "\n")


def official(model: Path, reference: Path, config: str) -> int:
    """Runs the official package's command on our files. Raises UserError where it is not installed."""
    command = shutil.which("alpaca_eval")
    if command is None:
        raise UserError("--official needs AlpacaEval's own package: pip install alpaca-eval")
    arguments = ["--model_outputs", str(model), "--reference_outputs", str(reference), "--annotators_config", config,
                 "--output_path", str(model.parent / "official")]  # fmt: skip
    return subprocess.run([command, "evaluate", *arguments], check=False).returncode


def headline(point: dict[str, Any]) -> str:
    raw = bracket(point["win_rate"], "{:.1%}")
    few = too_few(point["win_rate"]["n"])
    return (
        f"raw {raw}; no length control: {few}"
        if few
        else (f"length-controlled {bracket(point['length_controlled'], '{:.1%}')}, raw {raw}")
    )
