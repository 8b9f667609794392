"""What Python is told while a run goes on."""

from __future__ import annotations

from typing import Any


class Callback:
    """Override what you need. Only the first of several processes calls; what was done before is on disk. Raise StopRun
    to stop the run cleanly: a resume reaches the same weights as if it had never stopped. Any other error ends it."""

    def on_batch(self, record: dict[str, Any]) -> None:
        """After the updates of an online batch: its line of metrics.jsonl (docs/runs.md)."""

    def on_evaluation(self, done: int, means: dict[str, Any]) -> None:
        """After an evaluation of the policy of `done` online batches on what is held out."""

    def on_end(self, summary: dict[str, Any]) -> None:
        """When the run is finished: summary.json."""
