"""Runs `dualign` command lines in fresh processes that need not import anything, and kills them when told to.

One line of JSON in: {"argv": [...], "processes": 1, "nodes": 1, "kill_after": seconds, "kill_at": n, "log": file}; one line out:
{"status": exit code or -signal, "seconds": ..., "writes": ...}. `kill_after` is SIGKILL to the whole group at an
instant; `kill_at` the same at the n-th call (of any process) that changes a file, before (even n) or after (odd n) it.

What a reward gave and nobody has written down yet is lost in a kill, and no code can help it. So none comes in that
moment: from a reward's `os.writev`, which notes what it gives, to the write of these labels, a kill waits.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import os
import signal
import struct
import sys
import time
from typing import Any


def preload() -> None:
    import accelerate  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import torch
    import torch.distributed.fsdp
    import transformers  # noqa: F401
    from transformers import LlamaForCausalLM  # noqa: F401

    torch.set_num_threads(1)


def run(order: dict[str, Any]) -> dict[str, Any]:
    counter = mmap.mmap(-1, 8)
    start = time.monotonic()
    leader = os.fork()
    if leader == 0:
        os.setsid()
        _lead(order, counter)
    deadline = start + order["kill_after"] if order.get("kill_after") else None
    calm = _Calm(order)
    while True:
        pid, status = os.waitpid(leader, os.WNOHANG if deadline else 0)
        if pid:
            break
        if deadline and time.monotonic() >= deadline and calm.begin():
            try:
                os.killpg(leader, signal.SIGKILL)
            except ProcessLookupError:  # it has not called setsid yet
                os.kill(leader, signal.SIGKILL)
            deadline = None
        time.sleep(0.001)
    with contextlib.suppress(ProcessLookupError):  # whatever is left of the group
        os.killpg(leader, signal.SIGKILL)
    calm.close()
    writes = struct.unpack("q", counter[:8])[0]
    return {"status": os.waitstatus_to_exitcode(status), "seconds": time.monotonic() - start, "writes": writes}


def _lead(order: dict[str, Any], counter: mmap.mmap) -> None:
    """The group's leader: the only process, or the parent of several that end together."""
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    world = order.get("processes", 1)
    if world == 1:
        _work(order, counter)
    ranks, local = [], -(-world // order.get("nodes", 1))
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank % local))
            os.environ.update(WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(local))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(order["port"]))
            _work(order, counter)
        ranks.append(pid)
    code = 0
    while ranks:
        pid, status = os.wait()
        ranks.remove(pid)
        failed = os.waitstatus_to_exitcode(status)
        if failed and not code:
            code = failed
            for other in ranks:
                os.kill(other, signal.SIGKILL)
    os._exit(code & 0xFF)


def _work(order: dict[str, Any], counter: mmap.mmap) -> None:
    from dualign.cli import main

    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    _count_writes(order, counter)
    sys.argv = ["dualign", *order["argv"]]
    code: Any = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)


def _count_writes(order: dict[str, Any], counter: mmap.mmap) -> None:
    kill_at, killing, giving = order.get("kill_at"), _Calm(order), _Calm(order)

    def tick() -> None:
        count = struct.unpack("q", counter[:8])[0]
        if kill_at is not None and count >= kill_at and killing.begin():
            os.killpg(0, signal.SIGKILL)
            time.sleep(60)
        counter[:8] = struct.pack("q", count + 1)

    def counted(call: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if call is write and args[0] in (1, 2):
                return call(*args, **kwargs)
            tick()
            result = call(*args, **kwargs)
            if call is write and b'"by":"0","labels"' in args[1]:
                giving.end()
            tick()
            return result

        return wrapper

    def give(file: int, parts: Any) -> int:
        giving.begin(wait=True)
        return writev(file, parts)

    write, writev = os.write, os.writev
    for name in ("write", "fsync", "replace", "unlink", "rmdir", "ftruncate", "mkdir"):
        setattr(os, name, counted(getattr(os, name)))
    os.writev = give


class _Calm:
    """A lock that one at a time has, of the processes of one run and the killer, and in a process one of these."""

    def __init__(self, order: dict[str, Any]) -> None:
        self.file = os.open(order["log"] + ".lock", os.O_WRONLY | os.O_CREAT)

    def begin(self, wait: bool = False) -> bool:
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
        return True

    def end(self) -> None:
        fcntl.flock(self.file, fcntl.LOCK_UN)

    def close(self) -> None:
        os.close(self.file)


if __name__ == "__main__":
    preload()
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)
