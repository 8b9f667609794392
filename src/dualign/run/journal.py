"""What an unfinished online batch has so far, so that a killed run neither labels nor decides anything twice.

Beside the Parquet file that it will become, each process appends to NUMBER.RANK.journal: every completion as it is
finished, and every annotator's labels the moment they are returned. A completion is in the journal before its label
is, so a label always belongs to the very text that was labelled. The files go once the Parquet file is durable.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

from dualign.common import lines
from dualign.common.errors import UserError
from dualign.common.types import Label, Rollout
from dualign.rollout.base import Request

log = logging.getLogger(__name__)
GRACE = 10.0  # seconds that a run which is stopped waits for labels in flight


class Book:
    """What one batch has so far, as one process sees it: it reads all processes' files and adds to its own. Without a
    `stem` it holds nothing and keeps nothing. Raises UserError for a damaged file."""

    def __init__(self, stem: Path | None = None, rank: int = 0) -> None:
        self._rollouts: dict[int, dict[str, Any]] = {}
        self._labels: dict[str, dict[int, Label]] = {}
        self._behaviour: dict[int, list[float]] = {}
        self._file: lines.Appender | None = None
        self.ending = False  # whether the run is being stopped: nothing more is to be asked for
        if stem is None:
            return
        mine, end = stem.with_name(f"{stem.name}.{rank}.journal"), 0
        for path in files_of(stem):
            try:
                records, size = lines.read(path)
            except UserError as error:
                raise UserError(f"{error}; delete it and resume: its labels will be asked for again") from None
            end = size if path == mine else end
            for record in records:
                self._take(record)
        self._file = lines.Appender(mine, end)

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def _take(self, record: dict[str, Any]) -> None:
        if "index" in record:
            self._rollouts[record["index"]] = record
        elif "behaviour" in record:
            self._behaviour |= {int(i): logp for i, logp in record["behaviour"].items()}
        elif "labels" in record:
            found = {int(i): Label(*entry) for i, entry in record["labels"].items()}
            self._labels.setdefault(record["by"], {}).update(found)
        else:
            self._forget_absent()

    # --- completions ---

    def rollouts(self, requests: Sequence[Request], k: int) -> dict[int, Rollout]:
        """Those of `requests` that were finished before, by index."""
        found = {}
        for request in requests:
            for index in range(request.group * k, (request.group + 1) * k):
                if (record := self._rollouts.get(index)) is not None:
                    found[index] = _rollout(record, request)
        return found

    def add_rollout(self, rollout: Rollout) -> None:
        if self._file is None:
            return
        record = {
            "index": rollout.index,
            "prompt": rollout.prompt.id,
            "ids": rollout.completion_ids,
            "text": rollout.text,
            "finish": rollout.finish,
            "logp": rollout.sampler_logp,
        }
        self._file.add(record, sync=False)  # synced with the label; without one, it can be sampled again

    @property
    def behaviour(self) -> dict[int, list[float]]:
        """log μ per token by index, where the batch was sampled ahead and has been scored; else nothing."""
        return self._behaviour

    def add_behaviour(self, logp: Mapping[int, list[float]], mine: Collection[int]) -> None:
        """Writes down those that are `mine`. Returns once they are on disk, and with them this process's completions."""
        self._behaviour = dict(logp)
        if self._file is not None:
            self._file.add({"behaviour": {str(i): logp[i] for i in sorted(mine)}})

    # --- labels ---

    def labels(self, annotator: str) -> Mapping[int, Label]:
        """What the annotator said before, by index."""
        return self._labels.get(annotator, {})

    def add_labels(self, annotator: str, labels: Mapping[int, Label]) -> None:
        if self._file is None or not labels:
            return
        entries = {str(i): (x.value, x.reason, dict(x.parts), x.note) for i, x in labels.items()}
        self._file.add({"by": annotator, "labels": entries})

    def retry_absent(self) -> None:
        """A resume asks again for the labels that could not be had."""
        self._forget_absent()
        if self._file is not None:
            self._file.add({"retry": "absent"})

    def _forget_absent(self) -> None:
        for by, labels in self._labels.items():
            self._labels[by] = {i: label for i, label in labels.items() if label.value is not None}


class Journal:
    """The books of the batches in progress: of one, or where batches are sampled ahead of several. The batch that began
    last is the current one; what is opened while it is stays with it."""

    def __init__(self, rank: int = 0) -> None:
        self.rank, self.current = rank, Book()
        self._books: dict[Path, Book] = {}
        self._expected: list[Future[Any]] = []

    def expect(self, labels: Future[Any]) -> None:
        """Labels are on their way to a book: `end` waits for them."""
        self._expected = [*(each for each in self._expected if not each.done()), labels]

    def begin(self, stem: Path) -> Book:
        """Of the batch whose file will be STEM.parquet, beside those that are in progress."""
        self.end(stem)
        self.current = self._books[stem] = Book(stem, self.rank)
        return self.current

    def end(self, stem: Path | None = None) -> None:
        """Closes the book of one batch; or all, with what arrives within GRACE seconds for a run that is stopped. No label
        is asked for any more."""
        if stem is None:
            self._settle()
        for each in [stem] if stem else list(self._books):
            if (book := self._books.pop(each, None)) is not None:
                book.close()
                self.current = Book() if self.current is book else self.current

    def _settle(self) -> None:
        for book in self._books.values():
            book.ending = True
        at_once = isinstance(sys.exception(), KeyboardInterrupt)  # the second Ctrl-C
        if late := wait(self._expected, 0 if at_once else GRACE).not_done:
            log.warning("the labels of %d batches did not come in time: a resume asks for them again", len(late))


def files_of(stem: Path) -> list[Path]:
    """The journals of one batch, of all processes."""
    return sorted(stem.parent.glob(f"{stem.name}.*.journal"))


def _rollout(record: dict[str, Any], request: Request) -> Rollout:
    if record["prompt"] != request.prompt.id:
        raise UserError(
            f"the training data is not what it was: completion {record['index']} of the batch in progress was sampled "
            f"for prompt {record['prompt']!r}, which is now {request.prompt.id!r}; put the data back and resume"
        )
    return Rollout(
        index=record["index"],
        group=request.group,
        prompt=request.prompt,
        prompt_ids=request.prompt_ids,
        completion_ids=tuple(record["ids"]),
        text=record["text"],
        finish=record["finish"],
        sampler_logp=tuple(record["logp"]),
    )
