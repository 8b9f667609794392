"""Keys and values of rows that are decoded side by side: prompts once, branched to their completions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

WINDOW = 128  # columns by which a GPU's attention grows: each time a graph is recorded anew


class Columns:
    """Which of a cache's columns are filled. All layers share it; they do not hold the cache, which would keep each
    other's memory until garbage is collected."""

    def __init__(self, length: int, capacity: int, device: torch.device) -> None:
        self.length, self.step = length, WINDOW if device.type == "cuda" else 1
        self.capacity = self._whole_steps(capacity)
        self.at = torch.full((1,), length, device=device)  # the column to write next, as a tensor
        self.seen = length  # columns that attention reads: from a graph's sight a number that rarely changes

    def _whole_steps(self, length: int) -> int:
        return length + -length % self.step

    def grow(self) -> None:
        """Makes room for the tokens of one more step."""
        self.length += 1
        self.seen = self._whole_steps(self.length)


class BranchCache(Cache):
    """A key-value cache with room for `rows` completions, the prompts and all new tokens from the start: a step writes
    one column instead of copying the cache."""

    one_column = True  # every call is one step, whose layers may be compiled

    def __init__(self, rows: int, columns: Columns, dtype: torch.dtype) -> None:
        super().__init__(layers=[])
        self.new_layer = lambda: _BranchLayer(rows, columns, dtype)

    def branch(self, prompts: Cache, at: int, k: int) -> None:
        """Takes over computed prompts, the first of them as prompt number `at`: one row per prompt -> K rows."""
        for i, layer in enumerate(prompts.layers):
            if i == len(self.layers):
                self.layers.append(self.new_layer())
            self.layers[i].branch(layer.keys, layer.values, at * k, k)

    @torch.compiler.disable  # it changes memory that outlasts the step
    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return super().update(*args, **kwargs)

    def newest(self) -> list[Tensor]:
        """(N, heads, head size) each: what layer after layer holds of the newest token."""
        return [x[:, :, layer.columns.length - 1] for layer in self.layers for x in (layer.keys, layer.values)]

    def select(self, rows: Tensor) -> None:
        for layer in self.layers:
            layer.select(rows)


class _BranchLayer(CacheLayerMixin):
    """keys, values: (N, heads, capacity, head size), of which the first `columns.length` positions are filled."""

    def __init__(self, rows: int, columns: Columns, dtype: torch.dtype) -> None:
        super().__init__()
        self.rows, self.columns, self.dtype = rows, columns, dtype

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        # attention under autocast rounds keys and values at every step: `dtype` keeps them rounded
        self.keys, self.values = (
            x.new_zeros(self.rows, x.shape[1], self.columns.capacity, x.shape[3], dtype=self.dtype)
            for x in (key_states, value_states)  # zeros: a masked weight of zero times what memory may hold can be NaN
        )
        self.is_initialized = True

    def branch(self, keys: Tensor, values: Tensor, row: int, k: int) -> None:
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        for own, x in ((self.keys, keys), (self.values, values)):
            assert own is not None
            rows, end = own[row : row + len(x) * k], self.columns.length
            rows[:, :, end - x.shape[2] : end].unflatten(0, (len(x), k)).copy_(x[:, None])

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        assert self.keys is not None and self.values is not None
        for own, new in ((self.keys, key_states), (self.values, value_states)):
            if own.device.type == "cpu":
                own[:, :, self.columns.length - 1 : self.columns.length] = new
            else:
                own.index_copy_(2, self.columns.at, new.to(own.dtype))
        return self.keys[:, :, : self.columns.seen], self.values[:, :, : self.columns.seen]

    def select(self, rows: Tensor) -> None:
        """Keeps `rows`, moved up within the memory that there is."""
        assert self.keys is not None and self.values is not None
        for x in (self.keys, self.values):
            x[: len(rows), :, : self.columns.length] = x[:, :, : self.columns.length].index_select(0, rows)
        self.keys, self.values = self.keys[: len(rows)], self.values[: len(rows)]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.columns.seen, 0

    def get_seq_length(self) -> int:
        return self.columns.seen - 1  # to the model the newest column; what it may see there is the mask's affair

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:  # its name in earlier versions of transformers 5
        return self.get_max_length()
