"""A vLLM server of the run's own: a process in an environment of its own, that ends with the run."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from dualign.common.errors import UserError

LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "ACCELERATE_", "PYTHONPATH")
LAST = 15  # lines of its log in an error
GRACE = 15.0  # seconds in which it may end by itself
PR_SET_PDEATHSIG = 1


class Child:
    """Listens on this machine alone: whoever reaches its routes may change its weights."""

    def __init__(
        self, interpreter: Path, options: Sequence[str], more: Mapping[str, str], log: Path, port: int
    ) -> None:
        self.interpreter, self.options, self.more, self.log = interpreter, options, more, log
        self.port, self.url = port, f"http://127.0.0.1:{port}"
        self._process: subprocess.Popen[bytes] | None = None
        atexit.register(self.stop)

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self, model: str, answers: Callable[[], bool], within: float) -> None:
        """With the weights of `model`; returns once it `answers`. Raises UserError, with the last lines of its log, where
        it ends before, or takes longer than `within` seconds."""
        self.stop()
        command = [str(self.interpreter), "-m", "vllm.entrypoints.openai.api_server", "--model", model]
        command += ["--host", "127.0.0.1", "--port", str(self.port), *self.options]
        # its modules are those of its environment, not of ours or of the folder that we are in
        env = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
        libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None

        def with_us() -> None:
            """Between fork and exec: the kernel ends it when we die, even by SIGKILL."""
            if libc is not None:
                libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

        with open(self.log, "ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**env, **self.more, "PYTHONSAFEPATH": "1"},
                start_new_session=True, preexec_fn=with_us,
            )  # fmt: skip
        until = time.monotonic() + within
        try:
            while not answers():
                if not self.alive:
                    raise UserError(
                        f"the vLLM server ended as it started (exit code {self._process.poll()}); {self.said()}"
                    )
                if time.monotonic() > until:
                    raise UserError(f"the vLLM server did not start within {within:g} s; {self.said()}")
                time.sleep(0.5)
        except BaseException:
            self.stop()
            raise

    def said(self) -> str:
        """Where its log is, and how it ends."""
        try:
            lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            lines = []
        return f"its log, {self.log}, ends:\n" + "\n".join(f"  {line[:300]}" for line in lines[-LAST:])

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
