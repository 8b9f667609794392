"""The machine that a run is on: its device, its processes, its trackers. The only file that knows accelerate."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from dualign.common import cpu, launch
from dualign.common.errors import UserError
from dualign.common.processes import Processes
from dualign.config import Config

log = logging.getLogger(__name__)
PATIENCE = timedelta(days=1)  # processes wait for one another's labels: a launcher ends them all where one dies


class Machine:
    """Joins the processes that a launcher started, and seeds torch. Raises UserError for a tracker that is not
    installed."""

    def __init__(self, config: Config) -> None:
        from accelerate import Accelerator
        from accelerate.tracking import get_available_trackers
        from accelerate.utils import InitProcessGroupKwargs, set_seed

        self.config = config
        for name in config.run.trackers:  # accelerate leaves out in silence what is not installed
            if name not in {str(t.value) for t in get_available_trackers()}:
                raise UserError(f"run.trackers: {name} is not installed: pip install {name}")
        if note := launch.settle():
            log.warning("note: %s", note)
        self._accelerator = a = Accelerator(
            cpu=not torch.cuda.is_available(),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
            log_with=list(config.run.trackers) or None,
            project_dir=str(Path(config.run.dir) / "trackers"),
        )
        self.processes = Processes(int(a.process_index), int(a.num_processes), a.wait_for_everyone)
        self.device = torch.device(a.device)
        if self.device.type == "cuda":
            check_alike(self.processes.gather([torch.cuda.get_device_name(self.device)]))
        if self.processes.main and self.processes.world > config.prompts_per_batch:
            log.warning(
                "note: %d processes for %d prompts of an online batch: the others sample nothing",
                self.processes.world,
                config.prompts_per_batch,
            )
        set_seed(config.run.seed)
        if self.device.type == "cpu":
            cpu.keep_memory() if config.train.shard == "none" else cpu.return_memory()

    def start_trackers(self) -> None:
        """Opens the trackers that run.trackers names, which may write into the run's folder."""
        if self.config.run.trackers:
            tree = self.config.model_dump(exclude={"reward"})
            settings = {k: v for k, v in _flat(tree, ".").items() if isinstance(v, int | float | str)}
            self._accelerator.init_trackers(self.config.run.project, settings)

    def track(self, step: int, record: dict[str, Any]) -> None:
        """The numbers of `record` to the trackers; those of a section, as section/name."""
        if self.config.run.trackers:
            flat = {k: v for k, v in _flat(record, "/").items() if isinstance(v, int | float)}
            self._accelerator.log(flat, step=step)

    def stop_trackers(self) -> None:
        if self.config.run.trackers:
            for tracker in self._accelerator.trackers:  # end_training would take the process group with it
                tracker.finish()


def check_alike(gpus: Sequence[str]) -> None:
    """Raises UserError where the processes' GPUs are of several kinds: sums are rounded differently there, and the
    smallest memory and the slowest one would hold for all."""
    if len(kinds := sorted(set(gpus))) > 1:
        found = ", ".join(f"{gpus.count(kind)} x {kind}" for kind in kinds)
        raise UserError(f"the processes have different GPUs ({found}): choose those of one kind (CUDA_VISIBLE_DEVICES)")


def _flat(tree: dict[str, Any], between: str) -> dict[str, Any]:
    """The leaves of nested mappings, each under its path."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= {f"{key}{between}{k}": v for k, v in _flat(value, between).items()}
        else:
            flat[key] = value
    return flat
