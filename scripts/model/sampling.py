"""Sampling with a key/value cache. Knows a decoder and ids; no text."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from scripts.model.decoder import Cache, Decoder
from scripts.model.operations import KeysValues

LEAST_TEMPERATURE = 1e-6


def new_cache(model: Decoder, rows: int, length: int) -> Cache:
    """Room for the keys and values of every layer at `length` positions, each (rows, G, length, K) on the model's device."""
    config, head = model.config, model.head
    shape = (rows, config.num_kv_heads, length, config.head_width)
    return [KeysValues(head.new_empty(shape), head.new_empty(shape)) for _ in range(config.num_layers)]


@torch.no_grad()
def continue_ids(model: Decoder, ids: Tensor, num_tokens: int, *, temperature: float, top_k: int, seed: int) -> Iterator[int]:
    """Samples up to `num_tokens` ids after the prompt `ids` (T,) int64; one seed gives one continuation.

    Each id is drawn from the softmax of the `top_k` largest logits / temperature; below a temperature of 1e-6 the best id is
    taken. The prompt is cut to its last `context_length` ids; whenever the context is full its older half is dropped. Sampling
    ends early where a logit is not finite. Raises ValueError where `temperature` is negative or `top_k` below 1.
    """
    if temperature < 0 or top_k < 1:
        raise ValueError(f"temperature={temperature} and top_k={top_k}: at least 0 and 1 work")
    generator = torch.Generator().manual_seed(seed)
    limit = min(model.config.context_length, len(ids) + num_tokens)
    context = ids[-limit:].tolist()
    cache, num_cached = new_cache(model, 1, limit), 0
    for _ in range(num_tokens):
        if len(context) > limit:
            context, num_cached = context[-(limit // 2 + 1) :], 0
        new_ids = torch.tensor([context[num_cached:]], device=model.head.device)
        hidden = model(new_ids, cache, num_cached)[0, -1]
        num_cached = len(context)
        logits = functional.linear(hidden, model.head).float().cpu()
        if not logits.isfinite().all():
            return
        context.append(_sample(logits, temperature, top_k, generator))
        yield context[-1]


def _sample(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    if temperature < LEAST_TEMPERATURE:
        return int(logits.argmax())
    best, ids = logits.topk(min(top_k, len(logits)))
    return int(ids[torch.multinomial(torch.softmax((best - best[0]) / temperature, 0), 1, generator=generator)])
