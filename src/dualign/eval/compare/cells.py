"""Running a grid's cells, some side by side: finished ones are skipped, interrupted ones resumed, failed ones named."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Event, current_thread, main_thread
from typing import Any, Literal

from dualign import config as configs
from dualign.common.errors import UserError
from dualign.config import dump
from dualign.eval.compare.grid import Cell, Grid, cells, selection_cells, unique
from dualign.eval.compare.results import final
from dualign.run.folder import Run

State = Literal["finished", "interrupted", "to do"]
Execute = Callable[[Cell, bool, Event], None]  # runs a cell, or resumes it, until asked to stop; raises CellError
Say = Callable[[str], None]


class CellError(Exception):
    """A run that ended without its summary; the message is the last it said."""


def state(cell: Cell) -> State:
    """Raises UserError where the folder holds a run with other settings: numbers are never mixed."""
    if not (cell.folder / "config.yaml").is_file():
        return "to do"
    found = configs.differences(configs.load(cell.folder / "config.yaml"), cell.config)
    changed = [f"{key}: {old}, now {new}" for key, (old, new) in found.items() if key != "run.dir"]
    if changed:
        raise UserError(
            f"{cell.folder}: holds a run with other settings than the grid's ({'; '.join(changed[:5])}); "
            "choose another out folder, or remove this one"
        )
    return "finished" if (cell.folder / "summary.json").is_file() else "interrupted"


def run_grid(grid: Grid, execute: Execute, say: Say, jobs: int = 1) -> dict[str, str]:
    """Runs what is not finished: the selection first, then the compared cells, `jobs` at a time. Returns the failed ones
    by name, each with its reason; the others continued. Before the first run, every cell's folder is checked."""
    first = selection_cells(grid)
    for cell in first:
        state(cell)
    failed = run_cells(first, execute, say, False, jobs)
    chosen = selected(grid)
    if grid.select:
        for name in grid.systems:
            where = f"{name}: {grid.select.key}"
            if name in chosen:
                say(f"{where} = {chosen[name]} selected on seed {grid.select.seed}")
            else:
                failed[where] = "no run of the selection finished with a held-out reward, so the system is left out"
    return failed | run_cells(cells(grid, chosen), execute, say, grid.keep_weights, jobs)


def run_cells(todo: Sequence[Cell], execute: Execute, say: Say, keep_weights: bool, jobs: int) -> dict[str, str]:
    """The failed cells by name, each with its reason. A finished one is never resumed: its training state is dropped.
    Whatever else goes wrong, an interrupt included, stops the running cells, begins no other, and is raised."""
    states = {cell.folder: state(cell) for cell in todo}
    every = unique(todo)
    stopping = Event()

    def run(number: int, cell: Cell) -> str | None:
        if stopping.is_set():
            return None
        where = f"[{number}/{len(every)}] {cell.name}"
        before = states[cell.folder]
        if before == "finished":
            say(f"{where}: finished before")
            return None
        say(f"{where}: {'resumed' if before == 'interrupted' else 'started'}, in {cell.folder}")
        try:
            execute(cell, before == "interrupted", stopping)
            Run.open(cell.folder).slim(keep_weights)
        except CellError as error:
            if stopping.is_set():
                return None
            say(f"{where}: FAILED: {error}")
            return str(error)
        except BaseException:
            stopping.set()
            raise
        return None

    with _interrupted_by_sigterm(), ThreadPoolExecutor(jobs) as pool:
        try:
            running = [pool.submit(run, number, cell) for number, cell in enumerate(every, 1)]
            wait(running, return_when=FIRST_EXCEPTION)
        except BaseException:
            stopping.set()
            raise
        reasons = [found.result() for found in running]
    return {cell.name: why for cell, why in zip(every, reasons, strict=True) if why}


@contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    if current_thread() is not main_thread():  # no one but the main thread may say how a signal is handled
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def selected(grid: Grid) -> dict[str, Any]:
    """Each system's value with the highest final reward among its finished selection runs; of those whose policy did
    not collapse, where there are any."""
    best: dict[str, tuple[tuple[bool, float], Any]] = {}
    for cell in selection_cells(grid):
        if found := final(cell.folder, grid.measure):
            reward, share = found
            score = (share >= grid.select.distinct if grid.select else True, reward)
            if cell.system not in best or score > best[cell.system][0]:
                best[cell.system] = (score, cell.value)
    return {name: value for name, (_, value) in best.items()}


def subprocesses(launch: str, jobs: int) -> Execute:
    """Runs each cell as `dualign train` (or resume) in a process of its own, with its words in a log beside its folder:
    memory is given back, and a crash takes one cell. Side by side they share the cores, unless `launch` has a say in
    that. Asked to stop, the interrupt is handed on once, and the cell saves itself."""
    if jobs > 1 and not launch:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // jobs)))
    start: Start = partial(_launched, shlex.split(launch)) if launch else _forked

    def execute(cell: Cell, resume: bool, stopping: Event) -> None:
        cell.folder.parent.mkdir(parents=True, exist_ok=True)
        recipe, log = (cell.folder.with_name(f"{cell.folder.name}.{kind}") for kind in ("yaml", "log"))
        recipe.write_text(dump(cell.config), encoding="utf-8")
        pid, ended = start(["resume", str(cell.folder)] if resume else ["train", str(recipe)], log)
        while (code := ended(0.2)) is None:
            if stopping.is_set():
                os.kill(pid, signal.SIGTERM)
                code = ended(None)
                break
        if code or not (cell.folder / "summary.json").is_file():
            raise CellError(f"exit code {code}: {_last_line(log)} ({log})")

    return execute


Ended = Callable[[float | None], int | None]  # waits so many seconds: the exit code, or None while it runs
Start = Callable[[list[str], Path], tuple[int, Ended]]  # what `dualign` is called with, its log; the process's id
PRELOADED = (  # what every run imports
    "dualign.trainer",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.conversion_mapping",
    "transformers.models.llama.modeling_llama",
    "accelerate",
    "scipy.stats",
)


def _launched(launch: list[str], words: list[str], log: Path) -> tuple[int, Ended]:
    with log.open("a", encoding="utf-8") as out:
        child = subprocess.Popen(
            [*launch, "dualign", *words], stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )

    def ended(seconds: float | None) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return child.wait(seconds)
        return None

    return child.pid, ended


def _forked(words: list[str], log: Path) -> tuple[int, Ended]:
    """As `python -m dualign WORDS`, from a process that has imported what a run needs and done nothing with it: the
    imports of a small run take longer than the run."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED])
    child = context.Process(target=_as_command, args=(words, log))
    child.start()

    def ended(seconds: float | None) -> int | None:
        child.join(seconds)
        return child.exitcode

    return child.pid or 0, ended


def _as_command(words: list[str], log: Path) -> None:
    os.setsid()
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(out, stream)
    sys.argv = ["dualign", *words]
    runpy.run_module("dualign", run_name="__main__")


def _cores() -> int:
    """That this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith("to go on: ")]  # the grid's command does, too
    return lines[-1].strip()[:300] if lines else "it said nothing"
