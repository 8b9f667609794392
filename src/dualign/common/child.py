"""A server of our own: a process that ends with us, has its output in a file, and gets no secrets."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from dualign.common.errors import UserError
from dualign.common.paths import cache_dir, path_of

logger = logging.getLogger(__name__)
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "ACCELERATE_", "PYTHONPATH")
SECRETS = re.compile(r"(?:^|_)(?:API_?KEY|KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)(?:_|$)", re.I)
HUB = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")  # what fetches a model from a hub
LAST = 15  # lines of its log in an error
GRACE = 15.0  # seconds in which it may end by itself
SILENT = 5.0  # seconds of waiting after which it is said what for
PR_SET_PDEATHSIG = 1


class Child:
    """Listens on this machine alone. `what` it is, for people; `more`: of its environment; `secrets`: variables with
    keys that it needs."""

    def __init__(
        self, what: str, log: Path, port: int, more: Mapping[str, str] | None = None, secrets: Collection[str] = ()
    ) -> None:
        self.what, self.log, self.more, self.secrets = what, log, dict(more or {}), secrets
        self.port, self.url = port, f"http://127.0.0.1:{port}"
        self._process: subprocess.Popen[bytes] | None = None
        atexit.register(self.stop)

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(
        self,
        command: Sequence[str],
        answers: Callable[[], bool],
        within: float,
        *,
        folder: Path | None = None,
        with_us: signal.Signals = signal.SIGTERM,
    ) -> None:
        """Runs `command` (in `folder`) and returns once it `answers`. `with_us`: the signal that the kernel sends it when
        the thread that calls this ends, even by a SIGKILL of its process. Raises UserError, with the last lines of its
        log, where it ends before, or takes longer than `within` seconds."""
        self.stop()
        libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None

        def tie() -> None:
            """Between fork and exec."""
            if libc is not None:
                libc.prctl(PR_SET_PDEATHSIG, with_us)

        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "ab") as log:
            try:
                self._process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._environment(), cwd=folder,
                    start_new_session=True, preexec_fn=tie,
                )  # fmt: skip
            except OSError as error:
                raise UserError(f"{self.what}: {command[0]} cannot be run: {error.strerror}") from None
        began = time.monotonic()
        until, told = began + within, False
        try:
            while not (answers() and self.alive):
                if not told and time.monotonic() > began + SILENT:
                    told = True
                    logger.warning("waiting for %s to start, at most %g s; its log: %s", self.what, within, self.log)
                if not self.alive:
                    raise UserError(f"{self.what} ended as it started ({self._code()}); {self.said()}")
                if time.monotonic() > until:
                    raise UserError(f"{self.what} did not start within {within:g} s; {self.said()}")
                time.sleep(0.5)
        except BaseException:
            self.stop()
            raise

    def _environment(self) -> dict[str, str]:
        """Its modules are those of its environment, not of ours or of the folder that we are in; our keys stay ours."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(LAUNCHERS) and (name in self.secrets or not SECRETS.search(name))
        }
        return {**kept, **self.more, "PYTHONSAFEPATH": "1"}

    def _code(self) -> str:
        code = self._process.poll() if self._process else None
        return f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"

    def said(self) -> str:
        """Where its log is, and how it ends."""
        try:
            lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            lines = []
        return f"its log, {self.log}, ends:\n" + "\n".join(f"  {line[:300]}" for line in lines[-LAST:])

    def death(self) -> str | None:
        """How it ended by itself, with the end of its log; None while it lives."""
        return None if self.alive else f"{self.what} ended ({self._code()}); {self.said()}"

    def stop(self) -> None:
        """Ends it, with the processes that it started."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        with contextlib.suppress(ProcessLookupError, PermissionError):  # what it left, or would not end
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


# ---- vLLM, which samples for a run, and serves a judge of one's own ----


def vllm_python(named: str | None, key: str) -> Path:
    """The interpreter that has vllm: the one that is `named` under the setting `key`, else that of `dualign vllm-setup`.
    Raises UserError where it is not there."""
    found = vllm_place(named)
    if not found.is_file():
        made = "" if named else "; `dualign vllm-setup` makes an environment with vllm"
        raise UserError(f"{key}: no interpreter {found}{made}")
    return found


def vllm_place(named: str | None) -> Path:
    return path_of(named) if named else cache_dir() / "vllm" / "bin" / "python"


def vllm_command(python: Path, model: str, port: int, options: Sequence[str]) -> list[str]:
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    return [*command, "--host", "127.0.0.1", "--port", str(port), *options]
