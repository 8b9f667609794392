"""A preference set from π_0 and the run's own reward: what the offline systems learn from, in the same terms and at a
known number of labels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dualign import annotate, data
from dualign.annotate.base import Item, label_all
from dualign.common.durable import write_text
from dualign.common.errors import UserError
from dualign.config import Config
from dualign.rollout.base import Sampling
from dualign.rollout.sample import sample_from
from dualign.run.batch import Row
from dualign.run.named import pinned
from dualign.training.source import penalised


def make_pairs(config: Config, out: Path, limit: int | None = None) -> str:
    """Writes, for every training prompt whose K completions differ in reward, the best as chosen and the worst as
    rejected (the first of equals), and says what that took. Ties and prompts without two labels are left out; a
    completion that was cut off is worth rollout.missing_eos_penalty less, as in a run, and is marked. `limit`: so many
    prompts, drawn by the run's seed from those that the run would use."""
    if not config.reward:
        raise UserError("reward: none given; pairs are ranked by the recipe's rewards")
    config = pinned(config)
    d, r = config.data, config.rollout
    prompts = data.load_prompts(d.train, d, d.split)
    sampling = Sampling(max(2, r.k), r.max_new_tokens, r.temperature, r.top_p)
    rollouts = sample_from(config.model, prompts, sampling, config.run.seed, data_config=d, count=limit)
    annotator = annotate.build(config.reward)
    try:
        labels = label_all(annotator, [Item.of(o, sampling.k) for o in rollouts])
    finally:
        annotator.close()
    rows = [penalised(Row(o, label), r.missing_eos_penalty) for o, label in zip(rollouts, labels, strict=True)]
    groups: dict[int, list[Row]] = {}
    for row in rows:
        if row.label.value is not None:
            groups.setdefault(row.rollout.group, []).append(row)
    lines = [line for _, group in sorted(groups.items()) if (line := _pair(group))]
    if not lines:
        raise UserError("no prompt has two completions with different rewards: no pair was made")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    bought = sum(map(len, groups.values()))
    asked = len({o.group for o in rollouts})
    return f"{len(lines)} pairs of {asked} prompts in {out}; {bought} labels of {len(rollouts)} completions"


def _pair(group: Sequence[Row]) -> dict[str, Any] | None:
    """One line of the file, in Hugging Face's preference format; None for a tie, and where an answer is empty."""
    best, worst = (pick(group, key=_value) for pick in (max, min))
    if _value(best) == _value(worst) or not (best.rollout.text.strip() and worst.rollout.text.strip()):
        return None
    prompt = best.rollout.prompt

    def answer(row: Row) -> Any:
        text = row.rollout.text
        return [{"role": "assistant", "content": text}] if prompt.conversational else text

    return {
        "id": prompt.id,
        "prompt": prompt.messages if prompt.conversational else prompt.content,
        **prompt.for_template,
        "chosen": answer(best),
        "rejected": answer(worst),
        "rewards": [_value(best), _value(worst)],
        "finish": [best.rollout.finish, worst.rollout.finish],
    }


def _value(row: Row) -> float:
    assert row.label.value is not None
    return row.label.value
