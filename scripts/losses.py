"""The objectives, in chunks so that logits are never whole. Knows hidden states and heads, no model and no data."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from scripts.config import product_dtype

IGNORED = -100


class Labels(NamedTuple):
    """What a model says of the next token at each position, k of V ids.

    `ids` (B, T, k) integer: the likeliest, best first. `logs` (B, T, k) float16: their log-probabilities under
    softmax(logits / temperature). `tail` (B, T) float32: the probability of all other ids together. As they are read, the k
    probabilities are scaled to sum to 1 with the tail.
    """

    ids: Tensor
    logs: Tensor
    tail: Tensor


class _Aim(NamedTuple):
    """How much the teacher counts and how it is compared: fields of the configuration."""

    weight: float
    temperature: float
    divergence: str


class _ChunkedLoss(torch.autograd.Function):
    """The forward computes the gradients too, chunk by chunk; the backward only scales them (as Liger-kernel does, 2024).

    `judge` takes a chunk's inputs (C, D), the head (V, D), which rows these are and whether slopes are wanted; it gives what
    each row costs, (C,) float32, and where wanted the slope by the logits, (C, V) float32; zeros where ignored.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, head: Tensor, targets: Tensor, chunk_rows: int, judge: Callable) -> Tensor:
        total, needed = hidden.new_zeros((), dtype=torch.float32), ctx.needs_input_grad
        wide = _wide(head)
        grad_hidden = torch.empty_like(hidden) if needed[0] else None
        is_split = len(hidden) > chunk_rows
        grad_head = torch.zeros_like(head, dtype=torch.float32) if needed[1] and is_split else None
        for rows in _chunks(len(hidden), chunk_rows):
            inputs = hidden[rows].to(wide.dtype)
            costs, slope = judge(inputs, wide, rows, any(needed))
            total += costs.sum()
            if any(needed):
                slope = slope.to(inputs.dtype)
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
        return grad_hidden, grad_head, None, None, None


def next_token_loss(hidden: Tensor, head: Tensor, targets: Tensor, chunk_rows: int) -> Tensor:
    """Mean cross-entropy in nats: (B, T, D), (V, D), (B, T) int64 -> () float32; logits exist `chunk_rows` tokens at a time.

    Targets equal to -100 are ignored; with none left the loss is 0. The backward may run once.
    """
    flat = targets.flatten()
    return _ChunkedLoss.apply(hidden.flatten(0, 1), head, flat, chunk_rows, partial(_judge_by_text, flat))  # pyright: ignore


def distillation_loss(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    taught: Tensor,
    taught_head: Tensor,
    weight: float,
    temperature: float,
    divergence: str,
    chunk_rows: int,
) -> Tensor:
    """(1 - weight) * next-token + weight * temperature^2 * KL, means over tokens that are not ignored, in nats: () float32.

    hidden (B, T, D), head (V, D) and targets (B, T) int64 as in `next_token_loss`; taught (B, T, D_t) the teacher's last hidden
    states, taught_head (V, D_t). Both models' softmax is of logits / temperature (Hinton et al. 2015); the divergence
    "forward" is KL(teacher || student), "reverse" KL(student || teacher) (Gu et al. 2023, MiniLLM). Neither model's logits
    exist for more than `chunk_rows` tokens; the teacher gets no gradient, and of it nothing is kept for the backward.
    """
    flat, wide, aim = targets.flatten(), _wide(taught_head), _Aim(weight, temperature, divergence)
    judge = partial(_judge_by_teacher, flat, taught.flatten(0, 1), wide, aim)
    return _ChunkedLoss.apply(hidden.flatten(0, 1), head, flat, chunk_rows, judge)  # pyright: ignore[reportReturnType]


def label_loss(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    labels: Labels,
    weight: float,
    temperature: float,
    divergence: str,
    chunk_rows: int,
) -> Tensor:
    """`distillation_loss` where of the teacher `labels` are left, made at the same temperature: () float32.

    The divergence is between k + 1 outcomes, the k ids and "any other"; forward, it is never above the whole one (the data
    processing inequality, Cover & Thomas 2006, 2.8).
    """
    flat, aim = targets.flatten(), _Aim(weight, temperature, divergence)
    judge = partial(_judge_by_labels, flat, Labels(*(part.flatten(0, 1) for part in labels)), aim)
    return _ChunkedLoss.apply(hidden.flatten(0, 1), head, flat, chunk_rows, judge)  # pyright: ignore[reportReturnType]


@torch.no_grad()
def likeliest(hidden: Tensor, head: Tensor, top_k: int, temperature: float, chunk_rows: int) -> tuple[Labels, Tensor]:
    """Labels with k = `top_k` below V and int32 ids, and what they leave out: (B, T, D), (V, D) -> Labels, (B, T) float32.

    What they leave out, in nats, is by how much the forward KL over k + 1 outcomes is below the whole one for a student that
    knows nothing, whose every id is as likely: tail * (log(V - k) - the entropy within the tail).
    """
    flat, wide = hidden.flatten(0, 1), _wide(head)
    ids = torch.empty(len(flat), top_k, dtype=torch.int32, device=flat.device)
    logs = torch.empty_like(ids, dtype=torch.float16)
    tail, lost = torch.empty(2, len(flat), dtype=torch.float32, device=flat.device)
    for rows in _chunks(len(flat), chunk_rows):
        all_logs = _logs(flat[rows].to(wide.dtype), wide, temperature)
        best, ids_of_best = all_logs.topk(top_k)
        ids[rows], logs[rows] = ids_of_best, best.clamp_(min=torch.finfo(torch.float16).min)
        within, log_tail = _without(all_logs, ids_of_best)
        all_logs.sub_(log_tail).scatter_(1, ids_of_best, 0.0)
        tail[rows] = log_tail.squeeze(1).exp_()
        lost[rows] = tail[rows] * (math.log(len(wide) - top_k) + within.mul_(all_logs).sum(-1))
        del all_logs, within, best, ids_of_best
    shape = hidden.shape[:2]
    return Labels(ids.unflatten(0, shape), logs.unflatten(0, shape), tail.view(shape)), lost.view(shape)


@torch.no_grad()
def token_nats(hidden: Tensor, head: Tensor, targets: Tensor, chunk_rows: int) -> Tensor:
    """Cross-entropy of each token in nats, for evaluation: (B, T, D), (V, D), (B, T) int64 -> (B, T) float32."""
    flat, wanted, wide = hidden.flatten(0, 1), targets.flatten(), _wide(head)
    chunks = _chunks(len(flat), chunk_rows)
    return torch.cat([_nats(flat[rows].to(wide.dtype), wide, wanted[rows]) for rows in chunks]).view_as(targets)


def _wide(head: Tensor) -> Tensor:
    return head.to(product_dtype(head.dtype, head.device))


def _chunks(num_rows: int, chunk_rows: int) -> Iterator[slice]:
    return (slice(start, start + chunk_rows) for start in range(0, num_rows, chunk_rows))


def _add_product(total: Tensor, slope: Tensor, inputs: Tensor) -> None:
    """total += slope.T @ inputs, by parts no larger than slope: (V, D) float32, (C, V), (C, D)."""
    for part in _chunks(len(total), max(1, slope.numel() // inputs.shape[1])):
        total[part] += slope[:, part].T @ inputs


def _judge_by_text(
    targets: Tensor, inputs: Tensor, head: Tensor, rows: slice, wants_slope: bool
) -> tuple[Tensor, Tensor | None]:
    """Nats of the next token; one (C, V) float32 lives in all."""
    wanted = targets[rows]
    if not wants_slope:
        return _nats(inputs, head, wanted), None
    logits, ignored = functional.linear(inputs, head).float(), wanted == IGNORED
    nats = _cross_entropy(logits, wanted).masked_fill_(ignored, 0.0)
    return nats, logits.masked_fill_(ignored.unsqueeze(1), 0.0)


def _judge_by_teacher(
    targets: Tensor, taught: Tensor, taught_head: Tensor, aim: _Aim, inputs: Tensor, head: Tensor, rows: slice, _: bool
) -> tuple[Tensor, Tensor]:
    """Nats of the next token and of the divergence, weighed; three (C, V) float32 live in all."""
    logs = _logs(inputs, head, aim.temperature)
    theirs = _logs(taught[rows].to(taught_head.dtype), taught_head, aim.temperature)
    nats, slope = _diverge(logs, theirs, aim.divergence)
    del theirs
    return _weigh(logs, targets[rows], nats, slope, aim)


def _judge_by_labels(
    targets: Tensor, taught: Labels, aim: _Aim, inputs: Tensor, head: Tensor, rows: slice, _: bool
) -> tuple[Tensor, Tensor]:
    """As `_judge_by_teacher`, over k + 1 outcomes; two (C, V) float32 live in all.

    The slope by an outcome's logarithm is shared out to the logits that it is the sum of, by their parts of it.
    """
    logs, ids = _logs(inputs, head, aim.temperature), taught.ids[rows].long()
    own = logs.gather(1, ids)
    slope, log_tail = _without(logs, ids)
    logs.scatter_(1, ids, own)
    outcomes = _log_outcomes(taught.logs[rows], taught.tail[rows])
    nats, slopes = _diverge(torch.cat((own, log_tail), dim=1), outcomes, aim.divergence)
    slope.mul_(slopes[:, -1:]).scatter_(1, ids, slopes[:, :-1])
    return _weigh(logs, targets[rows], nats, slope, aim)


def _logs(inputs: Tensor, head: Tensor, temperature: float) -> Tensor:
    """Log-probabilities under softmax(logits / temperature): (C, D), (V, D) -> (C, V) float32."""
    logits = functional.linear(inputs, head).float()
    if temperature != 1.0:
        logits.div_(temperature)
    return torch.log_softmax(logits, dim=-1, out=logits)


def _log_outcomes(logs: Tensor, tail: Tensor) -> Tensor:
    """Log-probabilities (C, k + 1) of k ids, scaled to fill what the tail leaves, and of the tail: (C, k), (C,).

    A tail or a rest of nothing counts as the least number that float32 holds in full, so that it has a logarithm.
    """
    least, wide, tails = torch.finfo(torch.float32).tiny, logs.float(), tail.float().unsqueeze(1)
    rest = torch.log((1.0 - tails).clamp_(min=least)) - wide.logsumexp(dim=1, keepdim=True)
    return torch.cat((wide + rest, tails.clamp(min=least).log_()), dim=1)


def _without(logs: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The softmax (C, V) over all ids but those (C, k), where it is 0 and `logs` become -inf, and their log-sum (C, 1).

    The likeliest of them gives the log-sum: it is exact where 1 minus the sum of the others would be noise.
    """
    logs.scatter_(1, ids, -torch.inf)
    largest, best = logs.max(dim=-1, keepdim=True)
    within = torch.softmax(logs, dim=-1)
    return within, largest - within.gather(1, best).log_()


def _diverge(student: Tensor, teacher: Tensor, divergence: str) -> tuple[Tensor, Tensor]:
    """KL of each row and its slope by the student's logits: log-probabilities (C, V) -> (C,), (C, V); writes over teacher's."""
    if divergence == "forward":
        apart = torch.sub(teacher, student)
        shares = teacher.exp_()
        nats = apart.mul_(shares).sum(-1)
        return nats, torch.exp(student, out=apart).sub_(shares)
    apart = torch.sub(student, teacher)
    shares = torch.exp(student, out=teacher)
    nats = apart.mul_(shares).sum(-1)
    return nats, apart.addcmul_(shares, nats.unsqueeze(1), value=-1.0)


def _weigh(logs: Tensor, targets: Tensor, nats: Tensor, slope: Tensor, aim: _Aim) -> tuple[Tensor, Tensor]:
    """Adds the next token's nats and slope, which `logs` (C, V) at the temperature tell too; zeros where ignored."""
    kept, soft = (targets != IGNORED).float(), aim.weight * aim.temperature
    if aim.temperature != 1.0:
        logs.mul_(aim.temperature)
    costs = (1.0 - aim.weight) * _cross_entropy(logs, targets) + soft * aim.temperature * nats
    by_row = kept.unsqueeze(1)
    return costs * kept, logs.mul_((1.0 - aim.weight) * by_row).addcmul_(slope, soft * by_row)


def _nats(inputs: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each row, zero where ignored: (C, D), (V, D), (C,) -> (C,) float32."""
    logits = functional.linear(inputs, head).float()
    logs = torch.log_softmax(logits, dim=-1, out=logits)
    return -_of(logs, targets).masked_fill_(targets == IGNORED, 0.0)


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Nats of each row, (C,); the logits (C, V) float32 become their slope, softmax - one_hot. Ignored rows are as for id 0.

    The likeliest id's probability gives the logarithm of the softmax's denominator without a second (C, V).
    """
    (largest, best), own = logits.max(dim=-1), _of(logits, targets)
    slope = torch.softmax(logits, dim=-1, out=logits)
    nats = largest - own - slope.gather(1, best.unsqueeze(1)).squeeze(1).log_()
    slope[torch.arange(len(targets), device=targets.device), targets.clamp(min=0)] -= 1.0
    return nats


def _of(logits: Tensor, targets: Tensor) -> Tensor:
    """What each row holds at its target, and at 0 where ignored: (C, V), (C,) -> (C,)."""
    return logits.gather(1, targets.masked_fill(targets == IGNORED, 0).unsqueeze(1)).squeeze(1)
