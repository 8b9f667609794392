"""`dualign witness`: a second judge or reward asked about a run that is stored, or still in training."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dualign import config as configs
from dualign.common.durable import write_text
from dualign.common.errors import UserError
from dualign.common.interrupt import Interrupts
from dualign.config.sections import WitnessConfig
from dualign.eval.places import slug
from dualign.run import digests
from dualign.run.folder import Run
from dualign.run.witness import OWN, Kind, planned
from dualign.training.witness import Asking, steps, verdict


def ask(
    folder: Path, reward: Sequence[str], settings: dict[str, Any], name: str | None, say: Callable[[str], None]
) -> dict[str, Any]:
    """Makes the looks that the batches and evaluations in the run's `folder` allow, in their order; says what each found
    and what it comes to, and returns it, as summary.json has it. `reward`: key=value of a reward's settings; none: the
    run's own witness, asked by its own settings. Raises UserError for a reward that cannot be asked, and where it was
    asked otherwise by this name."""
    run = Run.open(folder)
    tree, path = configs.read(run.config_file)
    if reward:
        tree["witness"] = settings
        tree = configs.overridden(tree, [f"witness.reward.{text}" for text in reward])
    elif not tree.get("witness"):
        raise UserError(
            f"{folder}: the run has no witness; say which to ask: --set type=head --set path=builtin:harmless"
        )
    config = configs.build(tree, str(path), stored=True)
    assert config.witness is not None
    for each in config.witness.reward:
        each.check()
    place = run.folder / f"{OWN}-{slug(name or _called(tree, config.witness.reward[0]))}"
    _same_as_before(place / "asked.json", config.witness)
    evaluated = run.evaluated() if run.summary else None  # of a run in training those to come count too
    asking = Asking(config.witness, config.run.seed, planned(config, config.witness, evaluated), place, write_text)
    try:
        _looks(run, asking, say)
    finally:
        asking.close()
    for line in [*verdict(asking.seen, run), f"looks: {place}"]:
        say(line)
    return {"folder": place, **asking.seen.summary(steps(run))}


def _same_as_before(file: Path, settings: WitnessConfig) -> None:
    """Looks of two kinds would make no series."""
    asked = settings.model_dump(exclude={"reward", "stop"}) | {
        "rewards": [digests.of_reward(r) for r in settings.reward]
    }
    if file.is_file() and json.loads(file.read_text(encoding="utf-8")) != asked:
        raise UserError(
            f"{file.parent}: another witness, or one that was asked otherwise; give this one a --name of its own"
        )
    file.parent.mkdir(exist_ok=True)
    write_text(file, json.dumps(asked, indent=1))


def _called(tree: dict[str, Any], reward: Any) -> str:
    return reward.name or str(getattr(reward, "path", None) or getattr(reward, "model", None) or reward.type)


def _looks(run: Run, asking: Asking, say: Callable[[str], None]) -> None:
    batches, evaluations = set(run.steps()), set(run.evaluated())
    with Interrupts() as interrupts:
        for kind, step in asking.plan:
            if step not in (batches if kind == "batch" else evaluations) or not asking.due(kind, step):
                continue
            first = asking.seen.spoke is None
            say(asking.look(kind, step, _rows(run, kind, step), interrupts.check).text(told=first))


def _rows(run: Run, kind: Kind, step: int) -> Sequence[Any]:
    return run.batch(step).rows if kind == "batch" else run.read_evaluation(step)[0]
