"""A card that is not there: streams, events, copies and memory as CUDA has them, on this machine's memory, run by an adversary.

Inside `Card.standing_in` nothing that is issued to a stream runs until the adversary, who draws from a seed, lets it, or until
the host waits for it: kernels, copies, marks of events and waits are the entries of each stream's queue, in order. So the host
runs ahead of the streams, and they of each other, in every way that CUDA allows. A pool's thread runs its tasks the same way.

- A kernel reads and writes at the moment when it runs. Until then what lies in its result's memory is what lay there before.
- A copy between the card and page-locked memory has a beginning, at which its target turns into poison, and an end, at which it
  writes there; it reads its source at either. Other copies make the host wait, as torch does.
- Memory whose tensor is gone is given to the next tensor that asks for it in the same stream, however far the streams are. When
  the compute stream gets memory, all of its own that was given back before is also poisoned, in the order of that stream:
  whoever else asks for memory there may get it. Page-locked memory is poison as soon as its tensor is gone.
- Poison is NaN in every floating dtype.

Without a seed everything runs at once, and the threads' tasks too: that is the synchronous result.
"""

import ctypes
import math
import mmap
import weakref
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from random import Random
from threading import local
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from deepspeed.accelerator import real_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

CARD = torch.device("cuda", 0)
MEMORY_BYTES, ALIGNMENT, POISON = 2**26, 64, 0xFF
SPEEDS = (0.0, 0.0, 0.02, 0.2, 1.0, 4.0)
COPY = torch.ops.aten.copy_.default
FILLED_LATER = {torch.ops.aten.empty_like.default, torch.ops.aten.new_empty.default, torch.ops.aten.new_empty_strided.default}
READ_BY_THE_HOST = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default, torch.ops.aten.is_nonzero.default}
FACTORIES = ("empty", "zeros", "ones", "full", "arange", "tensor")


class Adversary:
    """Draws from a seed how far streams and threads come meanwhile, which memory is used again, and when copies read."""

    def __init__(self, seed: int | None) -> None:
        self.is_patient, self._random, self._speeds = seed is not None, Random(seed or 0), {}

    def entries(self, actor: object) -> float:
        """How many entries of its queue an actor gets done now; it keeps its speed for a while."""
        if not self.is_patient:
            return float("inf")
        if actor not in self._speeds or self._random.random() < 0.02:
            self._speeds[actor] = self._random.choice(SPEEDS)
        speed = self._speeds[actor]
        return int(speed) + (self._random.random() < speed % 1)

    def chooses(self, share: float) -> bool:
        """True in this share of the cases."""
        return self._random.random() < share


class Mark:
    """A place in a stream, which it has passed or not."""

    def __init__(self, stream: "Stream") -> None:
        self.stream, self.is_passed = stream, False


class Wait(NamedTuple):
    """An entry of a queue: nothing after it runs before another stream has passed the mark."""

    mark: Mark


class Stream:
    """In the place of torch.cuda.Stream."""

    def __init__(self, card: "Card", device: object = None) -> None:
        self.card, self.queue, self.number = card, deque(), len(card.streams)
        card.streams.append(self)

    def wait_event(self, event: "Event") -> None:
        if event.mark is not None:
            self.card.issue(self, Wait(event.mark))

    def wait_stream(self, stream: "Stream") -> None:
        self.wait_event(stream.record_event())

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event(self.card)
        event.record(self)
        return event

    def synchronize(self) -> None:
        self.record_event().synchronize()


class Event:
    """In the place of torch.cuda.Event: as long as it was never recorded nobody waits for it."""

    def __init__(self, card: "Card", blocking: bool = False) -> None:
        self.card, self.mark = card, None

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or self.card.current_stream()
        self.mark = Mark(stream)
        self.card.issue(stream, self.mark)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or self.card.current_stream()).wait_event(self)

    def synchronize(self) -> None:
        if self.mark is not None:
            self.card.go_on()
            self.card.pass_mark(self.mark)


class Task(Future):
    """What a pool's thread is to do. Whoever asks for the result waits until the thread has come so far."""

    def __init__(self, pool: "Pool", function: Callable) -> None:
        super().__init__()
        self.pool, self.function = pool, function

    def result(self, timeout: float | None = None) -> Any:
        self.pool.card.go_on()
        while not self.done():
            self.pool.run_next()
        return super().result(timeout)


class Pool:
    """In the place of a ThreadPoolExecutor of one thread. Its tasks run while the host stands still: so a seed says all."""

    def __init__(self, card: "Card", max_workers: int, name: str, initializer: Callable | None = None) -> None:
        assert max_workers == 1
        self.card, self.queue, self.is_closed = card, deque(), False
        card.pools.append(self)

    def submit(self, function: Callable, /, *arguments: Any) -> Task:
        assert not self.is_closed
        task = Task(self, partial(function, *arguments))
        self.queue.append(task)
        self.card.go_on()
        return task

    def run_next(self) -> None:
        """Runs the oldest task from its begin to its end."""
        task, self.card.is_in_pool = self.queue.popleft(), True
        self.card.order.append(-1)
        try:
            with torch._C._DisableTorchDispatch(), self.card.stream(self.card.compute_stream):
                task.set_result(task.function())
        except Exception as fault:
            task.set_exception(fault)
        self.card.is_in_pool = False

    def shutdown(self) -> None:
        while self.queue:
            self.run_next()
        self.is_closed = True


class Memory:
    """Addresses that are given out and taken back."""

    def __init__(self) -> None:
        self._mapping, self._numbers = mmap.mmap(-1, MEMORY_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), {}
        self.start = ctypes.addressof(ctypes.c_char.from_buffer(self._mapping))
        self._next, self._free = self.start, {}

    def holds(self, address: int) -> bool:
        return self.start <= address < self.start + MEMORY_BYTES

    def at(self, address: int, layout: "Layout") -> Tensor:
        """The numbers at an address, which keep nothing from being given back."""
        if layout.dtype not in self._numbers:
            self._numbers[layout.dtype] = torch.frombuffer(self._mapping, dtype=layout.dtype)
        offset = (address - self.start) // layout.dtype.itemsize
        return self._numbers[layout.dtype].as_strided(layout.size, layout.stride, offset)

    def take(self, num_bytes: int, owner: Stream | None, may_be_used: bool) -> int:
        """An address: one that this owner has given back, if it may be used again, or a fresh one full of poison."""
        size = -(-num_bytes // ALIGNMENT) * ALIGNMENT
        free = self._free.get((owner, size))
        if free and may_be_used:
            return free.pop()
        address, self._next = self._next, self._next + size
        assert self._next <= self.start + MEMORY_BYTES, "more memory than the card has"
        ctypes.memset(address, POISON, size)
        return address

    def give_back(self, address: int, num_bytes: int, owner: Stream | None) -> None:
        size = -(-num_bytes // ALIGNMENT) * ALIGNMENT
        self._free.setdefault((owner, size), []).append(address)


class Holding(weakref.ref):
    """Calls back when the storage of a tensor that lies in some memory is gone."""

    address: int
    num_bytes: int
    owner: Stream | None


class Card:
    """The streams, the memory and what is known of both; `standing_in` puts them in the place of torch's."""

    def __init__(self, seed: int | None, can_lock: bool = True) -> None:
        self.adversary, self.can_lock = Adversary(seed), can_lock
        self.memory, self.locked = Memory(), Memory()
        self.streams: list[Stream] = []
        self.pools: list[Pool] = []
        self.is_in_pool = self.is_running = False
        self.order: list[int] = []
        self.num_bytes = self.most_bytes = 0
        self._holdings: dict[int, Holding] = {}
        self._left: list[Callable] = []
        self._adopted: list[tuple[int, float]] = []
        self._current = local()
        self.compute_stream = Stream(self)

    def current_stream(self, device: object = None) -> Stream:
        """In the place of torch.cuda.current_stream: every thread has its own."""
        return getattr(self._current, "stream", self.compute_stream)

    @contextmanager
    def stream(self, stream: Stream | None) -> Iterator[None]:
        """In the place of torch.cuda.stream."""
        before = self.current_stream()
        self._current.stream = stream or before
        try:
            yield
        finally:
            self._current.stream = before

    def issue(self, stream: Stream, *entries: Mark | Wait | Callable) -> None:
        """Puts entries into a stream's queue; the adversary may then let some run."""
        stream.queue.extend(entries)
        self.go_on()

    def go_on(self) -> None:
        """Lets streams and threads run as far as the adversary likes."""
        if self.is_running or not any(actor.queue for actor in (*self.streams, *self.pools)):
            return
        with torch._C._DisableTorchDispatch():
            for stream in self.streams:
                entries = self.adversary.entries(stream) if stream.queue else 0
                while entries and stream.queue and self._run_next(stream):
                    entries -= 1
            for pool in () if self.is_in_pool else self.pools:
                entries = self.adversary.entries(pool) if pool.queue else 0
                while entries and pool.queue:
                    pool.run_next()
                    entries -= 1
        if not self.adversary.is_patient and not self.is_in_pool:
            self.go_on()

    def pass_mark(self, mark: Mark) -> None:
        """What happens at least when the host waits: this stream comes as far as the mark, others as far as it waits for."""
        with torch._C._DisableTorchDispatch():
            while not mark.is_passed:
                if not self._run_next(mark.stream):
                    self.pass_mark(mark.stream.queue[0].mark)

    def finish(self) -> None:
        """Runs all that was issued."""
        self._use_what_was_left()
        for stream in self.streams:
            stream.synchronize()

    def _run_next(self, stream: Stream) -> bool:
        entry = stream.queue[0]
        if isinstance(entry, Wait) and not entry.mark.is_passed:
            return False
        stream.queue.popleft()
        self.order.append(stream.number)
        if isinstance(entry, Mark):
            entry.is_passed = True
        elif not isinstance(entry, Wait):
            self.is_running = True
            try:
                entry()
            finally:
                self.is_running = False
        return True

    def adopt(self, tensor: Tensor) -> None:
        """Takes the memory of a tensor that was there before for the card's."""
        start = tensor.data_ptr()
        self._adopted = sorted([*self._adopted, (start, start + tensor.nbytes)])

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor lies on the card."""
        address = tensor.data_ptr()
        if self.memory.holds(address):
            return True
        place = bisect_right(self._adopted, (address, math.inf)) - 1
        return place >= 0 and self._adopted[place][0] <= address < self._adopted[place][1]

    def empty(self, layout: "Layout", owner: Stream | None) -> Tensor:
        """A tensor on the card, for a stream; or without one in page-locked memory."""
        num_bytes = _extent(layout) * layout.dtype.itemsize
        if not num_bytes:
            return torch.empty_strided(layout.size, layout.stride, dtype=layout.dtype)
        if owner is self.compute_stream:
            self._use_what_was_left()
        memory = self.memory if owner else self.locked
        address = memory.take(num_bytes, owner, owner is not None and self.adversary.chooses(0.9))
        numbers = _bytes(num_bytes).from_address(address)
        holding = Holding(numbers, self._let_go)
        holding.address, holding.num_bytes, holding.owner = address, num_bytes, owner
        self._holdings[id(holding)] = holding
        if owner:
            self.num_bytes += num_bytes
            self.most_bytes = max(self.most_bytes, self.num_bytes)
        return torch.frombuffer(numbers, dtype=layout.dtype).as_strided(layout.size, layout.stride)

    def put(self, host: Tensor, is_filled: bool = True) -> Tensor:
        """A tensor of the host on the card, in the order of the current stream."""
        with torch._C._DisableTorchDispatch():
            found = self.empty(_layout(host), self.current_stream())
            fill = partial(self._bare_one(found).copy_, host.clone())
        if is_filled:
            self.issue(self.current_stream(), fill)
        return found

    def _use_what_was_left(self) -> None:
        self.compute_stream.queue.extend(self._left)
        self._left.clear()

    def _let_go(self, holding: Holding) -> None:
        del self._holdings[id(holding)]
        poison = partial(ctypes.memset, holding.address, POISON, holding.num_bytes)
        if holding.owner is None:
            poison()
            return
        self.num_bytes -= holding.num_bytes
        self.memory.give_back(holding.address, holding.num_bytes, holding.owner)
        if holding.owner is self.compute_stream:
            self._left.append(poison)

    def call(self, func: Any, arguments: tuple, options: dict) -> Any:
        """Does what an operation does: a kernel is issued, a view is made at once, and so is what does not touch the card."""
        if not self._touches(arguments) and not self._touches(options.values()):
            self.go_on()
            return func(*arguments, **options)
        if func is COPY:
            return self._copy(*arguments, **options)
        if func.namespace == "c10d":
            self._launch(partial(func, *self._bare(arguments), **options))
            return func(*_map(Tensor.clone, arguments), **options)
        stream = self.current_stream()
        if func in READ_BY_THE_HOST:
            stream.synchronize()
            return func(*arguments, **options)
        if func._schema.is_mutable:
            self._launch(partial(func, *self._bare(arguments), **self._bare(options)))
            return options["out"] if "out" in options else arguments[0]
        layouts = _layouts(func, arguments, options)
        if layouts is None:
            return func(*arguments, **options)
        results = _map(lambda layout: self.empty(layout, stream), layouts)
        if func not in FILLED_LATER:
            self._launch(partial(_write, func, self._bare(arguments), self._bare(options), self._bare(results)))
        return results

    def _touches(self, arguments: Iterable) -> bool:
        for each in arguments:
            if isinstance(each, Tensor):
                if self.holds(each):
                    return True
            elif isinstance(each, list | tuple) and self._touches(each):
                return True
        return False

    def _launch(self, kernel: Callable) -> None:
        self.issue(self.current_stream(), kernel)

    def _bare(self, arguments: Any) -> Any:
        """Arguments of a kernel that keep nothing alive; a number on the host is read now."""
        return _map(self._bare_one, arguments)

    def _bare_one(self, tensor: Tensor) -> Tensor:
        if self.memory.holds(tensor.data_ptr()):
            return self.memory.at(tensor.data_ptr(), _layout(tensor))
        if self.holds(tensor):
            return tensor.detach()
        assert not tensor.dim() or not tensor.numel(), "a kernel of numbers that lie on the host"
        return tensor.clone()

    def _copy(self, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        stream, is_upward = self.current_stream(), self.holds(target)
        if is_upward and (self.holds(source) or not source.dim()):
            self._launch(partial(COPY, *self._bare((target, source))))
            return target
        is_locked = self.locked.holds((source if is_upward else target).data_ptr())
        if non_blocking and is_locked:
            self._copy_meanwhile(stream, target, source)
            return target
        if is_upward:
            stream.synchronize()
            self._launch(partial(COPY, self._bare_one(target), source.clone()))
        else:
            self._launch(partial(COPY, target.detach(), self._bare_one(source)))
        if not (is_upward and non_blocking):
            stream.synchronize()
        return target

    def _copy_meanwhile(self, stream: Stream, target: Tensor, source: Tensor) -> None:
        assert target.is_contiguous() and source.is_contiguous() and target.dtype == source.dtype
        here, there, num_bytes = target.data_ptr(), source.data_ptr(), source.nbytes
        reads_first, read = self.adversary.chooses(0.3), []

        def begin() -> None:
            if reads_first:
                read.append(ctypes.string_at(there, num_bytes))
            ctypes.memset(here, POISON, num_bytes)

        def end() -> None:
            ctypes.memmove(here, read.pop() if read else there, num_bytes)

        self.issue(stream, begin, end)

    @contextmanager
    def standing_in(self) -> Iterator["Card"]:
        """Puts this card in the place of torch's CUDA and of DeepSpeed's accelerator."""
        device, is_pinned = torch.Tensor.device, torch.Tensor.is_pinned
        in_place = {
            (torch.cuda, "Stream"): partial(Stream, self), (torch.cuda, "Event"): partial(Event, self),
            (torch.cuda, "stream"): self.stream, (torch.cuda, "current_stream"): self.current_stream,
            (torch.cuda, "set_device"): lambda device: None, (torch.cuda, "synchronize"): lambda device=None: self.finish(),
            (torch.cuda, "get_device_capability"): lambda device=None: (8, 6),
            (torch.Tensor, "device"): property(lambda each: CARD if self._knows(each) else device.__get__(each)),
            (torch.Tensor, "is_pinned"): lambda each: self.locked.holds(each.data_ptr()) or is_pinned(each),
            (torch.Tensor, "record_stream"): lambda each, stream: self._record_stream(stream),
            (real_accelerator, "ds_accelerator"): CardsAccelerator(self),
        }  # fmt: skip
        in_place |= {(torch, name): partial(self._make, getattr(torch, name)) for name in FACTORIES}
        with ExitStack() as left:
            for (place, name), stand_in in in_place.items():
                left.enter_context(patch.object(place, name, stand_in))
            left.enter_context(_Operations(self))
            yield self

    def _knows(self, tensor: Tensor) -> bool:
        return tensor.layout is torch.strided and self.holds(tensor)

    def _record_stream(self, stream: Stream) -> None:
        assert stream is self.compute_stream, "memory of one stream that another uses without waiting"

    def _make(self, factory: Callable, *arguments: Any, device: Any = None, pin_memory: bool = False, **options: Any) -> Tensor:
        if pin_memory and not self.can_lock:
            raise RuntimeError("CUDA error: out of memory")
        if pin_memory:
            with torch._C._DisableTorchDispatch():
                return self.empty(_layout(factory(*arguments, **options)), None)
        if device is None or torch.device(device).type != "cuda":
            return factory(*arguments, device=device, **options)
        return self.put(factory(*arguments, **options), factory.__name__ != "empty")


class CardsAccelerator(CPU_Accelerator):
    """In the place of DeepSpeed's CUDA_Accelerator, as far as its ZeRO-2 optimizer asks."""

    def __init__(self, card: Card) -> None:
        super().__init__()
        self.card = card

    def is_synchronized_device(self) -> bool:
        return False

    def current_device_name(self) -> str:
        return str(CARD)

    def synchronize(self, device_index: object = None) -> None:
        self.card.finish()

    @property
    def Event(self) -> Callable:
        return torch.cuda.Event

    def stream(self, stream: Stream) -> Any:
        return torch.cuda.stream(stream)  # pyright: ignore[reportArgumentType]

    def current_stream(self, device_index: object = None) -> Any:
        return torch.cuda.current_stream()


class _Operations(TorchDispatchMode):
    def __init__(self, card: Card) -> None:
        super().__init__()
        self.card = card

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing here is compiled, and asking at each operation takes ten times as long as the rest

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return self.card.call(func, args, kwargs or {})


class Layout(NamedTuple):
    """How a tensor lies in its memory."""

    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


_bytes = cache(lambda num_bytes: ctypes.c_ubyte * num_bytes)
_views: set[Any] = set()
_known_layouts: dict[Any, Any] = {}


def _layouts(func: Any, arguments: tuple, options: dict) -> Any:
    """The layouts of what an operation makes, from zeros in the place of its tensors; None where it makes views of them."""
    if func in _views:
        return None
    described = (func, *_describe(arguments), *_describe(tuple(options.items())))
    if described not in _known_layouts:
        given = _map(_zeros, arguments), _map(_zeros, options)
        results, own = func(*given[0], **given[1]), {each.untyped_storage().data_ptr() for each in _tensors(given)}
        if any(each.untyped_storage().data_ptr() in own for each in _tensors(results)):
            _views.add(func)
            return None
        _known_layouts[described] = _map(_layout, results)
    return _known_layouts[described]


def _write(func: Any, arguments: tuple, options: dict, results: Any) -> None:
    made = func(*arguments, **options)
    for target, source in zip(_tensors(results), _tensors(made), strict=True):
        target.copy_(source)


def _layout(tensor: Tensor) -> Layout:
    return Layout(tensor.size(), tensor.stride(), tensor.dtype)


def _zeros(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype).zero_()


def _extent(layout: Layout) -> int:
    """Elements from the first to the last."""
    if 0 in layout.size:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(layout.size, layout.stride, strict=True))


def _map(function: Callable, value: Any) -> Any:
    """`function` of every tensor, or layout of one, within tuples, lists and dicts."""
    if isinstance(value, Tensor | Layout):
        return function(value)
    if isinstance(value, dict):
        return {name: _map(function, each) for name, each in value.items()}
    return type(value)(_map(function, each) for each in value) if type(value) in (tuple, list) else value


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, tuple | list | dict):
        return [tensor for each in (value.values() if isinstance(value, dict) else value) for tensor in _tensors(each)]
    return []


def _describe(values: tuple | list) -> tuple:
    def one(value: Any) -> Any:
        if isinstance(value, Tensor):
            return _layout(value)
        return _describe(value) if type(value) in (tuple, list) else (type(value), value)

    return tuple(one(value) for value in values)
