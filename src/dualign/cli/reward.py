"""`dualign reward fit` and `dualign reward score`: make a reward from preferences, and apply one."""

from __future__ import annotations

import functools
import json
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dualign.common.errors import UserError

if TYPE_CHECKING:
    from rich.progress import Progress

    from dualign.annotate.features import Array
    from dualign.annotate.fit import Pairs
    from dualign.common.types import Example
    from dualign.data.settings import DataConfig

PromptColumn = Annotated[str, typer.Option(help="the column that holds the prompt")]

ENCODER = "all-minilm-l6-v2"

app = typer.Typer(no_args_is_help=True, help="Rewards from human preferences: make a head, score with it.")


def register(parent: typer.Typer) -> None:
    parent.add_typer(app, name="reward")


@app.command()
def fit(
    preferences: Annotated[list[str], typer.Argument(help="preference files or data set names; one sub-head for each")],
    out: Annotated[Path, typer.Option(help="where the head goes (.safetensors)")],
    holdout: Annotated[list[str] | None, typer.Option(help="a preference file to measure on; may be repeated")] = None,
    c: Annotated[float | None, typer.Option(min=1e-6, help="inverse ridge strength; default: cross-validated")] = None,
    gate: Annotated[str | None, typer.Option(help="prompts whose column `kind` says which sub-head they need")] = None,
    gate_kinds: Annotated[str, typer.Option(help="that column's value for each preference file, in order")] = "",
    prompt_column: PromptColumn = "prompt",
    encoder: Annotated[str, typer.Option(help="what makes features of texts: all-minilm-l6-v2, or words")] = ENCODER,
) -> None:
    """Fit a ridge Bradley-Terry head on frozen features, and say how often it agrees with people."""
    from importlib.metadata import version

    from dualign.annotate.features import WORDS
    from dualign.annotate.fit import fit_head, head_agreement

    if encoder not in (ENCODER, WORDS):
        raise UserError(f"--encoder: {encoder}; there are {ENCODER} and {WORDS}")
    kinds = [kind.strip() for kind in gate_kinds.split(",") if kind.strip()]
    if gate and (len(kinds) != len(preferences) or len(kinds) < 2):
        raise UserError("--gate needs two preference files or more, and --gate-kinds with one value for each of them")
    examples = {source: _preferences(source, prompt_column) for source in [*preferences, *(holdout or [])]}
    with _progress() as progress:
        pairs = {source: _encode(progress, source, rows, encoder) for source, rows in examples.items()}
        gate_prompts = _gate_prompts(progress, gate, kinds, prompt_column, encoder) if gate else []
        progress.add_task("fitting", total=None)
        head = fit_head([pairs[source] for source in preferences], c, gate_prompts, encoder)
    held_out = {source: head_agreement(head, pairs[source]) for source in holdout or []}
    sources = [*preferences, *(holdout or []), *([gate] if gate else [])]
    head.about.update(
        command=shlex.join(["dualign", *sys.argv[1:]]),
        versions={name: version(name) for name in ("dualign", "scikit-learn", "transformers", "torch")},
        files={_name(source): {"sha256": _sha256(source)} for source in sources},
        held_out={_name(source): asdict(figures) for source, figures in held_out.items()},
    )
    _save(out, head.to_bytes())
    for source, about in zip(preferences, head.about["fits"], strict=True):
        share = about["cross_validated"]
        print(f"{source}: {about['pairs']} pairs, C = {about['c']}; cross-validated agreement {share['share']:.1%}")
    for source, figures in held_out.items():
        print(f"held out, {source}: {figures}")
    print(f"wrote {out}")


@app.command()
def score(
    file: Annotated[str, typer.Argument(help="prompts with completions, or preferences")],
    out: Annotated[Path, typer.Option(help="where the rewards go (.jsonl)")],
    head: Annotated[str, typer.Option(help="a head file, or builtin:NAME")] = "builtin:harmless",
    prompt_column: PromptColumn = "prompt",
) -> None:
    """Score every completion of a file: one JSON line per row, {"id", "reward"} or {"id", "chosen", "rejected"}; null for
    an answer that is absent."""
    import numpy as np

    from dualign.annotate.head import load_head
    from dualign.data.responses import load_responses

    loaded, rows = load_head(head), load_responses(file, config=_reading(file, prompt_column))
    texts = [(row.prompt.text, text) for row in rows for text in row.texts.values() if text is not None]
    scores = iter(loaded.score_texts([prompt for prompt, _ in texts], [text for _, text in texts]).tolist())
    rewards = [{name: None if text is None else next(scores) for name, text in row.texts.items()} for row in rows]
    lines = [
        json.dumps(
            {"id": row.id, **{"reward" if name == "completion" else name: value for name, value in each.items()}}
        )
        for row, each in zip(rows, rewards, strict=True)
    ]
    _save(out, ("\n".join(lines) + "\n").encode())
    found = np.array([value for each in rewards for value in each.values() if value is not None])
    print(f"{found.size} completions: mean reward {found.mean():+.3f}, standard deviation {found.std():.3f}")
    for reason, count in Counter(reason for row in rows for reason in row.reasons.values()).items():
        print(f"  {count} absent: {reason}")
    whole = [tuple(v for v in each.values() if v is not None) for each in rewards if "chosen" in each]
    higher = [pair[0] > pair[1] for pair in whole if len(pair) == 2]
    if higher:
        print(f"chosen scores higher in {np.mean(higher):.1%} of {len(higher)} pairs")
    print(f"wrote {out}")


def _progress() -> Progress:
    from rich.console import Console
    from rich.progress import Progress

    return Progress(console=Console(stderr=True))


def _reading(source: str, prompt_column: str) -> DataConfig:
    """Rows that are not of the data's format are left out and counted."""
    from dualign.data.settings import DataConfig

    return DataConfig(train=source, prompt_column=prompt_column, bad_rows="skip")


def _preferences(source: str, prompt_column: str) -> list[Example]:
    from dualign.data.rows import load_examples

    rows = load_examples(source, _reading(source, prompt_column))
    if len(rows[0].completions) != 2:
        raise UserError(f"{source}: has completions but no preferences; needs columns chosen and rejected")
    return rows


def _encode(progress: Progress, source: str, rows: Sequence[Example], by: str) -> Pairs:
    from dualign.annotate.fit import encode_pairs

    task = progress.add_task(f"encoding {Path(source).name}", total=3 * len(rows))
    return encode_pairs(rows, functools.partial(progress.advance, task), by)


def _gate_prompts(progress: Progress, source: str, kinds: Sequence[str], prompt_column: str, by: str) -> list[Array]:
    """Encoded prompts of each kind. Raises UserError for a kind that no prompt has."""
    from dualign.annotate.features import encoder
    from dualign.data.rows import load_prompts

    prompts = load_prompts(source, _reading(source, prompt_column))
    texts = {kind: [p.text for p in prompts if p.columns.get("kind") == kind] for kind in kinds}
    for kind, found in texts.items():
        if not found:
            have = ", ".join(sorted({str(p.columns.get("kind")) for p in prompts})[:9])
            raise UserError(f"{source}: no prompt with kind {kind!r}; there are {have}")
    task = progress.add_task(f"encoding {Path(source).name}", total=sum(map(len, texts.values())))
    return [encoder(by).encode(found, "end", functools.partial(progress.advance, task)) for found in texts.values()]


def _name(source: str) -> str:
    """A source's name without the folder it happens to lie in here."""
    return source if source.startswith("builtin:") else Path(source).name


def _sha256(source: str) -> str | None:
    """Of a local file; None for a data set taken by name."""
    import hashlib

    from dualign.data.rows import local_file

    path = local_file(source)
    if path is None:
        return None
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _save(out: Path, data: bytes) -> None:
    from dualign.common.durable import durable

    def write(aside: Path) -> None:
        out.parent.mkdir(parents=True, exist_ok=True)
        aside.write_bytes(data)

    durable(out, write)
