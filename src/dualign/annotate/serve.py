"""A judge of one's own: `serve: MODEL` starts vLLM or `transformers serve` as a child. All rewards that name it alike
share one server on each machine; it ends with the last of them, and with us."""

from __future__ import annotations

import contextlib
import hashlib
import json
import signal
import threading
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from pydantic import Field, model_validator

from dualign.common.child import HUB, Child, free_port, vllm_command, vllm_python
from dualign.common.errors import UserError
from dualign.common.paths import cache_dir
from dualign.common.processes import Processes
from dualign.common.settings import Settings

if TYPE_CHECKING:
    from dualign.annotate.endpoints import Endpoint

E = TypeVar("E", bound="Endpoint")
TRANSFORMERS = "from transformers.cli.transformers import main; main()"


class Serve(Settings):
    """A model, and how it is served."""

    PATHS: ClassVar[tuple[str, ...]] = ("model", "python")
    model: str = Field(description="a folder, an embedded model or a hub name")
    by: Literal["vllm", "transformers"] = Field("vllm", description="what serves it")
    python: str | None = Field(
        None, description="the interpreter that has it; default: vllm's that of `dualign vllm-setup`, else this one"
    )
    devices: str | int | None = Field(
        None, description="GPUs that it sees, as 1 or '2,3' (CUDA_VISIBLE_DEVICES); default: those that the run sees"
    )
    gpu_memory: float = Field(
        0.4, gt=0, lt=1, description="share of each GPU's memory that vllm takes; on a CPU of the machine's"
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field("auto", description="of its weights")
    max_model_len: int | None = Field(None, ge=2, description="tokens of a prompt and its reply, for vllm")
    tensor_parallel: int = Field(1, ge=1, description="GPUs that vllm divides the model over")
    args: list[str] = Field(default_factory=list, description="more of its command line, as [--enforce-eager]")
    start_timeout: float = Field(600.0, gt=0, description="seconds within which it must answer")

    @model_validator(mode="after")
    def _are_read(self) -> Serve:
        for key in ("gpu_memory", "max_model_len", "tensor_parallel"):
            if self.by == "transformers" and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} is vllm's: `transformers serve` takes all that the model needs")
        return self

    @property
    def beside(self) -> bool:
        """Whether it shares the GPUs of the run."""
        return self.devices is None

    def check(self) -> None:
        """Raises UserError for what cannot be started, as far as that is known before."""
        from dualign.assets import resolve

        if self.by == "vllm":
            vllm_python(self.python, "serve.python")
        elif self.python and not Path(self.python).is_file():
            raise UserError(f"serve.python: no interpreter {self.python}")
        resolve(self.model)

    def describe(self) -> str:
        where = f"GPU {self.devices}" if not self.beside else "the run's GPU"
        share = f", {self.gpu_memory:.0%} of its memory" if self.by == "vllm" else ""
        return f"served by {self.by} on {where}{share}"


@dataclass
class Server:
    """One that runs, for `users`. `child`: None where another process of this machine has it."""

    url: str
    model: str  # its name there
    child: Child | None
    kept: bool  # whether its log is a run's
    users: int = 0

    @property
    def dead(self) -> bool:
        return self.child is not None and not self.child.alive

    def death(self) -> str | None:
        """How it ended, if it did."""
        return self.child.death() if self.child else None


_running: dict[str, Server] = {}
_lock = threading.RLock()


def join(settings: E, folder: Path | None) -> tuple[E, Server | None]:
    """The settings with the address of a server, which is started where none runs yet, and the server, to be left by
    `leave`; for one that was given, `settings` and None. `folder`: where its log is kept. Raises UserError where it
    does not start."""
    if settings.serve is None:
        return settings, None
    with _lock:
        key = _key(settings)
        server = _running.get(key)
        if server is None or server.dead:
            server = _running[key] = _start(settings, folder)
        server.users += 1
    return settings.model_copy(update={"base_url": server.url, "model": server.model}), server


def leave(server: Server | None) -> None:
    """Ends it with its last user."""
    if server is None:
        return
    with _lock:
        server.users -= 1
        if server.users:
            return
        for key in [key for key, each in _running.items() if each is server]:
            del _running[key]
    if server.child is not None:
        keep = server.kept or server.dead
        server.child.stop()
        if not keep:
            server.child.log.unlink(missing_ok=True)


@contextlib.contextmanager
def held(rewards: Sequence[Any], folder: Path | None = None, processes: Processes | None = None) -> Iterator[None]:
    """Servers of those `rewards` that want one run within, and on for whoever has joined them. Of several `processes`
    the first on each machine starts them, and all come here."""
    mine: list[Server] = []
    try:
        for settings in rewards:
            if getattr(settings, "serve", None) is None:
                continue
            if processes is not None and processes.world > 1:
                _share(settings, folder, processes)
            if server := join(settings, folder)[1]:
                mine.append(server)
        yield
    finally:
        for server in mine:
            leave(server)


def _share(settings: Endpoint, folder: Path | None, processes: Processes) -> None:
    machine, first = processes.machine

    def start() -> list[tuple[int, str, str]]:
        if not first:
            return []
        key = _key(settings)
        with _lock:
            server = _running.get(key) or _running.setdefault(key, _start(settings, folder))
        return [(machine, server.url, server.model)]

    for where, url, model in processes.everyones(start):
        if where == machine and not first:
            _running.setdefault(_key(settings), Server(url, model, None, True))


def _key(settings: Endpoint) -> str:
    assert settings.serve is not None
    return json.dumps([settings.serve.model_dump(mode="json"), settings.model, settings.SERVED_BY], sort_keys=True)


def folder_of(serve: Serve) -> Path | None:
    """The model's folder; None where a hub has it."""
    from dualign.assets import resolve

    found = Path(resolve(serve.model))
    return found.absolute() if found.is_dir() else None


def _name(settings: Endpoint, folder: Path | None) -> str:
    """What labels are kept under: a folder's by its content, unless it was given a name."""
    serve = settings.serve
    assert serve is not None
    if folder is None or settings.model != serve.model:
        return settings.model
    from dualign.models.digests import of_model

    content = json.dumps(of_model(str(folder)), sort_keys=True)
    return f"{folder.name}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"


def _start(settings: Endpoint, run_dir: Path | None) -> Server:
    serve = settings.serve
    assert serve is not None
    serve.check()
    folder = folder_of(serve)
    name, place = _name(settings, folder), cache_dir() / "servers"
    place.mkdir(parents=True, exist_ok=True)
    port = free_port()
    log = (run_dir or place) / f"server-{name.replace('/', '-')}{'' if run_dir else f'-{port}'}.log"
    more = {"VLLM_NO_USAGE_STATS": "1"} | ({} if serve.beside else {"CUDA_VISIBLE_DEVICES": str(serve.devices)})
    child = Child(f"the server of {name} ({serve.by})", log, port, more, HUB if folder is None else ())
    if serve.by == "vllm":
        options = ["--served-model-name", name, "--dtype", serve.dtype, "--uvicorn-log-level", "warning"]
        options += ["--gpu-memory-utilization", str(serve.gpu_memory)]
        options += ["--tensor-parallel-size", str(serve.tensor_parallel), *settings.SERVED_BY]
        options += ["--max-model-len", str(serve.max_model_len)] if serve.max_model_len else []
        model = str(folder or serve.model)
        command = vllm_command(vllm_python(serve.python, "serve.python"), model, port, options + serve.args)
        child.start(command, lambda: _healthy(child.url), serve.start_timeout)
    else:  # it answers to the name of what it loads alone: a link of that name
        if folder is not None:
            _link(place / name, folder)
        command = [*_transformers(serve), name, "--host", "127.0.0.1", "--port", str(port), "--dtype", serve.dtype]
        killed = signal.SIGKILL  # asked to end it would first finish what it is generating
        answers, within = (lambda: _healthy(child.url)), serve.start_timeout
        child.start([*command, *serve.args], answers, within, folder=place, with_us=killed)
    return Server(f"{child.url}/v1", name, child, run_dir is not None)


def _transformers(serve: Serve) -> list[str]:
    import sys

    return [serve.python or sys.executable, "-c", TRANSFORMERS, "serve"]


def _link(link: Path, folder: Path) -> None:
    if link.is_symlink() and link.resolve() == folder.resolve():
        return
    aside = link.with_name(f".{link.name}.{free_port()}")
    aside.symlink_to(folder)
    aside.replace(link)


def _healthy(url: str) -> bool:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy between us
    try:
        with direct.open(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
