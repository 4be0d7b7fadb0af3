"""Live bytes, counted storage by storage: in fake mode for models of any size, and over the real engine on the CPU.

A ledger of births and deaths of untyped storages is kept while the tracker is entered; peaks are read from it afterwards, once
it is known which storages would lie on the host where there is a GPU. A view is free; a storage counts once, from the operation
that makes it to its death. What operations do inside themselves is not seen.
"""

import gc
import linecache
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ds.shards import Labels
from scripts import trainer
from scripts.config import PRECISIONS, TrainingConfig
from scripts.engine import truth_check
from scripts.model import losses, operations
from scripts.model.decoder import Decoder, empty_model
from scripts.model.huggingface import teacher_config
from scripts.model.losses import next_token
from scripts.prepare_data import prepare
from scripts.run import setup
from scripts.run.evaluate import held_out_loss, sample_record
from scripts.run.state import Progress, Run
from scripts.train_distill import from_labels, from_teacher, label, objective_of

HOUSE = ("/scripts/", "/deepspeed/", "/transformers/", "/benchmarks/")
COPYING = (torch.ops.aten.copy_.default, torch.ops.aten.add_.Tensor)
HOST_FILES = ("/ops/adam/cpu_adam.py", "/scripts/run/checkpoint.py", "/scripts/run/storage.py", "/scripts/model/huggingface.py")
HOST_FUNCTIONS, DEVICE_FUNCTIONS = ("sum_of_squares",), ("empty_model",)
HOST_LINES = ("temp_buffer_bit16 = torch.full", "temp_grad_buffer_for_cpu_offload = torch.zeros", "torch.randn(", "pin_memory=")


class Peak(NamedTuple):
    """The most bytes alive at once, what made them by place (largest first), and the size of the largest storage of all."""

    num_bytes: int
    places: dict[str, int]
    largest_bytes: int


class Storage(NamedTuple):
    """One storage: its size, the place in the sources that made it, and whether that place works on the host."""

    num_bytes: int
    place: str
    on_host: bool


class Sides(NamedTuple):
    """The peaks on the device and on the host in one stretch of time, and the bytes copied from each to the other in it."""

    device: Peak
    host: Peak
    num_bytes_down: int
    num_bytes_up: int


class Moment(NamedTuple):
    """How many events and copies the ledger held."""

    num_events: int
    num_copies: int


class Copy(NamedTuple):
    """Numbers of the storages that one operation read and wrote into another, and the bytes of what it read."""

    source: int
    target: int
    num_bytes: int


class Tracker(TorchDispatchMode):
    """The ledger: `storages` in order of birth, `events` +n / -n for the birth and death of storage n (counted from 1), and
    `copies`, what was copied or added from one storage into another.
    """

    def __init__(self, existing: Iterable[tuple[str, Tensor]]) -> None:
        super().__init__()
        self.storages: list[Storage] = []
        self.events: list[int] = []
        self.copies: list[Copy] = []
        self._alive: dict[int, tuple[int, weakref.ref]] = {}
        self._host: set[int] = set()
        for place, tensor in existing:
            self._meet(tensor, place, False)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor) and leaf.device.type != "meta":
                self._meet(leaf, None, False)
        if func in COPYING and isinstance(args[1], Tensor):
            source, target = self._meet(args[1], None, False), self._meet(args[0], None, False)
            self.copies.append(Copy(source, target, args[1].numel() * args[1].element_size()))
        return made

    def now(self) -> Moment:
        """A moment, for `sides` to begin or end at."""
        return Moment(len(self.events), len(self.copies))

    def sides(self, begin: Moment, end: Moment) -> Sides:
        """What happened on both sides between two moments, by what is known of the storages now."""
        return Sides(
            self.peak(False, begin.num_events, end.num_events),
            self.peak(True, begin.num_events, end.num_events),
            self._copied_bytes(True, begin, end),
            self._copied_bytes(False, begin, end),
        )

    def claim_host(self, tensors: Iterable[Tensor]) -> None:
        """Says that these would lie in host memory where there is a GPU, from their birth on."""
        for tensor in tensors:
            self._host.add(self._meet(tensor, None, True))

    def peak(self, on_host: bool, begin: int, end: int) -> Peak:
        """The peak of one side between two numbers of events."""
        moment = self._moment_of_peak(on_host, begin, end)
        places: dict[str, int] = {}
        for storage in self._alive_at(moment, on_host):
            places[storage.place] = places.get(storage.place, 0) + storage.num_bytes
        ordered = dict(sorted(places.items(), key=lambda item: -item[1]))
        present = self._alive_at(begin, on_host) + [
            self.storages[event - 1] for event in self.events[begin:end] if event > 0 and self._is_host(event) == on_host
        ]
        return Peak(sum(places.values()), ordered, max((storage.num_bytes for storage in present), default=0))

    def _copied_bytes(self, to_host: bool, begin: Moment, end: Moment) -> int:
        copies = self.copies[begin.num_copies : end.num_copies]
        sides = [(self._is_host(copy.source), self._is_host(copy.target), copy.num_bytes) for copy in copies]
        return sum(num_bytes for source, target, num_bytes in sides if source != target and target == to_host)

    def _moment_of_peak(self, on_host: bool, begin: int, end: int) -> int:
        live, most, moment = 0, -1, begin
        for index, event in enumerate([0, *self.events[:end]]):
            if event and self._is_host(abs(event)) == on_host:
                live += self.storages[abs(event) - 1].num_bytes * (1 if event > 0 else -1)
            if index >= begin and live > most:
                most, moment = live, index
        return moment

    def _alive_at(self, moment: int, on_host: bool) -> list[Storage]:
        numbers = set()
        for event in self.events[:moment]:
            (numbers.add if event > 0 else numbers.discard)(abs(event))
        return [self.storages[number - 1] for number in numbers if self._is_host(number) == on_host]

    def _is_host(self, number: int) -> bool:
        return number in self._host or self.storages[number - 1].on_host

    def _meet(self, tensor: Tensor, place: str | None, claimed: bool) -> int:
        storage = tensor.untyped_storage()
        known = self._alive.get(storage._cdata)
        if known is not None:
            return known[0]
        made, on_host = (place, claimed) if place is not None else _birthplace()
        self.storages.append(Storage(storage.nbytes(), made, on_host or claimed))
        number = len(self.storages)
        self._alive[storage._cdata] = number, weakref.ref(storage, lambda _, key=storage._cdata: self._bury(key))
        self.events.append(number)
        return number

    def _bury(self, key: int) -> None:
        self.events.append(-self._alive.pop(key)[0])


def _birthplace() -> tuple[str, bool]:
    """The innermost line of the house or of DeepSpeed that is running, and whether it makes tensors for the host."""
    frame, place, on_host = sys._getframe(2), None, False
    while frame is not None:
        code = frame.f_code
        if _is_house(code.co_filename):
            if place is None:
                place = f"{code.co_filename.rpartition('/')[2]}:{code.co_name}:{frame.f_lineno}"
                on_host = any(line in linecache.getline(code.co_filename, frame.f_lineno) for line in HOST_LINES)
            if code.co_name in DEVICE_FUNCTIONS:
                break
            on_host = on_host or code.co_name in HOST_FUNCTIONS or code.co_filename.endswith(HOST_FILES)
        frame = frame.f_back
    return place or "elsewhere", on_host


@cache
def _is_house(path: str) -> bool:
    return any(part in path for part in HOUSE)


def peak_of(work: Callable[[], Any], existing: Iterable[tuple[str, Tensor]]) -> Peak:
    """The peak of `work()`, with `existing` (place, tensor) counted from the start; all storages count."""
    with Tracker(existing) as tracker:
        work()
    return tracker.peak(False, 0, len(tracker.events))


class Alone(NamedTuple):
    """A model on one rank as objectives call it, in the place of DeepSpeed's engine."""

    module: Decoder

    def __call__(self, ids: Tensor) -> Tensor:
        return self.module(ids)


def fake_step_peak(config: TrainingConfig) -> Peak:
    """Device-side storages of one micro-batch, as on a GPU of one rank, whatever the size of the model: nothing is computed.

    Forward, loss and backward; each gradient is dropped as soon as it is whole, as scripts/engine/offload.py takes it. Weights,
    a teacher's and, where they are kept on the GPU, the sums of gradients are counted; gradients that are being copied are not.
    """
    shapes, teacher_shapes = empty_model(config, torch.device("meta")), _teacher_shapes(config)
    with FakeTensorMode(), graph_of_gpu():
        decoder, teacher, windows = fill_fake(shapes), fill_fake(teacher_shapes), _fake_windows(config)
        for weight in decoder.parameters():
            weight.register_post_accumulate_grad_hook(drop_gradient)
        held = [*named("weights", decoder.parameters()), *_sums_of_gradients(config, decoder), ("ids", windows)]
        if config.teacher_dir is None:
            return peak_of(lambda: next_token(Alone(decoder), windows, config).backward(), held)
        if config.teacher_top_k is not None:
            labels = _fake_labels(config, config.teacher_top_k)
            held += named("labels", labels)
            return peak_of(lambda: from_labels(Alone(decoder), windows, labels, config).backward(), held)
        held += named("teacher", teacher.parameters())
        return peak_of(lambda: from_teacher(Alone(decoder), windows, teacher, config).backward(), held)


def fake_teacher_peak(config: TrainingConfig) -> Peak:
    """Device-side storages while the teacher alone labels a micro-batch, as on a GPU; its labels outlast it."""
    shapes = _teacher_shapes(config)
    with FakeTensorMode(), graph_of_gpu():
        teacher, windows = fill_fake(shapes), _fake_windows(config)
        held = [*named("teacher", teacher.parameters()), ("ids", windows)]
        return peak_of(lambda: label(teacher, windows, config), held)


def named(place: str, tensors: Iterable[Tensor]) -> list[tuple[str, Tensor]]:
    """Tensors as `peak_of` wants those that exist before its work."""
    return [(place, tensor) for tensor in tensors]


def _teacher_shapes(config: TrainingConfig) -> nn.Module:
    shape = teacher_config(config)
    return nn.Module() if shape is None else empty_model(shape, torch.device("meta")).requires_grad_(False)


def _fake_windows(config: TrainingConfig) -> Tensor:
    return torch.zeros(config.micro_batch_rows, config.context_length + 1, dtype=torch.int64)


def _fake_labels(config: TrainingConfig, top_k: int) -> Labels[Tensor]:
    shape = (config.micro_batch_rows, config.context_length)
    ids, logs = torch.zeros(*shape, top_k, dtype=torch.int32), torch.zeros(*shape, top_k, dtype=torch.float16)
    return Labels(ids, logs, torch.zeros(shape))


def fill_fake(module: nn.Module) -> Any:
    """The module with its meta tensors made into fake ones of the CPU; to be called in fake mode. Shared ones stay shared."""
    made: dict[int, Tensor] = {}
    for part in module.modules():
        for kept in cast(tuple[dict[str, Any], ...], (part._parameters, part._buffers)):
            for name, tensor in kept.items():
                if tensor is not None:
                    made[id(tensor)] = made[id(tensor)] if id(tensor) in made else _fresh(tensor)
                    kept[name] = made[id(tensor)]
    return module


def _fresh(tensor: Tensor) -> Tensor:
    fake = torch.empty(tensor.shape, dtype=tensor.dtype)
    return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake


def engine_peaks(config: TrainingConfig) -> dict[str, Sides]:
    """The real engine on one rank: each phase's peaks by side, and what stands "after" it.

    Phases: initialisation, two steps, evaluation, sample, save, load. The truth check, which has a tiny model of its own, is
    left out. Runs in a process of its own under `leaving()`, for it makes the process group; `config.run_dir` must be fresh.
    """
    marks: dict[str, tuple[Moment, Moment]] = {}
    with Tracker([]) as tracker:
        for phase, work in _phases(config):
            begin = tracker.now()
            tracker.claim_host(host_tensors(work()))
            marks[phase] = begin, tracker.now()
            marks[f"after {phase}"] = marks[phase][1], marks[phase][1]
    return {phase: tracker.sides(*mark) for phase, mark in marks.items()}


def host_tensors(optimizer: Any) -> Iterator[Tensor]:
    """What a DeepSpeed optimizer with CPU offload keeps in host memory."""
    for master in optimizer.single_partition_of_fp32_groups:
        yield from (master, *(state for state in optimizer.optimizer.state[master].values() if isinstance(state, Tensor)))
        if master.grad is not None:
            yield master.grad
    yield from optimizer.param_buffer_of_bit16_for_cpu_offload_groups
    yield optimizer.temp_grad_buffer_for_cpu_offload
    yield from optimizer.accumulated_grads_in_cpu.values()


def _phases(config: TrainingConfig) -> Iterator[tuple[str, Callable[[], Any]]]:
    runs: list[Run] = []
    objective = next_token if config.teacher_dir is None else objective_of(config)

    def begin() -> Any:
        truth_check.refuse_untrue_updates = lambda *_: None
        run = trainer.set_up(config, prepare, label)
        assert run is not None
        runs.append(run)
        return run.engine.optimizer

    def of_run(work: Callable[[Run], Any]) -> Callable[[], Any]:
        return lambda: (work(runs[-1]), runs[-1].engine.optimizer)[1]

    def leave(run: Run) -> None:
        setup.release_lock(run.lock)
        run.watch.close(clean=True)

    yield "initialisation", begin
    yield "step", of_run(lambda run: trainer.run_step(run, objective, 0))
    yield "second step", of_run(lambda run: trainer.run_step(run, objective, 1))
    yield "evaluation", of_run(lambda run: held_out_loss(run.config, run.ranks, run.data, run.engine.module))
    yield "sample", of_run(lambda run: sample_record(run, 2))
    yield "save", of_run(lambda run: trainer.verify_last_save(run, 2, trainer.save(run, 2, Progress(), print), print))
    leave(runs[0])
    runs.pop().engine.destroy()
    gc.collect()
    yield "load", begin
    leave(runs[0])


def drop_gradient(weight: Tensor) -> None:
    """What happens to a whole gradient on one rank: it leaves for the host at once."""
    weight.grad = None


@contextmanager
def graph_of_gpu() -> Iterator[None]:
    """Inside it decoder and losses build on the CPU the graph that they build on a GPU, for the sake of its storages alone.

    Products are in the storage dtype; norms make their results and nothing else, as CUDA's fused kernels do, and no numbers.
    """
    on_gpu = {
        (operations, "on_host"): lambda x: False,
        (operations, "rms_norm"): _fused_norm,
        (operations, "rms_norm_gradients"): _fused_norm_gradients,
        (losses, "product_dtype"): lambda storage, device: storage,
    }
    with ExitStack() as restored:
        for place, function in on_gpu.items():
            restored.callback(setattr, *place, getattr(*place))
            setattr(*place, function)
        yield


def _fused_norm(x: Tensor, gain: Tensor, eps: float) -> operations.Normed:
    return operations.Normed(torch.empty_like(x), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32))


def _fused_norm_gradients(gradient: Tensor, x: Tensor, gain: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    return torch.empty_like(x), torch.empty_like(gain)


def _sums_of_gradients(config: TrainingConfig, decoder: Decoder) -> list[tuple[str, Tensor]]:
    if not config.keeps_gradient_sums(1):
        return []
    dtype = PRECISIONS[config.accumulation_precision]
    return [("sums of gradients", torch.empty_like(weight, dtype=dtype)) for weight in decoder.parameters()]
