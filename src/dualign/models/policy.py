"""The policy: the one forward pass that scoring and training share."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dualign.models.load import load_model
from dualign.models.logprobs import token_logp
from dualign.models.master import LightEmbedding, round_linears
from dualign.models.on_disk import move_to_file
from dualign.models.packing import MicroBatch, Tokens, pack
from dualign.models.tokenizer import Tokenizer

__all__ = ["Policy", "Tokenizer", "load_model"]

log = logging.getLogger(__name__)


class Policy(nn.Module):
    """A causal LM seen as π: `forward(micro_batch)` gives log π per completion token.

    precision "bf16" means autocast's numbers: fp32 residual stream and norms, matrix products in bf16, log-normalisers
    in fp32. π_0, π_t and π_θ all go through this one path, so equal weights give equal log-probs.
    """

    def __init__(self, model: Any, precision: str, share: bool = True) -> None:
        super().__init__()
        self.model, self.precision, self.share, self.flash = model, precision, False, False
        self.base = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
        self.head = model.get_output_embeddings()
        self.plain_head = self._head_is_linear()
        self._rounded: Any = None
        self._rounded_of: Any = None  # the weight that it is the rounding of
        self.rest: Callable[[], None] = lambda: None  # lets go of memory that is not needed until the next use
        LightEmbedding.take(model.get_input_embeddings())
        if share and model.config._attn_implementation == "sdpa":
            self.share = self._try_sharing()
            self.flash = self.share and self.device.type == "cuda" and self._try_flash()
        if precision == "bf16":
            self._round_norms()

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16) if self.precision == "bf16" else nullcontext()

    def pack(self, tokens: Tokens, rows: Sequence[int], pad_id: int) -> MicroBatch:
        """Rows of `tokens` as a micro-batch of the kind that this model takes, where it is."""
        return pack(tokens, rows, tokens.width, pad_id, self.share, self.flash).to(self.device)

    def hidden(self, micro: MicroBatch) -> Tensor:
        """(M, H): what the decoder says at the positions that are scored."""
        out = self.base(**_inputs(micro)).last_hidden_state
        return out.flatten(0, 1).index_select(0, micro.predictor_M)

    def forward(self, micro: MicroBatch) -> Tensor:
        """(n, T) log π(token | before), untempered, 0 beyond each completion's end."""
        with self.autocast():
            if self.plain_head:
                logp_M = token_logp(self.hidden(micro), self.head.weight, self.rounded_head(), micro.target_M)
            else:  # a head that scales, caps or shifts its logits: let the model do it
                logits_MV = self.model(**_inputs(micro)).logits.flatten(0, 1).index_select(0, micro.predictor_M)
                logp_M = torch.log_softmax(logits_MV.float(), -1).gather(1, micro.target_M[:, None])[:, 0]
        return micro.scatter(logp_M)

    def rounded_head(self) -> Tensor:
        """(V, H): the head's weight in the dtype of its products, rounded anew only when it has changed. Whoever steps
        an optimizer says so by `stepped`: fused ones do not count a weight's version up."""
        weight = self.head.weight
        if weight.dtype == self.dtype:
            return weight.detach()
        if self._rounded_of != self._head_version():
            with torch.inference_mode(False), torch.no_grad():
                if self._rounded is None or self._rounded.device != weight.device:
                    self._rounded = torch.empty_like(weight, dtype=self.dtype)
                self._rounded.copy_(weight)
            self._rounded_of = self._head_version()
        return self._rounded

    def _head_version(self) -> tuple[int, int]:
        return self.head.weight.data_ptr(), self.head.weight._version

    def stepped(self) -> None:
        """The weights have changed."""
        self._rounded_of = None

    @torch.no_grad()
    def _head_is_linear(self) -> bool:
        """Whether logits are hidden @ weight.T and nothing else, found out by trying."""
        if not isinstance(self.head, nn.Linear) or self.head.bias is not None:
            return False
        ids = (torch.arange(8)[None] % self.head.out_features).to(self.device)
        logits = self.model(input_ids=ids, use_cache=False).logits
        ours = self.base(input_ids=ids, use_cache=False).last_hidden_state @ self.head.weight.T
        return bool(torch.allclose(logits, ours, rtol=1e-3, atol=1e-3 * float(logits.abs().max())))

    @torch.no_grad()
    def _try_sharing(self) -> bool:
        """Whether flat micro-batches give the log-probs of plain rows, found out by trying: models with recurrent or
        windowed layers, or with attention of their own, do not, and keep plain rows."""
        from dualign.models.attention import PACKED

        tokens = self._sample_tokens()
        flat, rows = (pack(tokens, [0, 1, 2], 6, 0, share).to(self.device) for share in (True, False))
        precision, self.precision = self.precision, "fp32"
        try:
            plain = self(rows)
            self.model.set_attn_implementation(PACKED)
            works = bool(torch.allclose(self(flat), plain, rtol=1e-3, atol=1e-3))
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError):  # whatever a foreign model may raise
            works = False
        finally:
            self.precision = precision
        if not works or _windowed(self.model.config.get_text_config()):
            self.model.set_attn_implementation("sdpa")
            return False
        return True

    def _try_flash(self) -> bool:
        """Whether FlashAttention's kernels take this model on this device and say what SDPA says, in their gradient too
        (that of the first norm's weight, or else of the first layer's, behind all attention), found out by trying."""
        if self.precision != "bf16":
            return False
        tokens, training, found = self._sample_tokens(), self.training, []
        embedding, named = self.model.get_input_embeddings().weight, self.base.named_parameters()
        weights = [p for name, p in named if name.endswith("weight") and p is not embedding]
        early = min(weights, key=Tensor.dim)
        try:
            with torch.no_grad():
                self.train()(pack(tokens, [0, 1, 2], tokens.width, 0, True, True).to(self.device))  # dropout raises
            self.eval()
            with torch.enable_grad():
                for flash in (False, True):
                    logp = self(pack(tokens, [0, 1, 2], tokens.width, 0, True, flash).to(self.device))
                    found.append((logp.detach(), torch.autograd.grad(logp.sum(), early)[0]))
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:  # dropout, other builds of torch
            log.warning("no FlashAttention here, SDPA instead: %s", str(error).splitlines()[0])
            return False
        finally:
            self.train(training)
            self.zero_grad(set_to_none=True)
        (blocks, block_grad), (segments, segment_grad) = found
        near = (segment_grad - block_grad).norm() <= 0.2 * block_grad.norm()
        agree = bool(near) and bool(torch.allclose(segments, blocks, rtol=0.05, atol=0.05))
        if not agree:
            log.warning("FlashAttention says something else than SDPA here and is not used")
        return agree

    def _sample_tokens(self) -> Tokens:
        """Two prompts, the first with two completions, to try things out with. Without the padding token: its embedding
        may be zero, through which no norm has a finite gradient."""
        padding = getattr(self.model.get_input_embeddings(), "padding_idx", None)
        known = [t for t in range(min(self.model.config.get_text_config().vocab_size, 99)) if t != padding]
        ids = [tuple(known[(7 * i + 3 * j + 1) % len(known)] for j in range(6)) for i in range(4)]
        return Tokens((ids[0], ids[0], ids[3][:2]), (ids[1], ids[2][:4], ids[2]), (0, 0, 1))

    def _round_norms(self) -> None:
        """The norms before a layer's linear maps hand on bf16: what autocast makes of their output anyway, once instead
        of once for each of q, k, v, gate and up."""
        layers = dict(self.base.named_modules())
        if any(name.endswith("feedforward_layernorm") for name in layers):
            return  # a family whose norms also feed the residual stream, which stays in fp32
        for name, module in layers.items():
            if name.endswith((".input_layernorm", ".post_attention_layernorm")):
                module.register_forward_hook(_to_bf16)

    def frozen_copy(self) -> Policy:
        """The same policy, to be kept as it is; in bf16 with its linear layers rounded: the same numbers from half
        the memory."""
        other = copy.deepcopy(self).requires_grad_(False).eval()
        other.round()
        return other

    def move_to_file(self, folder: Path) -> None:
        """Keeps a frozen policy's weights in a file of `folder`: they are in memory from their use to the next `rest`."""
        rounds_head = self.plain_head and self.head.weight.dtype != self.dtype
        self.rest = move_to_file([*self.parameters(), *([self.rounded_head()] if rounds_head else [])], folder)
        if rounds_head:
            self._rounded_of = self._head_version()  # the weight is the same one, elsewhere

    def round(self) -> dict[nn.Parameter, Tensor]:
        """In bf16, rounds the linear layers' weights once instead of in every pass; returns the exact ones."""
        if self.precision != "bf16":
            return {}
        return round_linears(self, keep=self.head.weight if self.head is not None else None)


def _to_bf16(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output.to(torch.bfloat16) if torch.is_autocast_enabled(output.device.type) else output


def _inputs(micro: MicroBatch) -> dict[str, Any]:
    inputs = {"input_ids": micro.input_ids, "position_ids": micro.position_ids, "attention_mask": micro.mask}
    return inputs | {"use_cache": False} | ({"layout": micro.layout} if micro.layout else {})


def _windowed(config: Any) -> bool:
    return bool(getattr(config, "sliding_window", None)) and getattr(config, "use_sliding_window", True)
