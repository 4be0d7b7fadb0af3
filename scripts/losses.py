"""The objectives, in chunks so that logits are never whole. Knows hidden states and a head, no model and no data."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from scripts.config import product_dtype

IGNORED = -100


class _NextTokenLoss(torch.autograd.Function):
    """The forward computes the gradients too, chunk by chunk; the backward only scales them (as Liger-kernel does, 2024)."""

    @staticmethod
    def forward(ctx, hidden: Tensor, head: Tensor, targets: Tensor, chunk_rows: int) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_head = torch.zeros_like(head, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        wide = head.to(product_dtype(head.dtype, head.device))
        for rows in _chunks(hidden.shape[0], chunk_rows):
            inputs = hidden[rows].to(wide.dtype)
            logits = functional.linear(inputs, wide).float()
            total += functional.cross_entropy(logits, targets[rows], ignore_index=IGNORED, reduction="sum")
            if grad_hidden is None and grad_head is None:
                continue
            slope = _cross_entropy_slope(logits, targets[rows]).to(wide.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = slope @ wide
            if grad_head is not None:
                grad_head += slope.T @ inputs
        count = (targets != IGNORED).sum().clamp_(min=1)
        ctx.grads, ctx.count, ctx.dtype = (grad_hidden, grad_head), count, head.dtype
        return total / count

    @staticmethod
    def backward(ctx, slope: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_hidden, grad_head = ctx.grads
        scale = slope / ctx.count
        if grad_hidden is not None:
            grad_hidden *= scale
        if grad_head is not None:
            grad_head = grad_head.mul_(scale).to(ctx.dtype)
        ctx.grads = None
        return grad_hidden, grad_head, None, None


def next_token_loss(hidden: Tensor, head: Tensor, targets: Tensor, chunk_rows: int) -> Tensor:
    """Mean cross-entropy in nats: (B, T, D), (V, D), (B, T) int64 -> () float32; logits exist `chunk_rows` tokens at a time.

    Targets equal to -100 are ignored; with none left the loss is 0. The backward may run once.
    """
    return _NextTokenLoss.apply(hidden.flatten(0, 1), head, targets.flatten(), chunk_rows)  # pyright: ignore[reportReturnType]


@torch.no_grad()
def token_nats(hidden: Tensor, head: Tensor, targets: Tensor, chunk_rows: int) -> Tensor:
    """Cross-entropy of each token in nats, for evaluation: (B, T, D), (V, D), (B, T) int64 -> (B, T) float32."""
    flat, wanted, wide = hidden.flatten(0, 1), targets.flatten(), head.to(product_dtype(head.dtype, head.device))
    nats = [
        functional.cross_entropy(functional.linear(flat[rows].to(wide.dtype), wide).float(), wanted[rows], reduction="none")
        for rows in _chunks(flat.shape[0], chunk_rows)
    ]
    return torch.cat(nats).view_as(targets)


def _chunks(num_rows: int, chunk_rows: int) -> Iterator[slice]:
    return (slice(start, start + chunk_rows) for start in range(0, num_rows, chunk_rows))


def _cross_entropy_slope(logits: Tensor, targets: Tensor) -> Tensor:
    """d cross_entropy / d logits = softmax - one_hot, zero where ignored; (C, V) float32, in the logits' own storage."""
    kept = targets != IGNORED
    slope = torch.softmax(logits, dim=-1, out=logits)
    slope[torch.arange(len(targets), device=targets.device), targets.clamp(min=0)] -= 1.0
    return slope.mul_(kept.unsqueeze(1))
