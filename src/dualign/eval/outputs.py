"""What is evaluated: answers to prompts, from a run's evaluations or checkpoints, a model, or a file of outputs.

Answers are matched by the prompt's content, not by its id or place: outputs of any origin can be compared.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dualign.errors import UserError
from dualign.schema import ModelConfig
from dualign.types import Prompt

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet")


@dataclass(frozen=True)
class Answer:
    prompt: Prompt
    text: str
    ended: bool | None = None  # closed with EOS? None: not known
    tokens: int | None = None
    reward: float | None = None  # what it was given when it was made


@dataclass(frozen=True)
class Outputs:
    """The answers of one policy. `batches`, `labels`: how far a run's policy was trained; None for what is no run's."""

    name: str
    answers: dict[str, tuple[Answer, ...]]  # by key_of(prompt)
    batches: int | None = None
    labels: int | None = None

    def __iter__(self) -> Iterator[Answer]:
        for answers in self.answers.values():
            yield from answers


@dataclass(frozen=True)
class Generation:
    """How models are sampled: greedily, or with the same random numbers for all. `prompts`: on what, None where each
    source brings its own; `folder`: where outputs are kept, so that nothing is sampled twice."""

    prompts: Sequence[Prompt] | None
    max_new_tokens: int
    temperature: float
    k: int
    seed: int
    folder: Path
    extra: dict[str, Any] = field(default_factory=dict)


def key_of(prompt: Prompt) -> str:
    return hashlib.sha256(json.dumps(prompt.messages, ensure_ascii=False).encode()).hexdigest()[:16]


def is_run(source: str) -> bool:
    return (Path(source) / "config.yaml").is_file()


def grouped(answers: Iterable[Answer]) -> dict[str, tuple[Answer, ...]]:
    out: dict[str, tuple[Answer, ...]] = {}
    for answer in answers:
        key = key_of(answer.prompt)
        out[key] = (*out.get(key, ()), answer)
    return out


def points(source: str, how: Generation) -> list[Outputs]:
    """The policies that `source` stands for, earliest first: a run's (π_0 first), or the single one of a model's name,
    a checkpoint's folder or a file."""
    if is_run(source):
        return _checkpoints(Path(source), how) if how.prompts is not None else _evaluations(Path(source))
    path = Path(source)
    if path.name.endswith(SUFFIXES):
        return [Outputs(path.name, grouped(read(path)))]
    return [Outputs(path.name if path.exists() else source, grouped(generate(ModelConfig(name=source), how)))]


# --- runs ---


def _evaluations(folder: Path) -> list[Outputs]:
    """What a run's own evaluations sampled: costs nothing."""
    from dualign.runs import Run

    run = Run.open(folder)
    files = sorted(run.evaluations.glob("*.parquet"))
    if not files:
        raise UserError(f"{folder}: the run evaluated nothing; name held-out prompts with --prompts")
    found = []
    for file in files:
        step = int(file.stem)
        rows, _ = run.read_evaluation(step)
        found.append(Outputs(_name(step), grouped(map(_answer, rows)), step, labels_at(run.metrics(), step)))
    return found


def _checkpoints(folder: Path, how: Generation) -> list[Outputs]:
    from dualign import config as configs
    from dualign.runs import Run

    run = Run.open(folder)
    first = configs.load(folder / "config.yaml").model
    models = [(0, first)] + [(int(p.name), saved_model(first, p)) for p in run.saved() if "+" not in p.name]
    metrics = run.metrics()
    return [Outputs(_name(step), grouped(generate(m, how)), step, labels_at(metrics, step)) for step, m in models]


def saved_model(first: ModelConfig, checkpoint: Path) -> ModelConfig:
    """A checkpoint of `first`, whose chat template was saved with it."""
    return first.model_copy(update={"name": str(checkpoint), "revision": None, "chat_template": None})


def _name(step: int) -> str:
    return f"batch {step}" if step else "π_0"


def labels_at(metrics: Sequence[dict[str, Any]], step: int) -> int:
    """Labels bought by the time `step` online batches were done."""
    return max((int(m["labels"]) for m in metrics if m["step"] < step), default=0)


def _answer(row: Any) -> Answer:
    r = row.rollout
    return Answer(r.prompt, r.text, r.finish == "eos", len(r.completion_ids), row.label.value)


# --- files ---


def read(path: Path) -> list[Answer]:
    """Outputs in `dualign sample`'s form (prompt, completion), in AlpacaEval's (instruction, output), or a run's
    evaluations/*.parquet. Raises UserError naming the row."""
    from dualign import data

    if path.suffix == ".parquet" and path.parent.name == "evaluations":
        from dualign.runs import Run

        return list(map(_answer, Run(path.parent.parent).read_evaluation(int(path.stem))[0]))
    if path.suffix == ".json":
        return _alpaca(path)
    examples = data.load_examples(str(path))
    return [
        Answer(e.prompt, e.completions[0], _ended(e.prompt.columns), e.prompt.columns.get("tokens")) for e in examples
    ]


def _ended(columns: Any) -> bool | None:
    finish = columns.get("finish")
    return None if finish is None else finish == "eos"


def _alpaca(path: Path) -> list[Answer]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        texts = [(row["instruction"], row["output"]) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: expected a list of objects with instruction and output, as AlpacaEval has them ({error!r})"
        ) from None
    return [Answer(user_prompt(f"{path.name}:{i}", q), a) for i, (q, a) in enumerate(texts)]


def user_prompt(id: str, text: str) -> Prompt:
    return Prompt(id, ({"role": "user", "content": text},))


# --- sampling ---


def generate(model: ModelConfig, how: Generation) -> list[Answer]:
    """Samples from `model`, once: the outputs are kept under what decides them. Raises UserError without prompts."""
    from dualign.rollout.base import Sampling
    from dualign.runs import write_text
    from dualign.sampling import sample_from

    if how.prompts is None:
        raise UserError(f"{model.name}: to sample from a model, name prompts with --prompts")
    sampling = Sampling(how.k, how.max_new_tokens, how.temperature)
    about = {
        "model": identity(model),
        "sampling": [how.k, how.max_new_tokens, how.temperature, how.seed],
        "prompts": [p.content for p in how.prompts],  # plain text and one user turn are asked differently
    }
    file = how.folder / f"{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]}.jsonl"
    if not file.is_file():
        rollouts = sample_from(model, how.prompts, sampling, how.seed)
        lines = [
            {"id": r.prompt.id, "prompt": r.prompt.messages, "completion": [{"role": "assistant", "content": r.text}],
             "finish": r.finish, "tokens": len(r.completion_ids), "model": model.name}
            for r in rollouts
        ]  # fmt: skip
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return read(file)


def identity(model: ModelConfig) -> list[Any]:
    """What tells a model from another of the same name: its settings, and its files' sizes and times. (Reading 15 GB
    would take longer than judging.)"""
    name, template = Path(model.name), Path(model.chat_template or "")
    files = sorted(name.glob("*.safetensors")) if name.is_dir() else []
    return [
        str(name.resolve()) if files else model.name,
        *[model.revision, model.precision, template.read_text(encoding="utf-8") if template.is_file() else None],
        *[[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files],
    ]
