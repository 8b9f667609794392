"""How what is evaluated was asked, or is to be: on which prompts, put how, sampled how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dualign import data
from dualign.common.errors import UserError, clean
from dualign.common.types import Prompt
from dualign.config import load
from dualign.data.settings import DataConfig
from dualign.eval.outputs import SUFFIXES, Generation, is_run
from dualign.run.folder import Run

TOKENS = 128


@dataclass(frozen=True)
class Asking:
    """The options of an evaluation. None: as the run's configuration has it; `prompts` None: what each source
    brings."""

    prompts: str | None = None
    limit: int | None = None
    max_new_tokens: int = TOKENS
    temperature: float = 0.0
    k: int = 1
    seed: int = 0
    chat: bool | None = None
    system_prompt: str | None = None
    prompt_column: str | None = None

    def check(self) -> None:
        """Raises UserError for options that nothing would read."""
        sampling = (self.limit, self.max_new_tokens, self.temperature, self.k, self.chat, self.system_prompt)
        if self.prompts is None and (*sampling, self.prompt_column) != (None, TOKENS, 0.0, 1, None, None, None):
            raise UserError(
                "--limit, --max-new-tokens, --temperature, --k, --chat, --system-prompt and --prompt-column say how to "
                "sample on --prompts; without it, what a run's own evaluations sampled is judged"
            )


def data_of(source: str | None) -> DataConfig | None:
    """A run's data settings; None for what is no run."""
    return load(Path(source) / "config.yaml").data if source and is_run(source) else None


def put(sources: Sequence[str], train: str, options: Asking) -> DataConfig:
    """How prompts are put to all of `sources`: as the runs among them were trained, or as the options say. Rows that
    hold no prompt are left out and counted. Raises UserError where the runs differ and no option decides."""
    runs = [settings for source in sources if (settings := data_of(source))]
    chosen: dict[str, Any] = {}
    for key, option in (("chat", "--chat or --no-chat"), ("system_prompt", "--system-prompt TEXT (or '' for none)"),
                        ("prompt_column", "--prompt-column"), ("eval_split", None), ("subset", None)):  # fmt: skip
        given = getattr(options, key, None)
        asked = list(dict.fromkeys(getattr(settings, key) for settings in runs))
        if given is None and len(asked) > 1 and option:
            raise UserError(f"the runs differ in data.{key}: say {option}, and all are asked alike")
        if given is not None or len(asked) == 1:
            chosen[key] = asked[0] if given is None else given
    if train not in {name for settings in runs for name in (settings.train, settings.eval)}:
        chosen.pop("subset", None)  # of another data set
    chosen["system_prompt"] = chosen.get("system_prompt") or None
    return DataConfig(train=train, bad_rows="skip", **chosen)


def load_prompts(source: str, settings: DataConfig, split: str) -> list[Prompt]:
    """Raises UserError where the system prompt would be left out in silence."""
    prompts = data.load_prompts(source, settings, split)
    if data.lost_system_prompt(prompts, settings):
        raise UserError(
            f"{source}: every prompt is plain text, so the system prompt {settings.system_prompt!r} would not be used: "
            "--system-prompt needs --chat (a run's data.system_prompt needs data.chat=true), or say --system-prompt ''"
        )
    return prompts


def generation(sources: Sequence[str], options: Asking, folder: Path) -> Generation:
    """How all of `sources` are sampled. With prompts of one's own, all get the same conversations."""
    o = options
    o.check()
    if o.prompts is None:
        return Generation(None, o.max_new_tokens, o.temperature, o.k, o.seed, folder)
    settings = put(sources, o.prompts, o)
    prompts = data.draw(load_prompts(o.prompts, settings, settings.eval_split), o.limit)
    return Generation(prompts, o.max_new_tokens, o.temperature, o.k, o.seed, folder, settings)


def said(source: str, how: Generation, options: Asking) -> dict[str, Any]:
    """For results: how the answers of `source` came about."""
    if how.prompts is not None and not source.endswith(SUFFIXES):
        assert how.data is not None
        return {"prompts": options.prompts, "asked": len(how.prompts), "chat": how.data.chat,
                "system_prompt": how.data.system_prompt, "k": how.k, "max_new_tokens": how.max_new_tokens,
                "temperature": how.temperature, "seed": how.seed}  # fmt: skip
    if not is_run(source):
        return {"prompts": f"those of {source}"}
    c = load(Path(source) / "config.yaml")
    temperature = c.rollout.temperature if c.eval.temperature is None else c.eval.temperature
    system_prompt = c.data.system_prompt
    if system_prompt and not c.data.chat and data.lost_system_prompt(_evaluated(Path(source)), c.data):
        system_prompt = None
    return {"prompts": "the run's own evaluations", "chat": c.data.chat, "system_prompt": system_prompt,
            "k": c.eval.k, "max_new_tokens": c.rollout.max_new_tokens, "temperature": temperature,
            "top_p": c.rollout.top_p, "seed": c.run.seed}  # fmt: skip


def _evaluated(folder: Path) -> list[Prompt]:
    """The prompts of a run's first evaluation."""
    run = Run.open(folder)
    first = min((int(path.stem) for path in run.evaluations_dir.glob("*.parquet")), default=None)
    return [] if first is None else [row.rollout.prompt for row in run.read_evaluation(first)[0]]


def in_words(system: Mapping[str, Any]) -> str:
    """How a system's answers came about, and by what exactly they were judged; "unknown" where an earlier version did
    not write it down."""
    how, judge = dict(system.get("sampling") or {}), system.get("judge") or {}
    words = [f"answers to {clean(str(how.pop('prompts')))}"] if how else ["how it was asked: unknown"]
    system_prompt = how.pop("system_prompt", None)
    words += [f"{key.replace('_', ' ')} {value}" for key, value in how.items() if value is not None]
    words += [f"system prompt {clean(system_prompt)!r}"] if system_prompt else []
    now = f", not surely what the run was trained on: {clean(judge['changed'])}" if judge.get("changed") else ""
    return f"{', '.join(words)}; reward {judge.get('digest') or 'unknown'}{now}"
