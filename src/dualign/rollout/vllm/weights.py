"""Weights on their way to servers: a fresh folder for each sync, as vLLM opens it."""

from __future__ import annotations

import copy
import itertools
import json
import os
import shutil
import socket
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dualign.common.durable import remove
from dualign.common.errors import UserError
from dualign.models.adapters import adapter_weights, bare, base_weights
from dualign.models.policy import Policy
from dualign.models.tokenizer import Tokenizer
from dualign.rollout.base import Weights

SHARD = 2**31  # bytes of a file, about
NUMBERS = itertools.count(1)  # of this process's folders


class Folders:
    """NAME/1, NAME/2, ...: a server that reads one again may see what it was before. Beside them stands NAME.log, what a
    server of our own says. NAME is of this machine and process: what runs of before left is known by it, and removed.

    `untie`: with a head of its own for a model whose head is the embedding. Every process of the run calls the methods
    that read weights, for they may be read together; the `writer` alone writes."""

    def __init__(self, place: Path, policy: Policy, tokenizer: Tokenizer, untie: bool, writer: bool) -> None:
        self.policy, self.tokenizer, self.untie, self.writer = policy, tokenizer, untie, writer
        self.made: list[Path] = []
        self.place = place / f"{socket.gethostname()}-{os.getpid()}"

    def make(self) -> Sequence[None]:
        """The writer's place, without what runs of before left. Raises UserError where it cannot be made."""
        place, host = self.place.parent, socket.gethostname()
        try:
            self.place.mkdir(parents=True, exist_ok=True)
            for left in place.glob(f"{host}-*"):
                process = left.name.removeprefix(f"{host}-").removesuffix(".log")
                if process.isdigit() and not _lives(int(process)):
                    with suppress(FileNotFoundError):  # another run has removed it meanwhile
                        remove(left)
        except OSError as error:
            raise UserError(f"rollout.options.weights_dir: {place}: cannot be written: {error.strerror}") from None
        return ()

    def whole(self, weights: Weights, turned: bool = False) -> Path:
        """All weights. `turned`: with the rows of the embedding and the head moved up by one, so that the model says of a
        text what it said of another, whose ids are all less by one."""
        named = _vocabulary(self.policy)

        def moved() -> Iterator[tuple[str, Tensor]]:
            for name, value in weights():
                yield name, value.roll(1, 0) if turned and name in named else value

        return self._write(self._next(), moved(), None)

    def base(self) -> Path:
        """The model under the adapters."""
        dtype = self.policy.dtype
        named = base_weights(self._holder())
        rounded = ((name, value.to(dtype) if value.is_floating_point() else value) for name, value in named)
        return self._write(self.place / "base", rounded, None)

    def adapter(self) -> Path:
        """The adapter alone."""
        model = self._holder()
        return self._write(self._next(), adapter_weights(model), model.peft_config["default"])

    def _holder(self) -> Any:
        """The model that has the weights, or its share of them."""
        return self.policy.divided().model if self.policy.divided else self.policy.model

    def _next(self) -> Path:
        """The next folder's name. The folder before last goes."""
        self.made.append(self.place / str(next(NUMBERS)))
        if self.writer and len(self.made) > 2:
            shutil.rmtree(self.made.pop(0), ignore_errors=True)
        return self.made[-1]

    def _write(self, folder: Path, weights: Iterator[tuple[str, Tensor]], adapter: Any) -> Path:
        """Reads all weights, and writes them where this process is the writer. Raises UserError where it cannot."""
        if not self.writer:
            for _ in weights:
                pass
            return folder
        folder.mkdir(parents=True, exist_ok=True)
        files = _Files(folder, "adapter_model" if adapter else "model")
        skipped = () if self.untie or adapter else _tied(self.policy)
        for name, value in weights:
            if name not in skipped:
                files.add(name, value)
        files.end()
        if adapter:
            adapter.save_pretrained(str(folder))
        else:
            self._describe(folder)
        return folder

    def _describe(self, folder: Path) -> None:
        """What a server reads beside the weights."""
        model = bare(self.policy.model)
        config = copy.deepcopy(model.config)
        config.dtype, config.architectures = self.policy.dtype, [type(model).__name__]
        if self.untie:
            for part in (config, config.get_text_config()):
                part.tie_word_embeddings = False
        config.save_pretrained(folder)
        self.tokenizer.hf.save_pretrained(folder)

    def remove(self) -> None:
        shutil.rmtree(self.place, ignore_errors=True)


class _Files:
    """Tensors into safetensors files. A disk's fault waits for the end: others may be reading with us until then."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name, self.fault = folder, name, ""
        self.held: dict[str, Tensor] = {}
        self.index: dict[str, str] = {}

    def add(self, name: str, value: Tensor) -> None:
        self.held[name] = value.detach().cpu().contiguous().clone()
        if sum(tensor.nbytes for tensor in self.held.values()) > SHARD:
            self.flush(f"{self.name}-{len(set(self.index.values())) + 1:05d}.safetensors")

    def flush(self, file: str) -> None:
        self.index |= dict.fromkeys(self.held, file)
        try:
            if self.held and not self.fault:
                save_file(self.held, self.folder / file, metadata={"format": "pt"})
        except (OSError, SafetensorError) as error:
            self.fault = str(error)
        self.held = {}

    def end(self) -> None:
        if self.index:
            self.flush(f"{self.name}-{len(set(self.index.values())) + 1:05d}.safetensors")
            text = json.dumps({"metadata": {}, "weight_map": self.index})
            (self.folder / f"{self.name}.safetensors.index.json").write_text(text)
        else:
            self.flush(f"{self.name}.safetensors")
        if self.fault:
            raise UserError(
                f"{self.folder}: weights cannot be written for the server: {self.fault}. Make room and resume"
            )


def _vocabulary(policy: Policy) -> set[str]:
    """The names of the tensors that have a row for every token: the embedding's and the head's."""
    model = bare(policy.model)
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    found = [name for name, module in model.named_modules() if any(module is end for end in ends)]
    return {f"{name}.{part}" for name in found for part in ("weight", "bias")}


def _tied(policy: Policy) -> tuple[str, ...]:
    """The head's weight, where it is the embedding's."""
    model = bare(policy.model)
    head = model.get_output_embeddings()
    tied = head is not None and getattr(head, "weight", None) is model.get_input_embeddings().weight
    return tuple(f"{name}.weight" for name, module in model.named_modules() if module is head) if tied else ()


def is_tied(policy: Policy) -> bool:
    return bool(_tied(policy))


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
