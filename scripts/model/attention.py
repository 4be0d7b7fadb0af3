"""Causal attention: torch's kernels on GPUs, blocks of scores on CPUs. Knows tensors; no layers.

Shape letters are decoder.py's; besides, R = H / G heads read each kv head, and N = B * G. On a CPU a block has the scores of
HOST_CHUNK_QUERIES positions, and of so many kv heads that neither they nor the queries have more than HOST_CHUNK_SCORES
elements: they stay in the cache. The backward computes scores again, and keeps no sums for it.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from scripts.config import HOST_CHUNK_QUERIES, HOST_CHUNK_SCORES, NUM_MULTIPROCESSORS, TrainingConfig
from scripts.model import operations


class Heads(NamedTuple):
    """Queries (N, T * R, K), keys and values (N, T, K) of each kv head, or their gradients. Queries of one position that read
    the same kv head lie side by side.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor


class Within(NamedTuple):
    """Documents that attention does not leave: the position at which each token's begins, (B, T) int32, and how many tokens the
    longest has.
    """

    begins: Tensor
    longest: int


class Block(NamedTuple):
    """A part of the scores: of some kv heads and `positions`, whose queries are `rows`, and of all that these have `seen`. With
    documents, `begins` (n, positions) are where each position's begins.
    """

    kv_heads: slice
    positions: slice
    rows: slice
    seen: slice
    begins: Tensor | None


def attend(q: Tensor, k: Tensor, v: Tensor, rotary: Tensor) -> Tensor:
    """Causal attention over rotated q and k: q (B, H, T, K), k and v (B, G, T, K) -> (B, H, T, K)."""
    if operations.on_host(q):
        return attend_on_host(q, k, v, rotary, None)
    return attend_rotated(operations.rotate(q, rotary), operations.rotate(k, rotary), v)


def attend_rotated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`attend` off the host, where q and k are rotated already.

    torch takes flash attention or, where that refuses and k and v are copied for every head, its memory-efficient kernel. Both
    want heads as wide as `padded_width`: the zeros that are added change no score.
    """
    width, padded, repeats = q.shape[-1], padded_width(q.shape[-1]), q.shape[1] // k.shape[1]
    is_flash = takes_flash(q, k, v)
    if padded > width:
        q, k, v = (functional.pad(each, (0, padded - width)) for each in (q, k, v))
    if repeats > 1 and not is_flash:
        k, v, repeats = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1), 1
    scale = 1 / math.sqrt(width)
    output = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=repeats > 1)
    return output if padded == width else output[..., :width]


def takes_flash(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether flash attention takes these heads on this device."""
    needs_gradient = torch.is_grad_enabled() and any(each.requires_grad for each in (q, k, v))
    capability = torch.cuda.get_device_capability(q.device) if q.device.type == "cuda" else None
    return flash_attends(capability, q.dtype, q.shape[-1], needs_gradient)


def padded_width(head_width: int) -> int:
    """The width of a head on a GPU: the next multiple of 8, which the memory-efficient kernel demands of 16-bit heads."""
    return -(-head_width // 8) * 8


def flash_attends(capability: tuple[int, ...] | None, dtype: torch.dtype, head_width: int, needs_gradient: bool) -> bool:
    """Whether flash attention takes such heads on a card of this compute capability; None is the worst that has the dtype.

    The rules are torch's (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, 2.11 to 2.13): 8.0 to 12.1, 16 bits, at most
    256 wide, and on 8.6 to 8.9 and 12.x no gradients of heads 193 to 224 wide. The memory-efficient kernel does not read shared
    kv heads: with those torch would take the kernel that holds every score, whose memory grows with T squared.
    """
    worst = 75 if dtype == torch.float16 else 86
    sm = worst if capability is None else 10 * capability[0] + capability[1]
    has_flash = dtype in (torch.float16, torch.bfloat16) and 80 <= sm <= 121
    is_refused = needs_gradient and (86 <= sm <= 89 or sm >= 120) and 192 < head_width <= 224
    return has_flash and head_width <= 256 and not is_refused


def attend_on_host(q: Tensor, k: Tensor, v: Tensor, rotary: Tensor, within: Within | None) -> Tensor:
    """`attend` on a CPU. `within` documents rotary is by token: (2, B, 1, T, K / 2)."""
    return _HostAttention.apply(q, k, v, rotary, within)  # pyright: ignore[reportReturnType]


def backward_kernel_bytes(config: TrainingConfig) -> int:
    """What torch's kernels make for themselves on a GPU, in deterministic mode, for tiles of positions and features.

    Flash attention (flash_attn/flash_api.cpp, mha_bwd; Dao 2023) adds up a float32 gradient of q for each share of the
    processors, and where kv heads are shared one of k and v for every head. The memory-efficient kernel (workspace_size in
    mem_eff_attention/kernel_backward.h) has one float32 gradient of q, and a tile of those of k and v. With zeros after heads
    the output's gradient is copied into the kernels' order, and for flash attention the output too. Documents are given to
    them so that tiles of rows take no more than their tokens do again (`documents_of`).
    """
    masks, heads = config.mask_across_documents, config.micro_batch_rows * config.num_heads
    head = padded_width(config.head_width)
    length, tokens = -(-config.context_length // 128) * 128 * (2 if masks else 1), heads * config.context_length
    sums, queries, is_padded = 4 * heads * length, config.dtype.itemsize * tokens * head, head > config.head_width
    if not flash_attends(None, config.dtype, config.head_width, needs_gradient=True):
        tiles = max(128 * heads, tokens * masks)
        return sums * (-(-head // 64) * 64 + 1) + 4 * tiles * (-(-head // 128) * 128) + queries * is_padded
    shares, tile = -(-NUM_MULTIPROCESSORS // heads), 32 if head <= 128 else 64
    copies = 2 * queries * ((config.num_kv_heads < config.num_heads) + is_padded)
    return sums * (shares * (-(-head // tile) * tile) + 1) + copies


def kv_heads_at_once(num_kv_heads: int, num_queries: int, num_seen: int, width: int) -> int:
    """How many of `num_kv_heads` kv heads a block has, with so many queries for each that see `num_seen` positions."""
    return min(num_kv_heads, max(1, HOST_CHUNK_SCORES // (num_queries * max(num_seen, width))))


def host_bytes(config: TrainingConfig, *, has_backward: bool) -> int:
    """The most that attention of a micro-batch takes on a CPU beside q, k and v: in the forward, or in the backward beside what
    that one keeps.
    """
    size, narrow = config.dtype.itemsize, weights_dtype(config.dtype).itemsize
    tokens = config.micro_batch_rows * config.context_length
    queries, keys = config.num_heads * config.head_width, config.num_kv_heads * config.head_width
    block, is_copied = _largest_block_bytes(config, has_backward), config.num_kv_heads > 1
    casts = keys * (4 * (size < 4) + (1 + has_backward) * narrow * (narrow != size))
    block += tokens * casts + 4 * tokens * config.num_kv_heads * config.mask_across_documents
    if has_backward:
        grads, returned = 4 * tokens * (queries + 2 * keys), size * tokens * (queries + 2 * keys)
        return grads + max(size * tokens * queries * is_copied + block, returned, 2 * tokens * queries)
    heads, output = size * tokens * (queries + keys + keys * is_copied), size * tokens * queries
    return max(6 * tokens * queries, heads + output + max(block, output))


def _largest_block_bytes(config: TrainingConfig, has_backward: bool) -> int:
    """The most that a block takes: queries in float32, scores, what hides other documents, and weights; then weights, in a
    backward their gradient too, and what they are multiplied by.
    """
    size, narrow, length = config.dtype.itemsize, weights_dtype(config.dtype).itemsize, config.context_length
    rows, repeats, most = min(length, HOST_CHUNK_QUERIES), config.num_heads // config.num_kv_heads, 0
    num_kv_heads, width = config.micro_batch_rows * config.num_kv_heads, config.head_width
    for seen in range(rows, length + rows, rows):
        at_once = kv_heads_at_once(num_kv_heads, rows * repeats, seen, width)
        queries, keys, scores = (at_once * each for each in (rows * repeats * width, seen * width, rows * repeats * seen))
        hiding = 5 * scores // repeats * config.mask_across_documents
        weighing = 4 * scores + max(4 * queries * (size < 4), hiding, narrow * (narrow < 4) * scores)
        using = narrow * (scores + queries)
        if has_backward:
            using = narrow * (queries * (narrow != size) + scores + max(keys, scores + max(queries, keys)))
        most = max(most, weighing, using)
    return most


def weights_dtype(storage: torch.dtype) -> torch.dtype:
    """The dtype in which a CPU multiplies by attention's weights: bfloat16 where `storage` and products are, else float32, in
    which no weight vanishes.
    """
    dtype = operations.product_dtype(storage, torch.device("cpu"))
    return dtype if dtype == torch.bfloat16 else torch.float32


def stacked(x: Tensor, num_groups: int) -> Tensor:
    """Heads in the order of `Heads`: (B, H, T, K) -> (B * num_groups, T * H / num_groups, K)."""
    return x.unflatten(1, (num_groups, -1)).transpose(2, 3).reshape(len(x) * num_groups, -1, x.shape[-1])


def unstacked(x: Tensor, num_rows: int, length: int, dtype: torch.dtype) -> Tensor:
    """Heads back from `stacked`, a copy, in memory position by position: (N, T * R, K) -> (B, H, T, K), B `num_rows`, T
    `length`.
    """
    by_position = x.view(num_rows, len(x) // num_rows, length, -1, x.shape[-1]).transpose(1, 2)
    return by_position.to(dtype, copy=True, memory_format=torch.contiguous_format).flatten(2, 3).transpose(1, 2)


def _attend(heads: Heads, within: Within | None) -> Tensor:
    """Attention by blocks, of rotated queries and keys: (N, T * R, K), in the dtype of `heads`."""
    output, keys = torch.empty_like(heads.queries), heads.keys.float()
    values = heads.values.to(weights_dtype(heads.values.dtype))
    for block in _blocks(heads, within):
        weights = _weights(heads.queries[block.kv_heads, block.rows], keys, block, values.dtype)
        output[block.kv_heads, block.rows] = torch.bmm(weights, values[block.kv_heads, block.seen])
        del weights
    return output


def _gradients(gradient: Tensor, heads: Heads, within: Within | None) -> Heads:
    """The gradients of `heads` in float32, from that of `_attend`, (N, T * R, K)."""
    narrow, by_key = weights_dtype(heads.values.dtype), (torch.zeros_like(each, dtype=torch.float32) for each in heads[1:])
    grads = Heads(torch.empty_like(heads.queries, dtype=torch.float32), *by_key)
    wide, read = heads.keys.float(), Heads(heads.queries, heads.keys.to(narrow), heads.values.to(narrow))
    for block in _blocks(heads, within):
        weights = _weights(heads.queries[block.kv_heads, block.rows], wide, block, narrow)
        _add_gradients_of_block_(grads, weights, gradient[block.kv_heads, block.rows].to(narrow), read, block)
        del weights
    return grads


def _blocks(heads: Heads, within: Within | None) -> Iterator[Block]:
    (num_kv_heads, length, width), repeats, begins = heads.keys.shape, heads.queries.shape[1] // heads.keys.shape[1], None
    if within is not None:
        begins = within.begins.repeat_interleave(num_kv_heads // len(within.begins), 0)
    for start in range(0, length, HOST_CHUNK_QUERIES):
        positions = slice(start, min(start + HOST_CHUNK_QUERIES, length))
        rows, seen = slice(repeats * start, repeats * positions.stop), slice(0, positions.stop)
        if within is not None:
            seen = slice(max(0, start + 1 - within.longest), positions.stop)
        at_once = kv_heads_at_once(num_kv_heads, rows.stop - rows.start, seen.stop - seen.start, width)
        for kv_heads in operations.row_slices(num_kv_heads, at_once):
            yield Block(kv_heads, positions, rows, seen, None if begins is None else begins[kv_heads, positions])


def _weights(queries: Tensor, keys: Tensor, block: Block, dtype: torch.dtype) -> Tensor:
    """The shares that queries (n, rows, K) give the positions that they see: (n, rows, seen), each row's sum is 1. The keys
    (N, T, K) are float32, and so are scores.
    """
    seen = keys[block.kv_heads, block.seen].transpose(1, 2)
    scores = torch.baddbmm(keys.new_empty(1), queries.float(), seen, beta=0, alpha=_scale(keys))
    num_positions = block.positions.stop - block.positions.start
    by_position, later = scores.unflatten(1, (num_positions, -1)), scores.new_full((num_positions,) * 2, -torch.inf)
    by_position[..., -num_positions:].add_(later.triu_(1).unsqueeze(1))
    if block.begins is not None:
        is_before = torch.arange(block.seen.start, block.seen.stop, device=keys.device) < block.begins.unsqueeze(-1)
        by_position.add_(scores.new_zeros(is_before.shape).masked_fill_(is_before, -torch.inf).unsqueeze(2))
    return torch.softmax(scores, -1, out=scores).to(dtype)


def _add_gradients_of_block_(grads: Heads, weights: Tensor, gradient: Tensor, read: Heads, block: Block) -> None:
    """Adds a block's part to the gradients; writes those of its queries, which no other block has."""
    own, seen = (block.kv_heads, block.rows), (block.kv_heads, block.seen)
    _add_products_(grads.values[seen], weights.transpose(1, 2), gradient, 1.0)
    by_score = torch.bmm(gradient, read.values[seen].transpose(1, 2))
    torch.ops.aten._softmax_backward_data.out(by_score, weights, -1, weights.dtype, grad_input=by_score)
    torch.mul(torch.bmm(by_score, read.keys[seen]), _scale(read.keys), out=grads.queries[own])
    _add_products_(grads.keys[seen], by_score.transpose(1, 2), read.queries[own].to(weights.dtype), _scale(read.keys))


def _add_products_(total: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """Adds scale * left @ right, batch by batch, to `total`, which is float32; in one pass if they are too."""
    if left.dtype == total.dtype:
        total.baddbmm_(left, right, alpha=scale)
    else:
        total.add_(torch.bmm(left, right), alpha=scale)


def _scale(keys: Tensor) -> float:
    """What scores are multiplied by: 1 / sqrt(K)."""
    return 1 / math.sqrt(keys.shape[-1])


class _HostAttention(torch.autograd.Function):
    """Rotary positions, rounded to the storage dtype as on a GPU, and attention by blocks."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, rotary: Tensor, within: Within | None) -> Tensor:
        num_groups, ctx.within = k.shape[1], within
        heads = Heads(_rotated(q, num_groups, rotary), _rotated(k, num_groups, rotary), stacked(v, num_groups))
        ctx.save_for_backward(*heads, rotary)
        return unstacked(_attend(heads, within), len(q), q.shape[2], q.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        *saved, rotary = ctx.saved_tensors
        heads, (num_rows, _, length, width) = Heads(*saved), gradient.shape
        num_groups, (cos, sin) = len(heads.keys) // num_rows, rotary.unsqueeze(-2)
        grads = _gradients(stacked(gradient, num_groups), heads, ctx.within)
        for each in (grads.queries, grads.keys):
            operations.rotate_(each.view(num_rows, num_groups, length, -1, width), cos, -sin)
        return *(unstacked(each, num_rows, length, gradient.dtype) for each in grads), None, None


def _rotated(x: Tensor, num_groups: int, rotary: Tensor) -> Tensor:
    """`stacked` heads, rotated in float32 and rounded to their dtype: (B, H, T, K) -> (B * num_groups, T * R, K)."""
    by_group = x.unflatten(1, (num_groups, -1)).transpose(2, 3)
    wide = by_group.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    return operations.rotate_(wide, *rotary.unsqueeze(-2)).to(x.dtype).view(len(x) * num_groups, -1, x.shape[-1])
