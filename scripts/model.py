"""The decoder: Llama, or Qwen3 when `qk_norm`. Owns layer names (transformers' own) and shapes; knows nothing of training.

Shape letters, here and everywhere: B rows, T positions, D width, H heads, G kv heads, K head width, F mlp, V vocabulary.
"""

import math
from collections.abc import Iterator
from contextlib import nullcontext
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from scripts.config import HOST_CHUNK_ROWS, TrainingConfig, product_dtype

COLDEST = 1e-6
ROPE_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
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

    def forward(self, x: Tensor, norm: nn.RMSNorm, rotary: Tensor, cache: tuple[Tensor, Tensor] | None, start: int) -> Tensor:
        """Attention over norm(x); with `cache`, over the keys that it holds before `start` too."""
        products = normed_products(x, norm, self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (each.unflatten(-1, (-1, self.head_width)) for each in products)
        if isinstance(self.q_norm, nn.RMSNorm) and isinstance(self.k_norm, nn.RMSNorm):
            q, k = normalise(q, self.q_norm), normalise(k, self.k_norm)
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        mixed = attend(q, k, v, rotary) if cache is None else attend_cached(q, k, v, rotary, cache, start)
        return product(mixed.transpose(1, 2).flatten(2), self.o_proj)


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020): (B, T, D) -> (B, T, D)."""

    def __init__(self, config: TrainingConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.mlp_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.mlp_size, bias=False)
        self.down_proj = nn.Linear(config.mlp_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, norm: nn.RMSNorm) -> Tensor:
        gate, up = normed_products(x, norm, self.gate_proj, self.up_proj)
        return gated_product(gate, up, self.down_proj)


class Block(nn.Module):
    """One pre-norm decoder layer: (B, T, D) -> (B, T, D).

    For the backward it keeps, a token, 2D + (2H + 2G) K + 2F numbers in the training dtype (x, the middle residual, rotated q
    and k, v, what attention mixed, gate and up) and H float32 (the log-sums); with `qk_norm` (H + G) K numbers and H + G
    float32 more (q and k before their norms, and the norms' scales). A card without flash attention keeps 2 (H - G) K more.
    """

    def __init__(self, config: TrainingConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rotary: Tensor, cache: tuple[Tensor, Tensor] | None = None, start: int = 0) -> Tensor:
        x = x + self.self_attn(x, self.input_layernorm, rotary, cache, start)
        return x + self.mlp(x, self.post_attention_layernorm)


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
        x = embed(ids, self.model.embed_tokens)
        rotary = rotary_table(self.config, start, start + ids.shape[1], x.device)
        mode = self.config.activation_checkpointing if torch.is_grad_enabled() else "none"
        parking = _Parking(x.device, self.config.num_layers) if mode == "block_offload" else None
        for layer, block in enumerate(self.model.layers):
            if mode == "none":
                x = block(x, rotary, None if cache is None else cache[layer], start)
            else:
                with nullcontext() if parking is None else parking.hooks():
                    x = checkpoint(partial(block, rotary=rotary), x, use_reentrant=False, preserve_rng_state=False)
        return normalise(x, self.model.norm)


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
    if "embed_tokens" in name and not config.tie_embeddings:
        return config.embedding_init_std
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


def attend_cached(q: Tensor, k: Tensor, v: Tensor, rotary: Tensor, cache: tuple[Tensor, Tensor], start: int) -> Tensor:
    """As `attend`, and writes rotated k and v into the cache at `start`; q sees every cached position before its own too."""
    stop, turned = start + q.shape[2], rotate(k, rotary)
    cache[0][:, :, start:stop], cache[1][:, :, start:stop] = turned, v
    if start == 0:
        return attend(q, k, v, rotary)
    seen = torch.ones(q.shape[2], stop, dtype=torch.bool, device=q.device).tril(start)
    keys, values = cache[0][:, :, :stop], cache[1][:, :, :stop]
    return functional.scaled_dot_product_attention(rotate(q, rotary), keys, values, attn_mask=seen, enable_gqa=True)


def rotary_table(config: TrainingConfig, start: int, stop: int, device: torch.device) -> Tensor:
    """Cosines and sines (2, T, K / 2) in float32 of positions start..stop (Su et al. 2021, RoFormer)."""
    half = torch.arange(0, config.head_width, 2, device=device, dtype=torch.float32) / config.head_width
    positions = torch.arange(start, stop, device=device, dtype=torch.float32)
    frequencies = 1.0 / config.rope_theta**half
    if config.rope_scaling is not None:
        frequencies = _scaled(frequencies, *config.rope_scaling)
    angles = torch.outer(positions, frequencies)
    return torch.stack((angles.cos(), angles.sin()))


def _scaled(frequencies: Tensor, factor: float, low: float, high: float, original_length: float) -> Tensor:
    """Llama 3.1's: divided by `factor` where the original context holds fewer than `low` turns, as they are from `high` turns
    on, and mixed in between (its own code, and transformers' modeling_rope_utils.py, 2024).
    """
    share = ((original_length * frequencies / (2 * math.pi) - low) / (high - low)).clamp(0.0, 1.0)
    return (1.0 - share) * frequencies / factor + share * frequencies


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Turns the pairs (i, i + K/2) of x (B, H, T, K) by their position's angle, in float32; keeps nothing of x."""
    return _Rotation.apply(x, rotary)  # pyright: ignore[reportReturnType]


def embed(ids: Tensor, table: nn.Embedding) -> Tensor:
    """Rows of the table: (B, T) int64 -> (B, T, D)."""
    return _HostEmbedding.apply(ids, table.weight) if _on_host(table.weight) else table(ids)  # pyright: ignore


def normalise(x: Tensor, norm: nn.RMSNorm) -> Tensor:
    """norm(x) over the last dimension; x and a scale a row are kept for the backward."""
    return _Norm.apply(x, norm.weight, norm.eps)  # pyright: ignore[reportReturnType]


def normed_products(x: Tensor, norm: nn.RMSNorm, *layers: nn.Linear) -> tuple[Tensor, ...]:
    """Each layer's product with norm(x); only x is kept for the backward: (B, T, D) -> (B, T, out) each."""
    kind = _HostNormedProducts if _on_host(x) else _NormedProducts
    return kind.apply(x, norm.weight, norm.eps, *(layer.weight for layer in layers))  # pyright: ignore[reportReturnType]


def gated_product(gate: Tensor, up: Tensor, layer: nn.Linear) -> Tensor:
    """layer(silu(gate) * up); only gate and up are kept for the backward: (B, T, F) twice -> (B, T, D)."""
    kind = _HostGatedProduct if _on_host(gate) else _GatedProduct
    return kind.apply(gate, up, layer.weight)  # pyright: ignore[reportReturnType]


def product(x: Tensor, layer: nn.Linear) -> Tensor:
    """layer(x) in the dtype in which this device multiplies well: (B, T, in) -> (B, T, out)."""
    wide = product_dtype(x.dtype, x.device) if _on_host(x) else x.dtype
    return functional.linear(x, layer.weight) if wide == x.dtype else _WideProduct.apply(x, layer.weight, wide)  # pyright: ignore


def attend(q: Tensor, k: Tensor, v: Tensor, rotary: Tensor) -> Tensor:
    """Rotates and attends causally: q (B, H, T, K), k and v (B, G, T, K) -> (B, H, T, K)."""
    if _on_host(q):
        return _HostAttention.apply(q, k, v, rotary)  # pyright: ignore[reportReturnType]
    q, k = rotate(q, rotary), rotate(k, rotary)
    if not _has_flash_attention(q):
        k, v = (each.repeat_interleave(q.shape[1] // k.shape[1], 1) for each in (k, v))
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=k.shape[1] != q.shape[1])


def _on_host(x: Tensor) -> bool:
    return x.device.type == "cpu"


def _has_flash_attention(x: Tensor) -> bool:
    """Flash attention shares kv heads; the kernel that takes its place does not, and without it memory would be quadratic."""
    if x.device.type != "cuda":
        return True
    return x.dtype != torch.float32 and torch.cuda.get_device_capability(x.device) >= (8, 0)


def _chunks(num_rows: int) -> list[slice]:
    return [slice(start, start + HOST_CHUNK_ROWS) for start in range(0, num_rows, HOST_CHUNK_ROWS)]


class _Kept(NamedTuple):
    """What stands for a block's input in the graph; `x` only for the last block's, which stays on the device."""

    layer: int
    x: Tensor | None


class _Parking:
    """Inputs of all blocks but the last, on the host from a block's forward to its backward, each back one block ahead.

    On CUDA a stream of its own copies. The compute stream waits for the copy down before the input's memory is used again, and
    that stream waits for the compute stream before it copies up into its own memory; so the memory needs no `record_stream`,
    which would hold it until the GPU has caught up with the host.
    """

    def __init__(self, device: torch.device, num_blocks: int) -> None:
        self.device, self.num_blocks = device, num_blocks
        self.stream = _copying_stream(device) if device.type == "cuda" else None
        self.parked: list[Tensor] = []
        self.leaving: tuple[Tensor, torch.cuda.Event | None] | None = None
        self.arriving: dict[int, tuple[Tensor, torch.cuda.Event | None]] = {}

    def hooks(self) -> torch.autograd.graph.saved_tensors_hooks:
        """The context in which a block is called; blocks must be called in their order."""
        return torch.autograd.graph.saved_tensors_hooks(self._leave, self._come_back)

    def _leave(self, x: Tensor) -> Tensor | _Kept:
        if not x.numel():
            return x
        self._let_go()
        if len(self.parked) == self.num_blocks - 1:
            return _Kept(len(self.parked), x.detach())
        host = torch.empty(x.shape, dtype=x.dtype, pin_memory=self.stream is not None)
        self.leaving = x.detach(), self._copy(x, host)
        self.parked.append(host)
        return _Kept(len(self.parked) - 1, None)

    def _let_go(self) -> None:
        if self.leaving is not None:
            self._await(self.leaving[1])
        self.leaving = None

    def _come_back(self, kept: Tensor | _Kept) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        x = self._arrived(kept.layer) if kept.x is None else kept.x
        if kept.layer:
            self._send_for(kept.layer - 1)
        return x

    def _arrived(self, layer: int) -> Tensor:
        if layer not in self.arriving:
            self._send_for(layer)
        x, arrival = self.arriving.pop(layer)
        self._await(arrival)
        return x

    def _send_for(self, layer: int) -> None:
        host = self.parked[layer]
        with torch.cuda.stream(self.stream):
            x = torch.empty(host.shape, dtype=host.dtype, device=self.device)
        self.arriving[layer] = x, self._copy(host, x)

    def _copy(self, source: Tensor, target: Tensor) -> torch.cuda.Event | None:
        if self.stream is None:
            target.copy_(source)
            return None
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        done = torch.cuda.Event()
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
            done.record()
        return done

    def _await(self, event: torch.cuda.Event | None) -> None:
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)


@cache
def _copying_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class _Norm(torch.autograd.Function):
    """RMSNorm (Zhang & Sennrich 2019)."""

    @staticmethod
    def forward(ctx, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        normed, scale = _norm(x, gain, eps)
        ctx.save_for_backward(x, gain, scale)
        return normed

    @staticmethod
    def backward(ctx, slope: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return *_norm_slopes(slope, *ctx.saved_tensors), None


class _Rotation(torch.autograd.Function):
    """A rotation of pairs, whose slope is turned back."""

    @staticmethod
    def forward(ctx, x: Tensor, rotary: Tensor) -> Tensor:
        ctx.save_for_backward(rotary)
        return _rotate_(x.to(torch.float32, copy=True), *rotary).to(x.dtype)

    @staticmethod
    def backward(ctx, slope: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        cos, sin = ctx.saved_tensors[0]
        return _rotate_(slope.to(torch.float32, copy=True), cos, -sin).to(slope.dtype), None


class _NormedProducts(torch.autograd.Function):
    """RMSNorm and several products of its result, which the backward makes again and then writes over."""

    @staticmethod
    def forward(ctx, x: Tensor, gain: Tensor, eps: float, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, gain, *weights)
        ctx.eps = eps
        normed = _norm(x, gain, eps)[0]
        return tuple(functional.linear(normed, weight) for weight in weights)

    @staticmethod
    def backward(ctx, *slopes: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, gain, *weights = ctx.saved_tensors
        normed, scale = _norm(x, gain, ctx.eps)
        inner, pieces = normed.flatten(0, -2), [slope.flatten(0, -2) for slope in slopes]
        grads = [piece.T @ inner for piece in pieces]
        torch.mm(pieces[0], weights[0], out=inner)
        for piece, weight in zip(pieces[1:], weights[1:], strict=True):
            inner.addmm_(piece, weight)
        return *_norm_slopes(inner.view_as(x), x, gain, scale), None, *grads


class _GatedProduct(torch.autograd.Function):
    """(silu(gate) * up) @ weight.T; the backward has two tensors of gate's size besides gate and up, and returns them."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        return functional.linear(functional.silu(gate).mul_(up), weight)

    @staticmethod
    def backward(ctx, slope: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        gate, up, weight = ctx.saved_tensors
        gates, ups, piece = (each.flatten(0, -2) for each in (gate, up, slope))
        active = functional.silu(gates)
        inner = active * ups
        grad = piece.T @ inner
        torch.mm(piece, weight, out=inner)
        active.mul_(inner)
        torch.ops.aten.silu_backward.grad_input(inner.mul_(ups), gates, grad_input=inner)
        return inner.view_as(gate), active.view_as(up), grad


class _HostEmbedding(torch.autograd.Function):
    """torch adds a frequent token's gradients up in bfloat16 on a CPU, where they stop growing; here the sum is float32."""

    @staticmethod
    def forward(ctx, ids: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.table = table.shape, table.dtype
        return functional.embedding(ids, table)

    @staticmethod
    def backward(ctx, slope: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        shape, dtype = ctx.table
        total = slope.new_zeros(shape, dtype=torch.float32)
        return None, total.index_add_(0, ctx.saved_tensors[0].flatten(), slope.flatten(0, 1).float()).to(dtype)


class _WideProduct(torch.autograd.Function):
    """x @ weight.T with both cast to `wide`; keeps them as they are."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, wide: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.wide = wide
        return functional.linear(x.to(wide), weight.to(wide)).to(x.dtype)

    @staticmethod
    def backward(ctx, slope: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        flat = slope.flatten(0, -2).to(ctx.wide)
        grad_weight = flat.T @ x.flatten(0, -2).to(ctx.wide)
        return (flat @ weight.to(ctx.wide)).to(x.dtype).view_as(x), grad_weight.to(weight.dtype), None


class _HostNormedProducts(torch.autograd.Function):
    """RMSNorm (Zhang & Sennrich 2019) and several products of its result, some rows at a time, to stay in the cache."""

    @staticmethod
    def forward(ctx, x: Tensor, gain: Tensor, eps: float, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, gain, *weights)
        ctx.eps = eps
        wide = product_dtype(x.dtype, x.device)
        flat, matrices = x.flatten(0, -2), [weight.to(wide) for weight in weights]
        outputs = [x.new_empty(len(flat), len(weight)) for weight in weights]
        for rows in _chunks(len(flat)):
            normed = _normalise(flat[rows].float(), gain.float(), eps)[0].to(wide)
            for output, matrix in zip(outputs, matrices, strict=True):
                output[rows] = functional.linear(normed, matrix)
        return tuple(output.view(*x.shape[:-1], -1) for output in outputs)

    @staticmethod
    def backward(ctx, *slopes: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, gain, *weights = ctx.saved_tensors
        wide = product_dtype(x.dtype, x.device)
        flat, grad_x, matrices = x.flatten(0, -2), torch.empty_like(x), [weight.to(wide) for weight in weights]
        grad_gain, grads = (
            torch.zeros_like(gain, dtype=torch.float32),
            [w.new_zeros(w.shape, dtype=torch.float32) for w in weights],
        )
        for rows in _chunks(len(flat)):
            normed, unit, scale = _normalise(flat[rows].float(), gain.float(), ctx.eps)
            inner, normed = torch.zeros_like(unit), normed.to(wide)
            for slope, matrix, grad in zip(slopes, matrices, grads, strict=True):
                piece = slope.flatten(0, -2)[rows].to(wide)
                grad += piece.T @ normed
                inner += piece @ matrix
            grad_gain += torch.linalg.vecdot(inner, unit, dim=0)
            grad_x.flatten(0, -2)[rows] = _norm_slope(inner.mul_(gain), unit, scale)
        return grad_x, grad_gain.to(gain.dtype), None, *(grad.to(gain.dtype) for grad in grads)


class _HostGatedProduct(torch.autograd.Function):
    """(silu(gate) * up) @ weight.T, some rows at a time so that they stay in the cache."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        wide = product_dtype(gate.dtype, gate.device)
        gates, ups, matrix = gate.flatten(0, -2), up.flatten(0, -2), weight.to(wide)
        output = gate.new_empty(len(gates), len(weight))
        for rows in _chunks(len(gates)):
            output[rows] = functional.linear(functional.silu(gates[rows].float()).mul_(ups[rows]).to(wide), matrix)
        return output.view(*gate.shape[:-1], -1)

    @staticmethod
    def backward(ctx, slope: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        gate, up, weight = ctx.saved_tensors
        wide = product_dtype(gate.dtype, gate.device)
        grad, grad_gate, grad_up = (
            weight.new_zeros(weight.shape, dtype=torch.float32),
            torch.empty_like(gate),
            torch.empty_like(up),
        )
        gates, ups, matrix = gate.flatten(0, -2), up.flatten(0, -2), weight.to(wide)
        for rows in _chunks(len(gates)):
            opened, lifted, piece = gates[rows].float(), ups[rows].float(), slope.flatten(0, -2)[rows].to(wide)
            active, inner = functional.silu(opened), (piece @ matrix).float()
            grad += piece.T @ (active * lifted).to(wide)
            grad_up.flatten(0, -2)[rows] = active.mul_(inner)
            grad_gate.flatten(0, -2)[rows] = torch.ops.aten.silu_backward(inner.mul_(lifted), opened)
        return grad_gate, grad_up, grad.to(weight.dtype)


class _HostAttention(torch.autograd.Function):
    """Rotary positions and flash attention in float32, kept in the storage dtype: torch's own is 7 times slower in bfloat16."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, rotary: Tensor) -> Tensor:
        turned_q, turned_k = (_rotate_(each.to(torch.float32, copy=True), *rotary) for each in (q, k))
        repeats = q.shape[1] // k.shape[1]
        wide = (turned_q, turned_k.repeat_interleave(repeats, 1), v.float().repeat_interleave(repeats, 1))
        mixed, log_sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*wide, 0.0, True)
        narrow = mixed.to(q.dtype)
        ctx.save_for_backward(turned_q.to(q.dtype), turned_k.to(q.dtype), v, narrow, log_sums, rotary)
        return narrow

    @staticmethod
    def backward(ctx, slope: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, mixed, log_sums, (cos, sin) = ctx.saved_tensors
        groups = (k.shape[0], k.shape[1], q.shape[1] // k.shape[1], *k.shape[2:])
        wide_k, wide_v = (each.float().repeat_interleave(groups[2], 1) for each in (k, v))
        grad_q, grad_k, grad_v = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            slope.float(), q.float(), wide_k, wide_v, mixed.float(), log_sums, 0.0, True
        )
        grad_k, grad_v = grad_k.view(groups).sum(2), grad_v.view(groups).sum(2)
        return _rotate_(grad_q, cos, -sin).to(q.dtype), _rotate_(grad_k, cos, -sin).to(q.dtype), grad_v.to(q.dtype), None


def _norm(x: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """gain * x / rms(x) over the last dimension, and 1 / rms(x) in float32, (..., 1)."""
    if x.device.type == "cuda":
        return torch.ops.aten._fused_rms_norm(x, [x.shape[-1]], gain, eps)
    normed, scale = torch.empty_like(x), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
    flat, results, scales = x.flatten(0, -2), normed.flatten(0, -2), scale.flatten(0, -2)
    for rows in _chunks(len(flat)):
        results[rows], _, scales[rows] = _normalise(flat[rows].float(), gain.float(), eps)
    return normed, scale


def _norm_slopes(slope: Tensor, x: Tensor, gain: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The slopes by x and gain from the slope by gain * x * scale."""
    if x.device.type == "cuda":
        return torch.ops.aten._fused_rms_norm_backward(slope, x, [x.shape[-1]], scale, gain, [True, True])
    grad_x, grad_gain = torch.empty_like(x), torch.zeros_like(gain, dtype=torch.float32)
    flat, slopes, scales, results = (each.flatten(0, -2) for each in (x, slope, scale, grad_x))
    for rows in _chunks(len(flat)):
        unit, inner = flat[rows].float() * scales[rows], slopes[rows].to(torch.float32, copy=True)
        grad_gain += torch.linalg.vecdot(inner, unit, dim=0)
        results[rows] = _norm_slope(inner.mul_(gain), unit, scales[rows])
    return grad_x, grad_gain.to(gain.dtype)


def _normalise(x: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """gain * unit, unit = x * scale, and scale = 1 / rms(x), float32."""
    scale = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    unit = x * scale
    return unit * gain, unit, scale


def _norm_slope(slope: Tensor, unit: Tensor, scale: Tensor) -> Tensor:
    """The slope by x from the slope by unit, in the latter's storage."""
    along = torch.linalg.vecdot(slope, unit).div_(unit.shape[-1]).unsqueeze(-1)
    return slope.addcmul_(unit, along, value=-1).mul_(scale)


def _rotate_(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rotate`, in the storage of x (B, H, T, K) float32."""
    first, second = x.chunk(2, dim=-1)
    turned = second * sin
    second.mul_(cos).addcmul_(first, sin)
    first.mul_(cos).sub_(turned)
    return x


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
        **_rope_description(config),
        "rms_norm_eps": config.norm_eps,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": end_of_text_id,
        "eos_token_id": end_of_text_id,
        "torch_dtype": str(config.dtype).removeprefix("torch."),
    }


def _rope_description(config: TrainingConfig) -> dict:
    if config.rope_scaling is None:
        return {}
    *factors, length = config.rope_scaling
    named = dict(zip(ROPE_SCALING, (*factors, int(length)), strict=True))
    return {"rope_scaling": {"rope_type": "llama3", **named}}


def architecture_fields(description: dict) -> dict:
    """The TrainingConfig fields that a transformers config.json describes.

    Raises:
        ValueError: the folder's model is not a Llama or Qwen3 that this decoder computes exactly.
    """
    kind = description.get("model_type")
    if kind not in ("llama", "qwen3"):
        raise ValueError(f'model_type={kind!r} is not supported; "llama" and "qwen3" are')
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
        if not isinstance(description.get(name), int):
            raise ValueError(f"config.json names no {name}; the download or copy is not complete")
    _refuse_variants(description)
    rope = _rope(description)
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
        "rope_scaling": _rope_scaling(rope),
        "norm_eps": float(description.get("rms_norm_eps", 1e-6)),
    }


@torch.no_grad()
def continue_ids(model: Decoder, ids: Tensor, num_tokens: int, temperature: float, top_k: int, seed: int) -> Iterator[int]:
    """Samples up to `num_tokens` ids after the prompt `ids` (T,) with a key/value cache; a seed gives one continuation.

    Temperature 0 (or below 1e-6) takes the likeliest id; where a logit is not finite it ends. The prompt is cut to its last
    `context_length` ids; positions beyond `context_length` are reached by dropping the older half of the context.
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
        logits = functional.linear(hidden, model.head).float().cpu()
        if not logits.isfinite().all():
            return
        context.append(_sample(logits, temperature, top_k, generator))
        yield context[-1]


def _sample(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    if temperature < COLDEST:
        return int(logits.argmax())
    best, ids = logits.topk(min(top_k, len(logits)))
    return int(ids[torch.multinomial(torch.softmax((best - best[0]) / temperature, 0), 1, generator=generator)])


def _rope(description: dict) -> dict:
    return description.get("rope_parameters") or description.get("rope_scaling") or {}


def _rope_type(rope: dict) -> str:
    return rope.get("rope_type") or rope.get("type") or "default"


def _rope_scaling(rope: dict) -> tuple[float, ...] | None:
    if _rope_type(rope) == "default":
        return None
    if not all(isinstance(rope.get(name), int | float) for name in ROPE_SCALING):
        raise ValueError(f"its scaled rotary positions name not all of {', '.join(ROPE_SCALING)}")
    return tuple(float(rope[name]) for name in ROPE_SCALING)


def _refuse_variants(description: dict) -> None:
    rope = _rope(description)
    plain_rope = _rope_type(rope) in ("default", "llama3")
    whole_rope = rope.get("partial_rotary_factor", 1.0) == 1.0 == description.get("partial_rotary_factor", 1.0)
    if not plain_rope or not whole_rope:
        raise ValueError(
            f"rotary positions of type {_rope_type(rope)!r:.40}, or partial ones, are not supported; a plain Llama or Qwen3 is"
        )
    for name in ("attention_bias", "mlp_bias", "use_sliding_window"):
        if description.get(name):
            raise ValueError(f"{name}={description[name]!r} is not supported; use a plain Llama or Qwen3")
    if description.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(f"hidden_act={description['hidden_act']!r} is not supported; use a plain Llama or Qwen3")


def tensor_shapes(config: TrainingConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor that a weights file of this model holds."""
    with torch.device("meta"):
        yield from ((name, tuple(tensor.shape)) for name, tensor in Decoder(config).named_parameters())
