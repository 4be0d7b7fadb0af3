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
        total, needed = hidden.new_zeros((), dtype=torch.float32), ctx.needs_input_grad
        wide = head.to(product_dtype(head.dtype, head.device))
        grad_hidden = torch.empty_like(hidden) if needed[0] else None
        is_split = len(hidden) > chunk_rows
        grad_head = torch.zeros_like(head, dtype=torch.float32) if needed[1] and is_split else None
        for rows in _chunks(len(hidden), chunk_rows):
            inputs = hidden[rows].to(wide.dtype)
            if not any(needed):
                total += _nats(inputs, wide, targets[rows]).sum()
                continue
            nats, slope = _nats_and_slope(inputs, wide, targets[rows])
            total += nats.sum()
            if grad_hidden is not None:
                grad_hidden[rows] = slope @ wide
            if grad_head is not None:
                _add_product(grad_head, slope, inputs)
            elif needed[1]:
                grad_head = slope.T @ inputs
            del slope
        count = (targets != IGNORED).sum().clamp_(min=1)
        ctx.grads, ctx.count, ctx.dtype = (grad_hidden, grad_head), count, head.dtype
        return total / count

    @staticmethod
    def backward(ctx, slope: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_hidden, grad_head = ctx.grads
        ctx.grads = None
        scale = (slope / ctx.count).reshape(1)
        if grad_hidden is not None:
            torch.mul(grad_hidden, scale, out=grad_hidden)
        if grad_head is not None:
            grad_head = torch.mul(grad_head, scale, out=grad_head).to(ctx.dtype)
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
    chunks = _chunks(len(flat), chunk_rows)
    return torch.cat([_nats(flat[rows].to(wide.dtype), wide, wanted[rows]) for rows in chunks]).view_as(targets)


def _chunks(num_rows: int, chunk_rows: int) -> Iterator[slice]:
    return (slice(start, start + chunk_rows) for start in range(0, num_rows, chunk_rows))


def _add_product(total: Tensor, slope: Tensor, inputs: Tensor) -> None:
    """total += slope.T @ inputs, by parts no larger than slope: (V, D) float32, (C, V), (C, D)."""
    for part in _chunks(len(total), max(1, slope.numel() // inputs.shape[1])):
        total[part] += slope[:, part].T @ inputs


def _nats(inputs: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each row, zero where ignored: (C, D), (V, D), (C,) -> (C,) float32."""
    logits = functional.linear(inputs, head).float()
    logs = torch.log_softmax(logits, dim=-1, out=logits)
    return -_of(logs, targets).masked_fill_(targets == IGNORED, 0.0)


def _nats_and_slope(inputs: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """As `_nats`, and its slope by the logits, softmax - one_hot, (C, V) in the inputs' dtype; one (C, V) float32 lives in all.

    The likeliest id's probability gives the logarithm of the softmax's denominator without a second (C, V).
    """
    logits, ignored = functional.linear(inputs, head).float(), targets == IGNORED
    (largest, best), own = logits.max(dim=-1), _of(logits, targets)
    slope = torch.softmax(logits, dim=-1, out=logits)
    nats = (largest - own - slope.gather(1, best.unsqueeze(1)).squeeze(1).log_()).masked_fill_(ignored, 0.0)
    slope[torch.arange(len(targets), device=targets.device), targets.clamp(min=0)] -= 1.0
    return nats, slope.masked_fill_(ignored.unsqueeze(1), 0.0).to(inputs.dtype)


def _of(logits: Tensor, targets: Tensor) -> Tensor:
    """What each row holds at its target, and at 0 where ignored: (C, V), (C,) -> (C,)."""
    return logits.gather(1, targets.masked_fill(targets == IGNORED, 0).unsqueeze(1)).squeeze(1)
