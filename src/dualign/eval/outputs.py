"""What is evaluated: answers to prompts, from a run's evaluations or checkpoints, a model, or a file of outputs.

Answers are matched by the prompt's content, not by its id or place: outputs of any origin can be compared.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualign.common.errors import UserError
from dualign.common.types import Prompt, user_prompt
from dualign.data.settings import DataConfig
from dualign.models.settings import ModelConfig

if TYPE_CHECKING:
    from dualign.data.responses import Responses

log = logging.getLogger(__name__)
PI_0 = "π_0"
SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet")


@dataclass(frozen=True)
class Answer:
    """One answer; an empty `text` is one. `absent`: why there is none."""

    prompt: Prompt
    text: str
    ended: bool | None = None  # closed with EOS? None: not known
    tokens: int | None = None
    reward: float | None = None  # what it was given when it was made
    ids: tuple[int, ...] | None = None  # its tokens; None: not known
    absent: str | None = None

    @property
    def given(self) -> str | None:
        """Its text; None where it is absent."""
        return None if self.absent else self.text


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

    def checked(self, source: str) -> Outputs:
        """Raises UserError where nothing was answered at all."""
        reasons = [answer.absent for answer in self]
        if reasons and all(reasons):
            raise UserError(f"{source}: none of the {len(reasons)} answers of {self.name} is there: {reasons[0]}")
        return self


@dataclass(frozen=True)
class Generation:
    """How models are sampled: greedily, or with the same random numbers for all. `prompts`: on what, None where each
    source brings its own; `folder`: where outputs are kept, so that nothing is sampled twice. `data`: how files'
    prompts are put to a model (data.chat, data.system_prompt)."""

    prompts: Sequence[Prompt] | None
    max_new_tokens: int
    temperature: float
    k: int
    seed: int
    folder: Path
    data: DataConfig | None = None


def key_of(prompt: Prompt) -> str:
    asked = [prompt.messages, prompt.for_template] if prompt.for_template else prompt.messages
    return hashlib.sha256(json.dumps(asked, ensure_ascii=False).encode()).hexdigest()[:16]


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
    a checkpoint (its folder, RUN@best, RUN@3) or a file."""
    from dualign.run.named import checkpoint_of

    if is_run(source):
        return _checkpoints(Path(source), how) if how.prompts is not None else _evaluations(Path(source))
    path = Path(source)
    if path.name.endswith(SUFFIXES):
        return [Outputs(path.name, grouped(read(path, how.data)))]
    model = ModelConfig(name=checkpoint_of(source))
    return [Outputs(path.name if path.exists() else source, grouped(generate(model, how)))]


# --- runs ---


def _evaluations(folder: Path) -> list[Outputs]:
    """What a run's own evaluations sampled: costs nothing."""
    from dualign import config as configs
    from dualign.run.folder import Run

    run = Run.open(folder)
    files = sorted(run.evaluations_dir.glob("*.parquet"))
    if not files:
        raise UserError(f"{folder}: the run evaluated nothing; name held-out prompts with --prompts")
    found, model = [], configs.load(run.config_file).model
    for file in files:
        step = int(file.stem)
        rows, stats = run.read_evaluation(step)
        if "data" in stats:
            raise UserError(
                f"{folder}: the run evaluated on held-out {stats['data']} and sampled nothing; name --prompts"
            )
        found.append(Outputs(_name(step, model), grouped(map(_answer, rows)), step, labels_at(run.metrics(), step)))
    return found


def _checkpoints(folder: Path, how: Generation) -> list[Outputs]:
    from dualign import config as configs
    from dualign.run.folder import Run

    run = Run.open(folder)
    first = configs.load(folder / "config.yaml").model
    saved = [(int(p.name), saved_model(first, p)) for p in run.saved() if "+" not in p.name]
    models = [(_name(step, first), step, model) for step, model in [(0, first), *saved]]
    if first.reference is not None:
        models.insert(0, (PI_0, 0, pi_0_of(first)))
    metrics = run.metrics()
    return [Outputs(name, grouped(generate(m, how)), step, labels_at(metrics, step)) for name, step, m in models]


def pi_0_of(first: ModelConfig) -> ModelConfig:
    """The model that a run's π_0 is: the one that model.reference names, or that training starts from."""
    if first.reference is None:
        return first
    return first.model_copy(update={"name": first.reference, "revision": first.reference_revision})


def saved_model(first: ModelConfig, checkpoint: Path) -> ModelConfig:
    """A checkpoint of `first`, whose chat template was saved with it."""
    return first.model_copy(update={"name": str(checkpoint), "revision": None, "chat_template": None})


def _name(step: int, model: ModelConfig) -> str:
    return f"batch {step}" if step else PI_0 if model.reference is None else "the start"


def labels_at(metrics: Sequence[dict[str, Any]], step: int) -> int:
    """Labels bought by the time `step` online batches were done."""
    return max((int(m["labels"]) for m in metrics if m["step"] < step), default=0)


def _answer(row: Any) -> Answer:
    r = row.rollout
    return Answer(r.prompt, r.text, r.finish == "eos", len(r.completion_ids), row.label.value, r.completion_ids)


# --- files ---


def read(path: Path, config: DataConfig | None = None) -> list[Answer]:
    """Outputs in `dualign sample`'s form (prompt, completion), in AlpacaEval's (instruction, output), or a run's
    evaluations/*.parquet. `config`: how its prompts were put to the model. A row without an answer is absent. Raises
    UserError for a file without any."""
    from dualign.data.responses import load_responses

    if path.suffix == ".parquet" and path.parent.name == "evaluations":
        from dualign.run.folder import Run

        return list(map(_answer, Run(path.parent.parent).read_evaluation(int(path.stem))[0]))
    if path.suffix == ".json":
        return _alpaca(path, config)
    asked = DataConfig(train=str(path))
    if config:
        asked = asked.model_copy(update={"chat": config.chat, "system_prompt": config.system_prompt})
    rows = load_responses(str(path), config=asked)
    return [_given(row) for row in rows]


def _given(row: Responses) -> Answer:
    (name, text), *_ = row.texts.items()
    if name == "a":
        raise UserError(f"row {row.id}: outputs are one completion a row; response_a and response_b are two")
    columns = row.prompt.columns
    ended = None if columns.get("finish") is None else columns["finish"] == "eos"
    ids = columns.get("completion_ids")
    known = tuple(ids) if isinstance(ids, list) and all(isinstance(i, int) for i in ids) else None
    return Answer(row.prompt, text or "", ended, columns.get("tokens"), ids=known, absent=row.reasons.get(name))


def _alpaca(path: Path, config: DataConfig | None) -> list[Answer]:
    from dualign.data.responses import answer_text

    expected = "expected a list of objects with instruction and output, as AlpacaEval has them"
    try:
        rows = list(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: {expected} ({error!r})") from None
    system = config.system_prompt if config else None
    found = []
    for i, row in enumerate(rows):
        if isinstance(row, dict) and isinstance(row.get("instruction"), str):
            text, reason = answer_text(row.get("output"))
            prompt = user_prompt(f"{path.name}:{i}", row["instruction"], system)
            found.append(Answer(prompt, text or "", absent=reason and f"output {reason}"))
    if all(answer.absent for answer in found):
        raise UserError(f"{path}: {expected}; no row has both")
    if len(found) < len(rows):
        log.warning("%s: %s of %s rows left out: they have no instruction", path, len(rows) - len(found), len(rows))
    return found


# --- sampling ---


def generate(model: ModelConfig, how: Generation) -> list[Answer]:
    """Samples from `model`, once: the outputs are kept under what decides them. A prompt that the model cannot be asked
    (longer than its context) has absent answers. Raises UserError without prompts."""
    from dualign.common.durable import write_text

    if how.prompts is None:
        raise UserError(f"{model.name}: to sample from a model, name prompts with --prompts")
    file = how.folder / f"{kept_under(model, how)}.jsonl"
    if not file.is_file():
        rows = _sampled(model, how, how.prompts)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
    prompts = [prompt for prompt in how.prompts for _ in range(how.k)]  # with the columns that a reward may read
    return [_kept(prompt, row) for prompt, row in zip(prompts, rows, strict=True)]


def _sampled(model: ModelConfig, how: Generation, prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
    """K rows for each prompt, in order."""
    from dualign.rollout.base import Sampling
    from dualign.rollout.sample import sample_from

    left_out: dict[int, str] = {}
    found = sample_from(model, prompts, Sampling(how.k, how.max_new_tokens, how.temperature), how.seed, left_out)
    rollouts = iter(found)
    rows: list[dict[str, Any]] = []
    for i, prompt in enumerate(prompts):
        row = {"id": prompt.id, "prompt": prompt.messages, **prompt.for_template, "model": model.name}
        if i in left_out:
            rows += [{**row, "completion": None, "absent": left_out[i]}] * how.k
            continue
        rows += [
            {**row, "completion": [{"role": "assistant", "content": r.text}], "finish": r.finish,
             "tokens": len(r.completion_ids), "completion_ids": r.completion_ids}
            for r in islice(rollouts, how.k)
        ]  # fmt: skip
    return rows


def _kept(prompt: Prompt, row: dict[str, Any]) -> Answer:
    if row["completion"] is None:
        return Answer(prompt, "", absent=row["absent"])
    text = row["completion"][0]["content"]
    return Answer(prompt, text, row["finish"] == "eos", row["tokens"], ids=tuple(row["completion_ids"]))


def kept_under(model: ModelConfig, how: Generation) -> str:
    """A digest of what decides the outputs: the model, how it is asked and on what, and this package's code."""
    from dualign.common.code_digest import code_digest

    about = {
        "model": identity(model),
        "sampling": [how.k, how.max_new_tokens, how.temperature, how.seed],
        "prompts": [[p.content, p.for_template] for p in how.prompts or ()],
        "code": code_digest(),
    }
    return hashlib.sha256(json.dumps(about, default=str).encode()).hexdigest()[:16]


def identity(model: ModelConfig) -> list[Any]:
    """What tells a model from another of the same name: its settings, and the digests of its files."""
    from dualign.run.digests import of_model

    template = Path(model.chat_template or "")
    return [
        *[of_model(model.name, model.revision) or model.name, model.revision, model.precision, model.attention],
        template.read_text(encoding="utf-8") if template.is_file() else None,
    ]
