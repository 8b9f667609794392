"""AlpacaEval 2.0 (Dubois et al. 2024, arXiv 2404.04475): one answer to each of 805 instructions against a baseline's.

Outputs are written in AlpacaEval's JSON, so the official package runs on them unchanged. Our own path judges the same
pairs with any annotator; its numbers are not the leaderboard's, whose annotator, prompt and weights are its own.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from dualign.common.errors import UserError
from dualign.common.types import Prompt
from dualign.data.responses import answer_text
from dualign.data.settings import DataConfig
from dualign.eval.outputs import Answer, Outputs, grouped, read

BASELINES = ("reference_gpt4_1106_preview", "reference_text_davinci_003")  # AlpacaEval 2's, AlpacaEval 1's


def baseline(
    prompts: Sequence[Prompt], column: str | None, file: Path | None, asked: DataConfig | None = None
) -> Outputs:
    """The baseline's answers: an AlpacaEval JSON file (`asked`: how its instructions are put), or a column of the
    instructions. A null one is absent. Raises UserError."""
    if file is not None:
        return Outputs(file.stem, grouped(read(file, asked))).checked(str(file))
    name = column or next((c for c in BASELINES if any(c in p.columns for p in prompts)), None)
    if name is None or all(name not in p.columns for p in prompts):
        raise UserError(
            f"the instructions have no column {name or ' or '.join(BASELINES)}: name the baseline's outputs with "
            "--reference FILE.json, or their column with --column"
        )
    given = [(p, *answer_text(p.columns.get(name))) for p in prompts]
    found = [Answer(p, text or "", absent=reason and f"{name} {reason}") for p, text, reason in given]
    return Outputs(name.removeprefix("reference_"), grouped(found)).checked(f"column {name}")


def slug(column: str | None, file: Path | None) -> str:
    """The baseline as part of a file's name."""
    if file is None:
        return str(column).removeprefix("reference_")
    return f"{file.stem}-{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:6]}"


def write_outputs(path: Path, outputs: Outputs) -> None:
    """AlpacaEval's format: a list of {instruction, output, generator, dataset}. Absent answers are left out."""
    from dualign.common.durable import write_text

    rows = [
        {"instruction": a.prompt.text, "output": a.text, "generator": outputs.name,
         "dataset": str(a.prompt.columns.get("subset", "alpaca_eval"))}
        for a in outputs if not a.absent
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
