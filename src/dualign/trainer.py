"""Algorithm 1, top to bottom: prompts -> rollouts -> labels -> weighted batch -> updates -> new sampler weights.

Everything random is a function of the run's seed and the online batch's number, and the weighted batch is a file before
the first optimizer step that uses it: a killed run resumes by replaying files, with the same numbers to the last bit.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from dualign import annotate, rollout
from dualign.algos import Algorithm
from dualign.annotate import Reward, RewardSettings
from dualign.annotate.base import Annotator
from dualign.annotate.function import name_of
from dualign.common.errors import AbsentError, RewardError, StopRun, UserError
from dualign.common.interrupt import Interrupts, StopAsked
from dualign.config import Config, build, dump
from dualign.models.adapters import own_base
from dualign.models.dates import freeze_date
from dualign.rollout.base import Sampler
from dualign.run import digests
from dualign.run.batch import WeightedBatch, check_finite, importance, sampled_by, updates, weigh
from dualign.run.folder import Run
from dualign.run.metrics import batch_record, reuse_record
from dualign.training.callbacks import Callback
from dualign.training.clock import Clock
from dualign.training.engine import Engine, Sums
from dualign.training.evaluations import Evaluations, stop_if_absent
from dualign.training.first_pass import FirstPass
from dualign.training.gap import check_sampler, gap_of_absent
from dualign.training.given import Rows, with_given
from dualign.training.labeller import Labeller
from dualign.training.machine import Machine
from dualign.training.parallelize import load_policy
from dualign.training.preview import preview
from dualign.training.resume import (
    Changes,
    check_inputs,
    check_same_run,
    check_stored,
    note_fetched,
    sampler_name,
    told,
)
from dualign.training.source import load_stream, make_source
from dualign.training.stale import Ahead, earlier
from dualign.training.view import View, plan_lines, warnings_of
from dualign.training.witness import Witness


def train(
    config: Config | dict[str, Any],
    reward: Reward | Sequence[Reward] = (),
    algo: Algorithm | None = None,
    sampler: Sampler | None = None,
    model: Any = None,
    tokenizer: Any = None,
    data: Rows | None = None,
    eval_data: Rows | None = None,
    resume: bool = False,
    quiet: bool = False,
    callbacks: Sequence[Callback] = (),
) -> Run:
    """Trains by `config` and returns the run.

    `reward`: Python functions (TRL's convention), annotators and reward settings, one or a list, beside those that the
    configuration names. `algo`, `sampler`, `data` and `eval_data` (rows: a list of mappings, or a datasets.Dataset),
    `model` and `tokenizer` (of transformers) take the place of what it names. `callbacks` are told what happens. To resume,
    call again with the same and `resume=True`.

    Raises UserError for what the user must fix (before any work is lost), StopRun for a clean stop.
    """
    rewards: list[Reward] = annotate.as_list(reward)
    if isinstance(config, dict):
        config = build(config)
    settings = [r for r in rewards if isinstance(r, RewardSettings)]
    config = with_given(config, algo, model, tokenizer, data, eval_data, settings, sampler, callbacks)
    rewards = [r for r in rewards if not isinstance(r, RewardSettings)]
    changes = check_same_run(Path(config.run.dir), config, rewards, sampler) if resume else Changes()
    if config.algo.source == "online" and not config.reward and not rewards:
        raise UserError(annotate.NO_REWARD)
    given = sampler_name(sampler)
    machine = Machine(config)
    processes, online = machine.processes, config.algo.source == "online"
    policy, tokenizer = load_policy(config, machine.device)
    if online or config.reward or rewards:  # fixed sets are sampled on to be evaluated
        sampler = rollout.build(config.rollout, policy, tokenizer, sampler)
    engine = Engine(config, machine, policy, tokenizer)
    if resume:  # what a hub calls by one name may have changed while it was fetched
        check_inputs(Run.open(Path(config.run.dir)), digests.of_models(config.model))
    view = View(config, quiet or not processes.main, callbacks if processes.main else ())
    run = Run(Path(config.run.dir), processes.rank)
    if processes.main:
        _open(run, config, rewards, given, changes if resume else None)
    processes.barrier()
    freeze_date(tokenizer.hf, run.begun)
    annotator = None
    try:
        if config.reward or rewards:
            annotator = annotate.build(config.reward, rewards, run.folder, run.journal, processes)
            if processes.main and not resume:
                note_fetched(run, config)
        with Interrupts() as interrupts, Witness(config, run, processes, interrupts, view.say) as witness, view:
            view.plan(list(changes.notes))
            Trainer(config, machine, engine, sampler, run, annotator, witness, view, interrupts).fit()
    except Exception as error:
        if processes.main and isinstance(error, RewardError | AbsentError):
            run.note(mending=True)
        if processes.main and not resume and not isinstance(error, StopRun):
            run.abandon()  # where nothing was sampled, the corrected command may use the folder
        raise
    finally:
        if annotator is not None:
            annotator.close()
        rollout.close(sampler)
        machine.stop_trackers()
        run.unlock()
    return run


def _open(run: Run, config: Config, rewards: Sequence[Reward], sampler: str | None, changes: Changes | None) -> None:
    """Begins a run, or opens one that is resumed, with these `changes`."""
    if changes is None:
        run.create(dump(config), [name_of(r) for r in rewards], digests.of_run(config, rewards))
        if sampler:
            run.note(sampler=sampler)
        return
    run.lock()
    run.tidy()
    run.write_text("config.yaml", dump(config))
    changes.record(run)


class Trainer:
    """The loop and what it holds."""

    def __init__(
        self,
        config: Config,
        machine: Machine,
        engine: Engine,
        sampler: Sampler | None,
        run: Run,
        annotator: Annotator | None,
        witness: Witness,
        view: View,
        interrupts: Interrupts,
    ) -> None:
        self.config, self.machine, self.engine, self.sampler = config, machine, engine, sampler
        self.run, self.view, self.interrupts, self.witness = run, view, interrupts, witness
        self.algo, self.processes, self.first_pass = config.algo, machine.processes, FirstPass(config, engine)
        self.labeller: Labeller | None = None
        if sampler is not None and annotator is not None:
            self.labeller = Labeller(sampler, annotator, run.journal, interrupts.check, self.processes)
        stream = load_stream(config, engine, view.say)
        self.source = make_source(config, self.processes, engine.tokenizer, self.labeller, stream)
        self.ahead = Ahead(config, engine, run, self.source, self.processes)
        self.evaluations = Evaluations(config, machine, engine, run, self.labeller, witness, view)
        self.labels, self.moved = 0, True  # whether π_θ has moved since the sampler got its weights
        self.carried: dict[str, float] = {}  # what the last batch left for the next one's weights
        rollout.check_room(sampler, [*stream, *self.evaluations.heldout], config.rollout.max_new_tokens)
        view.plan(plan_lines(config, engine, len(stream), len(self.evaluations.heldout)))
        view.plan(self.evaluations.notes(stream))

    def fit(self) -> None:
        start, skip, losses = self._restore()
        if start == 0 and not self.run.batch_path(0).exists():
            preview(self.config, self.labeller, self.source, self.processes, partial(self._sync, Clock()), self.view)
        self.machine.start_trackers()
        for step in range(start, self.config.train.online_batches):
            clock = Clock()
            try:
                if skip == 0 and self.evaluations.due(step):
                    self.evaluations.evaluate(step, partial(self._sync, clock))
                for due in self.ahead.due(step):
                    self._begin(due, clock)
                b = self.run.read_batch(step) or self._collect(step, clock)
                if skip == 0:
                    self.witness.batch(b, clock)
            except StopAsked as asked:
                self._checkpoint(step, skip, losses)
                raise StopRun(
                    f"stopped by {asked} before the updates of online batch {step}; all of it is kept"
                ) from None
            uses = self._update(b, skip, losses, clock)
            self.moved = True
            self._finish_batch(b, uses, losses, clock)
            skip, losses = 0, []
        self._summarise()

    def _sync(self, clock: Clock) -> None:
        """π_t <- π_θ, before something is sampled."""
        if self.moved and self.sampler is not None:
            with clock("sync"):
                self.sampler.sync(self.engine.weights)
        self.moved = False

    # --- one online batch ---

    def _begin(self, step: int, clock: Clock) -> None:
        """Samples batch `step` from the policy as it is; what annotates it gets every completion as it is finished."""
        self.view.phase(step, "sampling and labelling")
        self.engine.free_memory()
        if self.algo.source == "online":
            self._sync(clock)
        self.ahead.begin(step, clock)

    def _collect(self, step: int, clock: Clock) -> WeightedBatch:
        """Rows from all processes, then what is constant while they are used: log π_t, log π_0, weights; on disk."""
        self.view.phase(step, "waiting for labels")
        begun, b = self.ahead.finish(step, clock, self.carried)
        stop_if_absent(begun.book, self.config.train.max_absent, f"online batch {step}", b.rows)
        self.view.phase(step, "scoring")
        engine, algo, mu = self.engine, self.algo, begun.behaviour
        b = b if mu is None else sampled_by(b, mu)
        with clock("score"):
            ref_NT = engine.score_reference(b.tokens) if algo.needs_ref else None
            value_NT = engine.score(engine.critic, b.tokens) if engine.critic else None
            b = replace(b, gap_absent=gap_of_absent(self.config, engine, b, mu))
        old_NT = self.first_pass.log_pi_t(b, ref_NT, value_NT, clock) if self.config.needs_old else None
        models = {"log π_t": engine.policy, "log π_0": engine.reference, "value": engine.critic}
        with clock("score"):
            if mu is None:  # else that was seen to when it was sampled
                check_sampler(self.config, engine, b, old_NT if self.config.rollout.log_probs == "recomputed" else None)
            ratio_N = importance(b, old_NT if mu is None else b.sampled_NT, self.config.rollout.importance_cap)
            b = weigh(b, algo, old_NT, ref_NT, value_NT, ratio_N)
        check_finite(b, lambda name, tokens: engine.not_finite(models[name], tokens))
        with clock("write"):
            if self.processes.main:
                self.run.write_batch(b)
            self.processes.barrier()
        self.run.journal.end(self.run.batch_path(step).with_suffix(""))
        return b

    def _update(self, b: WeightedBatch, skip: int, losses: list[dict[str, float]], clock: Clock) -> list[WeightedBatch]:
        """One optimizer step per update, of the batch and then of earlier ones that are trained on again, past the first
        `skip`, which a checkpoint already holds; adds to `losses`. Returns those earlier ones."""
        c, u, uses = self.config, 0, []
        for use in chain([b], earlier(c, self.engine, self.run, b, clock)):
            for tokens, rows in updates(use, self.algo, c.train.update_size, c.run.seed):
                if u >= skip:
                    self._stop_if_asked(b.step, u, losses)
                    self.view.phase(b.step, f"update {u + 1}")
                    self.engine.begin_update(b.step, u)
                    with clock("update"):
                        losses.append(self._one_update(use, tokens, rows, self.first_pass.begun(b.step, u)))
                u += 1
            uses.append(use)
        return uses[1:]

    def _one_update(self, b: WeightedBatch, tokens: Any, rows: Any, begun: Sums | None) -> dict[str, float]:
        if self.config.train.no_signal == "skip" and b.stats.get("without_signal"):
            return self.engine.left_out()
        try:
            return self.engine.update(self.algo, tokens, rows, begun)
        except StopRun as stop:
            raise StopRun(f"online batch {b.step} ({self.run.batch_path(b.step)}, kept): {stop}") from None

    def _finish_batch(
        self, b: WeightedBatch, uses: list[WeightedBatch], losses: list[dict[str, float]], clock: Clock
    ) -> None:
        self.carried = b.handed_on(self.algo)
        self.labels += len(b.tokens) if self.algo.source == "online" else 0  # a fixed set's were bought elsewhere
        record = batch_record(b, losses, self.algo.source == "online") | reuse_record(uses)
        record |= {"labels": self.labels, "seconds": clock.seconds} | annotate.paid(self.run.folder)
        if "label" in clock.seconds and self.labeller is not None:  # else nothing was labelled now
            record |= self.labeller.record()
        record |= self.witness.record(b.step)
        if self.processes.main:
            self.run.records.add(record)
        self.machine.track(b.step, record)
        self.view.batch(record, warnings_of(record, self.algo))
        if b.step + 1 in self._checkpoint_steps():
            self._checkpoint(b.step + 1, 0, [])

    def _summarise(self) -> None:
        total = self.config.train.online_batches
        try:
            self.evaluations.evaluate(total, partial(self._sync, Clock()))
        except StopAsked as asked:
            raise StopRun(f"stopped by {asked} in the last evaluation; all of it is kept") from None
        if not self.processes.main:
            return
        summary: dict[str, Any] = {"online_batches": total, "labels": self.labels, "algo": self.algo.name}
        summary |= self.evaluations.before_and_after(total) | self.witness.summary()
        seconds: dict[str, float] = {}
        for record in self.run.metrics():
            for phase, spent in record["seconds"].items():
                seconds[phase] = seconds.get(phase, 0.0) + spent
        summary["seconds"] = seconds
        if mended := self.run.about.get("mended"):
            summary["mended"] = mended
            self.view.say(f"note: {'; '.join(map(told, mended))}: before and after were not labelled by the same code")
        self.run.write_text("summary.json", json.dumps(summary, indent=1))
        self.view.finish(summary, self.run)

    # --- stopping and resuming ---

    def _checkpoint_steps(self) -> set[int]:
        total, count = self.config.train.online_batches, self.config.run.checkpoints
        return {round(total * (i + 1) / count) for i in range(count)} | {total}

    def _checkpoint(self, step: int, update: int, losses: list[dict[str, float]]) -> None:
        self.view.phase(step, "saving a checkpoint")
        progress = {"step": step, "update": update, "labels": self.labels, "losses": losses, "carried": self.carried}
        progress["ahead"] = self.ahead.begun
        if own_base(self.config.model, self.config.run.dir) is not None and not self.run.base.exists():
            self.run.keep_base(self.engine.save_base) if self.processes.main else self.engine.save_base(None)
        if self.processes.main:
            save = partial(self.engine.save, progress=progress)
            self.run.save_checkpoint(step, update, save, self.config.run.keep_last)
        else:
            self.engine.save(None, progress)
        self.processes.barrier()

    def _restore(self) -> tuple[int, int, list[dict[str, float]]]:
        """The batch to resume with, how many of its updates are done, and their losses."""
        found = self.run.resumable()
        if found:
            self.run.check(found, f"Delete {found} and resume: training resumes from the stored batches")
        progress: dict[str, Any] = (
            self.engine.restore(found) if found else {"step": 0, "update": 0, "labels": 0, "losses": []}
        )
        if found:
            self.view.say(f"resuming from {found}: {progress['step']} online batches done")
        tokenizer = self.engine.tokenizer
        check_stored(self.run, self.config, self.source, tokenizer, progress["step"], progress["update"])
        if progress["step"] > self.config.train.online_batches:
            raise UserError(
                f"train.online_batches={self.config.train.online_batches}: the run has done {progress['step']} already"
            )
        self.labels, self.carried = progress["labels"], progress.get("carried", {})
        self.ahead.owed = frozenset(progress.get("ahead", ()))
        if self.processes.main:
            self.run.forget_metrics_from(progress["step"])
        self.processes.barrier()
        return progress["step"], progress["update"], progress["losses"]

    def _stop_if_asked(self, step: int, update: int, losses: list[dict[str, float]]) -> None:
        asked = [why for why in self.processes.gather([self.interrupts.requested]) if why]
        if asked:
            self._checkpoint(step, update, losses)
            raise StopRun(f"stopped by {asked[0]} in online batch {step}, after {update} of its updates; all is kept")
