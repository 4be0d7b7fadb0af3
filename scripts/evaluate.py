"""Held-out loss in nats per token and bits per byte. Knows a model, batches and token lengths; not where they come from."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from scripts.losses import token_nats


class HeldOut(NamedTuple):
    """`nats_per_token` over held-out tokens; `bits_per_byte`: the same nats as bits, spread over the bytes of the text."""

    nats_per_token: float
    bits_per_byte: float


@torch.no_grad()
def evaluate(model, batches: Iterable[Tensor], token_num_bytes: Tensor, chunk_rows: int) -> HeldOut:
    """Means over all ranks' `batches` of windows (B, T + 1) int64; `token_num_bytes` (V,) is each id's length in bytes.

    An end-of-text token counts in nats and has no bytes, so bits per byte is the length of the text, document ends included,
    coded by the model, over its length in bytes. Every rank must call this.
    """
    sums = torch.zeros(3, dtype=torch.float64, device=token_num_bytes.device)
    for windows in batches:
        targets = windows[:, 1:]
        nats = token_nats(model(windows[:, :-1]), model.head, targets, chunk_rows)
        sums += torch.stack((nats.double().sum(), sums.new_tensor(targets.numel()), token_num_bytes[targets].sum().double()))
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(sums)
    total, num_tokens, num_bytes = sums.tolist()
    return HeldOut(total / num_tokens, total / math.log(2) / num_bytes)
