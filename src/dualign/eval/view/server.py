"""The server of the page: reads, never writes, and gives nothing to strangers."""

from __future__ import annotations

import hmac
import json
import logging
from collections.abc import Awaitable, Callable
from http.cookies import CookieError, SimpleCookie
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlencode

from starlette.applications import Starlette
from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route

from dualign.common.errors import UserError, clean
from dualign.common.json_text import finite
from dualign.eval.view.folders import MissingError
from dualign.eval.view.library import POINTS, Library

if TYPE_CHECKING:
    from dualign.eval.view.browser import Kind

log = logging.getLogger("dualign.view")
KINDS = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
SHARED = ("parts.js", "parts.css")  # with `dualign report`
ASSETS = {
    p.name: p for p in (resources.files("dualign.eval.view") / "static").iterdir() if Path(p.name).suffix in KINDS
}
ASSETS |= {name: resources.files("dualign.eval.report") / name for name in SHARED}
PAGES = ("/", "/curves", "/completions")
LOCAL = {"localhost", "127.0.0.1", "[::1]"}
HEADERS = {
    # nothing from elsewhere, nothing inline: whatever a completion says, it cannot run
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
Send = Callable[[Any], Awaitable[None]]


def application(root: Path, token: str | None = None, port: int = 0) -> Guard:
    """The page of the runs in `root`. With a `token` only who knows it gets an answer; without one only who asks by a
    name of this machine does. Raises UserError where there is no such folder."""
    library = Library(root)
    routes = [Route(path, _static(ASSETS["index.html"])) for path in PAGES]
    routes += [Route(f"/static/{name}", _static(asset)) for name, asset in ASSETS.items()]
    routes += [Route(f"/api/{name}", _answering(library, answer)) for name, answer in ANSWERS.items()]
    return Guard(Starlette(routes=routes), token, port)


def _static(asset: Any) -> Callable[[Request], Response]:
    """Read for each request: a few kilobytes."""

    def respond(request: Request) -> Response:
        return Response(asset.read_bytes(), media_type=KINDS[Path(asset.name).suffix])

    return respond


def _answering(library: Library, answer: Callable[[Library, Request], Any]) -> Callable[[Request], Response]:
    """JSON, or in words why there is none."""

    def respond(request: Request) -> Response:
        try:
            return _json(answer(library, request))
        except MissingError as error:
            return _json({"error": clean(str(error))}, 404)
        except (UserError, ValueError) as error:
            return _json({"error": clean(str(error))}, 400)
        except OSError as error:  # also what pyarrow says of a damaged file
            return _json({"error": clean(f"damaged or half-written: {str(error).splitlines()[0]}")}, 500)
        except Exception as error:
            log.warning("view: %s: %s", request.url.path, clean(repr(error))[:400])
            return _json({"error": f"could not be read ({type(error).__name__}); the file may be damaged"}, 500)

    return respond


def _json(value: Any, status: int = 200) -> Response:
    if value is None:
        return Response(status_code=204)
    # ensure_ascii: also half a surrogate pair gets there
    body = json.dumps(finite(value), separators=(",", ":"), allow_nan=False)
    return Response(body, status, media_type="application/json")


# --- what can be asked ---


def _runs(library: Library, request: Request) -> Any:
    found = library.runs()
    return None if request.query_params.get("have") == found["version"] else found


def _curves(library: Library, request: Request) -> Any:
    q = request.query_params
    low, high = _number(q, "from", "-inf"), _number(q, "to", "inf")
    return library.curves(q.get("run", ""), low, high, min(_whole(q.get("points"), POINTS) or 1, 20_000))


def _list(library: Library, request: Request) -> Any:
    q = request.query_params
    page = (_whole(q.get("offset"), 0), min(_whole(q.get("limit"), 40), 200))
    text, sort = q.get("q", "")[:1000], q.get("sort", "order")
    if columns := q.getlist("col"):
        return library.browser.heldout(columns[:8], text, sort, *page)
    return library.browser.listed(q.get("run", ""), text, sort, *page)


def _prompt(library: Library, request: Request) -> Any:
    q = request.query_params
    row = _whole(q.get("row"), 0)
    if columns := q.getlist("col"):
        return library.browser.held(columns[:8], row)
    return library.browser.prompt(q.get("run", ""), _whole(q.get("step"), 0), row, min(_whole(q.get("count"), 1), 256))


def _text(library: Library, request: Request) -> Any:
    q = request.query_params
    kinds: dict[str | None, Kind] = {"batches": "batches", "evaluations": "evaluations"}
    kind, column = kinds.get(q.get("kind")), q.get("column", "completion")
    if kind is None or column not in ("completion", "note", "prompt"):
        raise UserError("kind: batches or evaluations; column: completion, note or prompt")
    step, row, start = (_whole(q.get(key), 0) for key in ("step", "row", "start"))
    return library.browser.text(q.get("run", ""), kind, step, row, column, start)


ANSWERS: dict[str, Callable[[Library, Request], Any]] = {
    "runs": _runs,
    "more": lambda library, request: library.more(),
    "run": lambda library, request: library.run(request.query_params.get("run", "")),
    "curves": _curves,
    "list": _list,
    "prompt": _prompt,
    "text": _text,
}


def _number(query: QueryParams, key: str, default: str) -> float:
    text = query.get(key, default)
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{key}: {text[:40]!r} is not a number") from None


def _whole(text: str | None, default: int) -> int:
    if text is None:
        return default
    if not (text.isascii() and text.isdecimal()) or len(text) > 9:
        raise UserError(f"{text[:40]!r} is not a whole number")
    return int(text)


# --- who may ask ---


class Guard:
    """Lets a request through that has the token, or without a token one that names this machine: a page elsewhere could
    make its own name lead here (DNS rebinding). The token comes once in the address, and then in a cookie."""

    def __init__(self, app: Any, token: str | None, port: int) -> None:
        self.app, self.token = app, token
        self.cookie = f"dualign-view-{port}"

    async def __call__(self, scope: Any, receive: Any, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return  # no websockets here

        async def safe(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *((k.encode(), v.encode()) for k, v in HEADERS.items())]
            await send(message)

        await (self._refusal(scope) or self.app)(scope, receive, safe)

    def _refusal(self, scope: Any) -> Response | None:
        """None: let it through."""
        headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
        if scope["method"] not in ("GET", "HEAD"):
            return PlainTextResponse("this page is only read", 405)
        if self.token is None:
            host = headers.get("host", "").rpartition(":")[0] if _has_port(headers) else headers.get("host", "")
            if host.lower() in LOCAL:
                return None
            return PlainTextResponse("open it as http://127.0.0.1 or http://localhost", 421)
        pairs = parse_qsl(scope["query_string"].decode("latin-1"))
        given = [value for key, value in pairs if key == "token"]
        if given and self._right(given[0]):
            rest = urlencode([pair for pair in pairs if pair[0] != "token"])
            away = RedirectResponse(f"/{scope['path'].lstrip('/')}" + (f"?{rest}" if rest else ""), 303)
            away.set_cookie(self.cookie, self.token, httponly=True, samesite="strict")
            return away
        kind, _, bearer = headers.get("authorization", "").partition(" ")
        if self._right(_cookie(headers.get("cookie", ""), self.cookie)) or (
            kind.lower() == "bearer" and self._right(bearer)
        ):
            return None
        return PlainTextResponse("open the address that `dualign view` printed: it ends in ?token=...", 401)

    def _right(self, given: str) -> bool:
        return bool(self.token) and hmac.compare_digest(given.encode(), str(self.token).encode())


def _has_port(headers: dict[str, str]) -> bool:
    return headers.get("host", "").rpartition(":")[2].isdigit()


def _cookie(text: str, name: str) -> str:
    try:
        found = SimpleCookie(text).get(name)
    except CookieError:
        return ""
    return found.value if found else ""
