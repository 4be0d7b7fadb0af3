"""Documents in the rows of a batch: attention that does not leave them, on GPUs and on CPUs. Knows tensors; no tokens' meaning.

Shape letters are decoder.py's; besides, M = B * T tokens on end, N pieces of documents, P places of tokens in groups of pieces.
A piece is what a row holds of a document. One that begins before the row counts as beginning with it.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from scripts.model import attention, operations
from scripts.model.attention import Within

# Kernels' own on a card: their backward makes room for so many tokens a piece, however short it is.
TILE_ROWS = 128


class Documents(NamedTuple):
    """The pieces of documents in B rows of T tokens, for attention that does not leave them. M = B * T tokens lie on end.

    `borders` (N + 1,) int32: where the N pieces begin, and M. `positions` (M,) int32 count from each piece's begin. `longest`
    is the longest piece's length. `groups`, for cards without flash attention, are the pieces sorted by length, each filled
    up at its end to its group's: `order` (P,) int32 says which token stands at each place, `places` (M,) int32 where each
    token stands, and `is_filling` (P, 1, 1) which places are filled up.
    """

    borders: Tensor
    positions: Tensor
    order: Tensor
    places: Tensor
    is_filling: Tensor
    groups: tuple["Group", ...]
    longest: int


class Group(NamedTuple):
    """Pieces of documents that take `length` places each, one after the other from `first` on."""

    first: int
    num_pieces: int
    length: int

    @property
    def places(self) -> slice:
        """The places of all its pieces."""
        return slice(self.first, self.first + self.num_pieces * self.length)


class Windows(NamedTuple):
    """What a model reads and has to predict: `ids` (B, T + 1) int64, and the documents of their first T, None to mask none."""

    ids: Tensor
    documents: Documents | None = None

    @property
    def inputs(self) -> Tensor:
        """What the model reads: (B, T) int64."""
        return self.ids[:, :-1]

    @property
    def targets(self) -> Tensor:
        """What it has to predict at each position: (B, T) int64."""
        return self.ids[:, 1:]


def windows_of(ids: np.ndarray, borders: np.ndarray | None, device: torch.device) -> Windows:
    """Windows on `device`: ids (B, T + 1) int64, and where the pieces of documents begin among their inputs, (N + 1,) int32.

    None masks nothing; where each row is one piece there is nothing to mask.
    """
    windows = Windows(torch.from_numpy(ids).to(device, non_blocking=True))
    if borders is None or len(borders) == len(ids) + 1:
        return windows
    return windows._replace(documents=documents_of(borders, device))


def documents_of(borders: np.ndarray, device: torch.device) -> Documents:
    """`Documents` on `device`, from the borders of their pieces, (N + 1,) int32. A piece is filled up by a quarter at most.

    A group is cut so that a tile of rows for each of its pieces is no more than all tokens.
    """
    lengths = np.diff(borders)
    steps = 2 ** np.maximum(np.log2(lengths).astype(np.int32) - 2, 0)
    filled = -(-lengths // steps) * steps
    at_once = max(1, int(borders[-1]) // TILE_ROWS)
    groups, orders, first = [], [], 0
    for length in np.unique(filled).tolist():
        pieces = np.flatnonzero(filled == length)
        for own in np.split(pieces, range(at_once, len(pieces), at_once)):
            groups.append(Group(first, len(own), length))
            orders.append((borders[own, None] + np.minimum(np.arange(length), lengths[own, None] - 1)).flatten())
            first += len(own) * length
    order = np.concatenate(orders)
    is_filling = np.append(False, order[1:] == order[:-1])
    places = np.flatnonzero(~is_filling)[np.argsort(order[~is_filling])]
    positions = np.arange(borders[-1]) - np.repeat(borders[:-1], lengths)
    numbers = (torch.from_numpy(each.astype(np.int32)) for each in (borders, positions, order, places))
    parts = (each.to(device, non_blocking=True) for each in (*numbers, torch.from_numpy(is_filling)[:, None, None]))
    return Documents(*parts, groups=tuple(groups), longest=int(lengths.max()))


def attend_within(q: Tensor, k: Tensor, v: Tensor, rotary: Tensor, documents: Documents) -> Tensor:
    """`attention.attend` within documents: q (B, H, T, K), k and v (B, G, T, K), rotary by token (2, B, 1, T, K / 2) ->
    (B, H, T, K).
    """
    if operations.on_host(q):
        positions = torch.arange(q.shape[2], dtype=torch.int32, device=q.device)
        within = Within(positions - documents.positions.view(len(q), -1), documents.longest)
        return attention.attend_on_host(q, k, v, rotary, within)
    return _attend_rotated_within(operations.rotate(q, rotary), operations.rotate(k, rotary), v, documents)


def _attend_rotated_within(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """`attend_within` off the host, where q and k are rotated already.

    Flash attention takes pieces of any lengths on end, as torch.nn.attention.varlen does, whose signature differs from 2.11 to
    2.13 while its kernel's does not. In the backward it makes room for TILE_ROWS more tokens a piece. So where pieces
    are shorter than that, or it does not take such heads, each group of them is a batch: a piece sees nothing behind its end.
    """
    rows, positions, width = q.shape[0], q.shape[2], q.shape[3]
    tokens = [each.transpose(1, 2).flatten(0, 1) for each in (q, k, v)]
    is_long = TILE_ROWS * (len(documents.borders) - 1) <= rows * positions
    if q.device.type == "cuda" and is_long and attention.takes_flash(q, k, v):
        padded = [functional.pad(each, (0, attention.padded_width(width) - width)) for each in tokens]
        lengths, scale = (documents.borders,) * 2 + (documents.longest,) * 2, 1 / math.sqrt(width)
        output = torch.ops.aten._flash_attention_forward(*padded, *lengths, 0.0, True, False, scale=scale)[0][..., :width]
    else:
        parts = zip(*(_split(_Grouped.apply(each, documents), documents) for each in tokens), strict=True)
        output = torch.cat([attention.attend_rotated(*part).transpose(1, 2).flatten(0, 1) for part in parts])
        output = _Ungrouped.apply(output, documents)
    return output.unflatten(0, (rows, positions)).transpose(1, 2)  # pyright: ignore[reportAttributeAccessIssue]


def _split(x: Tensor, documents: Documents) -> list[Tensor]:
    """Tokens at their places, (P, H, K), as one batch a group: (pieces, H, length, K)."""
    parts = zip(x.split([group.num_pieces * group.length for group in documents.groups]), documents.groups, strict=True)
    return [part.unflatten(0, (group.num_pieces, group.length)).transpose(1, 2) for part, group in parts]


class _Grouped(torch.autograd.Function):
    """Tokens on end, (M, H, K), at their places, (P, H, K). What fills up has no gradient: nothing reads it."""

    @staticmethod
    def forward(ctx, x: Tensor, documents: Documents) -> Tensor:
        ctx.places = documents.places
        return x.index_select(0, documents.order)

    @staticmethod
    def backward(ctx, gradient: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient.index_select(0, ctx.places), None


class _Ungrouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, documents: Documents) -> Tensor:
        ctx.documents = documents
        return x.index_select(0, documents.places)

    @staticmethod
    def backward(ctx, gradient: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient.index_select(0, ctx.documents.order).masked_fill_(ctx.documents.is_filling, 0.0), None
