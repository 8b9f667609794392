"""`dualign init`: five answers make a recipe, with a comment where somebody will want to change it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dualign import config as configs
from dualign.algos import ALGORITHMS
from dualign.common.durable import write_text
from dualign.common.errors import UserError

REWARDS = {
    "judge": "an LLM judge: its server's address and the model's name there, as in http://localhost:8000/v1 my-judge",
    "function": "a Python function of yours, as FILE.py:NAME",
    "classifier": "a reward model of Hugging Face's: a folder or a hub's name",
    "head": "a reward head: helpful, harmless, hh, or a file made by `dualign reward fit`",
}


@dataclass(frozen=True)
class Question:
    option: str
    asked: str
    default: str | None = None  # None: it must be answered


QUESTIONS = (
    Question(
        "model", "The model to align (a folder, a hub's name, a run, smollm2-135m-instruct)", "smollm2-135m-instruct"
    ),
    Question("prompts", "Prompts to train on (a .jsonl, .csv or .parquet file, or a data set's name)"),
    Question("held_out", "Prompts that are held out, to measure the gain (empty: none)", ""),
    Question("reward", f"What rewards answers ({', '.join(REWARDS)})", "judge"),
    Question("at", "Where that is"),
)


def answers(given: dict[str, str | None], ask: Callable[[str, str | None], str] | None) -> dict[str, str]:
    """What was given as options, and the rest by asking. Without somebody to `ask`, defaults; raises UserError where
    there is none."""
    found: dict[str, str] = {}
    for question in QUESTIONS:
        text = given.get(question.option)
        about = REWARDS.get(found.get("reward", "judge"), "") if question.option == "at" else ""
        if text is None and ask:
            text = ask(f"{question.asked}{f': {about}' if about else ''}", question.default)
        elif text is None:
            text = question.default
        if text is None:
            flag = question.option.replace("_", "-")
            raise UserError(f"init: --{flag} is missing: {about or question.asked} (there is no terminal to ask at)")
        found[question.option] = text.strip()
    return found


def recipe(a: dict[str, str], system: str = "dar") -> str:
    """The recipe's text. Raises UserError for an answer that makes none."""
    if a["reward"] not in REWARDS:
        raise UserError(f"--reward {a['reward']}: one of {', '.join(REWARDS)}")
    if system not in ALGORITHMS or ALGORITHMS[system].source != "online":
        raise UserError(f"--system {system}: not a system that samples online; `dualign keys algo` lists them")
    held = f"  eval: {_yaml(a['held_out'])}  # never trained on: these measure the gain\n" if a["held_out"] else ""
    return f"""# Made by `dualign init`. A key that is not here has its default; `dualign keys` lists them all.
model:
  name: {_yaml(a["model"])}  # π_0, from which the policy starts and is not to stray
  precision: auto  # bf16 where the machine has units for it, else fp32
  # lora: {{r: 16}}  # train adapters instead of the weights: less memory
data:
  train: {_yaml(a["prompts"])}
{held}  chat: true  # plain prompts are a user's message; false: the model goes on from them as they are
rollout:
  k: 4  # completions per prompt; their mean reward is what each is compared with
  max_new_tokens: 256  # longer answers are cut off
  missing_eos_penalty: 1.0  # off the reward of an answer that was cut off
reward:
  - type: {a["reward"]}
{_reward(a["reward"], a["at"])}algo:
  name: {system}
{_system(system)}train:
  online_batches: 50  # how long the run is
  online_batch: 64  # completions sampled from one policy
  update_size: 32  # completions of one optimizer step
  lr: 1.0e-6  # for small models more, up to 1e-5
eval:
  every: 10  # online batches between evaluations on what is held out
run:
  dir: {_yaml("runs/" + (re.sub(r"[^A-Za-z0-9.-]+", "-", Path(a["prompts"]).stem).strip("-") or "run"))}
  keep_last: 2  # checkpoints that keep their weights
"""


def _reward(kind: str, at: str) -> str:
    if not at:
        raise UserError(f"--at is missing: {REWARDS[kind]}")
    if kind == "judge":
        url, _, model = at.partition(" ")
        if not url.startswith(("http://", "https://")) or not model.strip():
            raise UserError(f"--at {at}: {REWARDS[kind]}")
        return (
            "    rubric: helpfulness  # or summarization, harmlessness, or a YAML file of yours (docs/judges.md)\n"
            f"    base_url: {_yaml(url)}  # its key is read from the environment: OPENAI_API_KEY\n"
            f"    model: {_yaml(model.strip())}\n"
            "    # price_prompt: 0.4  # dollars per million tokens: then --dry-run says what the run costs\n"
            "    # price_completion: 0.4\n"
            "    # max_dollars: 20  # and this is never passed\n"
        )
    if kind == "head":
        at = f"builtin:{at}" if re.fullmatch(r"\w+", at) else at
    return f"    {'model' if kind == 'classifier' else 'path'}: {_yaml(at)}\n"


def _system(name: str) -> str:
    if name != "dar":
        return f"  # its settings: dualign keys {name}\n"
    return (
        "  alpha: 0.1  # of the two references how much is π_0 (1: only π_0, 0: only the last policy)\n"
        "  beta: 0.05  # temperature of exp(A/β): smaller follows the reward more\n"
    )


def _yaml(text: str) -> str:
    """A text as YAML reads it: quoted where it would be more than a word."""
    plain = re.fullmatch(r"[A-Za-z][\w./-]*", text) and text.lower() not in (
        "yes",
        "no",
        "on",
        "off",
        "true",
        "false",
        "null",
    )
    return text if plain else json.dumps(text, ensure_ascii=False)


def check_new(file: Path) -> None:
    """Raises UserError where something is there already."""
    if file.exists():
        raise UserError(f"{file}: already there; name another file by --out")


def write(file: Path, text: str) -> None:
    """Puts the recipe into `file`, once it is one."""
    from dualign.common.yaml_text import parse_yaml

    configs.build(parse_yaml(text, str(file)), str(file))
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, text)
