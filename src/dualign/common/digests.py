"""What something is, by sha256, and whether it is what it was. Names and places do not count."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import time
from pathlib import Path

from dualign.common.code_files import with_imports
from dualign.common.errors import UserError
from dualign.common.named import importable
from dualign.common.paths import cache_dir, path_of

Digests = dict[str, str]  # sha256 by file name, or by what else a thing is told by; empty: cannot be had
LARGE = 2**20  # bytes from which a file's digest is remembered between processes
SETTLED = 2.0  # seconds: a file that changed later than so long ago may change again within its clock's tick
IMPORTED = "imported "  # before the names of modules that a module of one's own imports


def sha256_of(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def of_file(path: str | Path) -> Digests:
    file = path_of(path)
    return {file.name: cached_sha256(file)} if file.is_file() else {}


def of_code(path: str) -> Digests:
    """The file of FILE.py:NAME or package.module:NAME, and those of the user's own modules that it imports."""
    place = path.rpartition(":")[0]
    if place.endswith(".py"):
        return _with_imported(place)
    importable(Path(os.getcwd()))
    try:
        found = importlib.util.find_spec(place)
    except Exception:  # whatever a user's package raises: whoever loads what it names says so
        return {}
    return _with_imported(found.origin) if found and found.origin else {}


def _with_imported(path: str) -> Digests:
    file = path_of(path).absolute()
    others = {name: other for name, other in with_imports([file]).items() if other != file}
    return of_file(file) | imported(others)


def imported(files: dict[str, Path]) -> Digests:
    return {f"{IMPORTED}{name}": cached_sha256(file) for name, file in files.items()}


def changed(old: Digests, new: Digests) -> str | None:
    """What of an input is not what it was, in words; None where nothing is, or it cannot be known."""
    both = old.keys() & new.keys()
    unknown = {name for name in old.keys() ^ new.keys() if name.startswith(IMPORTED)}  # seen from another folder
    unknown |= {name for name in both if ":" in old[name] and _python(old[name]) != _python(new[name])}
    old, new = ({name: sha for name, sha in one.items() if name not in unknown} for one in (old, new))
    if not old or not new or sorted(old.values()) == sorted(new.values()):
        return None
    if len(old) == len(new) == 1:
        (name, was), (now_name, now) = *old.items(), *new.items()
        what = name if name == now_name else f"{now_name} (it was {name})"
        return f"{what} has changed since the run began (sha256 {_short(was)} then, {_short(now)} now)"
    names = [name for name in dict.fromkeys([*old, *new]) if old.get(name) != new.get(name)]
    told = ", ".join(
        f"{name} (sha256 {_short(old[name])} then, {_short(new[name])} now)" if name in old and name in new
        else f"{name} ({'missing' if name in old else 'new'} now)"
        for name in names[:3]
    )  # fmt: skip
    more = f" and {len(names) - 3} more files" if len(names) > 3 else ""
    return f"{told}{more} {'has' if len(names) == 1 else 'have'} changed since the run began"


def _python(digest: str) -> str:
    """That compiled the code which the digest is of: those of two cannot be compared."""
    return digest.partition(":")[0]


def _short(digest: str) -> str:
    return digest.rpartition(":")[2][:12]


# --- files ---


def cached_sha256(path: Path) -> str:
    """Of a file's bytes: of a large one as remembered, while the file is the very same by its inode, size and times."""
    s = os.stat(path)
    if s.st_size < LARGE:
        return sha256_of(path)
    about = [str(path.resolve()), s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns]
    note = cache_dir() / "digests" / hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]
    try:
        known = note.read_text(encoding="ascii")
        if len(known) == 64:
            return known
    except (OSError, ValueError):
        pass
    found = sha256_of(path)
    if time.time() - max(s.st_mtime, s.st_ctime) > SETTLED:
        _remember(note, found)
    return found


def _remember(note: Path, text: str) -> None:
    aside = note.with_name(f".{note.name}-{os.getpid()}")
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(text, encoding="ascii")
        os.replace(aside, note)
    except OSError:  # a cache that cannot be written costs time and nothing else
        aside.unlink(missing_ok=True)
