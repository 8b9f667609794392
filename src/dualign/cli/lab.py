"""lab: the files of a laboratory's task, made by the other commands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

EPOCHS = 2
C = 3.0  # inverse ridge strength of the proxy: where its agreement no longer grows, with few pairs and with many


def register(app: typer.Typer) -> None:
    app.command()(lab)


def lab(
    folder: Annotated[Path, typer.Argument(help="where the task's files go")] = Path("runs/lab"),
    seed: Annotated[int, typer.Option(min=0, help="of the language and its gold reward")] = 0,
    clauses: Annotated[int, typer.Option(min=1, max=12, help="of the longest sentence, four words each")] = 2,
    pairs: Annotated[int, typer.Option(min=20, max=8000, help="gold preferences that the proxy learns from")] = 6000,
    demonstrations: Annotated[int, typer.Option(min=128, help="sentences that π_0 is taught, twice")] = 8192,
    noise: Annotated[float, typer.Option(min=0, help="the better answer is preferred with σ(difference/noise)")] = 0.1,
) -> None:
    """Make a task whose truth is known: π_0 of a small language, a gold reward, a proxy of noisy preferences. Called
    again, it makes what is missing."""
    from dualign import config as configs
    from dualign.cli.reward import fit
    from dualign.cli.sft import make, sft_config
    from dualign.cli.train import _quiet
    from dualign.common.durable import write_text
    from dualign.common.errors import UserError
    from dualign.eval.lab import task as files
    from dualign.training.pairs import make_pairs

    task = files.Task(seed=seed, clauses=clauses, pairs=pairs, noise=noise, demonstrations=demonstrations)
    recipe, text = folder / "task.yaml", files.recipe_text(folder, task)
    if recipe.is_file() and recipe.read_text(encoding="utf-8") != text:
        raise UserError(f"{folder}: holds another task, which {recipe} names; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(recipe, text)
    _quiet()

    def step(name: str, command: str, work: Callable[[], object]) -> None:
        if (folder / name).exists():
            return
        print(f"{folder / name}: {command}", flush=True)
        if isinstance(said := work(), str):
            print(said)

    step("asked_heldout.jsonl", "the language and its prompts", lambda: files.write_data(folder, task))
    step("empty", "a Llama with random weights", lambda: files.write_model(folder, task))
    given = [f"model.name={folder}/empty", f"data.train={folder}/demonstrations.jsonl", f"run.dir={folder}/sft"]
    step(
        "sft/model",
        f"dualign sft lab/sft --epochs {EPOCHS} {' '.join(given)}",
        lambda: make(sft_config("lab/sft", given, epochs=EPOCHS)),
    )
    for name, asked in {"pairs": "asked", "pairs_heldout": "asked_heldout"}.items():
        told = [f"model.name={folder}/sft/model", f"data.train={folder}/{asked}.jsonl", f"run.seed={seed}"]
        told.append(f"rollout.max_new_tokens={4 * clauses + files.SLACK}")
        out = folder / f"{name}.jsonl"
        step(
            out.name,
            f"dualign pairs lab/pairs --out {out} {' '.join(told)}",
            lambda told=told, out=out: make_pairs(configs.load("lab/pairs", told), out),  # type: ignore[misc]
        )
    learned, holdout, head = (folder / name for name in ("pairs.jsonl", "pairs_heldout.jsonl", "proxy.safetensors"))
    step(
        head.name,
        f"dualign reward fit {learned} --encoder words --c {C:g} --holdout {holdout} --out {head}",
        lambda: fit([str(learned)], head, [str(holdout)], C, encoder="words"),
    )
    print(f"ready: dualign train {'lab/dar' if folder == Path('runs/lab') else recipe}")
