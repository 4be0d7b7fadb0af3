"""Before step one: are DeepSpeed's updates those of plain torch? Knows no data, no checkpoint and no engine.

A tiny clone of the run is trained twice: by the trainer, through the same DeepSpeed dict, ranks and accumulation; and in
float64 by plain torch, with operations of its own, which checks the autograd functions of scripts/model too.
"""

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from scripts.config import COMPILED_ON, NEWTON_SCHULZ_ITERATIONS, TrainingConfig
from scripts.engine.offload import DEEPSPEED_VERSION
from scripts.engine.updates import LEAST_NORM, NEWTON_SCHULZ, RMS_OF_ADAMW
from scripts.model.decoder import Block, Decoder, empty_model, parameter_groups
from scripts.model.documents import Windows, windows_of
from scripts.model.losses import next_token_loss
from scripts.model.operations import compile_kernels
from scripts.plan.machine import release_memory

LEARNING_RATE = 1e-2
MOST_TRIES = 40
MOST_STEPS = 3
FEWEST_MICRO_BATCHES = 3
MOST_MICRO_BATCHES = 8
PLAIN_ROWS = 1024
ROUNDING = 1e-3
# Where pieces of documents begin in each row: one that began before it, one of a single token, one that ends behind it.
CUTS = (0, 3, 4)
Steps = list[list[Windows]]


class Trained(NamedTuple):
    """The float32 master of each parameter by name after the last update, and each update's gradient norm before clipping."""

    masters: dict[str, Tensor]
    gradient_norms: list[float]


class Bounds(NamedTuple):
    """Relative errors that rounding may cause: in the update of all weights, in that of one group, in a gradient norm."""

    update: float
    group_update: float
    norm: float


class Finding(NamedTuple):
    """One comparison: what was compared, how large the difference is, and how large it may be."""

    what: str
    measured: float
    bound: float


TrainTiny = Callable[[TrainingConfig, Decoder, Steps, float], Trained]
# At least twice the largest errors of true updates in some 100 clones (qk_norm, micro-batches, betas, epsilon, clipping, both
# kinds of operations). fp16 rounds eight times as finely as bf16, but its smallest gradients have fewer bits.
BOUNDS = {"fp32": Bounds(1e-3, 1e-3, 1e-4), "bf16": Bounds(0.07, 0.1, 0.04), "fp16": Bounds(0.025, 0.035, 0.008)}
# Moments in 16 bits; and a group under Muon in 16 bits, which makes small parts of a gradient as large as the others.
SHORT_MOMENTS, SHORT_MUON_UPDATE = Bounds(0.01, 0.015, 1e-3), 0.2


def refuse_failing_compiler(config: TrainingConfig, device: torch.device) -> None:
    """Sets whether kernels are compiled on `device` in this process, and if they are tries that with the tiny clone. Raises
    ValueError where torch's compiler fails.
    """
    if device.type not in COMPILED_ON[config.compile_kernels]:
        compile_kernels(False)
        return
    tiny = tiny_clone(config, 1)
    model = draw_weights(empty_model(tiny, device))
    windows = windows_of(tiny_windows(tiny, 1)[0, 0, 0].numpy(), tiny_borders(tiny), device)
    try:
        compile_kernels(True)
        hidden = model(windows.inputs, documents=windows.documents)
        next_token_loss(hidden, model.head, windows.targets, tiny.loss_chunk_rows).backward()
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as fault:  # torch's compiler raises of every kind
        words = " ".join(str(fault).splitlines()[:2])
        raise ValueError(f'torch.compile fails here: {words}; set compile_kernels="never", which is slower') from fault


def refuse_untrue_updates(
    config: TrainingConfig, rank: int, world_size: int, device: torch.device, train_tiny: TrainTiny
) -> None:
    """Compares a few updates of the tiny clone through DeepSpeed with plain torch. Every rank must call this. Raises ValueError
    on every rank when on any rank an update, a gradient norm or a weight is not what plain torch gives.

    `train_tiny(tiny, model, steps, learning_rate)` trains `model` through DeepSpeed on the objective `next_token`, with one
    update for each element of `steps`, a list of this rank's micro-batches on `device`.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        tiny = tiny_clone(config, world_size)
        model = draw_weights(empty_model(tiny, device))
        plain, before = plain_copy(model), plain_copy(model)
        windows = tiny_windows(tiny, world_size)
        borders = tiny_borders(tiny)
        steps = [[windows_of(ids.numpy(), borders, device) for ids in step] for step in windows[:, rank]]
        trained = train_tiny(tiny, model, steps, LEARNING_RATE)
        plain_norms = train_plain(plain, windows, tiny)
    findings = _update_findings(plain, before, trained.masters, tiny)
    for step, (right, norm) in enumerate(zip(plain_norms, trained.gradient_norms, strict=True), start=1):
        error, bound = abs(norm / right - 1.0), bounds_of(tiny).norm
        findings.append(Finding(f"the difference of gradient norm {step}", error, bound))
    masters = {name: trained.masters[name].cpu().to(weight.dtype) for name, weight in model.named_parameters()}
    unlike = sum(int((weight.cpu() != masters[name]).sum()) for name, weight in model.named_parameters())
    findings.append(Finding("the number of weights unlike their masters", float(unlike), 0.5))
    del model, trained
    release_memory()
    _refuse_worst(findings, device)


def tiny_clone(config: TrainingConfig, world_size: int) -> TrainingConfig:
    """The run in small shapes, with a tied head and 3 to 8 micro-batches a step; of DeepSpeed's dict only the sizes differ."""
    steps = min(max(FEWEST_MICRO_BATCHES, config.accumulation_steps(world_size)), MOST_MICRO_BATCHES)
    rows, length = 2, 8
    return replace(
        config, corpus_weights=None, vocab_size=257, tokenizer_path=None, begin_of_text=None, end_of_text=None,
        context_length=length, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_size=None, mlp_size=48,
        tie_embeddings=True, micro_batch_rows=rows, tokens_per_step=rows * length * steps * world_size,
        first_tokens_per_step=None, batch_warmup_steps=None,
        loss_chunk_rows=rows * length, eval_tokens=length, teacher_dir=None, teacher_top_k=None, rope_scaling=None,
        muon_learning_rate=None, muon_momentum_warmup_steps=None if config.muon_first_momentum is None else MOST_STEPS - 1,
    )  # fmt: skip


def bounds_of(tiny: TrainingConfig) -> Bounds:
    """How far the updates of `tiny` may be from plain ones, by all that rounds them."""
    kinds = [BOUNDS[tiny.precision]] + [SHORT_MOMENTS] * (tiny.optimizer_state_precision == "bf16")
    return Bounds(*map(max, zip(*kinds, strict=True)))


def tiny_windows(tiny: TrainingConfig, world_size: int) -> Tensor:
    """The token windows of all updates, ranks and micro-batches: (updates, W, G, B, T + 1) int64, the same at every call.

    The micro-batches of a rank share no token, so that a lost one shows. The second update sees many different tokens and the
    others few, so that gradient norms differ and a missing clip shows. There is only one update where beta1^2 > beta2, because
    Adam's second has no bound there.
    """
    num_micro_batches = tiny.accumulation_steps(world_size)
    num_steps = MOST_STEPS if tiny.beta1**2 <= tiny.beta2 else 1
    shape = (num_steps, world_size, num_micro_batches, tiny.micro_batch_rows, tiny.context_length + 1)
    pool = tiny.vocab_size // num_micro_batches
    drawn = torch.randint(pool, shape, generator=torch.Generator().manual_seed(0))
    varied = torch.tensor([2, pool, 2][:num_steps]).view(-1, 1, 1, 1, 1)
    ranks, micro_batches = torch.arange(world_size).view(1, -1, 1, 1, 1), torch.arange(num_micro_batches).view(1, 1, -1, 1, 1)
    return (drawn % varied + 5 * ranks) % pool + micro_batches * pool


def tiny_borders(tiny: TrainingConfig) -> np.ndarray | None:
    """Where the pieces of documents begin in a micro-batch of `tiny_windows`, (N + 1,) int32; None where none are masked."""
    rows = np.arange(tiny.micro_batch_rows, dtype=np.int32)[:, None] * tiny.context_length
    size = tiny.micro_batch_rows * tiny.context_length
    return np.append(rows + np.array(CUTS, np.int32), np.int32(size)) if tiny.mask_across_documents else None


def train_plain(plain: Decoder, windows: Tensor, tiny: TrainingConfig) -> list[float]:
    """Trains `plain` (float64) in place by torch alone, on all ranks' `windows`; returns the gradient norms before clipping.
    The forward reads the weights as the training dtype rounds them, as DeepSpeed's does.
    """
    groups, norms = parameter_groups(plain, tiny.weight_decay), []
    moments = {weight: [torch.zeros_like(weight), torch.zeros_like(weight)] for weight in plain.parameters()}
    for number, batch in enumerate(windows.flatten(1, 3), start=1):
        for part in batch.split(PLAIN_ROWS):
            (plain_loss(plain, part, tiny) * len(part) / len(batch)).backward()
        norms.append(float(nn.utils.clip_grad_norm_(plain.parameters(), tiny.max_grad_norm)))
        for group in groups:
            for weight in group["params"]:
                if group["is_block"] and tiny.optimizer == "muon":
                    _plain_muon(weight, moments[weight][0], number, tiny)
                else:
                    _plain_adam(weight, moments[weight], number, group["weight_decay"], tiny)
        plain.zero_grad()
    return norms


def plain_loss(plain: Decoder, windows: Tensor, tiny: TrainingConfig) -> Tensor:
    """Mean nats per token of windows (B, T + 1) int64, () in the dtype of `plain`, by torch's own operations alone."""
    table = _rounded(plain.head, tiny)
    x = table[windows[:, :-1]]
    for block in plain.model.layers:
        x = _plain_block(x, block, tiny)  # pyright: ignore[reportArgumentType]
    logits = _plain_norm(x, plain.model.norm.weight, tiny) @ table.T
    return functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def draw_weights(model: Decoder) -> Decoder:
    """Fills the model's weights in place with the same random numbers at every call: norms around 1, matrices around 0."""
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        drawn = torch.randn(weight.shape, generator=generator)
        weight.copy_(1.0 + 0.2 * drawn if weight.dim() == 1 else 0.1 * drawn)
    return model


def plain_copy(model: Decoder) -> Decoder:
    """A copy on the CPU in float64."""
    return copy.deepcopy(model).to(torch.device("cpu"), torch.float64)


@torch.no_grad()
def _plain_muon(matrix: Tensor, momentum: Tensor, number: int, tiny: TrainingConfig) -> None:
    """Update `number` of Muon, from 1 on, in float64, as its paper writes it (Liu et al. 2025). Momentum is a mean."""
    first, beta, (a, b, c), gradient = tiny.muon_first_momentum, tiny.muon_momentum, NEWTON_SCHULZ, _gradient(matrix)
    if first is not None and number < MOST_STEPS:
        beta = first + (number - 1) / (MOST_STEPS - 1) * (beta - first)
    momentum.mul_(beta).add_((1 - beta) * gradient)
    x = (1 - beta) * gradient + beta * momentum
    x = x / x.square().sum().sqrt().clamp(min=LEAST_NORM)
    for _ in range(NEWTON_SCHULZ_ITERATIONS):
        gram = x @ x.T
        x = a * x + b * gram @ x + c * gram @ gram @ x
    decayed = matrix * (1 - LEARNING_RATE * tiny.weight_decay)
    matrix.copy_(decayed - LEARNING_RATE * RMS_OF_ADAMW * max(matrix.shape) ** 0.5 * x)


@torch.no_grad()
def _plain_adam(weight: Tensor, moments: list[Tensor], number: int, decay: float, tiny: TrainingConfig) -> None:
    """Update `number` of AdamW, from 1 on, in float64, as its paper writes it (Loshchilov & Hutter 2019)."""
    (mean, square), gradient = moments, _gradient(weight)
    mean.mul_(tiny.beta1).add_((1 - tiny.beta1) * gradient)
    square.mul_(tiny.beta2).add_((1 - tiny.beta2) * gradient.square())
    size = (square / (1 - tiny.beta2**number)).sqrt() + tiny.adam_eps
    weight.sub_(LEARNING_RATE * (decay * weight + mean / (1 - tiny.beta1**number) / size))


def _gradient(weight: Tensor) -> Tensor:
    return torch.zeros_like(weight) if weight.grad is None else weight.grad


def _plain_block(x: Tensor, block: Block, tiny: TrainingConfig) -> Tensor:
    attention, mlp = block.self_attn, block.mlp
    normed = _plain_norm(x, block.input_layernorm.weight, tiny)
    layers = (attention.q_proj, attention.k_proj, attention.v_proj)
    projected = (normed @ _rounded(layer.weight, tiny).T for layer in layers)
    q, k, v = (each.unflatten(-1, (-1, tiny.head_width)).transpose(1, 2) for each in projected)
    if tiny.qk_norm:
        q = _plain_norm(q, attention.q_norm.weight, tiny)  # pyright: ignore[reportArgumentType]
        k = _plain_norm(k, attention.k_norm.weight, tiny)  # pyright: ignore[reportArgumentType]
    output = _plain_attention(_plain_rotate(q, tiny), _plain_rotate(k, tiny), v, _plain_starts(tiny))
    x = x + output.transpose(1, 2).flatten(2) @ _rounded(attention.o_proj.weight, tiny).T
    normed = _plain_norm(x, block.post_attention_layernorm.weight, tiny)
    gate, up = (normed @ _rounded(layer.weight, tiny).T for layer in (mlp.gate_proj, mlp.up_proj))
    return x + (gate * torch.sigmoid(gate) * up) @ _rounded(mlp.down_proj.weight, tiny).T


def _plain_starts(tiny: TrainingConfig) -> Tensor:
    """Where each position's document begins, (T,)."""
    cuts = torch.tensor(CUTS if tiny.mask_across_documents else (0,))
    return cuts[torch.bucketize(torch.arange(tiny.context_length), cuts, right=True) - 1]


def _plain_attention(q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> Tensor:
    k, v = (each.repeat_interleave(q.shape[1] // each.shape[1], 1) for each in (k, v))
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    unseen = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1) | (starts[:, None] != starts)
    return scores.masked_fill(unseen, -math.inf).softmax(-1) @ v


def _plain_rotate(x: Tensor, tiny: TrainingConfig) -> Tensor:
    exponents = torch.arange(0, tiny.head_width, 2, dtype=x.dtype) / tiny.head_width
    positions = torch.arange(x.shape[2]) - _plain_starts(tiny)
    angles = torch.outer(positions.to(x.dtype), tiny.rope_theta**-exponents)
    rotated = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((rotated.real, rotated.imag), dim=-1)


def _plain_norm(x: Tensor, gain: Tensor, tiny: TrainingConfig) -> Tensor:
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + tiny.norm_eps) * _rounded(gain, tiny)


def _rounded(weight: Tensor, tiny: TrainingConfig) -> Tensor:
    """The weight as the training dtype rounds it, with the gradient of the weight itself."""
    return weight + (weight.to(tiny.dtype).to(weight.dtype) - weight).detach()


def _update_findings(plain: Decoder, start: Decoder, masters: dict[str, Tensor], tiny: TrainingConfig) -> list[Finding]:
    """The error of the whole update, and of each parameter group's, relative to the plain one in the L1 norm."""
    names = {parameter: name for name, parameter in plain.named_parameters()}
    groups, is_short = parameter_groups(plain, tiny.weight_decay), tiny.optimizer == "muon" and tiny.precision != "fp32"
    after, before, bounds = dict(plain.named_parameters()), dict(start.named_parameters()), bounds_of(tiny)

    def compare(where: str, group: list[str], bound: float) -> Finding:
        error = _total(masters[name].cpu().double() - after[name] for name in group)
        update, size = _total(after[name] - before[name] for name in group), _total(before[name] for name in group)
        return Finding(f"the difference of the update of {where}", error / (update + ROUNDING * size), bound)

    findings = [compare("all weights", list(names.values()), bounds.update)]
    for group in groups:
        members = [names[parameter] for parameter in group["params"]]
        bound = SHORT_MUON_UPDATE if is_short and group["is_block"] else bounds.group_update
        findings.append(compare(f"{members[0]} and its group", members, bound))
    return findings


def _total(tensors: Iterable[Tensor]) -> float:
    return sum(float(tensor.detach().abs().sum()) for tensor in tensors)


def _refuse_worst(findings: list[Finding], device: torch.device) -> None:
    """Raises ValueError on every rank when any rank's finding is out of bounds, about the worst on any rank."""
    shares = torch.tensor([found.measured / found.bound for found in findings], dtype=torch.float64)
    on_any_rank = shares.nan_to_num(nan=math.inf).to(device)
    torch.distributed.all_reduce(on_any_rank, torch.distributed.ReduceOp.MAX)
    share, worst = on_any_rank.max(0)
    if share > 1.0:
        what, _, bound = findings[int(worst)]
        raise ValueError(
            f"DeepSpeed's updates are not those of plain torch: {what} is {float(share) * bound:.3g}, above {bound:g};"
            f" pip install --force-reinstall deepspeed=={DEEPSPEED_VERSION}, or use another torch, driver or GPU"
        )
