"""A Python function as the reward, in the calling convention of TRL's GRPOTrainer (docs "Using a custom reward
function"): called once per batch with keyword arguments `prompts`, `completions`, `completion_ids` and every other data
column, each a list of one entry per completion; it returns one number, or None (no label), per completion.

Conversational prompts come as message lists and their completions as [{"role": "assistant", "content": ...}]; plain
ones as text. A function without **kwargs is given only what it names. It may be `async`.
"""

from __future__ import annotations

import asyncio
import difflib
import inspect
import queue
import sys
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from dualign.annotate.base import BatchSession, Item, Session
from dualign.annotate.settings import RewardSettings
from dualign.common.errors import RewardError, UserError
from dualign.common.named import load_named, place_of
from dualign.common.types import Label

RewardFunction = Callable[..., Any]


def name_of(reward: Any) -> str:
    """What a reward that is given in Python is called in logs and in a run's folder."""
    named = getattr(reward, "__name__" if callable(reward) else "name", None)
    return str(named or type(reward).__name__)


class FunctionAnnotator:
    """Labels a batch by one call of `function`. With a `timeout` (seconds) a late batch is absent; its call, if it is
    not async, cannot be killed and runs on in the background."""

    whole_batch = True  # several processes ask once, for the completions of all

    def __init__(self, function: RewardFunction, name: str | None = None, timeout: float | None = None) -> None:
        if not callable(function):
            raise UserError(f"reward: expected a function, got a value of type {type(function).__name__}")
        self.function = function
        self.name = name or name_of(function)
        self.timeout = timeout

    def open(self) -> Session:
        return BatchSession(self.label)

    def close(self) -> None:
        """Nothing is held open."""

    def label(self, items: Sequence[Item]) -> list[Label]:
        """One label per item, in order. Raises RewardError for a function that raises or returns something else than
        one finite number or None per completion."""
        try:
            return self._labels(items)
        except UserError as error:
            raise RewardError(str(error)) from error.__cause__

    def _labels(self, items: Sequence[Item]) -> list[Label]:
        try:
            result = _in_thread(self.function, self._accepted(arguments(items)), self.timeout)
        except _LateError:
            return [Label.absent(f"{self.name} took longer than {self.timeout:g} s") for _ in items]
        except _RaisedError as raised:
            error = raised.error
            raise UserError(
                f"reward function {self.name} raised {type(error).__name__}: {error}{place_of(error)} "
                f"(in a batch of {len(items)}; its first row is prompt {items[0].prompt.id!r})"
            ) from error
        values = result.tolist() if hasattr(result, "tolist") else result
        if not isinstance(values, list | tuple):
            raise UserError(f"reward function {self.name} returned {type(values).__name__}, not a list of numbers")
        if len(values) != len(items):
            raise UserError(f"reward function {self.name} returned {len(values)} values for {len(items)} completions")
        return [self._label(value, item) for value, item in zip(values, items, strict=True)]

    def _label(self, value: Any, item: Item) -> Label:
        value = value.item() if hasattr(value, "item") else value  # numpy and torch scalars
        if value is None:
            return Label.absent(f"{self.name} returned None")
        where = f"reward function {self.name}, completion {item.index} (prompt {item.prompt.id!r})"
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"{where}: returned {value!r}; expected a number (float(...) turns it into one) or None")
        if not abs(value) <= sys.float_info.max:  # NaN, infinite, or an int that no float holds
            raise UserError(f"{where}: returned {str(value)[:20]}; return None where there is no reward")
        return Label(float(value))

    def _accepted(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments that the function takes. Raises UserError where it requires one that there is not."""
        try:
            parameters = inspect.signature(self.function).parameters.values()
        except ValueError:  # a builtin without a signature
            return dict(given)
        required = [
            p.name for p in parameters if p.default is p.empty and p.kind not in {p.VAR_POSITIONAL, p.VAR_KEYWORD}
        ]
        if missing := [name for name in required if name not in given]:
            near = difflib.get_close_matches(missing[0], given, 1)
            raise UserError(
                f"reward function {self.name} takes {missing[0]!r}, which the data does not have; there are "
                f"{', '.join(given)}" + (f"; did you mean {near[0]!r}?" if near else "")
            )
        if any(p.kind is p.VAR_KEYWORD for p in parameters):
            return dict(given)
        names = {p.name for p in parameters}
        return {name: values for name, values in given.items() if name in names}


def arguments(items: Sequence[Item]) -> dict[str, list[Any]]:
    """The keyword arguments of one call; rows that lack a column have None there. As in TRL, columns called prompt,
    completion or completion_ids are not passed on. Without the tokens of every row there are no `completion_ids`."""
    chat = [item.prompt.conversational for item in items]
    columns = dict.fromkeys(key for item in items for key in item.prompt.columns)
    for reserved in ("prompt", "completion", "prompts", "completions", "completion_ids"):
        columns.pop(reserved, None)
    ids = [None if item.completion_ids is None else list(item.completion_ids) for item in items]
    return {
        "prompts": [item.prompt.messages if c else item.prompt.content for c, item in zip(chat, items, strict=True)],
        "completions": [
            [{"role": "assistant", "content": item.completion}] if c else item.completion
            for c, item in zip(chat, items, strict=True)
        ],
        **({"completion_ids": ids} if None not in ids else {}),
        **{key: [item.prompt.columns.get(key) for item in items] for key in columns},
    }


def load_function(path: str) -> RewardFunction:
    """The function at FILE.py:NAME or package.module:NAME. Raises UserError naming what is missing."""
    function: RewardFunction = load_named(path, "reward function")
    if not callable(function):
        raise UserError(f"reward function {path}: it is no function but a value of type {type(function).__name__}")
    if isinstance(function, type) and issubclass(function, RewardSettings):
        raise UserError(f"reward function {path}: it is a reward's settings: write {{type: {path}}}")
    return function


class _LateError(Exception):
    """No answer within the timeout."""


class _RaisedError(Exception):
    """What the function raised, whatever it was."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


def _in_thread(function: RewardFunction, kwargs: Mapping[str, Any], timeout: float | None) -> Any:
    """The function's answer. It runs in a thread of its own, so that a call that hangs holds up nothing but itself."""
    answer: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue()

    def work() -> None:
        try:
            result = function(**kwargs)
            answer.put((asyncio.run(_await(result, timeout)) if inspect.isawaitable(result) else result, None))
        except BaseException as error:  # SystemExit too: it must not end this thread unheard
            answer.put((None, error))

    threading.Thread(target=work, name="reward", daemon=True).start()
    try:
        result, error = answer.get(timeout=timeout)
    except queue.Empty:
        raise _LateError from None
    if isinstance(error, _LateError):
        raise error
    if error is not None:
        raise _RaisedError(error)
    return result


async def _await(result: Awaitable[Any], timeout: float | None) -> Any:
    scope = asyncio.timeout(timeout)
    try:
        async with scope:
            return await result
    except TimeoutError:
        if scope.expired():  # ours, not one that the function raised itself
            raise _LateError from None
        raise
