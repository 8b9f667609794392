"""`dualign eval mtbench | alpaca | ifeval` for Python: published benchmarks of one source, from their own files.

Each writes its result beside the run, or into eval/, and returns it. A run is its last checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dualign import data
from dualign.annotate.function import RewardFunction
from dualign.common.errors import UserError
from dualign.common.types import Prompt
from dualign.config import load
from dualign.eval import alpaca, ifeval, judges, mtbench, outputs, store, winrate
from dualign.eval.asking import Asking, load_prompts, put
from dualign.eval.outputs import Generation, Outputs
from dualign.eval.places import named, slug
from dualign.eval.result import Json, Result
from dualign.models.settings import ModelConfig
from dualign.run.folder import Run
from dualign.run.named import checkpoint_of

TOKENS = {"mtbench": 1024, "alpaca": 1024, "ifeval": 512}  # longest answers


@dataclass(frozen=True)
class Putting:
    """How a benchmark is put to the model: by its own rules, with the run's system prompt unless another is given."""

    max_new_tokens: int
    limit: int | None = None
    chat: bool = True
    system_prompt: str | None = None
    prompt_column: str = "prompt"

    def generation(
        self, source: str, prompts: str, name: str, judge: str | None, out: Path | None
    ) -> tuple[Path, Generation]:
        """Where the result goes (another judge or way of asking has another file), and how the source is sampled."""
        asking = Asking(chat=self.chat, system_prompt=self.system_prompt, prompt_column=self.prompt_column)
        usual = {"chat": True, "limit": None, "system_prompt": None, "max_new_tokens": TOKENS[name.partition("-")[0]]}
        changed = {key: value for key in usual if (value := getattr(self, key)) != usual[key]}
        stem = named(f"{name}-{slug(judge)}" if judge else name, [judge], changed)
        folder = Path(source) / "eval" if outputs.is_run(source) else Path("eval")
        path = out or folder / f"{stem}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        asked = put([source], prompts, asking)
        return path, Generation(None, self.max_new_tokens, 0.0, 1, 0, path.parent / "outputs", asked)


def mt_bench(
    source: str, judge: str, questions: Path, judge_prompts: Path, putting: Putting, out: Path | None = None
) -> Result:
    """Two turns, greedy, each graded 1-10; by category and turn."""
    path, how = putting.generation(source, str(questions), "mtbench", judge, out)
    prompts = mtbench.load_prompts(judge_prompts)
    chosen = data.draw(mtbench.load_questions(questions), putting.limit)
    answers = mtbench.answer(_model(source), chosen, how)
    client, settings = judges.open_client(judge, ledger=path.parent / "spent.sqlite", max_tokens=2048)
    try:
        ratings = mtbench.grade(client, settings, prompts, chosen, answers)
    finally:
        client.close()
    record = store.provenance("mtbench", settings.model_dump(mode="json"), 0) | _about(source, path, how)
    record |= mtbench.table(chosen, ratings)
    rows = [
        {"id": q.id, "category": q.category, "turn": t + 1, "answer": a[t].given, "rating": r[t].value,
         "reason": r[t].reason, "note": r[t].note}
        for q, a, r in zip(chosen, answers, ratings, strict=True) for t in (0, 1)
    ]  # fmt: skip
    return store.write(path, Result(rows, record["headline"], mtbench.tables(record), record))


def alpaca_eval(
    source: str,
    instructions: str,
    putting: Putting,
    judge: str | None = None,
    reference: Path | None = None,
    column: str | None = None,
    functions: Sequence[RewardFunction] = (),
    out: Path | None = None,
) -> tuple[tuple[Path, Path], Result | None]:
    """The source's answers and the baseline's (a file, or a column of the instructions), written in AlpacaEval's
    format; and with `judge` the win rate, raw and length-controlled."""
    name = "-against-".join(["alpaca", *([alpaca.slug(column, reference)] if column or reference else [])])
    path, how = putting.generation(source, instructions, name, judge, out)
    prompts = _prompts(instructions, how, "eval", putting)
    theirs = alpaca.baseline(prompts, column, reference, how.data)
    ours = _answers(source, prompts, how)
    files = path.with_name(f"{path.stem}-outputs.json"), path.with_name(f"{path.stem}-reference.json")
    for file, answers in zip(files, (ours, theirs), strict=True):
        alpaca.write_outputs(file, answers)
    if judge is None:
        return files, None
    run = source if outputs.is_run(source) else None
    with judges.open_judge(judge, run, path.parent, functions) as chosen:
        pairs = judges.judge_pairs(chosen, ours, theirs)
    about = _about(source, path, how) | {"judge": chosen.record(), "against": {"source": None, "name": theirs.name}}
    record = store.provenance("alpaca", chosen.record(), 0) | {"prompts": len(prompts)}
    record["systems"] = [about | {"points": [winrate.measure(ours, theirs, pairs)]}]
    rows = [winrate.row(ours.name, pair) for pair in pairs]
    tables = winrate.tables(record, "AlpacaEval, win rate")
    return files, store.write(path, Result(rows, winrate.headline(record), tables, record))


def if_eval(source: str, prompts: str, putting: Putting, out: Path | None = None) -> Result:
    """Instructions that a program checks. Raises UserError without lm-eval[ifeval]."""
    ifeval.library()
    path, how = putting.generation(source, prompts, "ifeval", None, out)
    ours = _answers(source, _prompts(prompts, how, "train", putting), how)
    rows = ifeval.check(list(ours))
    record = store.provenance("ifeval", None, 0) | _about(source, path, how) | ifeval.table(rows)
    return store.write(path, Result(rows, record["headline"], ifeval.tables(record), record))


def _prompts(source: str, how: Generation, split: str, putting: Putting) -> list[Prompt]:
    assert how.data is not None
    return data.draw(load_prompts(source, how.data, split), putting.limit)


def _about(source: str, path: Path, how: Generation) -> Json:
    """For results: whose answers they are, and how it was asked."""
    assert how.data is not None
    asked = {"prompts": how.data.train, "chat": how.data.chat, "system_prompt": how.data.system_prompt,
             "max_new_tokens": how.max_new_tokens, "temperature": how.temperature}  # fmt: skip
    return {"source": source, "run": store.away(source, path), "sampling": asked}


def _model(source: str) -> ModelConfig:
    """What is sampled: a run's last checkpoint, else what was named. Raises UserError for a run without one."""
    if not outputs.is_run(source):
        return ModelConfig(name=checkpoint_of(source))
    saved = Run.open(Path(source)).saved()
    if not saved:
        raise UserError(f"{source}: the run has no checkpoint yet")
    return outputs.saved_model(load(Path(source) / "config.yaml").model, saved[-1])


def _answers(source: str, prompts: list[Prompt], how: Generation) -> Outputs:
    """Greedy answers. Raises UserError where there is none at all."""
    found = outputs.generate(_model(source), replace(how, prompts=prompts))
    return Outputs(Path(source).name, outputs.grouped(found)).checked(source)
