"""Handing a run's model on: to a folder, to a hub, to a server, as GGUF."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dualign.common.errors import UserError, first_line
from dualign.eval.card import card
from dualign.models.export import BASE, BESIDE, Exported, Ids, export
from dualign.run.batch import Row
from dualign.run.folder import Run
from dualign.run.named import checkpoint_of

ROWS = 8  # completions of the run on which the files are compared with the checkpoint
CONVERTER = "convert_hf_to_gguf.py"
OUTTYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}  # the converter's, by the model's


@dataclass(frozen=True)
class Handed:
    """What was written where, and how far it is from what the run itself recorded (None: no such record)."""

    run: Run
    folder: Path
    checkpoint: Path
    exported: Exported
    recorded: float | None

    def lines(self) -> list[str]:
        told = [f"{self.folder}: {self.exported.what}, from {self.checkpoint}", f"checked: {self.exported}"]
        if self.recorded is not None:
            told.append(f"the run's own held-out answers had these log-probs up to {self.recorded:.1e} nats a token")
        return told

    def record(self) -> dict[str, Any]:
        """For programs. Distances of a token's log-prob, in nats: `mean` and `largest` from the checkpoint's over `tokens`,
        `recorded` the mean from the run's own."""
        told = {key: getattr(self.exported, key) for key in ("what", "adapter", "tokens", "mean", "largest")}
        return {"folder": self.folder, "checkpoint": self.checkpoint, **told, "recorded": self.recorded,
                "serve": served(self)}  # fmt: skip


def found(name: str) -> tuple[Run, Path]:
    """The run and the checkpoint that a run's name, or a checkpoint's folder, stands for. Raises UserError where there is
    none."""
    checkpoint = Path(checkpoint_of(name))
    if str(checkpoint) == name and checkpoint.parent.name != "checkpoints":
        raise UserError(f"{name}: no run here (config.yaml is missing)")
    return Run.open(checkpoint.parent.parent), checkpoint


def hand_on(
    name: str, out: Path | None = None, merge: bool = False, base: str | None = None, called: str | None = None
) -> Handed:
    """Exports the checkpoint that a run's name stands for, with a card. `called`: the model's name on it."""
    run, checkpoint = found(name)
    out = out or run.folder / "export"
    rows, recorded = _rows(run, int(checkpoint.name.partition("+")[0]))

    def finish(folder: Path, exported: Exported) -> None:
        text = card(run, checkpoint, exported, called or run.folder.resolve().name)
        (folder / "README.md").write_text(text, encoding="utf-8")

    ids: list[Ids] = [(row.rollout.prompt_ids, row.rollout.completion_ids) for row in rows]
    exported = export(checkpoint, out, run.config.model, merge, ids, base, finish)
    away = None
    if recorded:
        pairs = [pair for row, logp in zip(rows, exported.logp, strict=True)
                 for pair in zip(row.rollout.sampler_logp, logp, strict=True)]  # fmt: skip
        away = sum(abs(a - b) for a, b in pairs) / len(pairs)
    return Handed(run, out, checkpoint, exported, away)


def _rows(run: Run, done: int) -> tuple[Sequence[Row], bool]:
    """Completions of the run to compare on, and whether the checkpoint itself wrote them, with their log-probs: those
    of its held-out evaluation; else of the last stored batch."""
    if done in run.evaluated():
        rows = run.read_evaluation(done)[0][:ROWS]
        return rows, bool(rows) and all(row.rollout.sampler_logp for row in rows)
    steps = run.steps()
    return (run.batch(steps[-1]).rows[:ROWS] if steps else ()), False


def served(handed: Handed) -> list[str]:
    """The commands that serve it."""
    folder, name = shlex.quote(str(handed.folder)), shlex.quote(handed.run.folder.resolve().name)
    adapter = handed.exported.adapter
    if adapter is None:
        return [f"vllm serve {folder} --served-model-name {name}", f"transformers serve {folder}"]
    base = f"{folder}/{BASE}" if adapter == BESIDE else shlex.quote(adapter)
    return [f"vllm serve {base} --enable-lora --lora-modules {name}={folder}"]


def converter_in(given: Path) -> Path:
    """llama.cpp's own converter: the script, or in its folder. Raises UserError where it is not there."""
    script = given / CONVERTER if given.is_dir() else given
    if not script.is_file():
        raise UserError(f"--gguf {given}: no {CONVERTER} there; it is in llama.cpp's folder")
    return script


def to_gguf(handed: Handed, script: Path) -> Path:
    """The model as GGUF, its weights as they are: rounded to 16 bits, those of an fp32 run say something else. Raises
    UserError where the converter fails."""
    if handed.exported.adapter is not None:
        raise UserError("--gguf needs a whole model: add --merge")
    out = handed.folder / f"{handed.run.folder.resolve().name}.gguf"
    dtype = json.loads((handed.folder / "config.json").read_text(encoding="utf-8")).get("dtype")
    kind = OUTTYPES.get(dtype, "auto")
    command = [sys.executable, str(script), str(handed.folder), "--outfile", str(out), "--outtype", kind]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not out.is_file():
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise UserError(
            f"{script}: failed ({last}); it needs what llama.cpp's requirements.txt names. The model is in {handed.folder}"
        )
    return out


def token_of_hub() -> str:
    """Raises UserError where nothing can be uploaded."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise UserError("HF_HUB_OFFLINE is set: nothing can be uploaded; unset it, or write the files by --dry")
    token = get_token()
    if not token:
        raise UserError("no token of the hub: set HF_TOKEN, or run `hf auth login`; --dry writes the files alone")
    return token


def push(folder: Path, repository: str, private: bool) -> str:
    """Uploads a folder to a hub's model repository, made if need be, and returns its address. The token is the hub
    client's own (HF_TOKEN, or `hf auth login`). Raises UserError where the hub refuses or cannot be reached."""
    from huggingface_hub import HfApi

    token, api = token_of_hub(), HfApi(library_name="dualign")
    try:
        url = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=url.repo_id, folder_path=folder, commit_message="Upload by dualign push")
    except Exception as error:  # a network's are those of whatever library the hub's client uses
        raise UserError(f"{repository}: {first_line(error).replace(token, '***')}") from None
    return str(url)
