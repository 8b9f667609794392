"""A model's card, made from the run that it comes from: how it was made, what it gained, and what is not known."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dualign import assets
from dualign.annotate.settings import RewardSettings
from dualign.common.errors import clean
from dualign.common.intervals import plus_minus
from dualign.common.paths import path_of
from dualign.config import Config
from dualign.eval import store
from dualign.eval.cost import cost_of
from dualign.models.export import BESIDE, Exported
from dualign.run import witness
from dualign.run.folder import Run
from dualign.training.heldout import kl_name

LIMITS = """- A gain is one of the reward that it was trained on, on held-out prompts of the same kind as its training data. It
  is no promise for other prompts, and none of truth or safety.
- What the base model gets wrong, knows or refuses is mostly unchanged.
- Rewards can be gamed: length, tone and repeated phrases are what to look at first. Read answers before you use it."""


def card(run: Run, checkpoint: Path, exported: Exported, name: str) -> str:
    """Markdown with the front matter of a hub. Names of people's files and servers are left out: a local path is its
    last part."""
    config = run.config
    done = int(checkpoint.name.partition("+")[0])
    parts = [
        _front(config, exported),
        f"# {_text(name)}",
        f"{_text(public(config.model.name))}, aligned by {config.algo.name.upper()} with "
        f"[dualign](https://pypi.org/project/dualign/) {run.about.get('versions', {}).get('dualign', '')}: after "
        f"{done} of {config.train.online_batches} online batches.",
        "## How it was made",
        _table(("", ""), _made(run, config, done)),
        "## What it gained",
        "\n".join(_gained(run, config, done)),
        "## Did it cheat?",
        "\n".join(_cheated(run)),
        "## Limits",
        LIMITS,
        "## Use",
        _use(exported),
        f"The files were checked when they were written: {exported}.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def public(name: str) -> str:
    """What others may read of a model's or a data set's name: of a path or an address its last parts, also of one that
    is not here any more. A hub's name has at most one stroke, and does not end as files do."""
    path = path_of(name)
    a_file = name.count("/") > 1 or path.suffix in (".jsonl", ".json", ".parquet", ".csv", ".txt", ".py")
    if name in assets.EMBEDDED or not (path.exists() or a_file or name.startswith(("/", "~", "."))):
        return name
    run = path.parent.parent.name if path.parent.name == "checkpoints" else ""
    return f"{run}@{path.name}" if run else path.name.partition("?")[0]


def _front(config: Config, exported: Exported) -> str:
    """What a hub sorts by. A licence is nobody's to guess."""
    base = config.model.name
    if base in assets.EMBEDDED:
        base = assets.EMBEDDED[base].hub
    known = re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not Path(base).exists()
    about: dict[str, Any] = {
        "library_name": "peft" if exported.adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["dualign", "rlhf", config.algo.name if re.fullmatch(r"\w+", config.algo.name) else "own-system"],
    }
    return f"---\n{yaml.safe_dump(about | ({'base_model': base} if known else {}), sort_keys=False).rstrip()}\n---"


def _made(run: Run, c: Config, done: int) -> Iterator[tuple[str, str]]:
    about, cost = run.about, cost_of(run.folder)
    labels = max((int(record["labels"]) for record in run.metrics() if record["step"] < done), default=0)
    embedded = assets.EMBEDDED.get(c.model.name)
    of = f", dualign's form of {embedded.hub}" if embedded else ""
    yield "base model", public(c.model.name) + of + (f", revision {c.model.revision}" if c.model.revision else "")
    if c.model.reference:
        yield "π_0", public(c.model.reference)
    if c.model.lora:
        yield "adapters", ", ".join(f"{key} {value}" for key, value in c.model.lora.model_dump().items() if value)
    yield "prompts", public(c.data.train) + (f", held out: {public(c.data.eval)}" if c.data.eval else "")
    if c.data.system_prompt:
        yield "system prompt", c.data.system_prompt
    place = public(c.algo.name.partition(":")[0]) if ":" in c.algo.name else c.algo.name
    yield (
        "system",
        ", ".join([place, *(f"{k} {v}" for k, v in c.algo.model_dump(exclude={"name"}, exclude_none=True).items())]),
    )
    for reward in c.reward:
        yield "reward", _reward(reward)
    for function in run.functions or ():
        yield "reward", f"a Python function, {function}"
    r, t = c.rollout, c.train
    yield (
        "sampling",
        f"{c.group} completions per prompt, at most {r.max_new_tokens} tokens, temperature {r.temperature:g}",
    )
    yield (
        "training",
        (
            f"{t.online_batches} online batches of {t.online_batch} completions, {c.updates_per_batch} updates each, "
            f"{t.optimizer}, learning rate {t.lr:g}, seed {c.run.seed}"
        ),
    )
    yield (
        "labels",
        f"{labels:,}"
        + (f" of the run's {cost['labels']:,}" if labels < cost["labels"] else "")
        + (f", {cost['calls']:,} calls, {cost['dollars']:.2f} dollars" if cost["calls"] else ""),
    )
    yield "time", f"{cost['hours']:.2f} hours, begun {str(about.get('begun', '?'))[:10]}"
    yield "versions", ", ".join(f"{name} {version}" for name, version in about.get("versions", {}).items())


def _reward(reward: RewardSettings) -> str:
    """Its type, and what it is; never where a server is."""
    told = [reward.type if ":" not in reward.type else public(reward.type.partition(":")[0])]
    for key in ("name", "model", "head", "rubric", "path"):
        value = getattr(reward, key, None)
        if isinstance(value, str) and value:
            told.append(f"{key} {public(value) if ':' not in value or key == 'model' else _named(value)}")
    inner = [_reward(member) for member in reward.member_rewards]
    gate = " (a gate)" if reward.gate else f" (weight {reward.weight:g})" if reward.weight != 1 else ""
    return ", ".join(told) + gate + (f": {'; '.join(inner)}" if inner else "")


def _named(place: str) -> str:
    """FILE.py:NAME without the folder that it lies in here; builtin:NAME as it is."""
    file, _, name = place.rpartition(":")
    return place if file == "builtin" else f"{Path(file).name}:{name}"


def _gained(run: Run, c: Config, done: int) -> Iterator[str]:
    summary = run.summary
    evaluated = {each.done: each.stats for each in run.evaluations()} if run.evaluated() else {}
    first, last = evaluated.get(0), evaluated.get(done)
    if first and last:
        name = kl_name(c.rollout.model_dump() | ({} if c.eval.temperature is None else c.eval.model_dump()))
        names = {"reward": "reward", "kl": f"{name}, nats", "length": "length, tokens", "truncated": "share cut off"}
        rows = [(told, _measured(first, key), _measured(last, key)) for key, told in names.items() if key in last]
        yield _table(("held out, ± half the 95 % interval", "before", "after"), rows)
        yield ""
    if summary and done == c.train.online_batches and summary.get("gain") is not None:
        said = plus_minus(summary["gain"], summary["gain_ci"], summary["n"], "{:+.3f}")
        in_sd = plus_minus(summary["gain_sd"], summary["gain_sd_ci"], summary["n"])
        yield f"The held-out reward changed by {said} ({in_sd} standard deviations of the base's), over {summary['n']} prompts."
    elif not evaluated:
        yield "Nothing was held out to measure it: the gain is not known."
    elif not (first and last):
        there = ", ".join(map(str, sorted(evaluated)))
        yield f"The gain is not known: held-out answers were measured after {there} online batches, not after {done}."
    for result in store.read_all(run.folder):
        if result.headline and result.record["kind"] != "cheat":
            yield f"- {_text(result.record['kind'])}: {_text(result.headline)}"


def _cheated(run: Run) -> Iterator[str]:
    found = [each for each in store.read_all(run.folder) if each.record["kind"] == "cheat"]
    for result in found:
        second = _named(str(result.record.get("second", "")))
        yield f"- Held against {_text(second)}, which was never trained on: {_text(result.headline)}"
    for folder in witness.folders(run.folder):
        seen = witness.read(folder)
        if seen.looks:
            spoke = f"it spoke: {seen.spoke.test}" if seen.spoke else "it did not speak"
            when = "" if folder.name == witness.OWN else " afterwards"
            yield f"- The witness {_text(seen.by)} was asked {len(seen.looks)} times{when}: {_text(spoke)}."
    if not found and not witness.folders(run.folder):
        yield "Not checked. `dualign eval cheat RUN` holds a run against a reward that it was never trained on."


def _use(exported: Exported) -> str:
    lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    if exported.adapter is None:
        lines += ['here = "PLACE"  # this folder or repository', "model = AutoModelForCausalLM.from_pretrained(here)"]
    else:
        lines[0] = f"from peft import PeftModel\n{lines[0]}"
        beside = exported.adapter == BESIDE
        where = 'f"{here}/base"' if beside else repr(exported.adapter)
        told = (
            "this folder; of a repository huggingface_hub.snapshot_download(NAME)"
            if beside
            else "this folder or repository"
        )
        lines += [f'here = "PLACE"  # {told}', f"base = AutoModelForCausalLM.from_pretrained({where})"]
        lines += ["model = PeftModel.from_pretrained(base, here)"]
    return "\n".join(["```python", *lines, "tokenizer = AutoTokenizer.from_pretrained(here)", "```"])


def _table(header: Sequence[str], rows: Iterator[tuple[str, ...]] | Sequence[tuple[str, ...]]) -> str:
    lines = [header, ["---"] * len(header), *([_text(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _measured(stats: Mapping[str, Any], key: str) -> str:
    value, half = stats.get(key), stats.get(f"{key}_ci")
    return "–" if value is None else f"{value:.4g}" + (f" ± {half:.2g}" if half else "")


def _text(text: str) -> str:
    """Words from outside in Markdown: one line, nothing that it or HTML would take for more than words."""
    return (
        re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(clean(text).split()))
        .replace("\\<", "&lt;")
        .replace("\\>", "&gt;")
    )
