"""Runs `dualign` command lines in fresh processes that need not import anything, and kills them when told to.

One line of JSON in: {"argv": [...], "processes": 1, "nodes": 1, "kill_after": seconds, "kill_at": n, "log": file}; one line out:
{"status": exit code or -signal, "seconds": ..., "writes": ...}. `kill_after` is SIGKILL to the whole group at an
instant; `kill_at` the same at the n-th call (of any process) that changes a file, before (even n) or after (odd n) it.
"""

from __future__ import annotations

import contextlib
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
    while True:
        pid, status = os.waitpid(leader, os.WNOHANG if deadline else 0)
        if pid:
            break
        if deadline and time.monotonic() >= deadline:
            try:
                os.killpg(leader, signal.SIGKILL)
            except ProcessLookupError:  # it has not called setsid yet
                os.kill(leader, signal.SIGKILL)
            deadline = None
        time.sleep(0.001)
    with contextlib.suppress(ProcessLookupError):  # whatever is left of the group
        os.killpg(leader, signal.SIGKILL)
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
    _count_writes(order.get("kill_at"), counter)
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


def _count_writes(kill_at: int | None, counter: mmap.mmap) -> None:
    def counted(call: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if call is write and args[0] in (1, 2):
                return call(*args, **kwargs)
            _tick(kill_at, counter)
            result = call(*args, **kwargs)
            _tick(kill_at, counter)
            return result

        return wrapper

    write = os.write
    for name in ("write", "fsync", "replace", "unlink", "rmdir", "ftruncate", "mkdir"):
        setattr(os, name, counted(getattr(os, name)))


def _tick(kill_at: int | None, counter: mmap.mmap) -> None:
    count = struct.unpack("q", counter[:8])[0]
    if count == kill_at:
        os.killpg(0, signal.SIGKILL)
        time.sleep(60)
    counter[:8] = struct.pack("q", count + 1)


if __name__ == "__main__":
    preload()
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)
