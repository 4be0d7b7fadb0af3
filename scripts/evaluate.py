"""Held-out loss in nats per token and bits per byte. Knows a model, batches and token lengths; not where they come from."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

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


@torch.no_grad()
def hardest_pieces(
    model, batches: Iterable[tuple[Tensor, Any]], end_of_text_id: int, mean_nats: float, chunk_rows: int, count: int
) -> Tensor:
    """The pieces of documents whose tokens' nats exceed `mean_nats` a token by most in sum: (count, 3) float64, hardest first.

    A row is (nats above the mean, nats per token, position of its first predicted token in the stream); rows that are left
    over hold -inf. `batches` are windows (B, T + 1) int64 and where each starts in the stream, (B,) int64.
    """
    hardest = torch.full((count, 3), -math.inf, dtype=torch.float64)
    for windows, starts in batches:
        nats = token_nats(model(windows[:, :-1]), model.head, windows[:, 1:], chunk_rows).double().cpu()
        hardest = torch.cat((hardest, _pieces(nats, windows.cpu(), torch.as_tensor(starts), end_of_text_id, mean_nats)))
        hardest = hardest[hardest[:, 0].argsort(descending=True, stable=True)[:count]]
    return hardest


def _pieces(nats: Tensor, windows: Tensor, starts: Tensor, end_of_text_id: int, mean_nats: float) -> Tensor:
    """What each document has in each window: (B, T) nats, (B, T + 1) ids, (B,) starts -> (pieces, 3)."""
    rows, length = nats.shape
    piece = (windows[:, :-1] == end_of_text_id).cumsum(1) + torch.arange(rows)[:, None] * (length + 1)
    used, where = piece.flatten().unique(return_inverse=True)
    counts, sums = torch.zeros(2, len(used), dtype=torch.float64)
    counts.index_add_(0, where, torch.ones_like(where, dtype=torch.float64))
    sums.index_add_(0, where, nats.flatten())
    positions = (starts[:, None] + 1 + torch.arange(length)).flatten()
    firsts = torch.full((len(used),), positions.max().item()).scatter_reduce_(0, where, positions, "amin")
    return torch.stack((sums - mean_nats * counts, sums / counts, firsts.double()), 1)
