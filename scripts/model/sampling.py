"""Sampling with a key/value cache, and where a text stops. Knows a decoder, ids and bytes; no tokenizer."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from scripts.config import TrainingConfig
from scripts.model.decoder import Cache, Decoder, KeysValues

LEAST_TEMPERATURE = 1e-6


class Sampling(NamedTuple):
    """How an id is drawn from its logits. The steps are transformers', in their order.

    First the logits of ids that stand in prompt or text are divided by `repetition_penalty`, those below zero multiplied by it
    (Keskar et al. 2019). Then all are divided by `temperature`, the `top_k` largest stay, and of these the fewest whose
    probabilities sum up to `top_p` (Holtzman et al. 2020). Below a temperature of 1e-6 the best id is taken.
    """

    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float


class Candidates(NamedTuple):
    """The ids that may be drawn, best first, and their probabilities: (K,) int64, (K,) float32."""

    ids: Tensor
    probabilities: Tensor


def sampling_of(config: TrainingConfig) -> Sampling:
    """How `config` samples."""
    return Sampling(config.sample_temperature, config.sample_top_k, config.sample_top_p, config.sample_repetition_penalty)


def stop_bytes(config: TrainingConfig) -> list[bytes]:
    """The texts of `sample_stop`, as `before_stop` takes them."""
    return [stop.encode() for stop in config.sample_stop]


def new_cache(model: Decoder, rows: int, length: int) -> Cache:
    """Room for the keys and values of every layer at `length` positions, each (rows, G, length, K) on the model's device."""
    config, head = model.config, model.head
    shape = (rows, config.num_kv_heads, length, config.head_width)
    return [KeysValues(head.new_empty(shape), head.new_empty(shape)) for _ in range(config.num_layers)]


@torch.no_grad()
def continue_ids(model: Decoder, ids: Tensor, num_tokens: int, *, sampling: Sampling, seed: int) -> Iterator[int]:
    """Samples up to `num_tokens` ids after the prompt `ids` (T,) int64; one seed gives one continuation.

    The prompt is cut to its last `context_length` ids; whenever the context is full its older half is dropped. What is dropped
    still counts as repeated. Sampling ends early where a logit is not finite. Raises ValueError where `temperature` is
    negative, `top_k` below 1, `top_p` not in (0, 1] or `repetition_penalty` not above 0.
    """
    _check(sampling)
    generator = torch.Generator().manual_seed(seed)
    limit = min(model.config.context_length, len(ids) + num_tokens)
    seen = torch.zeros(len(model.head), dtype=torch.bool).index_fill(0, ids.cpu(), True)
    context = ids[-limit:].tolist()
    cache, num_cached = new_cache(model, 1, limit), 0
    for _ in range(num_tokens):
        if len(context) > limit:
            context, num_cached = context[-(limit // 2 + 1) :], 0
        new_ids = torch.tensor([context[num_cached:]], device=model.head.device)
        hidden = model(new_ids, cache, num_cached)[0, -1]
        num_cached = len(context)
        logits = functional.linear(hidden, model.head).float().cpu()
        logits = penalized(logits, seen, sampling.repetition_penalty)
        if not logits.isfinite().all():
            return
        context.append(_sample(logits, sampling, generator))
        seen[context[-1]] = True
        yield context[-1]


def penalized(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """The logits (V,) float32 of which those that are `seen` (V,) bool are made less likely, more likely below 1."""
    if penalty == 1:
        return logits
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def candidates(logits: Tensor, sampling: Sampling) -> Candidates:
    """The ids of (V,) float32 logits that `temperature`, which is not 0, `top_k` and `top_p` leave; at least one."""
    best, ids = logits.topk(min(sampling.top_k, len(logits)))
    probabilities = torch.softmax((best - best[0]) / sampling.temperature, 0)
    if sampling.top_p < 1:
        # Summed from the least likely on, as transformers does, so that both round alike.
        num_dropped = int((probabilities.flip(0).cumsum(0) <= 1 - sampling.top_p).sum())
        num_kept = max(1, len(ids) - num_dropped)
        ids, probabilities = ids[:num_kept], probabilities[:num_kept] / probabilities[:num_kept].sum()
    return Candidates(ids, probabilities)


def before_stop(pieces: Iterable[bytes], stops: Sequence[bytes]) -> Iterator[bytes]:
    """The bytes of `pieces` before the first of the texts `stops`, however the pieces cut it; first is the one that is
    complete first. Each byte comes as soon as no stop text can begin with it; `pieces` are read no further than needed.
    """
    held = b""
    for piece in pieces:
        held += piece
        complete = [(at + len(stop), at) for stop in stops if (at := held.find(stop)) >= 0]
        if complete:
            yield held[: min(complete)[1]]
            return
        num_free = len(held) - _begun(held, stops)
        yield held[:num_free]
        held = held[num_free:]
    yield held


def _begun(text: bytes, stops: Sequence[bytes]) -> int:
    """The most bytes at the end of `text` that a stop text begins with."""
    lengths = (length for stop in stops for length in range(len(stop)) if text.endswith(stop[:length]))
    return max(lengths, default=0)


def _check(sampling: Sampling) -> None:
    temperature, top_k, top_p, repetition_penalty = sampling
    if temperature < 0 or top_k < 1:
        raise ValueError(f"temperature={temperature} and top_k={top_k}: at least 0 and 1 work")
    if not 0 < top_p <= 1 or repetition_penalty <= 0:
        raise ValueError(f"top_p={top_p} and repetition_penalty={repetition_penalty}: above 0 works, and top_p=1.0 takes all")


def _sample(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    if sampling.temperature < LEAST_TEMPERATURE:
        return int(logits.argmax())
    ids, probabilities = candidates(logits, sampling)
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])
