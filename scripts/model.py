"""The decoder: Llama, or Qwen3 when `qk_norm`. Owns layer names (transformers' own) and shapes; knows nothing of training.

Shape letters, here and everywhere: B rows, T positions, D width, H heads, G kv heads, K head width, F mlp, V vocabulary.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from scripts.config import TrainingConfig

Cache = list[tuple[Tensor, Tensor]]


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

    def forward(self, x: Tensor, rotary: Tensor, cache: tuple[Tensor, Tensor] | None, start: int) -> Tensor:
        q = rotate(self.q_norm(self._heads(self.q_proj(x))), rotary)
        k = rotate(self.k_norm(self._heads(self.k_proj(x))), rotary)
        v = self._heads(self.v_proj(x))
        if cache is None:
            mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            mixed = attend_cached(q, k, v, cache, start)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_width)).transpose(1, 2)


class MLP(nn.Module):
    """SwiGLU: (B, T, D) -> (B, T, D)."""

    def __init__(self, config: TrainingConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.mlp_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.mlp_size, bias=False)
        self.down_proj = nn.Linear(config.mlp_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One pre-norm decoder layer: (B, T, D) -> (B, T, D)."""

    def __init__(self, config: TrainingConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rotary: Tensor, cache: tuple[Tensor, Tensor] | None = None, start: int = 0) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotary, cache, start)
        return x + self.mlp(self.post_attention_layernorm(x))


class Trunk(nn.Module):
    """Embedding, blocks and last norm, under the names that transformers gives them."""

    def __init__(self, config: TrainingConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.norm_eps)


class Decoder(nn.Module):
    """The whole model up to the last norm: ids (B, T) int64 -> hidden (B, T, D); `head` turns hidden into logits."""

    def __init__(self, config: TrainingConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head(self) -> Tensor:
        """The output head's weight (V, D); the embedding itself when tied."""
        return (self.model.embed_tokens if self.config.tie_embeddings else self.lm_head).weight

    def forward(self, ids: Tensor, cache: Cache | None = None, start: int = 0) -> Tensor:
        """ids (B, T) int64 at positions start..start+T -> hidden (B, T, D); keys before `start` are read from `cache`."""
        x = self.model.embed_tokens(ids)
        rotary = rotary_table(self.config, start, start + ids.shape[1], x.device)
        for layer, block in enumerate(self.model.layers):
            if self.config.activation_checkpointing == "block" and torch.is_grad_enabled():
                x = checkpoint(block, x, rotary, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, rotary, None if cache is None else cache[layer], start)
        return self.model.norm(x)


def empty_model(config: TrainingConfig, device: torch.device) -> Decoder:
    """A decoder on `device` in the training dtype whose weights are not set yet."""
    with torch.device("meta"):
        model = Decoder(config).to(config.dtype)
    return model.to_empty(device=device)


@torch.no_grad()
def initialise(model: Decoder) -> Decoder:
    """Draws fresh weights, one tensor at a time on the host; they depend on `config.seed` alone, not on the device."""
    generator = torch.Generator().manual_seed(model.config.seed)
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            weight.fill_(1.0)
        else:
            weight.copy_(torch.randn(weight.shape, generator=generator).mul_(_init_std(model.config, name)))
    return model


def _init_std(config: TrainingConfig, name: str) -> float:
    if "embed_tokens" in name or "lm_head" in name:
        return config.logits_init_std / math.sqrt(config.hidden_size)
    if "o_proj" in name or "down_proj" in name:
        return config.init_std / math.sqrt(2 * config.num_layers)
    return config.init_std


def parameter_groups(model: Decoder, weight_decay: float) -> list[dict]:
    """Optimizer groups in a fixed order: embedding, one a block, head (matrices, decayed), then every norm (not decayed).

    One group a block keeps DeepSpeed's flattening to one block at a time.
    """
    parts = [model.model.embed_tokens, *model.model.layers] + ([] if model.config.tie_embeddings else [model.lm_head])
    groups = [{"params": [p for p in part.parameters() if p.dim() > 1], "weight_decay": weight_decay} for part in parts]
    norms = [p for p in model.parameters() if p.dim() == 1]
    return [*groups, {"params": norms, "weight_decay": 0.0}]


def new_cache(model: Decoder, rows: int, length: int) -> Cache:
    """Empty keys and values, one pair a layer, each (rows, G, length, K)."""
    config, head = model.config, model.head
    shape = (rows, config.num_kv_heads, length, config.head_width)
    return [(head.new_empty(shape), head.new_empty(shape)) for _ in range(config.num_layers)]


def attend_cached(q: Tensor, k: Tensor, v: Tensor, cache: tuple[Tensor, Tensor], start: int) -> Tensor:
    """Writes k, v (B, G, T, K) into the cache at `start`; q (B, H, T, K) sees every position up to its own."""
    stop = start + q.shape[2]
    cache[0][:, :, start:stop], cache[1][:, :, start:stop] = k, v
    seen = torch.ones(q.shape[2], stop, dtype=torch.bool, device=q.device).tril(start)
    keys, values = cache[0][:, :, :stop], cache[1][:, :, :stop]
    return functional.scaled_dot_product_attention(q, keys, values, attn_mask=seen, enable_gqa=True)


def rotary_table(config: TrainingConfig, start: int, stop: int, device: torch.device) -> Tensor:
    """Cosines and sines (2, T, K / 2) in float32 of positions start..stop (Su et al. 2021, RoFormer)."""
    half = torch.arange(0, config.head_width, 2, device=device, dtype=torch.float32) / config.head_width
    positions = torch.arange(start, stop, device=device, dtype=torch.float32)
    angles = torch.outer(positions, 1.0 / config.rope_theta**half)
    return torch.stack((angles.cos(), angles.sin()))


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Turns the pairs (i, i + K/2) of x (B, H, T, K) by their position's angle; computed in float32."""
    cos, sin = rotary
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def transformers_config(config: TrainingConfig, end_of_text_id: int) -> dict:
    """The contents of transformers' config.json for this architecture."""
    kind = "Qwen3" if config.qk_norm else "Llama"
    return {
        "architectures": [f"{kind}ForCausalLM"],
        "model_type": kind.lower(),
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_width,
        "intermediate_size": config.mlp_size,
        "max_position_embeddings": config.context_length,
        "tie_word_embeddings": config.tie_embeddings,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": end_of_text_id,
        "eos_token_id": end_of_text_id,
        "torch_dtype": str(config.dtype).removeprefix("torch."),
    }


def architecture_fields(description: dict) -> dict:
    """The TrainingConfig fields that a transformers config.json describes.

    Raises:
        ValueError: the folder's model is not a Llama or Qwen3 that this decoder computes exactly.
    """
    kind = description.get("model_type")
    rope = description.get("rope_parameters") or description.get("rope_scaling") or {}
    if kind not in ("llama", "qwen3"):
        raise ValueError(f'model_type={kind!r} is not supported; "llama" and "qwen3" are')
    plain_rope = rope.get("rope_type", "default") == "default"
    if not plain_rope or any(description.get(name) for name in ("attention_bias", "mlp_bias", "use_sliding_window")):
        raise ValueError("scaled rotary positions, biases and sliding windows are not supported; use a plain Llama or Qwen3")
    heads = description["num_attention_heads"]
    return {
        "vocab_size": description["vocab_size"],
        "hidden_size": description["hidden_size"],
        "num_layers": description["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": description.get("num_key_value_heads") or heads,
        "head_size": description.get("head_dim") or description["hidden_size"] // heads,
        "mlp_size": description["intermediate_size"],
        "qk_norm": kind == "qwen3",
        "tie_embeddings": bool(description.get("tie_word_embeddings", False)),
        "rope_theta": float(description.get("rope_theta") or rope.get("rope_theta") or 10000.0),
        "norm_eps": float(description.get("rms_norm_eps", 1e-6)),
    }


@torch.no_grad()
def continue_ids(model: Decoder, ids: Tensor, num_tokens: int, temperature: float, top_k: int, seed: int) -> Iterator[int]:
    """Samples up to `num_tokens` ids after the prompt `ids` (T,) with a key/value cache; a seed gives one continuation.

    Temperature 0 takes the likeliest id. The prompt is cut to its last `context_length` ids; positions beyond
    `context_length` are reached by dropping the older half of the context.
    """
    generator = torch.Generator().manual_seed(seed)
    limit = min(model.config.context_length, len(ids) + num_tokens)
    context = ids[-limit:].tolist()
    cache, filled = new_cache(model, 1, limit), 0
    for _ in range(num_tokens):
        if len(context) > limit:
            context, filled = context[-(limit // 2 + 1) :], 0
        fresh = torch.tensor([context[filled:]], device=model.head.device)
        hidden = model(fresh, cache, filled)[0, -1]
        filled = len(context)
        context.append(_sample(functional.linear(hidden, model.head).float().cpu(), temperature, top_k, generator))
        yield context[-1]


def _sample(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    best, ids = logits.topk(min(top_k, len(logits)))
    return int(ids[torch.multinomial(torch.softmax(best / temperature, 0), 1, generator=generator)])


def tensor_shapes(config: TrainingConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor that a weights file of this model holds."""
    with torch.device("meta"):
        yield from ((name, tuple(tensor.shape)) for name, tensor in Decoder(config).named_parameters())
