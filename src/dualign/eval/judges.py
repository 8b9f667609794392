"""Who judges: one word on the command line for any annotator, and pairs judged by it."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from dualign.annotate.base import Annotator, Item, label_all
from dualign.annotate.endpoints import JudgeSampling
from dualign.annotate.function import RewardFunction, name_of
from dualign.annotate.normalised import unnormalised
from dualign.annotate.registry import RewardConfig
from dualign.common.errors import UserError
from dualign.common.types import Label, Prompt
from dualign.common.yaml_text import parse_yaml
from dualign.eval.outputs import Answer, Outputs, is_run

if TYPE_CHECKING:
    from dualign.annotate.client import Client
    from dualign.run.folder import Run

HELP = (
    "builtin:NAME or a head file; FILE.py:FUNCTION; a YAML file or an inline mapping of reward settings "
    "({type: preference, rubric: helpfulness, base_url: ..., model: ...}); run: the run's own reward"
)


log = logging.getLogger(__name__)

# columns that belong to an answer and not to its prompt
ANSWERS_OWN = {"completion", "completion_ids", "finish", "tokens", "model", "output", "generator"}


@dataclass(frozen=True)
class Chosen:
    """What judges: settings as in a recipe's `reward` section, and Python functions beside them."""

    settings: tuple[RewardConfig, ...]
    functions: tuple[RewardFunction, ...] = ()
    changed: str | None = None  # what of a run's own reward may not be what it was trained on

    @cached_property
    def digest(self) -> str:
        """The same for the same rewards: their settings, and the files and functions that they name."""
        from dualign.common.code_digest import of_function
        from dualign.run.digests import of_reward

        parts = [*map(of_reward, self.settings), *map(of_function, self.functions)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Judge:
    annotator: Annotator
    settings: list[dict[str, Any]]  # as in a recipe's `reward` section
    digest: str | None = None
    changed: str | None = None

    @property
    def name(self) -> str:
        return self.annotator.name

    def record(self) -> dict[str, Any]:
        """For results: who judged, and by what exactly."""
        said = {"name": self.name, "settings": self.settings, "digest": self.digest}
        return said | ({"changed": self.changed} if self.changed else {})

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *error: object) -> None:
        self.annotator.close()


def open_judge(
    spec: str, run: str | None = None, ledger: Path | None = None, functions: Sequence[RewardFunction] = ()
) -> Judge:
    """The annotator that `spec` names (see HELP). `run`: a run's folder, for "run", and `functions` those that it was
    given in Python. Raises UserError."""
    return opened(choose(spec, run, functions), ledger)


def opened(chosen: Chosen, ledger: Path | None) -> Judge:
    from dualign import annotate

    settings = [s.model_dump(mode="json") for s in chosen.settings]
    settings += [{"type": "python", "name": name_of(f)} for f in chosen.functions]
    if chosen.changed:
        log.warning("note: %s", chosen.changed)
    annotator = annotate.build(chosen.settings, chosen.functions, run_dir=ledger)
    return Judge(annotator, settings, chosen.digest, chosen.changed)


class Judges:
    """Who judges each of several sources: with "run", each run by its own reward. Each is opened once."""

    def __init__(
        self, spec: str, sources: Sequence[str], ledger: Path, functions: Sequence[RewardFunction] = ()
    ) -> None:
        self.ledger = ledger
        runs = {s: choose(spec, s, functions) for s in sources if is_run(s)} if spec == "run" else {}
        self.chosen = [runs.get(s) or _shared(spec, s, runs) for s in sources]
        self.open: dict[str, Judge] = {}

    @property
    def agree(self) -> bool:
        """Whether one and the same reward judges all."""
        return len({chosen.digest for chosen in self.chosen}) == 1

    def __iter__(self) -> Iterator[Judge]:
        """The judge of each source, in order."""
        for chosen in self.chosen:
            if chosen.digest not in self.open:
                self.open[chosen.digest] = opened(chosen, self.ledger)
            yield self.open[chosen.digest]

    def __enter__(self) -> Judges:
        return self

    def __exit__(self, *error: object) -> None:
        with ExitStack() as stack:
            for judge in self.open.values():
                stack.callback(judge.annotator.close)

    def record(self) -> dict[str, Any]:
        """For the head of a result. Each source's own stands beside its numbers."""
        judges = list(self)
        return judges[0].record() if self.agree else {"name": "each run's own reward", "settings": None, "digest": None}


def _shared(spec: str, source: str, runs: Mapping[str, Chosen]) -> Chosen:
    """Who judges what is no run: with "run", the reward that all the runs beside it have."""
    if spec != "run":
        return choose(spec)
    if not runs:
        raise UserError("judge run: nothing that is evaluated is a run; name a judge")
    if len({chosen.digest for chosen in runs.values()}) > 1:
        raise UserError(
            f"judge run: {source} is no run, and the runs beside it ({', '.join(runs)}) were trained on different "
            "rewards; name a judge (--judge), or evaluate them apart"
        )
    return next(iter(runs.values()))


def choose(spec: str, run: str | None = None, functions: Sequence[RewardFunction] = ()) -> Chosen:
    """The rewards that `spec` names, not loaded yet. Raises UserError."""
    if spec != "run":
        return Chosen(tuple(_settings(spec)))
    if run is None:
        raise UserError("judge run: nothing that is evaluated is a run; name a judge")
    return _own(run, {name_of(f): f for f in functions})


def _own(run: str, given: Mapping[str, RewardFunction]) -> Chosen:
    """All that the run was trained on: what its configuration names, and what it was given in Python."""
    from dualign.config import load
    from dualign.run.folder import Run

    opened = Run.open(Path(run))
    settings = tuple(load(opened.config_file).reward)
    names = opened.functions
    if names is None:  # run.json is lost
        names = [] if settings else list(given)
    missing = [name for name in names if name not in given]
    if missing or not (settings or names):
        told = f"the Python function{'s' * (len(missing) > 1)} {', '.join(missing)}" if missing else "a Python function"
        raise UserError(
            f"judge run: {run} was trained with {told}, which its config does not name: give each with "
            "--function FILE.py:NAME (in Python: reward=NAME), or name another judge"
        )
    functions = tuple(given[name] for name in names)
    return Chosen(settings, functions, _changed(opened, settings, functions))


def _changed(run: Run, settings: Sequence[RewardConfig], functions: Sequence[RewardFunction]) -> str | None:
    """In words: the file of a reward function has changed since the run began, which may be elsewhere in the file.
    Raises UserError for what surely is another reward."""
    from dualign.run import digests

    then = run.about.get("inputs")
    if not isinstance(then, dict):  # a run of before does not say
        return None
    now = digests.of_rewards(settings, functions)
    found = {key: words for key in now if (words := digests.changed(then.get(key) or {}, now[key]))}
    code = {key for key in found if all(name.endswith(".py") for name in now[key])}
    if others := {key: words for key, words in found.items() if key not in code}:
        told = "; ".join(f"{key}: {words}" for key, words in others.items())
        raise UserError(f"judge run: {run.folder}: {told}: put it back, or name the judge that is meant")
    return "; ".join(f"{run.folder}: {key}: {words}" for key, words in found.items()) or None


def _settings(spec: str) -> list[RewardConfig]:
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
    """A label for each answer, with all that a reward may read of it; what is no answer is absent. Raises UserError for
    a judge that only compares."""
    if hasattr(judge.annotator, "compare"):
        raise UserError(f"{judge.name}: an AI preference compares two answers and scores none; name a reward")
    _mention_columns(judge, answers)
    items = [Item(i, i, a.prompt, a.text, a.ids) for i, a in enumerate(answers) if not a.absent]
    labels = dict(zip([item.index for item in items], label_all(judge.annotator, items), strict=True))
    return [unnormalised(labels[i]) if i in labels else Label.absent(a.absent or "") for i, a in enumerate(answers)]


def _mention_columns(judge: Judge, answers: Sequence[Answer]) -> None:
    """Says where no prompt has a column that decides which rewards apply to it."""
    read = {column for settings in judge.settings for column in settings.get("where") or {}}
    for column in sorted(read - {column for a in answers for column in a.prompt.columns}):
        log.warning(
            "note: no prompt has the column %r, by which %s tells its rewards apart (where)", column, judge.name
        )


@dataclass(frozen=True)
class Pair:
    """One comparison on one prompt. `value` is a's: 1 won, 0.5 tie, 0 lost, None absent (with the reason). `orders`:
    the better one by each order, for AI preferences, and `named_first`, the share of the two answers that named what
    was shown first; `scores`: for rewards."""

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
    preference is asked in both orders, and a pair on which they disagree is a tie. Both are judged as answers to the
    same conversation; a pair that lacks an answer is absent."""
    met = [
        (k, x, y)
        for k in a.answers
        if k in b.answers
        for x, y in (_alike(x, y) for x, y in zip(a.answers[k], b.answers[k], strict=False))
    ]
    if not met:
        raise UserError(f"{a.name} and {b.name}: no prompt in common{_unlike(a, b)}")
    there = [m for m in met if not (m[1].absent or m[2].absent)]
    absent = [Pair(k, x.prompt, x, y, None, x.absent or y.absent) for k, x, y in met if x.absent or y.absent]
    if hasattr(judge.annotator, "compare"):
        return [*_preferred(judge.annotator, there), *absent]
    labels = score(judge, [answer for _, x, y in there for answer in (x, y)])
    return [*(_by_score(k, x, y, *labels[2 * i : 2 * i + 2]) for i, (k, x, y) in enumerate(there)), *absent]


def _alike(x: Answer, y: Answer) -> tuple[Answer, Answer]:
    """Both as answers to x's prompt. A column that only one of them has is the other's too: where it came from a file
    of outputs, the prompts' own columns are not in it."""

    def told(mine: Answer, other: Answer) -> Answer:
        lent = {k: v for k, v in other.prompt.columns.items() if k not in ANSWERS_OWN}
        return replace(mine, prompt=replace(x.prompt, columns={**lent, **mine.prompt.columns}))

    return told(x, y), told(y, x)


def _unlike(a: Outputs, b: Outputs) -> str:
    """Why outputs that answer the same questions do not meet."""
    asked = [{m["content"] for answer in o for m in answer.prompt.messages[-1:]} for o in (a, b)]
    if not asked[0] & asked[1]:
        return ""
    return (
        "; the same questions were asked in different conversations (another system prompt?): sample both alike with "
        "--prompts"
    )


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
