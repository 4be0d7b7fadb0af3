"""The losses, computed in chunks so that logits never exist whole. Knows hidden states and heads; no layers and no data.

A new objective needs three things: a loss function for one chunk (as `_text_chunk` below), a public loss that runs it through
`_ChunkedLoss` (as `next_token_loss`), and an objective that an entry hands to the trainer (as `next_token`).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ds.shards import Labels
from scripts.config import HOST_CHUNK_LOGITS, HOST_CHUNK_ROWS, TrainingConfig
from scripts.model.documents import Windows
from scripts.model.operations import kernel, on_host, product_dtype, row_slices

IGNORED = -100
HALF_GRADIENT_SCALE = 2.0**8


class LabelledTokens(NamedTuple):
    """A teacher's labels, and what they leave out of its distribution at each position: `left_out_nats` (B, T) float32."""

    labels: Labels[Tensor]
    left_out_nats: Tensor


def next_token(engine, windows: Windows, config: TrainingConfig) -> Tensor:
    """The pre-training objective: windows of T + 1 tokens -> mean nats per token, () float32.

    All T tokens count, also with `documents`: the first token of a document is predicted from the end of text before it, which
    sees its own document alone, as a model is asked to go on after one.
    """
    hidden = engine(windows.inputs, documents=windows.documents)
    return next_token_loss(hidden, engine.module.head, windows.targets, config.loss_chunk_rows)


def next_token_loss(hidden: Tensor, head: Tensor, targets: Tensor, chunk_rows: int) -> Tensor:
    """Mean cross-entropy in nats: (B, T, D), (V, D), (B, T) int64 -> () float32; logits exist `chunk_rows` tokens at a time.

    Targets equal to -100 are ignored; if all are, the loss is 0. The backward may run once.
    """
    return _chunked_loss(hidden, head, targets, chunk_rows, _Chunk(_text_chunk, 1.0))


def distillation_loss(
    hidden: Tensor, head: Tensor, targets: Tensor, teacher_hidden: Tensor, teacher_head: Tensor, *, weight: float,
    temperature: float, divergence: str, chunk_rows: int,
) -> Tensor:  # fmt: skip
    """(1 - weight) * next-token loss + weight * temperature^2 * KL, each a mean in nats over targets not ignored: () float32.

    hidden (B, T, D), head (V, D), targets (B, T) int64 and chunk_rows as in `next_token_loss`; teacher_hidden (B, T, D_t) are
    the teacher's last hidden states, teacher_head is (V, D_t). KL compares softmax(logits / temperature) of both (Hinton et al.
    2015): KL(teacher || student) if `divergence` is "forward", KL(student || teacher) if "reverse" (Gu et al. 2023, MiniLLM).
    Of neither model do logits exist whole. The teacher gets no gradient, and the backward keeps nothing of it.
    """
    teacher = {"teacher_hidden": teacher_hidden.flatten(0, 1), "teacher_head": _for_products(teacher_head)}
    chunk = partial(_teacher_chunk, **teacher, settings=_Distillation(weight, temperature, divergence))
    return _chunked_loss(hidden, head, targets, chunk_rows, _Chunk(chunk, _power_of_two(weight * temperature)))


def label_loss(
    hidden: Tensor, head: Tensor, targets: Tensor, labels: Labels[Tensor], *, weight: float, temperature: float,
    divergence: str, chunk_rows: int,
) -> Tensor:  # fmt: skip
    """`distillation_loss` from a teacher's labels in place of its hidden states: () float32.

    The labels, (B, T, k) and (B, T), must have been made at the same temperature. KL compares k + 1 outcomes: each of the k
    ids, and any other id. "forward" is never above the KL of all ids (data processing inequality, Cover & Thomas 2006, 2.8).
    """
    rows, settings = Labels(*(part.flatten(0, 1) for part in labels)), _Distillation(weight, temperature, divergence)
    chunk = partial(_label_chunk, labels=rows, settings=settings)
    return _chunked_loss(hidden, head, targets, chunk_rows, _Chunk(chunk, _power_of_two(weight * temperature)))


@torch.no_grad()
def likeliest(hidden: Tensor, head: Tensor, top_k: int, temperature: float, chunk_rows: int) -> LabelledTokens:
    """The `top_k` most likely ids under softmax(logits / temperature): (B, T, D), (V, D) -> labels with int32 ids; top_k < V.

    What they leave out is measured for a student that gives all V ids the same probability: how many nats its forward KL over
    k + 1 outcomes is below its KL over all ids, which is tail * (log(V - k) - entropy within the tail).
    """
    flat, matrix = hidden.flatten(0, 1), _for_products(head)
    ids = torch.empty(len(flat), top_k, dtype=torch.int32, device=flat.device)
    logs = torch.empty_like(ids, dtype=torch.float16)
    tail, left_out = torch.empty(2, len(flat), dtype=torch.float32, device=flat.device)
    for rows in row_slices(len(flat), chunk_rows):
        all_logs = _log_probabilities(flat[rows].to(matrix.dtype), matrix, temperature)
        best, ids_of_best = all_logs.topk(top_k)
        ids[rows], logs[rows] = ids_of_best, best.clamp_(min=torch.finfo(torch.float16).min)
        within, log_tail = _tail_of_(all_logs, ids_of_best)
        all_logs.sub_(log_tail).scatter_(1, ids_of_best, 0.0)
        tail[rows] = log_tail.squeeze(1).exp_()
        left_out[rows] = tail[rows] * (math.log(len(matrix) - top_k) + within.mul_(all_logs).sum(-1))
        del all_logs, within, best, ids_of_best
    shape = hidden.shape[:2]
    return LabelledTokens(Labels(ids.unflatten(0, shape), logs.unflatten(0, shape), tail.view(shape)), left_out.view(shape))


@torch.no_grad()
def token_nats(hidden: Tensor, head: Tensor, targets: Tensor, chunk_rows: int) -> Tensor:
    """Cross-entropy of each token in nats, for evaluation: (B, T, D), (V, D), (B, T) int64 -> (B, T) float32, 0 if ignored."""
    flat, wanted, matrix = hidden.flatten(0, 1), targets.flatten(), _for_products(head)
    slices = row_slices(len(flat), chunk_rows)
    return torch.cat([_nats(flat[rows].to(matrix.dtype), matrix, wanted[rows]) for rows in slices]).view_as(targets)


class _Distillation(NamedTuple):
    """How a teacher's loss is made: the configuration's distill_weight, distill_temperature and distill_divergence."""

    weight: float
    temperature: float
    divergence: str


class _Chunk(NamedTuple):
    """The loss function of one chunk, and about the largest that its gradient can be, as a power of two."""

    loss_function: Callable
    largest: float


class _Costs(NamedTuple):
    """Each row's nats (C,) float32, and their gradient with respect to the logits (C, V), empty where not wanted."""

    nats: Tensor
    gradient: Tensor


class _Tail(NamedTuple):
    """The softmax over all ids but some, `shares` (C, V), and the logarithm of their summed probability, `log_sum` (C, 1)."""

    shares: Tensor
    log_sum: Tensor


class _ChunkedLoss(torch.autograd.Function):
    """The forward computes the gradients too, chunk by chunk; the backward only scales them (as Liger-kernel does, 2024).

    `chunk.loss_function(inputs, head, targets, rows, scale)` gets hidden states (C, D), the head (V, D), targets (C,) and
    `rows`, the slice that they are. It returns _Costs, zero where ignored, the gradient times `scale` in the dtype of `inputs`.
    No gradient is wanted where `scale` is None.

    In float16 probabilities below 3e-8 would vanish from the gradient of the logits, before the loss scale can save them. So it
    is made HALF_GRADIENT_SCALE times as large, less where the loss's `largest` gradient is above 1; its products with hidden
    states are added up in float32, and those with the head are divided again in the backward.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, head: Tensor, targets: Tensor, chunk_rows: int, chunk: _Chunk) -> Tensor:
        total, needed = hidden.new_zeros((), dtype=torch.float32), ctx.needs_input_grad
        matrix = _for_products(head)
        grad_hidden = torch.empty_like(hidden) if needed[0] else None
        is_half = matrix.dtype == torch.float16
        is_split, scale = is_half or len(hidden) > chunk_rows, HALF_GRADIENT_SCALE / chunk.largest if is_half else 1.0
        grad_head = torch.zeros_like(head, dtype=torch.float32) if needed[1] and is_split else None
        for rows in row_slices(len(hidden), chunk_rows):
            inputs = hidden[rows].to(matrix.dtype)
            nats, gradient = chunk.loss_function(inputs, matrix, targets[rows], rows, scale if any(needed) else None)
            total += nats.sum()
            if grad_hidden is not None:
                grad_hidden[rows] = gradient @ matrix
            if grad_head is not None:
                most = gradient.numel() // inputs.shape[1] // (2 if is_half else 1)  # no more bytes than `gradient`
                for part in row_slices(len(head), max(1, most)):
                    grad_head[part] += _head_product(gradient[:, part], inputs)
            elif needed[1]:
                grad_head = gradient.T @ inputs
            del gradient
        count = (targets != IGNORED).sum().clamp_(min=1)
        ctx.gradients, ctx.count, ctx.scale, ctx.dtype = (grad_hidden, grad_head), count, scale, head.dtype
        return total / count

    @staticmethod
    def backward(ctx, gradient: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_hidden, grad_head = ctx.gradients
        ctx.gradients = None
        scale = (gradient / ctx.count).reshape(1) / ctx.scale
        for each in (grad_hidden, grad_head):
            if each is not None:
                _scale_(each, scale)
        grad_head = None if grad_head is None else grad_head.to(ctx.dtype)
        return grad_hidden, grad_head, None, None, None


def _scale_(gradient: Tensor, scale: Tensor) -> None:
    """scale (1,) float32 times `gradient` (N, D), in place. A CPU casts what it multiplies to float32: a few rows at a time."""
    for part in gradient.split(HOST_CHUNK_ROWS) if on_host(gradient) else [gradient]:
        torch.mul(part, scale, out=part)


def _chunked_loss(hidden: Tensor, head: Tensor, targets: Tensor, chunk_rows: int, chunk: _Chunk) -> Tensor:
    return _ChunkedLoss.apply(hidden.flatten(0, 1), head, targets.flatten(), chunk_rows, chunk)  # pyright: ignore


def _head_product(gradient: Tensor, inputs: Tensor) -> Tensor:
    """gradient.T @ inputs: (C, V), (C, D) -> (V, D); of float16 in float32, where neither small nor large sums are lost."""
    if inputs.dtype != torch.float16:
        return gradient.T @ inputs
    if inputs.device.type == "cpu":
        return gradient.T.float() @ inputs.float()
    return torch.mm(gradient.T, inputs, out_dtype=torch.float32)


def _power_of_two(number: float) -> float:
    """The least power of two that is not below `number`, at least 1."""
    return 2.0 ** math.ceil(math.log2(max(number, 1)))


def _for_products(head: Tensor) -> Tensor:
    return head.to(product_dtype(head.dtype, head.device))


def _scaled(gradient: Tensor, scale: float | None, dtype: torch.dtype) -> Tensor:
    """scale * gradient in `dtype`, rounded once; unscaled where `scale` is None."""
    if scale in (None, 1.0):
        return gradient.to(dtype)
    return torch.mul(gradient, scale, out=torch.empty_like(gradient, dtype=dtype))


def _text_chunk(inputs: Tensor, head: Tensor, targets: Tensor, _: slice, scale: float | None) -> _Costs:
    """The next-token loss of a chunk; beside logits of 16 bits one (C, V) float32 is alive at a time. On the host only
    HOST_CHUNK_LOGITS of its elements are, which stay in the cache and in memory that the process has already.
    """
    if scale is None:
        return _Costs(_nats(inputs, head, targets), inputs.new_empty(0))
    logits, nats = functional.linear(inputs, head), torch.empty_like(targets, dtype=torch.float32)
    at_once = max(1, HOST_CHUNK_LOGITS // len(head)) if on_host(logits) else len(logits)
    for rows in row_slices(len(logits), at_once):
        nats[rows] = _text_costs_(logits[rows], targets[rows], scale)
    return _Costs(nats, logits)


def _teacher_chunk(
    inputs: Tensor, head: Tensor, targets: Tensor, rows: slice, scale: float | None, *, teacher_hidden: Tensor,
    teacher_head: Tensor, settings: _Distillation,
) -> _Costs:  # fmt: skip
    """The distillation loss of a chunk; at most three (C, V) float32 are alive at a time."""
    logs = _log_probabilities(inputs, head, settings.temperature)
    teacher_logs = _log_probabilities(teacher_hidden[rows].to(teacher_head.dtype), teacher_head, settings.temperature)
    nats, gradient = _divergence_(logs, teacher_logs, settings.divergence)
    del teacher_logs
    nats = _with_text_(logs, targets, nats, gradient, settings)
    del gradient
    return _Costs(nats, _scaled(logs, scale, inputs.dtype))


def _label_chunk(
    inputs: Tensor, head: Tensor, targets: Tensor, rows: slice, scale: float | None, *, labels: Labels[Tensor],
    settings: _Distillation,
) -> _Costs:  # fmt: skip
    """The label loss of a chunk; at most two (C, V) float32 are alive at a time.

    The gradient of an outcome's log-probability goes to the ids that the outcome sums up, in proportion to their probabilities.
    """
    logs, ids = _log_probabilities(inputs, head, settings.temperature), labels.ids[rows].long()
    likely = logs.gather(1, ids)
    gradient, log_tail = _tail_of_(logs, ids)
    logs.scatter_(1, ids, likely)
    outcomes = _log_outcomes(labels.logs[rows], labels.tail[rows])
    nats, by_outcome = _divergence_(torch.cat((likely, log_tail), dim=1), outcomes, settings.divergence)
    gradient.mul_(by_outcome[:, -1:]).scatter_(1, ids, by_outcome[:, :-1])
    nats = _with_text_(logs, targets, nats, gradient, settings)
    del gradient
    return _Costs(nats, _scaled(logs, scale, inputs.dtype))


@kernel(any_shape=False)
def _text_costs_(logits: Tensor, targets: Tensor, scale: float) -> Tensor:
    """Cross-entropy of each row (C,), zero where ignored. Its gradient times `scale` overwrites `logits` (C, V)."""
    nats, gradient = _cross_entropy_(logits.float(), targets)
    kept = (targets != IGNORED).float()
    logits.copy_(gradient.mul_((scale * kept).unsqueeze(1)))
    return nats.mul_(kept)


def _log_probabilities(inputs: Tensor, head: Tensor, temperature: float) -> Tensor:
    """The logarithm of softmax(logits / temperature): (C, D), (V, D) -> (C, V) float32."""
    logits = functional.linear(inputs, head).float()
    if temperature != 1.0:
        logits.div_(temperature)
    return torch.log_softmax(logits, dim=-1, out=logits)


def _log_outcomes(logs: Tensor, tail: Tensor) -> Tensor:
    """Log-probabilities (C, k + 1) of the labels' outcomes, from (C, k) and (C,): the k ids', scaled so that all sum to 1, then
    the tail's. Where the tail, or 1 - tail, is 0 the least normal float32 takes its place, so that there is a logarithm.
    """
    least, wide, tails = torch.finfo(torch.float32).tiny, logs.float(), tail.float().unsqueeze(1)
    rest = torch.log((1.0 - tails).clamp_(min=least)) - wide.logsumexp(dim=1, keepdim=True)
    return torch.cat((wide + rest, tails.clamp(min=least).log_()), dim=1)


def _tail_of_(logs: Tensor, ids: Tensor) -> _Tail:
    """The tail beside the ids (C, k) of log-probabilities (C, V).

    Those of the ids become -inf. The largest share gives the log: exact also where 1 - the ids' sum would be rounding noise.
    """
    logs.scatter_(1, ids, -torch.inf)
    largest, best = logs.max(dim=-1, keepdim=True)
    shares = torch.softmax(logs, dim=-1)
    return _Tail(shares, largest - shares.gather(1, best).log_())


def _divergence_(student: Tensor, teacher: Tensor, divergence: str) -> _Costs:
    """KL of each row, and its gradient with respect to the student's logits: log-probabilities (C, V); overwrites `teacher`."""
    if divergence == "forward":
        difference = torch.sub(teacher, student)
        shares = teacher.exp_()
        nats = difference.mul_(shares).sum(-1)
        return _Costs(nats, torch.exp(student, out=difference).sub_(shares))
    difference = torch.sub(student, teacher)
    shares = torch.exp(student, out=teacher)
    nats = difference.mul_(shares).sum(-1)
    return _Costs(nats, difference.addcmul_(shares, nats.unsqueeze(1), value=-1.0))


def _with_text_(
    logs: Tensor, targets: Tensor, divergence: Tensor, divergence_gradient: Tensor, settings: _Distillation
) -> Tensor:
    """The weighted sum of divergence and next-token loss of each row, zero where ignored. Its gradient overwrites the
    student's `logs` at the temperature.
    """
    kept, soft = (targets != IGNORED).float(), settings.weight * settings.temperature
    if settings.temperature != 1.0:
        logs.mul_(settings.temperature)
    nats, gradient = _cross_entropy_(logs, targets)
    total, by_row = (1.0 - settings.weight) * nats + soft * settings.temperature * divergence, kept.unsqueeze(1)
    gradient.mul_((1.0 - settings.weight) * by_row).addcmul_(divergence_gradient, soft * by_row)
    return total * kept


def _nats(inputs: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each row, zero where ignored: (C, D), (V, D), (C,) -> (C,) float32."""
    return -_at(_log_probabilities(inputs, head, 1.0), targets).masked_fill_(targets == IGNORED, 0.0)


def _cross_entropy_(logits: Tensor, targets: Tensor) -> _Costs:
    """Cross-entropy of each row and its gradient, softmax - one_hot, which overwrites `logits` (C, V) float32.

    Ignored rows count as if their target were id 0. The likeliest id's probability gives the logarithm of the softmax's
    denominator, so that no second (C, V) is needed.
    """
    own, aims = _at(logits, targets), targets.clamp(min=0)
    if torch.compiler.is_compiling():  # so that no pass needs what another one has written
        log_sums, is_aim = logits.logsumexp(dim=-1), torch.arange(logits.shape[1], device=aims.device) == aims.unsqueeze(1)
        return _Costs(log_sums - own, logits.sub_(log_sums.unsqueeze(1)).exp_().sub_(is_aim.float()))
    largest, gradient = logits.amax(dim=-1), torch.softmax(logits, dim=-1, out=logits)
    nats = largest - own - gradient.amax(dim=-1).log_()
    gradient[torch.arange(len(aims), device=aims.device), aims] -= 1.0
    return _Costs(nats, gradient)


def _at(logits: Tensor, targets: Tensor) -> Tensor:
    """Each row's value at its target, and at id 0 where ignored: (C, V), (C,) -> (C,)."""
    return logits.gather(1, targets.masked_fill(targets == IGNORED, 0).unsqueeze(1)).squeeze(1)
