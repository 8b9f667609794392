"""Who judges: one word on the command line for any annotator, and pairs judged by it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from dualign.annotate.base import Annotator, Item, label_all
from dualign.annotate.settings import JudgeSampling, RewardConfig
from dualign.errors import UserError
from dualign.eval.outputs import Answer, Outputs
from dualign.types import Label, Prompt
from dualign.yaml_text import parse_yaml

if TYPE_CHECKING:
    from dualign.annotate.client import Client

HELP = (
    "builtin:NAME or a head file; FILE.py:FUNCTION; a YAML file or an inline mapping of reward settings "
    "({type: preference, rubric: helpfulness, base_url: ..., model: ...}); run: the run's own reward"
)


@dataclass(frozen=True)
class Judge:
    annotator: Annotator
    settings: list[dict[str, Any]]  # as in a recipe's `reward` section

    @property
    def name(self) -> str:
        return self.annotator.name

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *error: object) -> None:
        self.annotator.close()


def open_judge(spec: str, run: str | None = None, ledger: Path | None = None) -> Judge:
    """The annotator that `spec` names (see HELP). `run`: a run's folder, for "run". Raises UserError."""
    from dualign import annotate

    settings = _settings(spec, run)
    return Judge(annotate.build(settings, run_dir=ledger), [s.model_dump(mode="json") for s in settings])


def _settings(spec: str, run: str | None) -> list[RewardConfig]:
    from dualign.config import load

    if spec == "run":
        if run is None:
            raise UserError("judge run: nothing that is evaluated is a run; name a judge")
        found = load(Path(run) / "config.yaml").reward
        if not found:
            raise UserError(f"judge run: {run} was trained with a Python function that its config does not name")
        return list(found)
    if spec.startswith("builtin:") or spec.endswith(".safetensors"):
        tree: Any = {"type": "head", "path": spec}
    elif spec.endswith((".yaml", ".yml")):
        path = Path(spec)
        if not path.is_file():
            raise UserError(f"judge {spec}: no such file")
        tree = parse_yaml(path.read_text(encoding="utf-8"), spec)
        tree = tree.get("reward", tree) if isinstance(tree, dict) else tree
    elif spec.lstrip().startswith(("{", "[")):
        tree = parse_yaml(spec, "--judge")
    else:
        tree = {"type": "function", "path": spec}
    try:
        return TypeAdapter(list[RewardConfig]).validate_python(tree if isinstance(tree, list) else [tree])
    except ValidationError as error:
        raise UserError(f"judge {spec}: {'; '.join(_faults(error, 1))}") from None


def open_client(spec: str, ledger: Path | None, **defaults: Any) -> tuple[Client, JudgeSampling]:
    """A client to ask a model with prompts of one's own: `spec` as for judges, without a rubric. Raises UserError."""
    from dualign.annotate.client import Client

    path = Path(spec)
    inline = spec.lstrip().startswith("{")
    if not inline and not path.is_file():
        raise UserError(f"--judge {spec}: neither a file nor a mapping such as {{base_url: ..., model: ...}}")
    tree = parse_yaml(spec if inline else path.read_text(encoding="utf-8"), "--judge" if inline else spec)
    try:
        kept = {k: v for k, v in dict(tree).items() if k not in ("type", "rubric")}
        settings = JudgeSampling.model_validate(defaults | kept)
    except ValidationError as error:
        raise UserError(f"--judge: {'; '.join(_faults(error, 0))}") from None
    except (TypeError, ValueError):
        raise UserError(f"--judge {spec}: expected a mapping such as {{base_url: ..., model: ...}}") from None
    return Client(settings, ledger=ledger), settings


def _faults(error: ValidationError, skip: int) -> list[str]:
    return [f"{'.'.join(str(p) for p in e['loc'][skip:])}: {e['msg']}" for e in error.errors()]


def score(judge: Judge, answers: Sequence[Answer]) -> list[Label]:
    """A label for each answer. Raises UserError for a judge that only compares."""
    if hasattr(judge.annotator, "compare"):
        raise UserError(f"{judge.name}: an AI preference compares two answers and scores none; name a reward")
    return label_all(judge.annotator, [Item(i, i, a.prompt, a.text) for i, a in enumerate(answers)])


@dataclass(frozen=True)
class Pair:
    """One comparison on one prompt. `value` is a's: 1 won, 0.5 tie, 0 lost, None absent (with the reason). `orders`:
    the better one by each order, for AI preferences, and `named_first`, the share of the two answers that named what was
    shown first; `scores`: for rewards."""

    key: str
    prompt: Prompt
    a: Answer
    b: Answer
    value: float | None
    reason: str | None = None
    orders: tuple[str | None, str | None] | None = None
    named_first: float | None = None
    scores: tuple[float | None, float | None] | None = None
    note: str | None = None


def judge_pairs(judge: Judge, a: Outputs, b: Outputs) -> list[Pair]:
    """The i-th answers of both to every prompt that both have. A reward's higher score wins, equal scores tie; an AI
    preference is asked in both orders, and a pair on which they disagree is a tie."""
    met = [(k, x, y) for k in a.answers if k in b.answers for x, y in zip(a.answers[k], b.answers[k], strict=False)]
    if not met:
        raise UserError(f"{a.name} and {b.name}: no prompt in common")
    if hasattr(judge.annotator, "compare"):
        return list(_preferred(judge.annotator, met))
    labels = score(judge, [answer for _, x, y in met for answer in (x, y)])
    return [_by_score(k, x, y, *labels[2 * i : 2 * i + 2]) for i, (k, x, y) in enumerate(met)]


def _by_score(key: str, a: Answer, b: Answer, one: Label, two: Label) -> Pair:
    scores = (one.value, two.value)
    if one.value is None or two.value is None:
        return Pair(key, a.prompt, a, b, None, one.reason or two.reason, scores=scores)
    value = 0.5 if one.value == two.value else float(one.value > two.value)
    notes = [f"{side}: {x.note}" for side, x in (("A", one), ("B", two)) if x.note]
    return Pair(key, a.prompt, a, b, value, scores=scores, note="\n".join(notes) or None)


def _preferred(annotator: Any, met: Sequence[tuple[str, Answer, Answer]]) -> Iterator[Pair]:
    from dualign.annotate.judge import windowed

    window = 4 * annotator.settings.concurrency
    for (key, a, b), asked in windowed(met, lambda m: annotator.compare(m[1].prompt, m[1].text, m[2].text), window):
        said = asked.verdict()
        orders = (said.ab, said.ba)
        yield Pair(key, a.prompt, a, b, said.value, said.reason, orders, said.named_first, note=said.note)
