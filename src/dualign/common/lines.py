"""Append-only files whose every line, a checksum and JSON, is whole or not there. A kill can tear only the last one."""

from __future__ import annotations

import json
import os
import threading
import zlib
from pathlib import Path
from typing import Any

from dualign.common.errors import UserError


def seal(record: Any) -> bytes:
    body = json.dumps(record, ensure_ascii=True, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(body), body)


def unseal(line: bytes) -> Any:
    """The record of one line without its newline. Raises ValueError where a byte is not as it was written."""
    checksum, _, body = line.partition(b" ")
    if len(checksum) != 8 or int(checksum, 16) != zlib.crc32(body):
        raise ValueError("checksum")
    return json.loads(body)


def read(path: Path) -> tuple[list[Any], int]:
    """The whole records of a file (none where there is no file), and where the last of them ends, in bytes. What a
    kill tore off at the end is left out; a damaged line before that raises UserError with its number."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return [], 0
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    *whole, _torn = data.split(b"\n")
    records: list[Any] = []
    for number, line in enumerate(whole, 1):
        try:
            records.append(unseal(line))
        except ValueError:
            raise UserError(f"{path}, line {number}: damaged (its checksum does not fit)") from None
    return records, sum(len(line) + 1 for line in whole)


class Appender:
    """Adds records to a file, from any thread. A torn end is cut off first."""

    def __init__(self, path: Path, end: int) -> None:
        self.path, self._lock = path, threading.Lock()
        try:
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.ftruncate(self._file, end)
        except OSError as error:
            raise _unwritable(path, error) from None

    def add(self, record: Any, sync: bool = True) -> None:
        """One line, by one write. With `sync` it and all lines before it outlive a power cut; without, only a kill.
        Raises UserError where the disk is full; the file then ends where it did."""
        line = seal(record)
        with self._lock:
            start = os.fstat(self._file).st_size
            try:
                if os.write(self._file, line) != len(line):
                    raise OSError(28, "No space left on device")
                if sync:
                    os.fsync(self._file)
            except OSError as error:
                os.ftruncate(self._file, start)
                raise _unwritable(self.path, error) from None

    def close(self) -> None:
        with self._lock:
            os.close(self._file)
            self._file = -1


def _unwritable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"{path}: cannot be written: {error.strerror or error}. What was written before is kept; "
        "make room (or fix the folder's permissions) and resume"
    )
