"""Steps of decoding as CUDA graphs: hundreds of small kernels are launched by one call."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Hashable
from typing import Any

import torch

log = logging.getLogger(__name__)


class Graphs:
    """Runs work that changes tensors in place. The first time that a key is seen the work is run as it is, the second
    time it is recorded, and from then on it is replayed. The graphs last as long as the `with` block, since they hold
    on to the tensors that they were recorded with."""

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self.known: dict[Hashable, Any] = {}
        self.pool: Any = None

    def __enter__(self) -> Graphs:
        return self

    def __exit__(self, *exception: object) -> None:
        self.known.clear()
        self.pool = None

    def run(self, key: Hashable, work: Callable[[], None]) -> None:
        if not self.enabled:
            return work()
        if key not in self.known:
            self.known[key] = None
            return work()
        if self.known[key] is None:
            self.known[key] = self._record(work)
            if self.known[key] is None:
                return work()
        self.known[key].replay()

    def _record(self, work: Callable[[], None]) -> Any:
        """The graph of `work`, which is not run; None where the model does what a graph cannot hold. Not by
        `torch.cuda.graph`, which collects garbage and empties the allocator's cache each time."""
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                # a reward model may be at work in another thread
                graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
                try:
                    work()
                except RuntimeError:
                    with contextlib.suppress(RuntimeError):  # which says only that something failed before
                        graph.capture_end()
                    raise
                graph.capture_end()
        except RuntimeError as error:
            log.warning("decoding without CUDA graphs, which this model does not allow: %s", str(error).splitlines()[0])
            self.enabled = False
            torch.cuda.synchronize()
            return None
        torch.cuda.current_stream().wait_stream(stream)
        self.pool = graph.pool()
        return graph
