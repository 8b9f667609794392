"""The policy: the one forward pass that scoring and training share."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dualign.common.errors import FOREIGN, UserError, first_line, out_of_memory
from dualign.models.finite import first_not_finite
from dualign.models.load import copied, load_model
from dualign.models.logprobs import token_logp
from dualign.models.master import LightEmbedding, linear_weights, round_linears, widened
from dualign.models.mmap import move_to_file, move_to_host
from dualign.models.packing import MicroBatch, Tokens, pack
from dualign.models.tokenizer import Tokenizer
from dualign.models.windows import small_windows

__all__ = ["Policy", "Tokenizer", "load_model"]

log = logging.getLogger(__name__)
TOLERANCE = 1e-3  # of fp32 numbers that two ways of computing should both give
ROUGH = 0.2  # the same of bf16 numbers, where a kernel knows no others
NOISE = 1e-4  # of fp32 numbers, in nats a token: no less is asked of a model that hardly heeds its input


class Policy(nn.Module):
    """A causal LM seen as π: `forward(micro_batch)` gives log π per completion token.

    precision "bf16" means autocast's numbers: fp32 residual stream and norms, matrix products in bf16, log-normalisers
    in fp32. π_0, π_t and π_θ all go through this one path, so equal weights give equal log-probs.
    """

    whole: Callable[[], AbstractContextManager[None]] = nullcontext  # within it, its weights are here
    divided: Callable[[], Any] | None = None  # gives the policy that has its weights' shares, where it has none itself
    _rounded: Any = None
    _rounded_of: Any = None  # the weight that it is the rounding of

    def __init__(self, model: Any, precision: str, share: bool = True, key: str = "model.name") -> None:
        super().__init__()
        self.key = key  # what a configuration calls it
        kernels = str(model.config._attn_implementation).startswith("flash")  # which know no fp32
        self.exact, self.tolerance = ("bf16", ROUGH) if kernels else ("fp32", TOLERANCE)
        self.model, self.precision, self.share, self.flash = model, precision, False, False
        self.base = _decoder_of(model)
        self.head = model.get_output_embeddings()
        self.plain_head = False  # whether logits are hidden @ weight.T and nothing else
        self.decoding: Any = None  # how completions are sampled, once that was tried (rollout/trial.py)
        LightEmbedding.take(model.get_input_embeddings())
        with self.on_trial():
            try:
                self.plain_head = self._head_is_linear()
                plain = self._try_rows()
            except FOREIGN as error:
                if out_of_memory(error):
                    raise
                raise UserError(f"{self.name} cannot score completions here: {first_line(error)}") from None
            if share and model.config._attn_implementation == "sdpa":
                self.share = self._try_sharing(plain)
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
        out = self.base(**inputs_of(micro)).last_hidden_state
        return out.flatten(0, 1).index_select(0, micro.predictor_M)

    def width(self) -> int:
        """H, found out by trying: some decoders project what they say to another width than that of their layers. Raises
        UserError for a model that does not give what its decoder says."""
        tokens = self._sample_tokens()
        try:
            with self.on_trial():
                return self.hidden(self.pack(tokens, range(len(tokens)), 0)).shape[-1]
        except FOREIGN as error:
            if out_of_memory(error):
                raise
            raise UserError(f"{self.name} gives no hidden states for a value model: {first_line(error)}") from None

    def forward(self, micro: MicroBatch) -> Tensor:
        """(n, T) log π(token | before), untempered, 0 beyond each completion's end."""
        with self.autocast():
            if self.plain_head:
                logp_M = token_logp(self.hidden(micro), self.head.weight, self.rounded_head(), micro.target_M)
            else:  # a head that scales, caps or shifts its logits: let the model do it
                logits_MV = self.model(**inputs_of(micro)).logits.flatten(0, 1).index_select(0, micro.predictor_M)
                logp_M = torch.log_softmax(logits_MV.float(), -1).gather(1, micro.target_M[:, None])[:, 0]
        return micro.scatter(logp_M)

    def rounded_head(self) -> Tensor:
        """(V, H): the head's weight in the dtype of its products, rounded anew only when it has changed. Whoever steps
        an optimizer says so by `weights_changed`: fused ones do not count a weight's version up."""
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

    def weights_changed(self, gone: bool = False) -> None:
        """The weights have changed, or are `gone`."""
        self._rounded, self._rounded_of = None if gone else self._rounded, None

    def _head_is_linear(self) -> bool:
        """Whether the head multiplies what the decoder says, and the model gives its product as it is: other families
        scale, cap or shift one or the other."""
        if type(self.head) is not nn.Linear or self.head.bias is not None:
            return False
        seen: dict[str, Tensor] = {}

        def after_decoder(module: nn.Module, inputs: Any, output: Any) -> None:
            seen["said"] = output[0]

        def after_head(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            # a cap of logits shows in large ones
            seen["read"], seen["made"] = inputs[0], output * (1000 / output.abs().max().clamp(min=1e-6))
            return seen["made"]

        hooks = [self.base.register_forward_hook(after_decoder), self.head.register_forward_hook(after_head)]
        try:
            ids = (torch.arange(8)[None] % self.head.out_features).to(self.device)
            logits = self.model(input_ids=ids, use_cache=False).logits
        finally:
            for hook in hooks:
                hook.remove()
        same = {"said", "read"} <= set(seen) and seen["said"].shape == seen["read"].shape
        return same and bool(torch.equal(seen["said"], seen["read"])) and close(logits, seen["made"].to(logits.dtype))

    @contextmanager
    def on_trial(self, precision: str | None = None, windows: bool = True) -> Iterator[None]:
        """While active, the model computes in fp32, without dropout and gradient, and its windows are a few tokens long
        (unless they are to stay as they are): two ways of computing that are both right then agree on short texts, and a
        wrong one shows."""
        precision = precision or self.exact
        kept = self.training, self.precision, self.flash
        self.eval()
        self.precision, self.flash = precision, self.flash and precision == "bf16"
        try:
            small = small_windows(self.model) if windows else nullcontext()
            with torch.no_grad(), small, widened(self) if precision == "fp32" else nullcontext():
                yield
        finally:
            training, self.precision, self.flash = kept
            self.train(training)

    def _try_rows(self) -> Tensor:
        """(n, T) log-probs of sample rows, padded and side by side. Raises UserError where the model says something else
        of the beginning of one of them alone: it sees padding, or later tokens."""
        tokens = self._sample_tokens()
        plain = self(pack(tokens, range(len(tokens)), tokens.width, 0, False).to(self.device))
        prompt, completion = tokens.prompt_ids[-1], tokens.completion_ids[-1][:5]  # past a small window
        logp = self.alone(prompt, completion)
        if not logp.isfinite().all():
            where = first_not_finite(self, lambda: self.alone(prompt, completion))
            raise UserError(f"{self.name} gives log-probs that are not finite: {where}")
        heard = float((self.alone(prompt[::-1], completion) - logp).abs().max())  # what earlier tokens have to say
        if self.exact == "fp32":
            self.tolerance = min(TOLERANCE, max(NOISE, 0.05 * heard))
        if (plain[-1, : len(logp)] - logp).abs().max() > self.tolerance:
            raise UserError(
                f"{self.name} says something else of a text alone than in a batch: it sees later tokens or padding (no "
                "causal language model, or not used as one), or its windows only with a mask"
            )
        return plain

    def alone(self, prompt: Sequence[int], completion: Sequence[int]) -> Tensor:
        """(T,) log-probs of one completion by the model as it comes: no padding, no mask, no cache."""
        ids = torch.tensor([[*prompt, *completion]], device=self.device)
        with self.autocast():
            logits = self.model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        return torch.log_softmax(logits.float(), -1).gather(1, ids[0, len(prompt) :, None])[:, 0]

    @property
    def name(self) -> str:
        """The model's architecture and where it came from, for people."""
        return f"{self.key}: {self.model.config._name_or_path or 'the model'} ({type(self.model).__name__})"

    def _try_sharing(self, plain: Tensor) -> bool:
        """Whether flat micro-batches give the log-probs of plain rows, found out by trying: models with recurrent or
        windowed layers, or with attention of their own, do not, and keep plain rows."""
        from dualign.models.attention import PACKED

        tokens = self._sample_tokens()
        try:
            self.model.set_attn_implementation(PACKED)
            flat = self(pack(tokens, range(len(tokens)), tokens.width, 0, True).to(self.device))
            works = close(flat, plain)
        except FOREIGN:
            works = False
        if not works:
            self.model.set_attn_implementation("sdpa")
        return works

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

    def sample_ids(self) -> list[int]:
        """Token ids to try things out with. Without the padding token: its embedding may be zero, through which no norm
        has a finite gradient."""
        padding = getattr(self.model.get_input_embeddings(), "padding_idx", None)
        return [t for t in range(min(self.model.config.get_text_config().vocab_size, 99)) if t != padding]

    def _sample_tokens(self) -> Tokens:
        """Two prompts, the first with two completions."""
        known = self.sample_ids()
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

    def frozen_copy(self, where: torch.device | None = None) -> Policy:
        """The same policy, to be kept as it is, `where` or beside this one; in bf16 with its linear layers rounded as they
        are copied: the same numbers from half the memory."""
        fp32 = [p for p in self.linears() if p.dtype == torch.float32] if self.precision == "bf16" else []
        rounded = {id(p): nn.Parameter(p.detach().to(torch.bfloat16).to(where or p.device)) for p in fp32}
        return copied(self, rounded, where).freeze()

    def freeze(self) -> Policy:
        """This policy itself, likewise."""
        self.requires_grad_(False).eval()
        self.round()
        return self

    def take_adapters(self, model: Any) -> None:
        """`model`: its own, with fresh adapters in its layers. With one on the head, logits are no product with a weight.
        Raises UserError where a layer does not work with them."""
        self.model, head = model, model.get_output_embeddings()
        if head is not self.head:
            self.head, self.plain_head = head, False
        ids = self.sample_ids()
        try:
            with self.on_trial():
                self.alone(ids[:2], ids[2:6])
        except FOREIGN as error:
            if out_of_memory(error):
                raise
            raise UserError(
                f"model.lora.target_modules: the layers of {self.name} do not all work with adapters: {first_line(error)}; "
                "name the ones that are to have them"
            ) from None

    def move_to_file(self, folder: Path) -> None:
        """Keeps a frozen policy's weights in a file of `folder`: they are in memory from their use to the end of
        `whole`."""
        rounds_head = self.plain_head and self.head.weight.dtype != self.dtype
        self.whole = move_to_file([*self.parameters(), *([self.rounded_head()] if rounds_head else [])], folder)
        if rounds_head:
            self._rounded_of = self._head_version()  # the weight is the same one, elsewhere

    def move_to_host(self) -> None:
        """Keeps a frozen policy's weights in the host's memory: they are on the device within `whole`."""
        self.weights_changed(gone=True)
        self.whole = move_to_host(list(self.parameters()))

    def round(self) -> dict[nn.Parameter, Tensor]:
        """In bf16, rounds the linear layers' weights once instead of in every pass; returns the exact ones."""
        return round_linears(self, keep=self._head_weight) if self.precision == "bf16" else {}

    def linears(self) -> list[nn.Parameter]:
        """What `round` rounds."""
        return linear_weights(self, keep=self._head_weight)

    @property
    def _head_weight(self) -> Tensor | None:
        return None if self.head is None else self.head.weight


def _decoder_of(model: Any) -> Any:
    """The part of a causal LM that ends in hidden states. Some families name themselves when they are asked for it."""
    asked = model.get_decoder() if hasattr(model, "get_decoder") else None
    parts = [asked, model.base_model, getattr(model, "model", None)]
    return next((part for part in parts if part is not None and part is not model), model)


def close(found: Tensor, expected: Tensor) -> bool:
    """Whether two ways of computing fp32 numbers agree."""
    return bool(torch.allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE))


def _to_bf16(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output.to(torch.bfloat16) if torch.is_autocast_enabled(output.device.type) else output


def inputs_of(micro: MicroBatch) -> dict[str, Any]:
    inputs = {"input_ids": micro.input_ids, "position_ids": micro.position_ids, "attention_mask": micro.mask}
    return inputs | {"use_cache": False} | ({"layout": micro.layout} if micro.layout else {})
