"""Before a run that asks a judge: a handful of labels is bought and shown, so that a wrong rubric, model or key costs
three labels and not a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dualign.annotate.endpoints import Endpoint
from dualign.annotate.told import absent_words, shortened
from dualign.common.errors import AbsentError
from dualign.common.processes import Processes
from dualign.config import Config
from dualign.rollout.base import Request, Sampling
from dualign.run.batch import Row
from dualign.training.clock import Clock
from dualign.training.labeller import Labeller
from dualign.training.source import OnlineSource, Source
from dualign.training.view import View

SEED_SHIFT = 0x0F1B_5713  # the number of a batch that no run has
PROMPT, COMPLETION, WORDS = 160, 240, 320  # characters that are shown


def preview(
    config: Config,
    labeller: Labeller | None,
    source: Source,
    processes: Processes,
    ready: Callable[[], None],
    view: View,
) -> None:
    """Samples from π_0 and labels, apart from all batches; nothing is stored but what the cache of labels keeps. `ready`
    makes the sampler that policy. Raises AbsentError where the judge labels none of them."""
    servers = any(isinstance(each, Endpoint) for reward in config.reward for each in reward.all_rewards)
    if labeller is None or not servers or not config.run.preview or not isinstance(source, OnlineSource):
        return
    requests, k = _chosen(source.stream.at(0), config)
    ready()
    sampling = Sampling(k, config.rollout.max_new_tokens, config.rollout.temperature, config.rollout.top_p)
    seed = (config.run.seed, SEED_SHIFT)
    asked = labeller  # not None, also in the closure
    rows = processes.everyones(lambda: asked.rows(processes.mine(requests), sampling, seed, Clock()))
    for line in told(rows):
        view.say(line)
    if all(row.label.value is None for row in rows):
        raise AbsentError(
            f"before the first batch: none of {len(rows)} completions got a label ({absent_words([r.label for r in rows])}). "
            "Nothing else was bought; run.preview=0 begins all the same"
        )


def _chosen(stream: Sequence[Request], config: Config) -> tuple[list[Request], int]:
    """One completion of each of the first prompts; where completions are compared, all of the first prompt's."""
    compared = any(each.compares for reward in config.reward for each in reward.all_rewards)
    prompts, k = (1, config.rollout.k) if compared else (config.run.preview, 1)
    return [Request(g, q.prompt, q.prompt_ids) for g, q in enumerate(stream[:prompts])], k


def told(rows: Sequence[Row]) -> list[str]:
    """For people: what was judged, the label, and the judge's own words."""
    lines = [f"the first {len(rows)} labels:"]
    for row in rows:
        value = f"{row.label.value:+g}" if row.label.value is not None else f"absent ({row.label.reason})"
        lines += [f"  {shortened(row.rollout.prompt.text, PROMPT)}", f"    > {shortened(row.rollout.text, COMPLETION)}",
                  f"    = {value}" + (f" | {shortened(row.label.note, WORDS)}" if row.label.note else "")]  # fmt: skip
    return lines
