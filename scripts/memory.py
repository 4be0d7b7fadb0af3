"""The plan: bytes by kind and hours, from the configuration alone, held against what the machine has free. Builds nothing.

Letters are model.py's: B rows, T positions, D width, H heads, G kv heads, K head width, F mlp, V vocabulary; besides, M = B * T
tokens of a micro-batch, L layers, C tokens of a loss chunk, N parameters, k ids of a label.
"""

import errno
import json
import shutil
import sys
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import combinations, product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from scripts.config import (
    ACTIVATION_CHECKPOINTING,
    DISTILL,
    HOST_CHUNK_ROWS,
    PRECISIONS,
    PRETRAIN,
    TrainingConfig,
    product_dtype,
    refuse_arguments,
    refusing,
)

GIB, MIB = 2**30, 2**20
PHASES = ("initialisation", "training step", "save and load")
TEACHER_ALONE, TEACHER_TOP_K = "teacher alone", 32
HOST_MOMENTS = {
    TEACHER_ALONE: "reading weights and writing labels",
    PHASES[0]: "DeepSpeed's copies",
    PHASES[1]: "Adam",
    PHASES[2]: "reading and writing files",
}
GPU, HOST = "GPU memory", "host memory"
CONTEXT_BYTES, LIBRARIES_BYTES, WORKSPACE_BYTES, MULTIPROCESSORS = 256 * MIB, 256 * MIB, 32 * MIB, 128
ALLOCATOR_SLACK = 0.02
PROGRAM_BYTES = {"cuda": 1600 * MIB, "cpu": 544 * MIB}
LABEL_CHUNK_BYTES, LABEL_COPIES, WINDOW_BYTES = 24, 4, 33
DATA_BYTES, PIECES_BYTES, LARGEST_LIMIT = 64 * MIB, 64 * MIB, 2**60
OUTSIDE_TORCH = ("CUDA and its libraries", "allocator's slack")
FIXED = ("CUDA and its libraries", "the program", "the data")
NUM_OFFERS, FEWEST_CHUNK_ROWS, SHORTEST_CONTEXT, LESS = 3, 64, 64, 0.9
OUT_OF_MEMORY_WORDS = ("can't allocate memory", "DefaultCPUAllocator", "out of memory", "ALLOC_FAILED", "bad_alloc")
LEAST_SECONDS, COPIED_BYTES, MOST_ROWS = 0.02, 32 * MIB, {"cpu": 256, "cuda": 8192}
EFFICIENCY, BACKWARD_SHARE, ADAM_BYTES = 0.6, 2 / 3, 34
NAME_COLUMNS, NUMBER_COLUMNS = 44, 17
TRANSFORMERS_NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "mlp_size": "intermediate_size",
}


class Moment(NamedTuple):
    """What is held at one moment: its name, and bytes by kind."""

    name: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes of all kinds."""
        return sum(self.parts.values())


class Plan(NamedTuple):
    """The largest moment of each phase for one rank, on the `device` and beside it on the `host`; bytes on the `disk`.

    With `device_type` "cpu" the device's bytes lie in host memory too.
    """

    device_type: str
    device: dict[str, Moment]
    host: dict[str, Moment]
    disk: dict[str, int]


class Room(NamedTuple):
    """Bytes for a launch: `gpu` (None without one), `host` and run_dir's `disk`; `which`: "free" or "there in all"."""

    gpu: int | None
    host: int
    disk: int
    which: str


class Rates(NamedTuple):
    """What the machine does in a second: FLOP of matrix products, bytes through host memory, bytes between host and GPU."""

    flops: float
    host_bytes: float
    link_bytes: float


def phases(config: TrainingConfig) -> tuple[str, ...]:
    """A run's phases in their order; with `teacher_top_k` the teacher's own comes first, before anything of the student."""
    return PHASES if config.teacher_top_k is None else (TEACHER_ALONE, *PHASES)


def plan(config: TrainingConfig, world_size: int, device_type: str | None = None) -> Plan:
    """Bytes by kind of one of `world_size` ranks at the largest moment of each phase, from the configuration alone.

    `device_type` None means "cuda", with or without one in this machine; "cpu" is a run without a GPU. The host's bytes are one
    rank's: a machine needs them once for each rank that it runs.
    """
    kind = device_type or "cuda"
    device, host = (
        {phase: max(moments(config, world_size, kind, phase), key=lambda at: at.total) for phase in phases(config)}
        for moments in (device_moments, _host_moments)
    )
    return Plan(kind, device, host, _disk(config))


def device_moments(config: TrainingConfig, world_size: int, device_type: str, phase: str) -> Iterator[Moment]:
    """What the device holds of one rank at each moment of a phase that can be its largest."""
    held, largest = _held(config, world_size), max(_group_elements(config))
    if phase == TEACHER_ALONE:
        for name, parts in _labelling(config, device_type):
            yield _surrounded(name, parts, device_type)
    elif phase == "initialisation":
        for name, parts in _first_look_at_teacher(config, device_type):
            yield _surrounded(name, parts, device_type)
        kept = {kind: held[kind] for kind in ("weights", "optimizer state", "teacher")}
        flattened = {"one group, flattened by DeepSpeed": largest * config.dtype.itemsize}
        yield _surrounded("flattening the weights", kept | flattened, device_type)
        yield _surrounded("making the sums", kept | {"sums of gradients": held["sums of gradients"]}, device_type)
    elif phase == "save and load":
        yield _surrounded("writing the weights", held, device_type)
    else:
        for name, parts in _micro_batch(config, device_type, world_size):
            yield _surrounded(name, held | parts, device_type)
        if not config.offload_optimizer:
            cast = {"one group's gradient, cast by DeepSpeed": max(4 * largest // world_size, 8 * _largest_matrix(config))}
            yield _surrounded("the update", held | cast, device_type)


def needs(planned: Plan, local_size: int) -> dict[str, tuple[str, Moment]]:
    """The phase and moment that need most of each kind of memory: of the GPU for one rank, of the host for `local_size`."""
    together, found = planned.host, {}
    if planned.device_type == "cuda":
        found[GPU] = max(planned.device.items(), key=lambda item: item[1].total)
    else:
        together = {phase: Moment(at.name, at.parts | planned.host[phase].parts) for phase, at in planned.device.items()}
    phase, most = max(together.items(), key=lambda item: item[1].total)
    return found | {HOST: (phase, Moment(most.name, {kind: size * local_size for kind, size in most.parts.items()}))}


def allocated_bytes(planned: Plan) -> int:
    """What torch.cuda.max_memory_allocated is at the end: the device's peak without what torch's allocator does not count."""
    moments = planned.device.values()
    return max(sum(size for kind, size in at.parts.items() if kind not in OUTSIDE_TORCH) for at in moments)


def largest_item(moment: Moment) -> tuple[str, int]:
    """The kind that takes most of a moment, and its bytes."""
    return max(moment.parts.items(), key=lambda part: part[1])


def room_free(config: TrainingConfig, device: torch.device) -> Room:
    """What is free now: on the GPU, in host memory within every control group's limit, on the disk.

    What this process holds of the host already, and the context that a look at the GPU makes, count as free: plans have them.
    """
    gpu = torch.cuda.mem_get_info(device)[0] + CONTEXT_BYTES if device.type == "cuda" else None
    free = min([_kilobytes("/proc/meminfo")["MemAvailable"], *(limit - used for limit, used in _group_limits())])
    return Room(gpu, max(0, free) + _kilobytes("/proc/self/status").get("RssAnon", 0), _disk_usage(config).free, "free")


def room_in_all(config: TrainingConfig, device: torch.device) -> Room:
    """What the machine has, or its control groups allow, whatever else runs."""
    gpu = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else None
    host = min([_kilobytes("/proc/meminfo")["MemTotal"], *(limit for limit, _ in _group_limits())])
    return Room(gpu, host, _disk_usage(config).total, "there in all")


def refuse_unfit_memory(config: TrainingConfig, world_size: int, local_size: int, room: Room, device_type: str) -> None:
    """Refuses a run that would not fit in `room`, before anything of it is loaded.

    Raises:
        ValueError: a peak is above what there is; the line names it, its largest item and up to three configurations that fit.
    """
    for kind, (phase, at) in needs(plan(config, world_size, device_type), local_size).items():
        if at.total > _room_of(kind, room):
            item, size = largest_item(at)
            ranks = f" for {local_size} ranks" if kind == HOST and local_size > 1 else ""
            raise ValueError(
                f"{phase} ({at.name}) needs {gib(at.total)} of {kind}{ranks} and {gib(_room_of(kind, room))} are {room.which};"
                f" the largest item is {item}, {gib(size)}; {_advice(config, world_size, local_size, room, device_type)}"
            )


def offers(config: TrainingConfig, world_size: int, local_size: int, room: Room, device_type: str) -> list[dict]:
    """At most three sets of changes to `config`, the nearest, with which the plan fits in `room`: one field each, else two."""

    def fits(changes: dict) -> bool:
        return _fits(replace(config, **changes), world_size, local_size, room, device_type)

    ladders = _ladders(config, world_size, device_type)
    found = [changes for ladder in ladders if (changes := next(filter(fits, ladder), None))]
    for first, second in combinations(ladders, 2) if not found else ():
        rungs = sorted(product(enumerate(first), enumerate(second)), key=lambda pair: pair[0][0] + pair[1][0])
        pair = next(filter(fits, (one[1] | other[1] for one, other in rungs)), None)
        found += [pair] if pair else []
    return (found or [changes for changes in [_all_last(ladders)] if changes and fits(changes)])[:NUM_OFFERS]


def flops_per_token(config: TrainingConfig) -> int:
    """FLOP of a training token: 6 for each parameter that multiplies it, causal attention, and the forward of the blocks again
    where their activations are not kept (Kaplan et al. 2020; Dao 2023 for the causal half); the forward of a teacher beside it.
    """
    head, repeats = 6 * config.vocab_size * config.hidden_size, 3 if config.activation_checkpointing == "none" else 4
    return repeats * _forward_flops(config) + head + (_teacher_flops(config) if config.teacher_top_k is None else 0)


def tokens_per_second(config: TrainingConfig, world_size: int, local_size: int, device_type: str, rates: Rates) -> float:
    """What to expect of a step: products at EFFICIENCY of their rate, gradients on their way beside the backward, then Adam.

    A micro-batch's gradients go down in the training dtype and are added in float32; Adam reads master, gradient and moments
    and writes master, moments and weights. Evaluation, sampling and saving are not in it.
    """
    own, size = config.num_parameters / world_size, config.dtype.itemsize
    on_gpu, host = device_type == "cuda", rates.host_bytes / local_size
    micro_batches = config.accumulation_steps(world_size)
    products = config.micro_batch_rows * config.context_length * flops_per_token(config) / (EFFICIENCY * rates.flops)
    trips = micro_batches if config.accumulate_on == "cpu" else 1
    down = max(own * size / rates.link_bytes if on_gpu else 0.0, own * (size + 8) / host)
    reduction = 2 * config.num_parameters * size / rates.link_bytes if world_size > 1 else 0.0
    hidden = products * BACKWARD_SHARE if on_gpu and trips > 1 else 0.0
    up = config.num_parameters * size / rates.link_bytes if on_gpu else 0.0
    seconds = micro_batches * (products + reduction) + trips * max(0.0, down - hidden) + own * ADAM_BYTES / host + up
    return config.tokens_per_step / seconds


def teacher_seconds(config: TrainingConfig, world_size: int, rates: Rates) -> float:
    """How long the teacher alone takes to label all tokens that are read; 0 without `teacher_top_k`."""
    if config.teacher_top_k is None:
        return 0.0
    own_tokens = config.num_steps * config.tokens_per_step / world_size
    return own_tokens * _teacher_flops(config) / (EFFICIENCY * rates.flops)


def hours(config: TrainingConfig, tokens_per_second: float, teacher_seconds: float) -> float:
    """How long all steps take, and the teacher before them."""
    return (config.num_steps * config.tokens_per_step / tokens_per_second + teacher_seconds) / 3600


def measure_rates(config: TrainingConfig, device: torch.device) -> Rates:
    """Measures this machine in a fraction of a second: a product of the MLP's shape, copies in host memory and to the GPU."""
    rows = min(config.micro_batch_rows * config.context_length, MOST_ROWS[device.type])
    dtype, shape = product_dtype(config.dtype, device), (config.hidden_size, config.mlp_size)
    left, right = torch.ones(rows, shape[0], dtype=dtype, device=device), torch.ones(*shape, dtype=dtype, device=device)
    flops = 2 * rows * shape[0] * shape[1] / _seconds(lambda: left @ right, device)
    here, there = np.ones((2, COPIED_BYTES), dtype=np.uint8)
    host_bytes = 2 * COPIED_BYTES / _seconds(lambda: np.copyto(there, here), torch.device("cpu"))
    if device.type == "cpu":
        return Rates(flops, host_bytes, host_bytes)
    locked = torch.empty(COPIED_BYTES, dtype=torch.uint8, pin_memory=True)
    away = torch.empty_like(locked, device=device)
    return Rates(flops, host_bytes, COPIED_BYTES / _seconds(lambda: away.copy_(locked, non_blocking=True), device))


def short_words(config: TrainingConfig, world_size: int, local_size: int, device: torch.device) -> str:
    """The plan in one line: each kind of memory against what is free, its largest item, and the hours to expect."""
    room, wanted = room_free(config, device), needs(plan(config, world_size, device.type), local_size).items()
    words = [f"{gib(at.total)} of {gib(_room_of(kind, room))} free {kind} ({_why(phase, at)})" for kind, (phase, at) in wanted]
    rates = measure_rates(config, device)
    return f"The plan: {', '.join(words)}, {_time_words(config, world_size, local_size, device.type, rates)}"


def comparison(planned: Plan, gpu_peak_bytes: int, host_peak_bytes: int) -> dict[str, float]:
    """One rank's planned and measured peaks in GiB, as metrics.jsonl holds them; the GPU's as torch's allocator counts."""
    _, host = needs(planned, 1)[HOST]
    gpu = {"gpu_planned_gib": allocated_bytes(planned) / GIB, "gpu_peak_gib": gpu_peak_bytes / GIB}
    found = gpu if planned.device_type == "cuda" else {}
    return found | {"host_planned_gib": host.total / GIB, "host_peak_gib": host_peak_bytes / GIB}


def comparison_words(record: dict) -> str:
    """What `comparison` made, for a person."""
    return ", ".join(
        f"{kind}: {gib(record[f'{name}_planned_gib'] * GIB)} planned, {gib(record[f'{name}_peak_gib'] * GIB)} measured"
        for name, kind in (("gpu", GPU), ("host", HOST))
        if f"{name}_planned_gib" in record
    )


def is_out_of_memory(fault: BaseException) -> bool:
    """Whether the GPU or the host had no memory left, which torch says in words where Python has an exception of its own."""
    if isinstance(fault, OSError):
        return fault.errno == errno.ENOMEM
    in_words = isinstance(fault, RuntimeError) and any(words in str(fault) for words in OUT_OF_MEMORY_WORDS)
    return in_words or isinstance(fault, MemoryError)


def out_of_memory_words(
    config: TrainingConfig, world_size: int, local_size: int, device_type: str, gpu_peak_bytes: int, host_peak_bytes: int
) -> str:
    """For a run that ran out of memory all the same: the plan beside what was measured, and what needs less than this plan."""
    planned = plan(config, world_size, device_type)
    wanted = {kind: _somewhat_less(at) for kind, (_, at) in needs(planned, local_size).items()}
    room = Room(wanted.get(GPU), wanted[HOST], 0, "planned")
    found = offers(config, world_size, local_size, room, device_type)
    advice = (
        f"less is needed with {', or '.join(as_written(changes) for changes in found)}" if found else "choose a smaller model"
    )
    return f"{comparison_words(comparison(planned, gpu_peak_bytes, host_peak_bytes))}; {advice}"


def as_written(changes: dict) -> str:
    """Changes as they are written in scripts/config.py."""
    return " and ".join(f"{name}={json.dumps(value) if isinstance(value, str) else value}" for name, value in changes.items())


def gib(num_bytes: float) -> str:
    """Bytes as a person reads them."""
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB / 10 else f"{num_bytes / MIB:.1f} MiB"


def table(name: str, config: TrainingConfig, num_ranks: int, device: torch.device) -> str:
    """The plan of one preset on this machine, as a person reads it: kinds by phases, what is free, the hours to expect."""
    planned, room = plan(config, num_ranks, device.type), room_free(config, device)
    wanted = needs(planned, num_ranks).items()
    verdicts = [_verdict(kind, at.total, _room_of(kind, room), _why(phase, at)) for kind, (phase, at) in wanted]
    size = (
        f"{config.num_parameters / 1e6:,.1f} million"
        if config.num_parameters < 1e9
        else f"{config.num_parameters / 1e9:,.2f} billion"
    )
    ranks = "1 rank" if num_ranks == 1 else f"{num_ranks} ranks, each"
    lines = [f"{name}: {size} parameters, {config.tokens_per_step:,} tokens a step, {ranks}", ""]
    lines += [" " * NAME_COLUMNS + "".join(f"{phase:>{NUMBER_COLUMNS}}" for phase in phases(config))]
    lines += _kinds("GPU memory" if device.type == "cuda" else "what a GPU would hold, in host memory", planned.device)
    lines += _kinds("host memory", planned.host)
    lines += ["disk", *(_row(f"  {kind}", [num_bytes]) for kind, num_bytes in planned.disk.items() if num_bytes)]
    lines += ["", *verdicts]
    lines += [_verdict("disk", sum(planned.disk.values()), room.disk, "at the end")]
    rates = measure_rates(config, device)
    return "\n".join([*lines, _time_words(config, num_ranks, num_ranks, device.type, rates), ""])


def main() -> None:
    with refusing():
        refuse_arguments(sys.argv[1:])
        device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        for name, config in {"PRETRAIN": PRETRAIN, "DISTILL": DISTILL}.items():
            ranks = max(1, torch.cuda.device_count())
            while config.rows_per_step % (config.micro_batch_rows * ranks):
                ranks -= 1
            print(table(name, config, ranks, device))


class _Sizes(NamedTuple):
    """The letters above for one micro-batch, H and G times K as `queries` and `keys`; bytes of an element in `storage` and in
    `products`; `rows`, the tokens that the host's functions take at a time.
    """

    storage: int
    products: int
    tokens: int
    rows: int
    chunk: int
    width: int
    queries: int
    keys: int
    heads: int
    sequences: int
    mlp: int
    vocabulary: int


class _Backward(NamedTuple):
    """A moment of a block's backward: bytes of its activations that are still kept, of other activations, of gradients of its
    weights, and what a kernel takes for itself.
    """

    name: str
    kept: int
    work: int
    gradients: int
    kernel: int


def _held(config: TrainingConfig, world_size: int) -> dict[str, int]:
    """What lies on the device between micro-batches: weights, sums of gradients, the optimizer if it is there, and the teacher
    if the student learns from itself and not from its labels.
    """
    own, size = -(-config.num_parameters // world_size), config.dtype.itemsize
    summed = config.accumulate_on == "gpu" and (config.accumulation_steps(world_size) > 1 or not config.offload_optimizer)
    return {
        "weights": config.num_parameters * size,
        "sums of gradients": own * PRECISIONS[config.accumulation_precision].itemsize * summed,
        "optimizer state": 0 if config.offload_optimizer else own * 12,
        "teacher": 0 if (teacher := _teacher_beside(config)) is None else teacher.num_parameters * size,
        "DeepSpeed's bucket": config.bucket_elements * size if world_size > 1 else 0,
    }


def _teacher(config: TrainingConfig) -> TrainingConfig | None:
    """A configuration of the teacher's shape and the student's micro-batch, as the config.json in teacher_dir says, a run's or
    a transformers folder's; PRETRAIN's shape for PRETRAIN's run before it is there.
    """
    if config.teacher_dir is None:
        return None
    path = Path(config.teacher_dir) / "config.json"
    try:
        is_planned = config.teacher_dir == PRETRAIN.run_dir and not path.exists()
        return _shaped_as(config, None if is_planned else path.read_text())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as fault:
        raise ValueError(
            f"teacher_dir={config.teacher_dir!r}: {path} describes no model: {fault!r}; name a run or a transformers folder"
        ) from None


@lru_cache(maxsize=16)
def _shaped_as(config: TrainingConfig, described: str | None) -> TrainingConfig:
    found = vars(PRETRAIN) if described is None else json.loads(described)
    shape = {name: found.get(theirs) or found[name] for name, theirs in TRANSFORMERS_NAMES.items()}
    heads = found.get("num_key_value_heads") or found.get("num_kv_heads") or shape["num_heads"]
    return replace(
        config, teacher_dir=None, teacher_top_k=None, init_from=None, tokenizer_path=None, activation_checkpointing="none",
        **shape, num_kv_heads=heads, head_size=found.get("head_dim") or found.get("head_size"),
        qk_norm=found.get("model_type") == "qwen3" or bool(found.get("qk_norm")),
        tie_embeddings=bool(found.get("tie_word_embeddings") or found.get("tie_embeddings")),
    )  # fmt: skip


def _teacher_beside(config: TrainingConfig) -> TrainingConfig | None:
    """The teacher's shape where it is on the device with the student."""
    return _teacher(config) if config.teacher_top_k is None else None


def _forward_flops(config: TrainingConfig) -> int:
    """FLOP of a token's way through all blocks."""
    attention = config.context_length * config.num_heads * config.head_width
    return config.num_layers * (2 * config.block_parameters + 2 * attention)


def _teacher_flops(config: TrainingConfig) -> int:
    """FLOP of a token's way through the teacher, its head included; 0 without one."""
    teacher = _teacher(config)
    return 0 if teacher is None else _forward_flops(teacher) + 2 * teacher.vocab_size * teacher.hidden_size


def _group_elements(config: TrainingConfig) -> list[int]:
    """Parameters of the optimizer's groups: the embedding or head, a block's matrices, all norms."""
    norms = 2 * config.hidden_size + (2 * config.head_width if config.qk_norm else 0)
    matrices = config.block_parameters - norms
    return [config.vocab_size * config.hidden_size, matrices, config.num_layers * norms + config.hidden_size]


def _largest_matrix(config: TrainingConfig) -> int:
    return config.hidden_size * max(config.vocab_size, config.mlp_size, config.num_heads * config.head_width)


def _surrounded(name: str, parts: dict[str, int], device_type: str) -> Moment:
    """With what CUDA adds, and without kinds of no bytes."""
    counted = {kind: size for kind, size in parts.items() if size}
    if device_type == "cuda":
        counted["cuBLAS's workspace"] = WORKSPACE_BYTES
        counted["allocator's slack"] = int(ALLOCATOR_SLACK * sum(counted.values()))
        counted["CUDA and its libraries"] = CONTEXT_BYTES + LIBRARIES_BYTES
    return Moment(name, counted)


def _micro_batch(config: TrainingConfig, device_type: str, world_size: int) -> Iterator[tuple[str, dict[str, int]]]:
    """What a micro-batch takes besides what is held, at each moment of its forwards, its loss and its backward.

    Of the blocks' backwards the last block's is the first and has most activations; in the next one the last block's gradients
    are on their way down besides, which scripts/offload.py bounds.
    """
    sizes, mode, layers = _sizes(config, device_type), config.activation_checkpointing, config.num_layers
    one_input, matrix = sizes.storage * sizes.tokens * sizes.width, sizes.storage * sizes.vocabulary * sizes.width
    always, block = _inputs(config), _kept_of_block(config, sizes, device_type)
    leaving, of_blocks, of_matrices = _gradients_under_way(config, device_type, world_size, matrix)
    saved = layers * block if mode == "none" else one_input * (1 if mode == "block_offload" else layers)
    yield from _forwards_with_teacher(config, device_type, saved)
    for name, parts in _loss(config, device_type):
        yield name, always | {"saved activations": saved} | parts | of_matrices
    for under, at in product(range(min(2, layers)), _backward(sizes, block, device_type)):
        inputs = min(layers - under, 2 if mode == "block_offload" else layers) * one_input
        again = {"saved activations": inputs, "one block's recomputation": at.kept - one_input}
        kept = {"saved activations": (layers - 1 - under) * block + at.kept} if mode == "none" else again
        gradients = {"gradients in flight": at.gradients + matrix * config.tie_embeddings} | (leaving if under else {})
        yield at.name, always | kept | {"one block's backward": at.work, "kernels' own work": at.kernel} | gradients | of_blocks
    last = _embedding_backward(config, sizes, device_type)
    yield "the embedding's backward", always | last | leaving | of_matrices


def _inputs(config: TrainingConfig) -> dict[str, int]:
    """What a micro-batch reads, and the table that its forward makes of its positions."""
    rotary = 4 * config.context_length * config.head_width
    labels = 0 if config.teacher_top_k is None else _label_bytes(config, config.teacher_top_k)
    return {"ids and rotary table": 8 * config.micro_batch_rows * (config.context_length + 1) + rotary, "labels": labels}


def _label_bytes(config: TrainingConfig, top_k: int) -> int:
    """A micro-batch's labels in memory: k int32 and float16, and a float32, a token."""
    return config.micro_batch_rows * config.context_length * (6 * top_k + 4)


def _first_look_at_teacher(config: TrainingConfig, device_type: str) -> Iterator[tuple[str, dict[str, int]]]:
    """The moments of a teacher's held-out loss, before there is anything of the student."""
    teacher = _teacher_beside(config)
    if teacher is None:
        return
    sizes = _sizes(teacher, device_type)
    held = {"teacher": teacher.num_parameters * sizes.storage} | _inputs(teacher)
    yield "the teacher's forward", held | {"teacher's forward": _forward(teacher, device_type)}
    chunk = {"loss chunk": _wide_head(sizes) + sum(_made_and_cast(sizes))}
    yield "the teacher's held-out loss", held | {"teacher's hidden states": _hidden_bytes(sizes)} | chunk


def _labelling(config: TrainingConfig, device_type: str) -> Iterator[tuple[str, dict[str, int]]]:
    """The moments of the teacher alone. With its labels come float32 of what they leave out."""
    teacher, top_k = _teacher(config), config.teacher_top_k
    if teacher is None or top_k is None:
        return
    sizes = _sizes(teacher, device_type)
    held = {"teacher": teacher.num_parameters * sizes.storage} | _inputs(teacher)
    yield "the teacher's forward", held | {"teacher's forward": _forward(teacher, device_type)}
    made = _label_bytes(config, top_k) + 4 * sizes.tokens
    first, then = sum(_made_and_cast(sizes)), 8 * sizes.chunk * sizes.vocabulary + 12 * sizes.chunk * top_k
    chunk = {"loss chunk": _wide_head(sizes) + max(first, then)}
    yield "the labels", held | {"teacher's hidden states": _hidden_bytes(sizes), "labels": made} | chunk


def _forwards_with_teacher(config: TrainingConfig, device_type: str, saved: int) -> Iterator[tuple[str, dict[str, int]]]:
    """The forwards of a teacher on the device and of the student, which the teacher's hidden states outlast."""
    teacher, sizes = _teacher_beside(config), _sizes(config, device_type)
    if teacher is None:
        return
    yield "the teacher's forward", _inputs(teacher) | {"teacher's forward": _forward(teacher, device_type)}
    hidden = {"teacher's hidden states": _hidden_bytes(_sizes(teacher, device_type)), "saved activations": saved}
    last_product = sizes.storage * sizes.tokens * (sizes.mlp + sizes.width)
    is_kept = config.activation_checkpointing == "none"
    block = {"one block's forward": last_product if is_kept else _forward(config, device_type) - _hidden_bytes(sizes)}
    yield "the forward", _inputs(config) | hidden | block


def _hidden_bytes(sizes: _Sizes) -> int:
    return sizes.storage * sizes.tokens * sizes.width


def _wide_head(sizes: _Sizes) -> int:
    """A head in the products' dtype, where that is not its own."""
    return sizes.products * sizes.vocabulary * sizes.width * (sizes.products != sizes.storage)


def _made_and_cast(sizes: _Sizes) -> tuple[int, int]:
    """A chunk's logits as they become float32, and its hidden states in the products' dtype where that is not their own."""
    w, is_cast = sizes.products, sizes.products != sizes.storage
    return sizes.chunk * sizes.vocabulary * (4 + (w if w < 4 else 0)), w * sizes.chunk * sizes.width * is_cast


def _making(config: TrainingConfig, device_type: str) -> int:
    """What lives while a chunk's slope is made: a float32 (C, V), two and some of k with labels, three with a teacher."""
    sizes, teacher = _sizes(config, device_type), _teacher_beside(config)
    logits, (made, _) = 4 * sizes.chunk * sizes.vocabulary, _made_and_cast(sizes)
    if teacher is not None:
        return max(3 * logits, logits + sum(_made_and_cast(_sizes(teacher, device_type))))
    return made if config.teacher_top_k is None else 2 * logits + LABEL_CHUNK_BYTES * sizes.chunk * config.teacher_top_k


def _forward(config: TrainingConfig, device_type: str) -> int:
    """The most that a forward without gradients takes: a block's input, and what its attention or its MLP makes of it."""
    sizes = _sizes(config, device_type)
    s, m, d, q, k = sizes.storage, sizes.tokens, sizes.width, sizes.queries, sizes.keys
    products = s * m * (d + (q + 2 * k) + (q + k if config.qk_norm else 0))
    if device_type == "cpu":
        return max(4 * s * m * d, *_forward_on_host(sizes, products))
    expanded = 0 if config.precision == "bf16" else 2 * q
    turning = max(6 * m * q, s * m * q + 6 * m * k)
    attending = s * m * (2 * q + k + expanded) + 4 * m * sizes.heads
    return max(products + max(turning, attending), 3 * s * m * (d + sizes.mlp), 4 * s * m * d)


def _forward_on_host(sizes: _Sizes, products: int) -> Iterator[int]:
    """The moments of a block: q, k and v, attention in float32, its last product, the MLP's first products and its last."""
    s, w, m, r, d, f = sizes.storage, sizes.products, sizes.tokens, sizes.rows, sizes.width, sizes.mlp
    q, k, cast = sizes.queries, sizes.keys, w * (w != s)
    yield s * m * (d + q + 2 * k) + cast * d * (q + 2 * k) + _normed_rows(sizes, q)
    yield products + 4 * m * (4 * q + k + sizes.heads) + s * m * (2 * q + k) * (s < 4)
    yield products + s * m * q + cast * (m * q + d * q) + 4 * m * d + s * m * d * (s < 4)
    yield s * m * 2 * (d + f) + cast * 2 * d * f + _normed_rows(sizes, f)
    yield s * m * (3 * d + 2 * f) + cast * d * f + r * (4 * f + max(4 * f * (s < 4), w * d))


def _normed_rows(sizes: _Sizes, widest: int) -> int:
    """Some rows on their way through a norm and a product, where the last ones live until there are the next."""
    rows = 4 * sizes.rows * sizes.width
    return max(rows * (2 + (sizes.storage < 4) + (sizes.tokens > sizes.rows)), rows + sizes.products * sizes.rows * widest)


def _gradients_under_way(config: TrainingConfig, device_type: str, world_size: int, matrix: int) -> tuple[dict[str, int], ...]:
    """Gradients that go down from a GPU, and DeepSpeed's copies of a bucket and of a matrix beyond it, on several ranks."""
    is_summed = config.accumulate_on == "gpu" and config.accumulation_steps(world_size) > 1
    bucket, several = config.bucket_elements * config.dtype.itemsize, world_size > 1
    leaving = 0 if device_type == "cpu" or is_summed or several else bucket
    kind = "gradients being reduced by DeepSpeed"
    return {"gradients on their way down": leaving}, {kind: bucket * several}, {kind: 2 * matrix * several}


def _sizes(config: TrainingConfig, device_type: str) -> _Sizes:
    tokens = config.micro_batch_rows * config.context_length
    return _Sizes(
        storage=config.dtype.itemsize,
        products=product_dtype(config.dtype, torch.device(device_type)).itemsize,
        tokens=tokens,
        rows=min(tokens, HOST_CHUNK_ROWS),
        chunk=min(tokens, config.loss_chunk_rows),
        width=config.hidden_size,
        queries=config.num_heads * config.head_width,
        keys=config.num_kv_heads * config.head_width,
        heads=config.num_heads,
        sequences=config.micro_batch_rows,
        mlp=config.mlp_size,
        vocabulary=config.vocab_size,
    )


def _kept_of_block(config: TrainingConfig, sizes: _Sizes, device_type: str) -> int:
    """Bytes that a block keeps for its backward: its input and middle, q, k, v and their mixture, gate and up; what qk_norm
    reads; float32 sums. Without flash attention, which cards older than Ampere and float32 lack, k and v for every head.
    """
    wide = 2 * (sizes.width + sizes.queries + sizes.keys + sizes.mlp)
    wide += 2 * (sizes.queries - sizes.keys) * (device_type == "cuda" and config.precision != "bf16")
    normed = sizes.storage * (sizes.queries + sizes.keys) + 4 * (config.num_heads + config.num_kv_heads)
    return sizes.tokens * (wide * sizes.storage + 4 * sizes.heads + (normed if config.qk_norm else 0))


def _loss(config: TrainingConfig, device_type: str) -> Iterator[tuple[str, dict[str, int]]]:
    """The loss, when a chunk's slope is made or multiplied, and its backward; hidden and what the last norm keeps beside it."""
    sizes, teacher = _sizes(config, device_type), _teacher_beside(config)
    s, w, matrix = sizes.storage, sizes.products, sizes.vocabulary * sizes.width
    is_split, is_cast = sizes.chunk < sizes.tokens, w != s
    last = sizes.tokens * (s * sizes.width + 4)
    hidden = 2 * _hidden_bytes(sizes) + 16 * sizes.tokens
    logits = sizes.chunk * sizes.vocabulary
    multiplying = w * (logits + max(sizes.chunk * sizes.width, min(matrix, logits) if is_split else matrix))
    chunk = hidden + _made_and_cast(sizes)[1] + _wide_head(sizes) + max(_making(config, device_type), multiplying)
    parts = {"last norm's activations": last, "gradients in flight": 4 * matrix * is_split, "loss chunk": chunk}
    if teacher is not None:
        theirs = _sizes(teacher, device_type)
        parts |= {"teacher's hidden states": _hidden_bytes(theirs), "loss chunk": chunk + _wide_head(theirs)}
    yield "the loss", parts
    total = matrix * ((4 if is_split else w) + s * (is_split and s < 4 or is_cast))
    yield "the loss's backward", {"last norm's activations": last, "loss chunk": hidden // 2, "gradients in flight": total}


def _backward(sizes: _Sizes, block: int, device_type: str) -> Iterator[_Backward]:
    """The moments of a block's backward in their order: its activations go as they are used up."""
    gates = 2 * sizes.storage * sizes.tokens * sizes.mlp
    middle = sizes.storage * sizes.tokens * sizes.width
    gated, gate_and_up, attention = (_work_on_gpu if device_type == "cuda" else _work_on_host)(sizes)
    yield _Backward("the backward of an MLP's last product", block, *gated)
    yield _Backward("the backward of an MLP's first products", block - gates, *gate_and_up)
    yield _Backward("the backward of attention", block - gates - middle, *attention)


def _work_on_gpu(sizes: _Sizes) -> Iterator[tuple[int, int, int]]:
    """Whole-row products in the storage dtype. Flash attention's deterministic backward adds up one float32 slope of q for each
    share of the processors, and k's and v's for every head (Dao 2023; its code in torch).
    """
    s, m, d, f = sizes.storage, sizes.tokens, sizes.width, sizes.mlp
    slope = s * m * d
    yield slope + 2 * s * m * f, s * d * f, 0
    yield slope + 2 * s * m * f + 2 * s * m * d, 2 * s * d * f, 0
    shares = -(-MULTIPROCESSORS // (sizes.sequences * sizes.heads))
    expanded = 2 * s * m * sizes.queries * (sizes.keys < sizes.queries)
    kernel = shares * 4 * m * sizes.queries + expanded + 4 * m * sizes.heads
    yield slope + s * m * (2 * sizes.queries + 2 * sizes.keys), s * d * sizes.queries, kernel


def _work_on_host(sizes: _Sizes) -> Iterator[tuple[int, int, int]]:
    """Some rows at a time, where a variable's last value lives until it has the next, and float32 sums of weights' gradients;
    weights and slopes are cast where products are wider than storage.
    """
    s, w, m, r, d, f = sizes.storage, sizes.products, sizes.tokens, sizes.rows, sizes.width, sizes.mlp
    last, cast, copied = m > r, w * (w != s), 4 * (s < 4)
    slope, gates, matrix = s * m * d, 2 * s * m * f, d * f
    read, made = r * (2 * copied * f + cast * d), r * 8 * f
    piece = max(read * (1 + last) + made * last, read + made * (1 + last), read + made + 4 * r * f + w * matrix)
    yield slope + gates + cast * matrix + piece, 4 * matrix, 0
    rows, slopes = 4 * r * d, r * cast * f
    piece = max(
        rows * (3 + 3 * last) + slopes * last, rows * 4 + slopes * (1 + last) + w * matrix, rows * 3 + slopes + copied * matrix
    )
    yield 2 * slope + gates + 2 * cast * matrix + piece, 8 * matrix, 0
    mixed = 4 * m * sizes.queries
    yield slope + s * m * sizes.queries + 5 * mixed + max(3 * (s < 4) * mixed, 8 * m * sizes.keys), 0, 0


def _embedding_backward(config: TrainingConfig, sizes: _Sizes, device_type: str) -> dict[str, int]:
    """torch's own on a GPU, sorted, with float32 sums of a few rows each; on the host a float32 sum of the whole table. A tied
    table's gradient is the sum of this one and the head's.
    """
    table, slope = sizes.vocabulary * sizes.width, sizes.tokens * sizes.width
    tied = sizes.storage * table * config.tie_embeddings
    if device_type == "cuda":
        gradients, kernel = sizes.storage * table, 4 * sizes.width * (sizes.tokens // 10 + min(sizes.tokens, sizes.vocabulary))
    else:
        gradients, kernel = 4 * table + max(4 * slope, sizes.storage * table) * (sizes.storage < 4), 0
    flying = {"gradients in flight": max(gradients + tied, 3 * tied), "kernels' own work": kernel}
    return flying | {"one block's backward": sizes.storage * slope}


def _host_moments(config: TrainingConfig, world_size: int, device_type: str, phase: str) -> Iterator[Moment]:
    """What one rank holds of host memory beside the device's share."""
    own, size = -(-config.num_parameters // world_size), config.dtype.itemsize
    staging = _page_locked(2 * size * -(-max(_group_elements(config)) // world_size), device_type)
    parts = {"the program": PROGRAM_BYTES[device_type], "the data": DATA_BYTES, **_host_labels(config, phase)}
    if config.offload_optimizer and phase != TEACHER_ALONE:
        parts |= {"master weights": 4 * own, "gradients": 4 * own}
        first = {"DeepSpeed's staging, until it is replaced": size * (own + _largest_matrix(config)) + staging}
        parts |= first if phase == "initialisation" else {"Adam's moments": 8 * own, "staging": staging}
    if phase in ("save and load", TEACHER_ALONE):
        parts["pieces of files"] = PIECES_BYTES
    if phase == "training step" and config.activation_checkpointing == "block_offload":
        one_input = size * config.micro_batch_rows * config.context_length * config.hidden_size
        parts["offloaded activations"] = (config.num_layers - 1) * _page_locked(one_input, device_type)
    yield Moment(HOST_MOMENTS[phase], {kind: num_bytes for kind, num_bytes in parts.items() if num_bytes})


def _host_labels(config: TrainingConfig, phase: str) -> dict[str, int]:
    """A micro-batch's labels on their way from the device to a file or back, and the numbers of the windows to be labelled."""
    if config.teacher_top_k is None or phase not in (TEACHER_ALONE, "training step"):
        return {}
    numbers = WINDOW_BYTES * config.num_steps * config.rows_per_step * (phase == TEACHER_ALONE)
    copies = LABEL_COPIES * _label_bytes(config, config.teacher_top_k)
    return {"labels under way": copies, "numbers of windows": numbers}


def _page_locked(num_bytes: int, device_type: str) -> int:
    """torch rounds page-locked memory up to a power of two before 2.13, where scripts/trainer.py tells it not to."""
    is_exact = device_type == "cpu" or tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)
    return num_bytes if is_exact else 1 << (num_bytes - 1).bit_length()


def _disk(config: TrainingConfig) -> dict[str, int]:
    """Bytes on the disk that are known: the tokens that the run reads and the checkpoints; metrics and pictures are small."""
    token, num_tokens = 2 if config.vocab_size <= 2**16 else 4, config.num_steps * config.tokens_per_step
    record = 0 if config.teacher_top_k is None else (token + 2) * config.teacher_top_k + 4
    checkpoint = config.num_parameters * (config.dtype.itemsize + 12)
    saves = config.save_every_steps is not None
    return {
        "shards of the tokens it reads": num_tokens * token,
        "the teacher's labels": num_tokens * record,
        "checkpoints": config.keep_checkpoints * checkpoint * saves,
        "the checkpoint being written": checkpoint * saves,
    }


def _disk_usage(config: TrainingConfig):
    folder = Path(config.run_dir).absolute()
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists()))


def _kilobytes(path: str) -> dict[str, int]:
    """The lines `name: number kB` of a file of /proc, in bytes."""
    lines = (line.replace(":", " ").split() for line in Path(path).read_text().splitlines())
    return {words[0]: int(words[1]) * 1024 for words in lines if words[-1:] == ["kB"]}


def _group_limits() -> Iterator[tuple[int, int]]:
    """(limit, used) of each memory control group around this process that has a limit, of version 1 and 2."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        number, names, place = line.split(":", 2)
        if "memory" in names.split(","):
            yield from _limits_above("/sys/fs/cgroup/memory", place, ("memory.limit_in_bytes", "memory.usage_in_bytes"))
        elif number == "0":
            yield from _limits_above("/sys/fs/cgroup", place, ("memory.max", "memory.current"))


def _limits_above(root: str, place: str, names: tuple[str, str]) -> Iterator[tuple[int, int]]:
    """Of the group at `place` and those above it, up to the root, where a container sees its own; file pages do not count."""
    inner = Path(place.lstrip("/"))
    for folder in {Path(root, inner), *(Path(root, above) for above in inner.parents)}:
        limit, used, table = (_text(folder / name) for name in (*names, "memory.stat"))
        if limit.isdecimal() and used.isdecimal() and int(limit) < LARGEST_LIMIT:
            counts = dict(line.split() for line in table.splitlines())
            pages = int(counts.get("total_inactive_file", counts.get("inactive_file", "0")))
            yield int(limit), int(used) - pages


def _text(path: Path) -> str:
    return path.read_text().strip() if path.is_file() else ""


def _room_of(kind: str, room: Room) -> int:
    return room.host if kind == HOST else room.gpu or 0


def _fits(config: TrainingConfig, world_size: int, local_size: int, room: Room, device_type: str) -> bool:
    wanted = needs(plan(config, world_size, device_type), local_size)
    return all(moment.total <= _room_of(kind, room) for kind, (_, moment) in wanted.items())


def _somewhat_less(at: Moment) -> int:
    return at.total - int((1 - LESS) * sum(size for kind, size in at.parts.items() if kind not in FIXED))


def _advice(config: TrainingConfig, world_size: int, local_size: int, room: Room, device_type: str) -> str:
    found = offers(config, world_size, local_size, room, device_type)
    if found:
        return f"what fits: {', or '.join(as_written(changes) for changes in found)}"
    changes = _all_last(_ladders(config, world_size, device_type)[:-1])
    least = replace(config, **changes)
    reached = needs(plan(least, world_size, device_type), local_size)
    words = " and ".join(f"{gib(moment.total)} of {kind}" for kind, (_, moment) in reached.items())
    layers = bisect_left(
        range(1, config.num_layers),
        True,
        key=lambda n: not _fits(replace(least, num_layers=n), world_size, local_size, room, device_type),
    )
    is_teacher = any(largest_item(moment)[0] == "teacher" for _, moment in reached.values())
    smaller = f"num_layers={layers} with that fits" if layers else f"choose a smaller {'teacher' if is_teacher else 'model'}"
    return f"with {as_written(changes)} it still needs {words}; {smaller}"


def _ladders(config: TrainingConfig, world_size: int, device_type: str) -> list[list[dict]]:
    """For each field that saves memory the values beyond the present one, the nearest first, each with what it obliges to."""
    halves = [config.context_length // 2**n for n in range(1, 16) if config.context_length % 2**n == 0]
    chunk = min(config.loss_chunk_rows, config.micro_batch_rows * config.context_length)
    rows = [n for n in range(config.micro_batch_rows - 1, 0, -1) if config.rows_per_step % (n * world_size) == 0]
    later = ACTIVATION_CHECKPOINTING[ACTIVATION_CHECKPOINTING.index(config.activation_checkpointing) + 1 :]
    ladders = [
        [{"micro_batch_rows": n} for n in rows],
        [{"activation_checkpointing": value} for value in later if value != "block_offload" or device_type == "cuda"],
        [{"loss_chunk_rows": chunk // 2**n} for n in range(1, 16) if chunk // 2**n >= FEWEST_CHUNK_ROWS],
        _ladder_of_places(config),
        [{"precision": "bf16"}] if config.precision == "fp32" else [],
        _ladder_of_teacher(config),
        [{"context_length": length} for length in halves if length >= SHORTEST_CONTEXT],
    ]
    return [ladder for ladder in ladders if ladder]


def _ladder_of_places(config: TrainingConfig) -> list[dict]:
    """Where the optimizer and the gradients are: from the GPU towards the host."""
    ladder = []
    if config.accumulation_precision == "fp32" and config.accumulate_on == "gpu" and config.precision == "bf16":
        ladder.append({"accumulation_precision": "bf16"})
    if config.accumulate_on == "gpu":
        offload = {} if config.offload_optimizer else {"offload_optimizer": True}
        ladder.append(offload | {"accumulate_on": "cpu", "accumulation_precision": "fp32"})
    return ladder


def _ladder_of_teacher(config: TrainingConfig) -> list[dict]:
    """A teacher that is beside the student: its labels in its place."""
    is_beside = config.teacher_dir is not None and config.teacher_top_k is None
    return [{"teacher_top_k": TEACHER_TOP_K}] if is_beside and config.vocab_size > TEACHER_TOP_K else []


def _all_last(ladders: list[list[dict]]) -> dict:
    return {name: value for ladder in ladders for name, value in ladder[-1].items()}


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Of one call, the fastest of several that take LEAST_SECONDS together, after one that is not counted."""

    def once() -> float:
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    once()
    began, taken = time.perf_counter(), [once()]
    while time.perf_counter() - began < LEAST_SECONDS:
        taken.append(once())
    return min(taken)


def _kinds(title: str, moments: dict[str, Moment]) -> list[str]:
    kinds = dict.fromkeys(kind for at in moments.values() for kind in at.parts)
    rows = [_row(f"  {kind}", [at.parts.get(kind, 0) for at in moments.values()]) for kind in kinds]
    return [title, *rows, _row("  together", [at.total for at in moments.values()])]


def _row(name: str, sizes: list[int]) -> str:
    return f"{name:<{NAME_COLUMNS}}" + "".join(f"{gib(size) if size else '':>{NUMBER_COLUMNS}}" for size in sizes)


def _verdict(kind: str, needed: int, free: int, why: str) -> str:
    return f"{kind}: {gib(needed)} needed ({why}), {gib(free)} free: {'it fits' if needed <= free else 'IT DOES NOT FIT'}"


def _why(phase: str, at: Moment) -> str:
    item, size = largest_item(at)
    return f"{phase}, {gib(size)} of it {item}"


def _time_words(config: TrainingConfig, world_size: int, local_size: int, device_type: str, rates: Rates) -> str:
    per_second = tokens_per_second(config, world_size, local_size, device_type, rates)
    first = teacher_seconds(config, world_size, rates)
    duration, before = (_duration(each) for each in (hours(config, per_second, first), first / 3600))
    alone = f", {before} of it the teacher alone," if first else ""
    return f"about {duration}{alone} for {config.num_steps:,} steps at {per_second:,.0f} tokens/s"


def _duration(num_hours: float) -> str:
    return f"{num_hours:,.1f} hours" if num_hours >= 2 else f"{num_hours * 60:,.1f} minutes"


if __name__ == "__main__":
    main()
