"""A hand-written step of decoding for decoders built like Llama's, on a CPU.

With a few dozen rows a step's products take as long as memory needs for their weights, and the dozens of small
operations around them as long again. Here q, k and v are one product, gate and up another, queries and keys are rotated
together, and nothing is asked that a step knows: a third of the operations, the model's numbers to bf16's rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from dualign.models.attention import one_query
from dualign.rollout.hf.cpu_linear import Product, product, supported

NORMS = ("input_layernorm", "post_attention_layernorm")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")


def like_llama(base: Any) -> bool:
    """Whether a decoder has Llama's parts and no others, such as adapters, with plain linear layers in bf16 and the
    residual stream in fp32. That they are put together like Llama's is for whoever uses the step to try out."""
    if not _has(base, "embed_tokens", "layers", "norm", "rotary_emb"):
        return False
    norms, linear = [base.norm], []
    for layer in base.layers:
        if not (_has(layer, *NORMS, "self_attn", "mlp") and _has(layer.self_attn, *ATTENTION)):
            return False
        if not _has(layer.mlp, *FEED_FORWARD, "act_fn"):
            return False
        norms += [getattr(layer, name) for name in NORMS]
        linear += [getattr(layer.self_attn, name) for name in ATTENTION]
        linear += [getattr(layer.mlp, name) for name in FEED_FORWARD]
    return (
        base.embed_tokens.weight.dtype == torch.float32
        and all(not list(norm.children()) for norm in norms)
        and all(type(m) is nn.Linear and supported(m.weight) for m in linear)
    )


def _has(module: nn.Module, *names: str) -> bool:
    return {name for name, _ in module.named_children()} == set(names)


class LlamaStep:
    """The newest token of N rows through the decoder. Weights are laid out for about `rows` rows, as they are now."""

    def __init__(self, base: Any, head: Product, rows: int) -> None:
        self.base, self.head = base, head
        self.layers = [_Layer(layer, rows) for layer in base.layers]

    def __call__(self, token_N: Tensor, position_N: Tensor, mask: Tensor, cache: Cache) -> Tensor:
        """The next token's logits, (N, V). mask: (N, 1, 1, columns seen), added to scores."""
        x = self.base.embed_tokens(token_N)
        cos, sin = (t.transpose(0, 1) for t in self.base.rotary_emb(x[None], position_N[None]))  # (N, 1, head size)
        low, high = sin.chunk(2, -1)
        signed = torch.cat([-low, high], -1)
        for i, layer in enumerate(self.layers):
            layer(x, cos, signed, mask, cache.layers[i])
        return self.head(_normed(x, self.base.norm, torch.empty_like(x)))


class _Layer:
    def __init__(self, layer: Any, rows: int) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.norms = layer.input_layernorm, layer.post_attention_layernorm
        self.size, self.scaling = attention.head_dim, attention.scaling
        self.heads, self.kv_heads = (m.out_features // self.size for m in (attention.q_proj, attention.k_proj))
        self.qkv = _joined([attention.q_proj, attention.k_proj, attention.v_proj], rows)
        self.out = product(attention.o_proj.weight, attention.o_proj.bias, rows)
        self.gate_up, self.act = _joined([mlp.gate_proj, mlp.up_proj], rows), mlp.act_fn
        self.down = product(mlp.down_proj.weight, mlp.down_proj.bias, rows)

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, kept: Any) -> None:
        """Adds what the layer has to say to x (N, H), and the token's key and value to `kept`."""
        rotated = self.heads + self.kv_heads
        heads = self.qkv(self._normed(x, 0)).view(len(x), rotated + self.kv_heads, self.size)
        qk = heads[:, :rotated]
        torch.addcmul(qk * cos, qk.roll(self.size // 2, -1), sin, out=qk)  # halves change places; `sin` has the signs
        keys, values = kept.update(heads[:, self.heads : rotated, None], heads[:, rotated:, None])
        attended = one_query(heads[:, : self.heads, None], keys, values, mask, self.scaling)
        x += self.out(attended.flatten(1))
        gate, up = self.gate_up(self._normed(x, 1)).chunk(2, -1)
        x += self.down(self.act(gate) * up)

    def _normed(self, x: Tensor, which: int) -> Tensor:
        return _normed(x, self.norms[which], torch.empty(x.shape, dtype=torch.bfloat16))


def _joined(layers: list[nn.Linear], rows: int) -> Product:
    """Linear layers of one input as one."""
    bias: list[Tensor] = [m.weight.new_zeros(m.out_features) if m.bias is None else m.bias for m in layers]
    biased = any(m.bias is not None for m in layers)
    return product(torch.cat([m.weight.detach() for m in layers]), torch.cat(bias) if biased else None, rows)


def _normed(x: Tensor, norm: Any, out: Tensor) -> Tensor:
    """w x / sqrt(mean(x^2) + eps), rounded to what `out` holds."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    scale = (length * length).mul_(1 / x.shape[-1]).add_(norm.variance_epsilon).rsqrt_()
    return torch.mul(x * scale, norm.weight, out=out)
