"""A preference set from π_0 and the run's own reward: what the offline systems learn from, in the same terms and at a
known number of labels."""

from __future__ import annotations

import json
from pathlib import Path

from dualign import annotate, data
from dualign.annotate.base import Item, label_all
from dualign.config import Config
from dualign.errors import UserError
from dualign.rollout.base import Sampling
from dualign.runs import write_text
from dualign.sampling import sample_from


def make_pairs(config: Config, out: Path) -> str:
    """Writes, for every training prompt whose K completions differ in reward, the best as chosen and the worst as
    rejected (the first of equals), and says what that took. Ties and prompts without two labels are left out."""
    if not config.reward:
        raise UserError("reward: none given; pairs are ranked by the recipe's rewards")
    prompts = data.load_prompts(config.data.train, config.data, config.data.split)
    r = config.rollout
    sampling = Sampling(max(2, r.k), r.max_new_tokens, r.temperature, r.top_p)
    rollouts = sample_from(config.model.name, prompts, sampling, config.run.seed, config.model.precision)
    annotator = annotate.build(config.reward)
    try:
        labels = label_all(annotator, [Item(o.index, o.group, o.prompt, o.text, o.completion_ids) for o in rollouts])
    finally:
        annotator.close()
    ranked: dict[int, list[tuple[float, str]]] = {}
    for rollout, label in zip(rollouts, labels, strict=True):
        if label.value is not None:
            ranked.setdefault(rollout.group, []).append((label.value, rollout.text))
    lines = []
    for group, answers in sorted(ranked.items()):
        best, worst = (pick(answers, key=lambda answer: answer[0]) for pick in (max, min))
        if best[0] > worst[0] and best[1].strip() and worst[1].strip():
            prompt = prompts[group]
            lines.append(
                {
                    "id": prompt.id,
                    "prompt": prompt.messages if prompt.conversational else prompt.content,
                    "chosen": [{"role": "assistant", "content": best[1]}] if prompt.conversational else best[1],
                    "rejected": [{"role": "assistant", "content": worst[1]}] if prompt.conversational else worst[1],
                    "rewards": [best[0], worst[0]],
                }
            )
    if not lines:
        raise UserError("no prompt has two completions with different rewards: no pair was made")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    bought = sum(len(answers) for answers in ranked.values())
    return f"{len(lines)} pairs of {len(prompts)} prompts in {out}; {bought} labels of {len(rollouts)} completions"
