"""`dualign view`: runs on a local page, live. It reads their folders and nothing else, and writes nothing there."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from pathlib import Path

from dualign.common.errors import UserError

HOST, PORT = "127.0.0.1", 8760
TOKEN = "DUALIGN_VIEW_TOKEN"  # the variable that gives one
TRIED = 20  # ports after PORT


def serve(
    root: Path, host: str = HOST, port: int | None = None, say: Callable[[str], None] = print, browse: bool = False
) -> None:
    """Until it is interrupted. Bound elsewhere than to this machine alone, it asks for a token. Raises UserError without
    the server's library, for a folder that is not there, and for a port that is taken."""
    try:
        import uvicorn

        from dualign.eval.view.server import application
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("dualign"):
            raise
        raise UserError(f"view needs {error.name}: pip install 'dualign[view]'") from None
    local = host in ("127.0.0.1", "localhost", "::1")
    token = None if local else os.environ.get(TOKEN) or secrets.token_urlsafe(24)
    listening = _listen(host, port)
    _calm()
    at = int(listening.getsockname()[1])
    page = application(root, token, at)
    shown = f"[{host}]" if ":" in host else socket.gethostname() if host in ("0.0.0.0", "::") else host
    address = f"http://{shown}:{at}/"
    say(f"{root}: {address}{f'?token={token}' if token else ''}")
    if token:
        say("who has this address can read the runs. The connection is not encrypted: better, reach it by ssh -L")
    say("Ctrl-C ends it; training is not touched")
    if browse:
        import webbrowser

        webbrowser.open(address)
    settings = uvicorn.Config(page, log_level="warning", access_log=False, server_header=False, lifespan="off")
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(settings).run(sockets=[listening])


def _calm() -> None:
    """Takes little of the memory and of the processors that training on the same machine needs. pyarrow reads these when
    it is loaded, and would load pandas, where it is installed, at its first conversion (half a second, 45 MB)."""
    os.environ |= {"ARROW_DEFAULT_MEMORY_POOL": "system", "ARROW_IO_THREADS": "1", "OMP_NUM_THREADS": "1"}
    sys.meta_path.insert(0, _WithoutPandas())


class _WithoutPandas(MetaPathFinder):
    def find_spec(self, name: str, path: object, target: object = None) -> None:
        if name == "pandas":
            raise ModuleNotFoundError("the page does without", name=name)


def _listen(host: str, port: int | None) -> socket.socket:
    """On `port`, or on the first free one from PORT on."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    tried = range(PORT, PORT + TRIED) if port is None else [port]
    for each in tried:
        found = socket.socket(family, socket.SOCK_STREAM)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind((host, each))
            found.listen()  # who opens the address at once waits until it is answered
            return found
        except OSError as error:
            found.close()
            why = error.strerror or str(error)
    raise UserError(f"{host}, port {', '.join(map(str, tried))}: {why}; give another one by --port")
