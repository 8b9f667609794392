"""What a person sees: a live table on a terminal, plain lines elsewhere, warnings in words, answers before and after."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from dualign.algos import Algorithm
from dualign.annotate.normalised import RAW
from dualign.common.cpu import bf16_units
from dualign.common.errors import clean
from dualign.common.intervals import bracket, known, plus_minus, too_few
from dualign.config import Config
from dualign.training.callbacks import Callback
from dualign.training.heldout import HeldOut, key_of, kl_name
from dualign.training.heldout_set import HeldOutSet

if TYPE_CHECKING:
    from dualign.run.folder import Run
    from dualign.training.engine import Engine

SHOWN = 12  # latest batches in the live table
COLLAPSED = 0.5  # of the share of different answers at π_0: a person should be told of less
COLUMNS = {  # column: (key, format); shown when the key is there
    "batch": ("step", "{:d}"),
    "reward": ("reward", "{:+.3f}"),
    RAW: (f"{RAW}/mean", "{:+.3f}"),
    "witness": ("witness", "{:+.3f}"),
    "KL to π_0": ("kl", "{:z.2f}"),
    "clipped": ("clip_rate", "{:.0%}"),
    "ess": ("ess", "{:.0%}"),
    "tied": ("tied_prompts", "{:.0%}"),
    "α": ("alpha_found", "{:.3f}"),
    "β": ("beta_found", "{:.3f}"),
    "length": ("length", "{:.1f}"),
    "truncated": ("truncated", "{:.0%}"),
    "different": ("distinct", "{:.0%}"),
    "absent": ("absent", "{:d}"),
    "loss": ("loss", "{:.3g}"),
    "margin": ("margin", "{:+.3g}"),
    "accuracy": ("accuracy", "{:.0%}"),
    "grad": ("grad_norm", "{:.2g}"),
}


class View:
    """Everything that a run says. Quiet in all processes but the first."""

    def __init__(self, config: Config, quiet: bool = False, callbacks: Sequence[Callback] = ()) -> None:
        self.config, self.callbacks = config, callbacks
        self.columns = columns_of(config)
        self.console = Console(quiet=quiet, highlight=False, markup=False, emoji=False)
        self.rows: list[dict[str, Any]] = []
        self.said: set[str] = set()
        self.doing = ""
        self.began = time.perf_counter()
        self.live: Live | None = None

    def __enter__(self) -> View:
        if self.console.is_terminal and not self.console.quiet:
            self.live = Live(console=self.console, refresh_per_second=4, get_renderable=self._render)
            self.live.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.live is not None:
            self.doing = ""
            self.live.stop()

    def say(self, text: str) -> None:
        # a file or a notebook gets whole lines, as there is no width that they must fit
        self.console.print(Text(clean(text)), soft_wrap=not self.console.is_terminal)

    def plan(self, lines: list[str]) -> None:
        for line in lines:
            self.say(line)

    def phase(self, step: int, doing: str) -> None:
        self.doing = f"online batch {step}: {doing}"

    def batch(self, record: dict[str, Any], warnings: list[str]) -> None:
        self.rows.append(record)
        if self.live is None:
            cells = [f"{name} {text}" for name, text in self._cells(record).items()]
            self.say(f"{'  '.join(cells)}  | {_seconds(record)}  {self._eta()}")
        for warning in warnings:
            if warning not in self.said:
                self.said.add(warning)
                self.say(f"note (batch {record['step']}): {warning}")
        for each in self.callbacks:
            each.on_batch(record)

    def evaluation(self, result: HeldOut | HeldOutSet) -> None:
        self._say_evaluation(result)
        for each in self.callbacks:
            each.on_evaluation(result.batches, result.record())

    def _say_evaluation(self, result: HeldOut | HeldOutSet) -> None:
        if isinstance(result, HeldOutSet):
            self.say(f"held-out {result.data} after {result.batches} batches: {_of_set(result.record())}")
            return
        absent = f", absent {result.absent:.0%} of the labels" if result.absent else ""
        of = f" of {result.asked}" if result.asked is not None and result.asked > result.prompts else ""
        self.say(
            f"held-out after {result.batches} batches: "
            f"reward {plus_minus(result.reward, result.reward_ci, result.prompts, '{:+.3f}')}, "
            f"{_kl(result.record())}, length {result.length:.1f}, "
            f"truncated {result.truncated:.0%}, different {_text(result.distinct, '{:.0%}')}{absent} "
            f"({result.prompts}{of} prompts, {result.seconds:.1f} s)"
        )

    def finish(self, summary: dict[str, Any], run: Run) -> None:
        """The before/after table and where everything is."""
        if self.live is not None:
            self.doing = ""
            self.live.stop()
            self.live = None
        if "after" in summary:
            if "changes" not in summary:
                self.console.print(_answers(run, summary["online_batches"]))
            for line in verdict(summary):
                self.say(line)
        spent = summary["seconds"]
        self.say("seconds by phase: " + ", ".join(f"{k} {v:.1f}" for k, v in spent.items()))
        self.say(f"run folder: {run.folder}")
        for each in self.callbacks:
            each.on_end(summary)

    def _eta(self) -> str:
        done = len(self.rows)
        left = self.config.train.online_batches - self.rows[-1]["step"] - 1
        return f"ETA {_clock((time.perf_counter() - self.began) / done * left)}" if left else ""

    def _render(self) -> Group:
        shown = self.rows[-SHOWN:]
        names = [name for name, (key, _) in self.columns.items() if any(r.get(key) is not None for r in shown)]
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name in names:
            table.add_column(name, justify="right")
        table.add_column("seconds")
        for record in shown:
            cells = self._cells(record)
            table.add_row(*(cells.get(name, "") for name in names), _seconds(record))
        progress = f"{len(self.rows)} batches  {self._eta()}" if self.rows else ""
        return Group(table, Text(f"{self.doing}  {progress}".strip(), style="dim"))

    def _cells(self, record: dict[str, Any]) -> dict[str, str]:
        shown = {}
        for name, (key, form) in self.columns.items():
            if (value := record.get(key)) is not None:
                half = record.get(f"{key}_ci")
                shown[name] = form.format(value) + ("" if half is None else f" ± {form.replace('+', '').format(half)}")
        return shown


def columns_of(config: Config) -> dict[str, tuple[str, str]]:
    """COLUMNS by the names that they have under the run's sampling and reward."""
    r = config.rollout
    names = {"KL to π_0": kl_name({"temperature": r.temperature, "top_p": r.top_p})}
    if r.missing_eos_penalty:
        names["reward"] = "reward less penalty"
    return {names.get(name, name): column for name, column in COLUMNS.items()}


def _seconds(record: dict[str, Any]) -> str:
    def words(spent: dict[str, float]) -> str:
        return " ".join(f"{name} {seconds:.1f}" for name, seconds in spent.items() if seconds >= 0.05)

    rewards = words(record.get("label_seconds", {}))
    return words(record["seconds"]) + (f" ({rewards})" if rewards else "")


def _clock(seconds: float) -> str:
    return f"{int(seconds // 60)}:{int(seconds % 60):02d}"


def slow_here(config: Config, engine: Engine) -> list[str]:
    """Where bf16 is not what it promises."""
    if config.model.precision == "fp32" or engine.device.type != "cpu" or bf16_units():
        return []
    return ["note: this processor has no bf16 units: bf16 is computed slowly; model.precision=fp32 is faster here"]


def plan_lines(config: Config, engine: Engine, prompts: int, heldout: int) -> list[str]:
    """What the counts come to, in words."""
    t, c = config.train, config
    per = c.updates_per_batch
    size = sum(p.numel() for p in engine.policy.parameters()) / 1e6
    sharing = "prompts shared" if engine.policy.share else "prompts not shared"
    return [
        f"{c.algo.name} on {c.model.name} ({size:.0f}M parameters, {c.model.precision}, {sharing}), "
        f"{engine.processes.world} process{'es' if engine.processes.world > 1 else ''}, {engine.device}",
        f"{t.online_batches} online batches of {t.online_batch} completions = {c.prompts_per_batch} prompts × {c.group}; "
        f"{per} update{'s' if per > 1 else ''} each on {c.update_completions} completions; "
        f"{t.online_batches * per} updates and {c.labels[0]} labels in all",
        *slow_here(config, engine),
        f"{prompts} training prompts ({t.online_batches * c.prompts_per_batch / prompts:.1f} epochs), {heldout} held out",
    ]


def warnings_of(record: dict[str, Any], algo: Algorithm) -> list[str]:
    """What a person should know about this batch, in words."""
    found = []
    if record.get("clip_rate", 0) > 0.6:
        found.append(
            f"{record['clip_rate']:.0%} of weights are clipped: they no longer tell completions apart; raise algo.beta"
        )
    if record.get("without_signal"):
        flat = record["reward_std"] <= 1e-6 * abs(record["reward"])  # single precision's rounding
        equal = "all rewards are equal" if flat else "the completions of each prompt have equal rewards"
        step = (
            "the batch was left out" if record.get("skipped") == 1 else f"what its step is then: {algo.without_signal}"
        )
        found.append(f"{equal}: there is nothing to learn from; check the reward. {step} (train.no_signal)")
    elif record.get("reward_std") == 0 and algo.source == "online":
        found.append("all rewards are equal: there is nothing to learn from; check the reward")
    if record.get("tied_prompts", 0) > 0.8:
        found.append(
            f"{record['tied_prompts']:.0%} of prompts have completions of equal rewards; a finer reward or more completions "
            "would help"
        )
    if record["truncated"] >= 1:
        found.append("no completion ended with EOS: all were cut off; raise rollout.max_new_tokens")
    if record.get("ess") is not None and record["ess"] < 0.05:
        found.append(
            f"the effective sample size is {record['ess']:.1%} of the batch: very few completions carry the update"
        )
    if record["absent"]:
        found.append("some completions could not be labelled; they left the batch (reasons in its Parquet file)")
    return found


def verdict(summary: dict[str, Any]) -> list[str]:
    """Did it get better, by how much, and at what price, in words."""
    if "changes" in summary:
        return _verdict_of_set(summary)
    before, after = summary["before"], summary["after"]
    n = summary.get("n", after["prompts"])  # a run of before does not say how many prompts have both labels
    gain, half, scale = summary["gain_sd"], summary["gain_sd_ci"], "standard deviations"
    if gain is None or (half is not None and not summary["sd"]):  # rewards of π_0 that are all equal have none
        gain, half, scale = summary["gain"], summary["gain_ci"], "in the reward's own units"
    lines = [
        f"held-out reward {before['reward']:+.3f} -> {after['reward']:+.3f}: {plus_minus(gain, half, n)} {scale} "
        f"(95 % interval over {n} prompts): {_better(gain, half, n)}",
        *(f"  {name} {_change(each)}" for name, each in summary.get("rewards", {}).items()),
        *(
            f"as trained, an answer that is cut off worth {summary['penalty']:g} less: {_change(each)}"
            for each in [summary.get("trained")]
            if each
        ),
        f"{_kl(after)}; length {before['length']:.1f} -> {after['length']:.1f}; "
        f"truncated {before['truncated']:.0%} -> {after['truncated']:.0%}",
    ]
    if before.get("absent") or after.get("absent"):
        lines.append(
            f"of the held-out labels, {before.get('absent', 0):.0%} before and {after.get('absent', 0):.0%} after are absent"
        )
    different = before.get("distinct"), after.get("distinct")
    if different[0] is not None and different[1] is not None and different[1] < COLLAPSED * different[0]:
        lines.append(
            f"only {after['distinct']:.0%} of the answers differ ({before['distinct']:.0%} before): the policy has collapsed "
            "to what the reward likes best; lower train.lr, raise algo.beta, or bound the reward (reward.N.clip)"
        )
    return lines


def _verdict_of_set(summary: dict[str, Any]) -> list[str]:
    """Of a system that learns from a fixed set: how its numbers on held-out rows of such a set changed."""
    lines = []
    for name, change in summary["changes"].items():
        form = "{:.1%}" if name == "accuracy" else "{:.3f}"
        before, after = (_text(summary[at][name], form) for at in ("before", "after"))
        moved = plus_minus(change["change"], change["change_ci"], change["n"], "{:+.3f}")
        sign = -1 if name == "loss" else 1
        word = _better(sign * change["change"], change["change_ci"], change["n"])
        data = f"{change['n']} {summary['after']['data']}"
        lines.append(f"held-out {name} {before} -> {after}: {moved} (95 % interval over {data}): {word}")
    return lines


def _of_set(record: dict[str, Any]) -> str:
    n = record["rows"]
    said = [f"loss {plus_minus(record['loss'], record['loss_ci'], n, '{:.3f}')}"]
    if record["margin"] is not None:
        accuracy = {k: record[f"accuracy{v}"] for k, v in (("value", ""), ("low", "_low"), ("high", "_high"))}
        said += [f"margin {plus_minus(record['margin'], record['margin_ci'], n, '{:+.3f}')}"]
        said += [f"accuracy {bracket(accuracy, '{:.0%}')}"]
    return f"{', '.join(said)} ({n} {record['data']}, {record['seconds']:.1f} s)"


def _better(gain: float | None, half: float | None, n: int) -> str:
    """The verdict in a word, where there are prompts enough for one."""
    if not n or gain is None:
        return "no prompt has a label both before and after"
    if few := too_few(n):
        return few
    if half is None or math.isnan(half):
        return "the differences are all equal" if gain else "no change"
    return "better" if gain - half > 0 else "worse" if gain + half < 0 else "no clear change"


def _change(each: dict[str, Any]) -> str:
    before, after = (_text(each[key], "{:+.3f}") for key in ("before", "after"))
    gain, half = (each["gain_sd"], each["gain_sd_ci"]) if each["sd"] else (each["gain"], each["gain_ci"])
    n = f" (n={each['n']})" if "n" in each and half is not None else ""
    return f"{before} -> {after}: {plus_minus(gain, half, each.get('n'))}{n}"


def _kl(record: dict[str, Any]) -> str:
    """The distance to π_0 by the name of what was measured."""
    if record.get("batches") == 0 and record["kl"] == 0:
        return f"{kl_name(record)} 0"
    return f"{kl_name(record)} {plus_minus(record['kl'], record['kl_ci'], record['prompts'], '{:.2f}')} nats"


def _text(value: float | None, form: str) -> str:
    return form.format(value) if value is not None and known(value) else "–"


def _answers(run: Run, done: int, count: int = 6) -> Table:
    """The same held-out prompts answered before and after, chosen evenly through the set, not by reward."""
    before, after = (
        {key_of(row): row for row in run.read_evaluation(at)[0][::-1]} for at in (0, done)
    )  # each first one
    pairs = [(row, after[key]) for key, row in reversed(before.items()) if key in after]
    table = Table(title="Held-out answers before and after", show_lines=True, expand=True)
    for name, ratio in (("prompt", 2), ("before (π_0)", 3), ("after", 3)):
        table.add_column(name, ratio=ratio, overflow="fold")
    for row, other in pairs[:: max(1, len(pairs) // count)][:count]:
        table.add_row(Text(clean(row.rollout.prompt.text)), _answer(row), _answer(other))
    return table


def _answer(row: Any) -> Text:
    value = "absent" if row.label.value is None else f"{row.label.value:+.2f}"
    cut = "" if row.rollout.finish == "eos" else " …"
    return Text.assemble((f"[{value}] ", "dim"), clean(row.rollout.text.strip()) + cut)
