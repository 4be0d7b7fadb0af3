"""What an update does to numbers, and the host memory through which they pass. Knows tensors and streams; no DeepSpeed.

Muon: Jordan et al. 2024 (kellerjordan.github.io/posts/muon), with the scale of Liu et al. 2025 (arXiv 2502.16982), which makes
its updates as large as AdamW's. Letters: n elements of a flat vector, (R, C) a matrix.
"""

import math
import struct
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, partial
from hashlib import blake2b
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scripts import config as settings

# torch.optim.Muon's own, from Jordan's post: a steep slope at zero, and five iterations end between 0.7 and 1.2.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
LEAST_NORM = 1e-7
RMS_OF_ADAMW = 0.2
ROW_ELEMENTS = 2**10
WORDS = 2**16
HIGH_HALF = -WORDS


class Piece(NamedTuple):
    """Elements start..stop of the ring's memory, and when what lies there has been added to its target on the host."""

    start: int
    stop: int
    arrival: Future


class Sent(NamedTuple):
    """A gradient on its way to the host, which it leaves, or where it arrives, when `copied` has come."""

    gradient: Tensor
    copied: Any


class StagingRing:
    """Host memory, pinned for a GPU, through which gradients go to the host, and the one thread that adds them up, in order.

    On a GPU the copies run on a stream of their own, after the kernels that compute the gradients. At most `held_elements` of
    gradients wait on the GPU for their copies, or one larger gradient; later kernels wait for the copies of those before. With
    None nothing waits: what is sent stays where it is until it is drained.
    """

    def __init__(self, memory: Tensor, held_elements: int | None, device: torch.device) -> None:
        self._memory, self._held_elements = memory, held_elements
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(1, "gradients", partial(torch.cuda.set_device, device) if self._stream else None)
        self._pieces: deque[Piece] = deque()
        self._held: deque[Sent] = deque()
        self._next = 0

    def send(self, source: Tensor, target: Tensor, is_first: bool) -> None:
        """Writes `source` (n,) into `target` (n,) float32 on the host if it is the first of a step, else adds it. Waits while
        the ring is full. Raises what went wrong in the thread with an earlier piece.
        """
        if self._held_elements is not None:
            self.release(self._held_elements - len(source))
        copied, most = None, min(settings.GRADIENT_PIECE_ELEMENTS, len(self._memory) // 2)
        for part, place in zip(source.split(most), target.split(most), strict=True):
            start = self._next if self._next + len(part) <= len(self._memory) else 0
            self._next = start + len(part)
            while any(piece.start < self._next and start < piece.stop for piece in self._pieces):
                self._pieces.popleft().arrival.result()
            slot = self._memory[start : self._next]
            copied = self._copy(part, slot)
            self._pieces.append(Piece(start, self._next, self._thread.submit(add_to, slot, place, is_first, copied)))
        if copied is not None and self._held_elements is not None:
            self._held.append(Sent(source, copied))

    def release(self, num_elements: int) -> None:
        """Frees the oldest gradients on the GPU until at most `num_elements` are left; later kernels wait for their copies."""
        while self._held and sum(len(sent.gradient) for sent in self._held) > num_elements:
            sent = self._held.popleft()
            torch.cuda.current_stream().wait_event(sent.copied)

    def drain(self) -> None:
        """Waits until all that was sent has been added to its target. Raises what went wrong in the thread."""
        while self._pieces:
            self._pieces.popleft().arrival.result()
        self._held.clear()

    def close(self) -> None:
        """Ends the thread, after all that was sent."""
        self._thread.shutdown()

    def _copy(self, source: Tensor, slot: Tensor) -> torch.cuda.Event | None:
        if self._stream is None:
            slot.copy_(source)
            return None
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            slot.copy_(source, non_blocking=True)
        copied = torch.cuda.Event(blocking=True)
        copied.record(self._stream)
        return copied


class Matrix(NamedTuple):
    """A matrix of a group: the elements start..stop of the group's flat vector, and its shape."""

    start: int
    stop: int
    shape: torch.Size


class Copies(NamedTuple):
    """A flat matrix (n,) in the two places where it lies: beside others that one rank has made, and in its group's vector."""

    packed: Tensor
    unpacked: Tensor


class Landed(NamedTuple):
    """A piece of a group's gradient on the host: elements from `start` on of this rank's slice, (n,) float32."""

    group: int
    start: int
    gradient: Tensor


class Draws(NamedTuple):
    """What decides how an update's moments are rounded: the run's seed, the update's number, the group of parameters."""

    seed: int
    step: int
    group: int


class Adam(NamedTuple):
    """The numbers of one update of AdamW (Loshchilov & Hutter 2019); `step` counts from 1."""

    step: int
    rate: float
    beta1: float
    beta2: float
    eps: float
    decay: float


def orthogonalise(update: Tensor, products: torch.dtype) -> Tensor:
    """The matrix (R, C) with its singular values brought near 1 by Newton-Schulz, in the dtype `products`.

    A singular value of more than 2^-8 of the Frobenius norm ends in 0.6 to 1.3, a smaller one below. Zeros stay zeros.
    """
    a, b, c = NEWTON_SCHULZ
    norm = torch.linalg.vector_norm(update, dtype=torch.float32).clamp(min=LEAST_NORM)
    x = (update / norm).to(products)
    x = x.mT if len(x) > x.shape[1] else x
    for _ in range(settings.NEWTON_SCHULZ_ITERATIONS):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if x.shape == update.shape else x.mT


def orthogonal_slice(own: Tensor, matrices: list[Matrix], products: torch.dtype, dp_group) -> Tensor:
    """A rank's slice (n,) of a group's orthogonal matrices, from its slice `own` (n,), which may be written over. Each matrix
    is made orthogonal by one rank for all. Every rank of `dp_group` must call this.
    """
    rank, world_size = torch.distributed.get_rank(dp_group), torch.distributed.get_world_size(dp_group)
    shares, whole = shared_out(matrices, world_size), own
    if world_size > 1:
        whole = _gathered(own, world_size, dp_group)
    for start, stop, shape in shares[rank]:
        part = whole[start:stop]
        part.copy_(orthogonalise(part.view(shape), products).reshape(-1))
    if world_size > 1:
        _exchange(whole, shares, rank, dp_group)
    return whole[rank * len(own) : (rank + 1) * len(own)]


def shared_out(matrices: list[Matrix], world_size: int) -> list[list[Matrix]]:
    """The matrices that each rank makes orthogonal: those with most products first, each to the rank that has least to do."""
    shares: list[list[Matrix]] = [[] for _ in range(world_size)]
    work = [0] * world_size
    for matrix in sorted(matrices, key=_num_products, reverse=True):
        rank = work.index(min(work))
        shares[rank].append(matrix)
        work[rank] += _num_products(matrix)
    return shares


def scale_of(shape: torch.Size) -> float:
    """What an orthogonal matrix of this shape is multiplied by so that its elements have the size of AdamW's updates."""
    return RMS_OF_ADAMW * math.sqrt(max(shape))


def momentum_at(update: int, config: settings.TrainingConfig) -> float:
    """Muon's momentum in an update, counted from 0: it rises in a line to `muon_momentum`, as in modded-nanogpt."""
    first, num_steps = config.muon_first_momentum, config.muon_momentum_warmup_steps
    if first is None or num_steps is None or update >= num_steps:
        return config.muon_momentum
    return first + update / num_steps * (config.muon_momentum - first)


def take_momentum(gradient: Tensor, momentum: Tensor, target: Tensor, beta: float) -> None:
    """Moves `momentum` (n,) by 1 - beta towards `gradient` (n,) float32; Nesterov's look ahead is written to `target` (n,)."""
    split = (each.split(_at_once(gradient)) for each in (gradient, momentum, target))
    for part, kept, place in zip(*split, strict=True):
        moved = kept.float().lerp_(part, 1 - beta)
        if moved.data_ptr() != kept.data_ptr():
            kept.copy_(moved)
        place.copy_(part.lerp(moved, beta))


def descend(master: Tensor, direction: Tensor, *, rate: float, scale: float, decay: float) -> None:
    """`master` (n,) float32 after weight decay and a step of `rate * scale` against `direction` (n,)."""
    most = _at_once(master)
    for part, way in zip(master.split(most), direction.split(most), strict=True):
        part.mul_(1 - rate * decay).add_(way, alpha=-rate * scale)


def adam_in_16_bits(master: Tensor, gradient: Tensor, moments: list[Tensor], adam: Adam, *, draws: Draws, first: int) -> None:
    """AdamW in float32 whose two moments (n,) bfloat16 are rounded up or down at random, so that no small change is lost.

    `first` is the number of the first element within its group's whole vector: the rounding depends on no number of ranks.
    """
    steps = [torch.tensor(float(adam.step), device=master.device)]
    rates: dict = {"lr": adam.rate, "beta1": adam.beta1, "beta2": adam.beta2, "weight_decay": adam.decay, "eps": adam.eps}
    update = torch._fused_adamw_  # pyright: ignore[reportPrivateImportUsage]
    for part, part_gradient, *kept in zip(
        *(each.split(_at_once(master)) for each in (master, gradient, *moments)), strict=True
    ):
        mean, square = (moment.float() for moment in kept)
        update([part], [part_gradient], [mean], [square], [], steps, **rates, amsgrad=False, maximize=False)
        words = words_of(draws, first, len(part), master.device)
        round_at_random(mean, words.bitwise_right_shift(16).bitwise_and_(~HIGH_HALF), kept[0])
        round_at_random(square, words.bitwise_and_(~HIGH_HALF), kept[1])
        first += len(part)


def round_at_random(values: Tensor, draws: Tensor, target: Tensor) -> None:
    """`values` (n,) float32 into `target` (n,) bfloat16, up with a chance in proportion to what is cut off: on average nothing
    is lost. `draws` (n,) int32 lie evenly in 0 .. 65535. Writes over `values`.
    """
    bits = values.view(torch.int32).add_(draws).bitwise_and_(HIGH_HALF)
    target.copy_(bits.view(torch.float32))


def words_of(draws: Draws, first: int, num: int, device: torch.device) -> Tensor:
    """Random words (num,) int32 of the elements from `first` on: a function of the numbers in `draws` and of each element's own
    number alone.
    """
    number, place = divmod(first, WORDS)
    keys = torch.tensor([_keys(draws, each) for each in range(number, -(-(first + num) // WORDS))], dtype=torch.int32)
    flips, factors, summands = keys.to(device).mT.unsqueeze(2)
    return (_table(device) ^ flips).mul_(factors).add_(summands).flatten()[place : place + num]


def sum_of_squares(vector: Tensor) -> Tensor:
    """The sum of squares () float64 of `vector` (n,), without a copy where it is float32: float32 within a row of ROW_ELEMENTS,
    float64 over rows.
    """
    total = torch.zeros((), dtype=torch.float64, device=vector.device)
    for part in vector.split(settings.OPTIMIZER_CHUNK_ELEMENTS):
        part, whole = part.float(), len(part) // ROW_ELEMENTS * ROW_ELEMENTS
        rows = torch.linalg.vector_norm(part[:whole].view(-1, ROW_ELEMENTS), dim=1)
        rest = torch.linalg.vector_norm(part[whole:])
        total += rows.double().square().sum() + rest.double().square()
    return total


def bring_down(sums: list[Tensor], slots: list[Tensor], stream: torch.cuda.Stream | None) -> Iterator[Landed]:
    """Every group's sum of gradients (n,) on the host, in order and in pieces. From a GPU, which has finished them, they come
    on a stream of their own, through two pinned `slots` in turn: the next copy runs beside what is done with a piece, which is
    good until the next is asked for.
    """
    most = settings.GRADIENT_PIECE_ELEMENTS
    places = [
        Landed(group, start, total[start : start + most])
        for group, total in enumerate(sums)
        for start in range(0, len(total), most)
    ]
    if stream is None:
        yield from (place._replace(gradient=place.gradient.float()) for place in places)
        return
    coming = deque(_copy_down(place.gradient, slot, stream) for place, slot in zip(places, slots, strict=False))
    for number, place in enumerate(places):
        slot, copied = coming.popleft()
        copied.synchronize()
        yield place._replace(gradient=slot.float())
        if number + 2 < len(places):
            coming.append(_copy_down(places[number + 2].gradient, slots[number % 2], stream))


def cut(landed: Landed) -> Iterator[Landed]:
    """The same in pieces of as many elements as are worked on at once."""
    most = _at_once(landed.gradient)
    for number, part in enumerate(landed.gradient.split(most)):
        yield Landed(landed.group, landed.start + number * most, part)


def timed(seconds: dict[str, float], name: str, work: Callable, *arguments) -> Any:
    """What `work(*arguments)` returns. The time that it took is added to that of `name`."""
    started = time.perf_counter()
    result = work(*arguments)
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started
    return result


def add_to(source: Tensor, target: Tensor, is_first: bool, copied: torch.cuda.Event | None = None) -> None:
    """target = source or target += source, after `copied`; on the host in parts, because torch casts a copy of the source."""
    if copied is not None:
        copied.synchronize()
    most = settings.GRADIENT_CACHE_ELEMENTS if source.device.type == "cpu" else len(source)
    parts = zip(source.split(most), target.split(most), strict=True) if len(source) > most else ((source, target),)
    for part, place in parts:
        if is_first:
            place.copy_(part)
        else:
            place.add_(part)


def _at_once(vector: Tensor) -> int:
    """Elements that stay in a processor's cache through several operations; on a GPU as many as make few kernels."""
    return settings.GRADIENT_CACHE_ELEMENTS if vector.device.type == "cpu" else settings.GRADIENT_PIECE_ELEMENTS


def _num_products(matrix: Matrix) -> int:
    short, long = sorted(matrix.shape)
    return short * short * (2 * long + short)


def _gathered(own: Tensor, world_size: int, dp_group) -> Tensor:
    """Every rank's `own` (n,), one after another; as bytes, which every backend knows."""
    whole = torch.empty(world_size * len(own), dtype=own.dtype, device=own.device)
    torch.distributed.all_gather([part.view(torch.uint8) for part in whole.split(len(own))], own.view(torch.uint8), dp_group)
    return whole


def _exchange(whole: Tensor, shares: list[list[Matrix]], rank: int, dp_group) -> None:
    """Gives every rank the matrices in `whole` (n,) that others have made."""
    size = max(sum(matrix.stop - matrix.start for matrix in share) for share in shares)
    packed = torch.zeros(size, dtype=whole.dtype, device=whole.device)
    for each in _copies_of(packed, whole, shares[rank]):
        each.packed.copy_(each.unpacked)
    for row, share in zip(_gathered(packed, len(shares), dp_group).split(size), shares, strict=True):
        for each in _copies_of(row, whole, share):
            each.unpacked.copy_(each.packed)


def _copies_of(packed: Tensor, whole: Tensor, share: list[Matrix]) -> Iterator[Copies]:
    """Where each matrix of a share lies in `packed`, one after another, and in `whole`."""
    sizes = [matrix.stop - matrix.start for matrix in share]
    places = packed[: sum(sizes)].split(sizes)
    return (Copies(place, whole[each.start : each.stop]) for place, each in zip(places, share, strict=True))


def _copy_down(source: Tensor, slot: Tensor, stream: torch.cuda.Stream) -> Sent:
    """Starts a copy into the first elements of `slot`."""
    with torch.cuda.stream(stream):
        slot[: len(source)].copy_(source, non_blocking=True)
        return Sent(slot[: len(source)], stream.record_event(torch.cuda.Event(blocking=True)))


def _keys(draws: Draws, number: int) -> list[int]:
    """What makes the words of one update and stretch of elements out of the table: bits to flip, an odd factor, a summand."""
    packed = struct.pack("<4Q", *draws, number)
    flips, factor, shift = struct.unpack("<3i", blake2b(packed, digest_size=12).digest())
    return [flips, factor | 1, shift]


@cache
def _table(device: torch.device) -> Tensor:
    """WORDS words (n,) int32, of which the low halves and the high halves are all different."""
    generator = torch.Generator().manual_seed(0)
    high, low = (torch.randperm(WORDS, generator=generator) for _ in range(2))
    return (high * WORDS + low - 2**31).to(torch.int32).to(device)
