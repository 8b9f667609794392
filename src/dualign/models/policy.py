"""The policy: loading, tokens, and the one forward pass that scoring and training share."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dualign.errors import UserError
from dualign.models.logprobs import token_logp
from dualign.models.packing import MicroBatch, Tokens, pack
from dualign.schema import ModelConfig
from dualign.types import Prompt

log = logging.getLogger(__name__)


class Tokenizer:
    """A Hugging Face tokenizer with what alignment needs to be sure of: EOS ids, a pad that is not EOS, a template."""

    def __init__(self, hf: Any, eos_ids: Sequence[int]) -> None:
        self.hf = hf
        self.eos_ids = frozenset(eos_ids)
        self.eos_id = hf.eos_token_id if hf.eos_token_id is not None else min(self.eos_ids)
        # Padding is masked by length, never by id, so a model whose pad equals its EOS is no danger here.
        self.pad_id = hf.pad_token_id if hf.pad_token_id is not None else self.eos_id

    def prompt(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a prompt, ready to be answered. Raises UserError for a conversation without a chat template."""
        if isinstance(prompt.content, str):
            ids = self.hf(prompt.content)["input_ids"]
        else:
            if self.hf.chat_template is None:
                raise UserError(
                    f"prompt {prompt.id}: it is a conversation, but the model has no chat template; "
                    "give one with model.chat_template=FILE.jinja, or use plain-text prompts"
                )
            ids = self.hf.apply_chat_template(prompt.messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        if not ids:
            raise UserError(f"prompt {prompt.id}: it is empty once tokenized")
        return tuple(ids)

    def completion(self, text: str) -> tuple[int, ...]:
        """Token ids of a given completion, closed with EOS."""
        return (*self.hf(text, add_special_tokens=False)["input_ids"], self.eos_id)

    def text(self, completion_ids: Sequence[int]) -> str:
        return str(self.hf.decode(list(completion_ids), skip_special_tokens=True))


def load_model(config: ModelConfig) -> tuple[Any, Tokenizer]:
    """The causal LM in fp32 and its tokenizer. Raises UserError when there is no such model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from dualign import assets

    name = assets.resolve(config.name)
    common: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    if config.trust_remote_code:
        log.warning("trust_remote_code is on: code that comes with %s will run", config.name)
    try:
        hf = AutoTokenizer.from_pretrained(name, **common)
        model = AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.float32, attn_implementation=config.attention, use_safetensors=True, **common
        )
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"model.name: {config.name} cannot be loaded: {first}") from None
    if config.chat_template:
        path = Path(config.chat_template)
        if not path.is_file():
            raise UserError(f"model.chat_template: {path}: no such file")
        hf.chat_template = path.read_text(encoding="utf-8")
    eos = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = set(eos if isinstance(eos, list) else [] if eos is None else [eos])
    ids |= {hf.eos_token_id} if hf.eos_token_id is not None else set()
    if not ids:
        raise UserError(f"model.name: {config.name} names no end-of-sequence token; completions could never end")
    model.config.use_cache = True
    return model, Tokenizer(hf, sorted(ids))


class Policy(nn.Module):
    """A causal LM seen as π: `forward(micro_batch)` gives log π per completion token.

    precision "bf16" means autocast: fp32 weights and residual stream, matrix products in bf16, log-normalisers in
    fp32. π_0, π_t and π_θ all go through this one path, so equal weights give equal log-probs.
    """

    def __init__(self, model: Any, precision: str, share: bool = True) -> None:
        super().__init__()
        self.model = model
        self.precision = precision
        self.base, self.head = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model, model.get_output_embeddings()
        self.plain_head = self._head_is_linear()
        self.share = share and self._can_share()

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def autocast(self) -> AbstractContextManager:
        device = next(self.parameters()).device.type
        return torch.autocast(device, torch.bfloat16) if self.precision == "bf16" else nullcontext()

    def hidden(self, micro: MicroBatch) -> Tensor:
        """(M, H): what the decoder says at the positions that are scored."""
        out = self.base(
            input_ids=micro.input_ids, position_ids=micro.position_ids, attention_mask=micro.mask, use_cache=False
        ).last_hidden_state
        return out.flatten(0, 1).index_select(0, micro.predictor_M)

    def forward(self, micro: MicroBatch) -> Tensor:
        """(n, T) log π(token | before), untempered, 0 beyond each completion's end."""
        with self.autocast():
            if self.plain_head:
                logp_M = token_logp(self.hidden(micro), self.head.weight, micro.target_M, self.dtype)
            else:  # a head that scales, caps or shifts its logits: let the model do it
                out = self.model(
                    input_ids=micro.input_ids, position_ids=micro.position_ids, attention_mask=micro.mask, use_cache=False
                )
                logits_MV = out.logits.flatten(0, 1).index_select(0, micro.predictor_M).float()
                logp_M = torch.log_softmax(logits_MV, -1).gather(1, micro.target_M[:, None])[:, 0]
        return micro.scatter(logp_M)

    @torch.no_grad()
    def _head_is_linear(self) -> bool:
        """Whether logits are hidden @ weight.T and nothing else, found out by trying."""
        if not isinstance(self.head, nn.Linear) or self.head.bias is not None:
            return False
        ids = torch.arange(8)[None] % self.head.out_features
        ids = ids.to(self.head.weight.device)
        logits = self.model(input_ids=ids, use_cache=False).logits
        ours = self.base(input_ids=ids, use_cache=False).last_hidden_state @ self.head.weight.T
        return bool(torch.allclose(logits, ours, rtol=1e-3, atol=1e-3 * float(logits.abs().max())))

    @torch.no_grad()
    def _can_share(self) -> bool:
        """Whether a prompt shared by packing gives the log-probs of the plain path, found out by trying. (Eager
        attention reads a boolean mask as numbers, and recurrent or windowed layers ignore it: silently wrong.)"""
        window = getattr(self.model.config, "sliding_window", None)
        if self.model.config._attn_implementation != "sdpa" or (window and getattr(self.model.config, "use_sliding_window", True)):
            return False
        vocab = self.model.config.vocab_size
        ids = [tuple((7 * i + 3 * j) % vocab for j in range(6)) for i in range(3)]
        tokens = Tokens(prompt_ids=(ids[0],) * 2, completion_ids=(ids[1], ids[2]), group=(0, 0))
        device = next(self.parameters()).device
        precision, self.precision = self.precision, "fp32"
        try:
            packed, plain = (self(pack(tokens, s, 6, 0).to(device)) for s in ([[0, 1]], [[0], [1]]))
        except (RuntimeError, ValueError, TypeError, IndexError):
            return False
        finally:
            self.precision = precision
        return bool(torch.allclose(packed, plain, rtol=1e-3, atol=1e-3))

    def frozen_copy(self) -> Policy:
        """The same policy, to be kept as it is. In bf16 the linear layers are rounded once instead of at every call:
        the same numbers from half the memory."""
        other = copy.deepcopy(self).requires_grad_(False).eval()
        if self.precision == "bf16":
            head = other.head.weight if other.head is not None else None
            for module in other.modules():
                if isinstance(module, nn.Linear) and module.weight is not head:
                    module.to(torch.bfloat16)
        return other

    @torch.no_grad()
    def copy_weights(self, source: nn.Module) -> None:
        """Take over `source`'s weights, each rounded to the dtype it has here."""
        for mine, theirs in zip(self.parameters(), source.parameters(), strict=True):
            mine.copy_(theirs)
