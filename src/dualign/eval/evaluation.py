"""Evaluations of one's own: `dualign eval FILE.py:NAME SOURCE... [key=value...]`, or `evaluate` from Python.

An evaluation is a class derived from `Evaluation`: its fields are its settings, and `run` looks at what the sources
answered and returns a `Result`, which is kept beside the run, shown in the terminal and on the report's page.
"""

from __future__ import annotations

import difflib
import inspect
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ValidationError

from dualign.common.code_files import with_imports
from dualign.common.errors import StopRun, UserError
from dualign.common.named import load_named
from dualign.common.settings import Settings
from dualign.common.yaml_text import parse_yaml
from dualign.eval import outputs, store
from dualign.eval.asking import Asking, data_of, generation, said
from dualign.eval.judges import Judge, open_judge, score
from dualign.eval.outputs import Answer, Generation, Outputs
from dualign.eval.places import place
from dualign.eval.result import Column, Json, Plot, Result, Table
from dualign.eval.statistics import Estimate, share, t_interval
from dualign.run.manifest import sha256_of

__all__ = [
    "Answer", "Column", "Estimate", "Evaluation", "Outputs", "Plot", "Result", "Source", "Table", "evaluate", "opened",
    "per_prompt", "score", "share", "t_interval",
]  # fmt: skip


@dataclass(frozen=True)
class Source:
    """One of what is evaluated, by the `name` that it was given: a run, a checkpoint, a model, a file of outputs."""

    name: str
    how: Generation
    judges: list[Json] = field(default_factory=list)  # those that were opened

    def policies(self) -> list[Outputs]:
        """Whose answers there are, earliest first: of a run π_0 and every evaluation, with --prompts every checkpoint,
        each with `answers` by prompt. An answer that is `absent` says why."""
        how = replace(self.how, data=self.how.data or data_of(self.name))
        return [policy.checked(self.name) for policy in outputs.points(self.name, how)]

    def judge(self, spec: str = "run") -> Judge:
        """A reward by its spec (judges.HELP), by default the run's own, for `score` and `judges.judge_pairs`; to be
        opened by `with`."""
        judge = open_judge(spec, self.name if outputs.is_run(self.name) else None, self.how.folder.parent)
        self.judges.append({"source": self.name, **judge.record()})
        return judge


def per_prompt(policy: Outputs, value: Callable[[Answer], float]) -> list[float]:
    """The mean over each prompt's answers: prompts are the independent draws. Absent answers are left out."""
    there = [[answer for answer in answers if not answer.absent] for answers in policy.answers.values()]
    return [sum(map(value, answers)) / len(answers) for answers in there if answers]


class Evaluation(Settings):
    """Settings with what they say to do. `name` stands before the headline and in the file's name."""

    name: ClassVar[str] = ""

    def run(self, sources: Sequence[Source]) -> Result:
        raise NotImplementedError(f"{type(self).__name__} has no run")


def opened(spec: str, settings: Sequence[str] = ()) -> Evaluation:
    """What stands at FILE.py:NAME, with `key=value` settings. Raises UserError naming key and nearest match."""
    kind = load_named(spec, "evaluation")
    if not (isinstance(kind, type) and issubclass(kind, Evaluation)):
        raise UserError(f"evaluation {spec}: expected a class derived from dualign.eval.evaluation.Evaluation")
    tree = {}
    for text in settings:
        key, _, value = text.partition("=")
        tree[key] = parse_yaml(value, f"evaluation {spec}: {text}")
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        faults = [_fault(item, list(kind.model_fields)) for item in error.errors()]
        raise UserError("\n".join(f"evaluation {spec}: {fault}" for fault in faults)) from None


def _fault(item: Any, known: Sequence[str]) -> str:
    key = ".".join(map(str, item["loc"]))
    if item["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, known, 1, 0.6)
        return f"{key}: no such key; " + (
            f"did you mean {near[0]}?" if near else f"it has {', '.join(known) or 'none'}"
        )
    if item["type"] == "missing":
        return f"{key}: missing; give {key}=VALUE"
    return f"{key}: {item['msg'][0].lower()}{item['msg'][1:]}, not {item['input']!r}"


def evaluate(
    evaluation: Evaluation, sources: Sequence[str], asking: Asking | None = None, out: Path | None = None
) -> Result:
    """Runs it, and writes its result beside the first run (or into eval/) with what made it. Raises UserError for what
    it raised, naming the line."""
    if not sources:
        raise UserError("nothing to evaluate: name a run, a checkpoint, a model or a file of outputs")
    asking = asking or Asking()
    name = evaluation.name or type(evaluation).__name__
    settings = evaluation.model_dump(mode="json")
    kind = type(evaluation)
    code = Path(inspect.getfile(kind)).resolve()
    path = place(name, sources, None, asking, out, own={"code": f"{code}:{kind.__qualname__}", **settings})
    how = generation(sources, asking, path.parent / "outputs")
    given = [Source(source, how) for source in sources]
    about = [{"source": s, "run": store.away(s, path), "sampling": said(s, how, asking)} for s in sources]
    try:
        result = evaluation.run(given)
        if not isinstance(result, Result):
            raise UserError(f"evaluation {name}: run returned {type(result).__name__}, and no Result")
        judges = [judge for source in given for judge in source.judges]
        files = {
            name: sha256_of(file) for name, file in with_imports([code]).items()
        }  # with what it imports of one's own
        record = store.provenance(name, None, asking.seed) | {"settings": settings, "sources": about, "judges": judges}
        record |= {"evaluation": {"class": kind.__qualname__, "files": files}, **result.record}
        return store.write(path, replace(result, record=record))
    except (UserError, StopRun, OSError):
        raise
    except Exception as error:
        raise UserError(f"evaluation {name} raised {type(error).__name__}: {error}{_where(error, code)}") from error


def _where(error: Exception, code: Path) -> str:
    """The last line of the user's own file that it came by."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).resolve() == code]
    return f", {code} line {frames[-1].lineno}" if frames else ""
