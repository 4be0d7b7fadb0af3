"""The decoder: Llama, or Qwen3 when `qk_norm`. Owns layer names (transformers' own) and shapes; knows nothing of training.

Shape letters, here and everywhere: B rows, T positions, D width, H heads, G kv heads, K head width, F mlp, V vocabulary.
"""

import math
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from scripts.config import TrainingConfig
from scripts.model import operations
from scripts.model.activation_offload import BlockInputOffload, HostInputs
from scripts.model.attention import attend
from scripts.model.documents import Documents, attend_within
from scripts.model.operations import normalise, normed_products, rotate


class KeysValues(NamedTuple):
    """What one layer's attention remembers of earlier positions: rotated keys and values, each (B, G, length, K)."""

    keys: Tensor
    values: Tensor


Cache = list[KeysValues]


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions: (B, T, D) -> (B, T, D)."""

    def __init__(self, config: TrainingConfig) -> None:
        super().__init__()
        width, self.head_width = config.hidden_size, config.head_width
        self.q_proj = nn.Linear(width, config.num_heads * self.head_width, bias=False)
        self.k_proj = nn.Linear(width, config.num_kv_heads * self.head_width, bias=False)
        self.v_proj = nn.Linear(width, config.num_kv_heads * self.head_width, bias=False)
        self.o_proj = nn.Linear(config.num_heads * self.head_width, width, bias=False)
        self.q_norm = nn.RMSNorm(self.head_width, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(self.head_width, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, norm: nn.RMSNorm, rotary: Tensor, seen: KeysValues | Documents | None, start: int) -> Tensor:
        """Attention over norm(x) at positions from `start` on, over what is `seen`: a cache of earlier positions too, or only a
        token's own document.
        """
        products = normed_products(x, norm, self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (each.unflatten(-1, (-1, self.head_width)) for each in products)
        if isinstance(self.q_norm, nn.RMSNorm) and isinstance(self.k_norm, nn.RMSNorm):
            q, k = normalise(q, self.q_norm), normalise(k, self.k_norm)
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        if isinstance(seen, KeysValues):
            output = _attend_cached(q, k, v, rotary, seen, start=start)
        else:
            output = attend(q, k, v, rotary) if seen is None else attend_within(q, k, v, rotary, seen)
        return operations.product(output.transpose(1, 2).flatten(2), self.o_proj)


def _attend_cached(q: Tensor, k: Tensor, v: Tensor, rotary: Tensor, cache: KeysValues, *, start: int) -> Tensor:
    """`attend` for positions from `start` on, over the cached ones before it too; writes rotated k, and v, into the cache.

    With a mask torch holds every score, and k and v in float32 for every head: for one position after others, which is what
    sampling asks for, less than a training step.
    """
    stop, rotated = start + q.shape[2], rotate(k, rotary)
    cache.keys[:, :, start:stop], cache.values[:, :, start:stop] = rotated, v
    if start == 0:
        return attend(q, k, v, rotary)
    seen = torch.ones(q.shape[2], stop, dtype=torch.bool, device=q.device).tril(start)
    keys, values = cache.keys[:, :, :stop], cache.values[:, :, :stop]
    return functional.scaled_dot_product_attention(rotate(q, rotary), keys, values, attn_mask=seen, enable_gqa=True)


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020): (B, T, D) -> (B, T, D)."""

    def __init__(self, config: TrainingConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.mlp_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.mlp_size, bias=False)
        self.down_proj = nn.Linear(config.mlp_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, norm: nn.RMSNorm) -> Tensor:
        """The MLP of norm(x)."""
        gate, up = normed_products(x, norm, self.gate_proj, self.up_proj)
        return operations.gated_product(gate, up, self.down_proj)


class Block(nn.Module):
    """One pre-norm decoder layer: (B, T, D) -> (B, T, D).

    What the backward keeps of each token: 2D + (2H + 2G) K + 2F elements of the training dtype (x, x after attention, rotated
    q and k, v, the attention output, gate, up), and on a card H float32 (attention's log-sums). `qk_norm` adds (H + G) K
    elements and H + G float32 (q and k before their norms, and the norms' scales). Where a card has no flash attention for
    such heads (`attention.flash_attends`) k and v are kept for every head: 2 (H - G) K more. On a card a K that is no multiple
    of 8 counts as the next one, and adds H K elements, the attention output as the last product reads it.
    """

    def __init__(self, config: TrainingConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rotary: Tensor, seen: KeysValues | Documents | None = None, start: int = 0) -> Tensor:
        """The layer at positions from `start` on. It sees what this layer's cache holds, or in training documents, or rows."""
        x = x + self.self_attn(x, self.input_layernorm, rotary, seen, start)
        return x + self.mlp(x, self.post_attention_layernorm)


class Trunk(nn.Module):
    """Embedding, blocks and last norm, under the names that transformers gives them."""

    def __init__(self, config: TrainingConfig) -> None:
        super().__init__()
        weight = torch.empty(config.vocab_size, config.hidden_size)  # drawing it on meta would load torch.compile, two seconds
        self.embed_tokens = nn.Embedding.from_pretrained(weight, freeze=False)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.norm_eps)


class Decoder(nn.Module):
    """The whole model up to the last norm: ids (B, T) int64 -> hidden (B, T, D); `head` turns hidden into logits."""

    def __init__(self, config: TrainingConfig) -> None:
        super().__init__()
        self.config, self.host_inputs = config, HostInputs()
        self.model = Trunk(config)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head(self) -> Tensor:
        """The output head's weight (V, D); the embedding itself when tied."""
        return (self.model.embed_tokens if self.config.tie_embeddings else self.lm_head).weight

    def forward(self, ids: Tensor, cache: Cache | None = None, start: int = 0, documents: Documents | None = None) -> Tensor:
        """ids (B, T) int64 at positions from `start` on -> hidden states (B, T, D) after the last norm.

        With `cache` (see scripts/model/sampling.py) the earlier positions are read from it, and these are written into it. With
        `documents` (of these ids) each is computed as if it stood alone, from position 0 on.
        """
        x = operations.embed(ids, self.model.embed_tokens)
        rotary = rotary_table(self.config, start, start + ids.shape[1], x.device)
        if documents is not None:
            rotary = rotary.index_select(1, documents.positions).unflatten(1, (len(ids), 1, -1))
        mode = self.config.activation_checkpointing if torch.is_grad_enabled() else "none"
        offload = BlockInputOffload(x, self.config.num_layers, self.host_inputs) if mode == "block_offload" else None
        for layer, block in enumerate(self.model.layers):
            if mode == "none":
                x = block(x, rotary, documents if cache is None else cache[layer], start)
            else:
                with nullcontext() if offload is None else offload.hooks():
                    again = partial(block, rotary=rotary, seen=documents)
                    x = checkpoint(again, x, use_reentrant=False, preserve_rng_state=False)
        return normalise(x, self.model.norm)


def empty_model(config: TrainingConfig, device: torch.device) -> Decoder:
    """A decoder on `device` in the training dtype; its weights hold whatever was in memory."""
    with torch.device("meta"):
        model = Decoder(config)
    return model._apply(lambda weight: torch.empty(weight.shape, dtype=config.dtype, device=device))


@torch.no_grad()
def initialise(model: Decoder) -> Decoder:
    """Draws fresh weights in place, one at a time on the host, and returns the model; norms' weights are 1. They depend on
    `config.seed` and the shapes alone.
    """
    generator = torch.Generator().manual_seed(model.config.seed)
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            weight.fill_(1.0)
        else:
            weight.copy_(torch.randn(weight.shape, generator=generator).mul_(_init_std(model.config, name)))
    return model


def _init_std(config: TrainingConfig, name: str) -> float:
    if "embed_tokens" in name and not config.tie_embeddings:
        return config.embedding_init_std
    if "embed_tokens" in name or "lm_head" in name:
        return config.logits_init_std / math.sqrt(config.hidden_size)
    if "o_proj" in name or "down_proj" in name:
        return config.init_std / math.sqrt(2 * config.num_layers)
    return config.init_std


def parameter_groups(model: Decoder, weight_decay: float) -> list[dict]:
    """The optimizer's groups, always in this order: embedding, each block, head, and last all norms, which do not decay. Each
    block has its own, because DeepSpeed copies a whole group into one flat tensor; `is_block` tells those.
    """
    parts = [model.model.embed_tokens, *model.model.layers] + ([] if model.config.tie_embeddings else [model.lm_head])
    groups: list[dict] = [
        {"params": [p for p in part.parameters() if p.dim() > 1], "weight_decay": weight_decay, "is_block": type(part) is Block}
        for part in parts
    ]
    return [*groups, {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0, "is_block": False}]


def rotary_table(config: TrainingConfig, start: int, stop: int, device: torch.device) -> Tensor:
    """Cosines and sines (2, T, K / 2) float32 of the positions from `start` to before `stop` (Su et al. 2021, RoFormer)."""
    positions = torch.arange(start, stop, device=device, dtype=torch.float32)
    angles = torch.outer(positions, rotary_frequencies(config, device))
    return torch.stack((angles.cos(), angles.sin()))


def rotary_frequencies(config: TrainingConfig, device: torch.device) -> Tensor:
    """Radians that each pair of features turns by from one position to the next: (K / 2,) float32."""
    half = torch.arange(0, config.head_width, 2, device=device, dtype=torch.float32) / config.head_width
    frequencies = 1.0 / config.rope_theta**half
    return frequencies if config.rope_scaling is None else _scaled(frequencies, *config.rope_scaling)


def _scaled(frequencies: Tensor, factor: float, low: float, high: float, original_length: float) -> Tensor:
    """Llama 3.1's scaling of rotary frequencies (its own code, and transformers' modeling_rope_utils.py, 2024).

    A frequency that makes `high` turns or more within the original context stays as it is, one of `low` turns or fewer is
    divided by `factor`, and one between is interpolated.
    """
    share = ((original_length * frequencies / (2 * math.pi) - low) / (high - low)).clamp(0.0, 1.0)
    return (1.0 - share) * frequencies / factor + share * frequencies
