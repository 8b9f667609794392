"""A checkpoint as a model for others: without the training state, adapters merged or with a base that can be found,
and loaded again to see that it says the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dualign import assets
from dualign.common.durable import durable
from dualign.common.errors import UserError
from dualign.models.digests import LEFT_OUT, files_of
from dualign.models.load import load_model
from dualign.models.settings import ModelConfig

BASE = "base"  # beside an adapter, the model that it is of
BESIDE = f"the model in its folder {BASE}"
ROUNDING = {False: 1e-3, True: 5e-2}  # nats a token that a copy, and weights merged into bf16, may be away

Ids = tuple[Sequence[int], Sequence[int]]  # a prompt's, a completion's


@dataclass(frozen=True)
class Exported:
    """`what` was written. `adapter`: the base that it names; None for a whole model. `mean` and `largest`: distance of a
    completion token's log-prob from the checkpoint's, in nats, over `tokens`."""

    what: str
    adapter: str | None
    tokens: int
    mean: float
    largest: float
    logp: tuple[tuple[float, ...], ...]  # of each row that was compared

    def __str__(self) -> str:
        return (
            f"loaded again, it says what the checkpoint says: log-probs of {self.tokens} tokens differ by "
            f"{self.mean:.1e} nats on average, {self.largest:.1e} at most"
        )


def export(
    checkpoint: Path,
    out: Path,
    model: ModelConfig,
    merge: bool,
    rows: Sequence[Ids],
    base: str | None = None,
    finish: Callable[[Path, Exported], None] = lambda folder, exported: None,
) -> Exported:
    """Writes the policy of a checkpoint into `out`, as from_pretrained opens it, and compares it on `rows`. `model`: of
    the run; its precision is that of merged weights. `base`: the name that an adapter's base has elsewhere; without one,
    a base of this machine's is put beside the adapter. `finish` adds to the folder before it gets its name. Raises
    UserError where `out` is there already, or says something else than the checkpoint."""
    if out.exists():
        raise UserError(f"{out}: already there; name another folder by --out")
    adapter = assets.adapter_of(str(checkpoint))
    if base and (adapter is None or merge):
        raise UserError(f"--base names the base of an adapter; {checkpoint} is written as a whole model")
    out.parent.mkdir(parents=True, exist_ok=True)
    merging = adapter is not None and merge
    written: list[Exported] = []

    def write(aside: Path) -> None:
        if merging:
            _merge(checkpoint, aside, model)
        else:
            shutil.copytree(checkpoint, aside, ignore=shutil.ignore_patterns(*LEFT_OUT, "README.md"))
        named = _name_base(aside, adapter, base) if adapter and not merging else None
        what = f"an adapter of {named}" if named else f"the whole model{', its adapter merged' if merging else ''}"
        exported = _compared(aside, checkpoint, model, rows, what, named)
        if exported.mean > ROUNDING[merging and model.precision == "bf16"]:
            raise UserError(f"{out}: not written: it does not say what {checkpoint} says: {exported}")
        finish(aside, exported)
        written.append(exported)

    durable(out, write)
    return written[0]


def _merge(checkpoint: Path, out: Path, model: ModelConfig) -> None:
    whole, tokenizer = load_model(_as_saved(checkpoint, model), "export")
    whole.to(torch.bfloat16 if model.precision == "bf16" else torch.float32).save_pretrained(out)
    tokenizer.hf.save_pretrained(out)


def _name_base(folder: Path, adapter: assets.Adapter, name: str | None) -> str:
    """Gives an adapter a base that holds on another machine, and returns what it is called."""
    place = Path(adapter.base)
    if name is None and not place.is_dir():
        return adapter.base  # a hub's
    if name is None:
        for file in files_of(place):
            target = folder / BASE / file.relative_to(place)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    settings = folder / "adapter_config.json"
    held = json.loads(settings.read_text(encoding="utf-8"))
    held |= {"base_model_name_or_path": name or BASE, "revision": None}
    settings.write_text(json.dumps(held, indent=2) + "\n", encoding="utf-8")
    return name or BESIDE


def _as_saved(folder: Path, model: ModelConfig) -> ModelConfig:
    saved = {"name": str(folder), "revision": None, "reference": None, "lora": None, "chat_template": None,
             "attention": "sdpa"}  # fmt: skip
    return model.model_copy(update=saved)


def _compared(
    folder: Path, checkpoint: Path, model: ModelConfig, rows: Sequence[Ids], what: str, adapter: str | None
) -> Exported:
    """One model is in memory at a time."""
    expected, found = (logprobs(_as_saved(each, model), rows) for each in (checkpoint, folder))
    away = torch.cat([(a - b).abs() for a, b in zip(expected, found, strict=True)] or [torch.zeros(1)])
    logp = tuple(tuple(row.tolist()) for row in found)
    return Exported(what, adapter, sum(map(len, found)), float(away.mean()), float(away.max()), logp)


@torch.no_grad()
def logprobs(model: ModelConfig, rows: Sequence[Ids]) -> list[Tensor]:
    """Each completion's log-probs (tokens,) by a model in fp32, as transformers computes them: one row at a time."""
    hf, _ = load_model(model, "export")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hf.to(device).eval()
    found = []
    for prompt, completion in rows:
        ids = torch.tensor([[*prompt, *completion]], device=device)
        logp_TV = hf(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        found.append(logp_TV.gather(1, ids[0, len(prompt) :, None])[:, 0].cpu())
    return found
