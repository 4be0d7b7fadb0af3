"""What fits: the plan against what there is, refusals, offers, words and the tables of `python scripts/memory.py`."""

import errno
import json
import math
import sys
from bisect import bisect_left
from dataclasses import asdict, replace
from itertools import combinations, product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from scripts import config as settings
from scripts.config import ACTIVATION_CHECKPOINTING, GIB, MIB, TrainingConfig
from scripts.plan.budget import BYTES_A_TOKEN, SOLD_CARDS, TOKENS_A_PARAMETER, WIDTHS, Offer, largest_runs
from scripts.plan.footprint import Moment, Plan, phases, plan
from scripts.plan.machine import (
    KERNEL_FILE,
    Peaks,
    Rates,
    Room,
    hours,
    is_wsl,
    measure_rates,
    room_free,
    teacher_seconds,
    tokens_per_second,
    usable_card,
)

GPU = "GPU memory"
HOST = "host memory"
OUTSIDE_TORCH = ("CUDA and its libraries", "NCCL's communicators", "allocator's slack")
FIXED = ("CUDA and its libraries", "NCCL's communicators", "the program", "the data")
OUT_OF_MEMORY_WORDS = ("can't allocate memory", "DefaultCPUAllocator", "out of memory", "ALLOC_FAILED", "bad_alloc")
DRIVER_OUT_OF_MEMORY_WORDS = "CUDA error: out of memory"
NAME_COLUMNS = 44
NUMBER_COLUMNS = 17
Changes = dict[str, Any]


class Need(NamedTuple):
    """The moment at which most of one kind of memory is needed, and its phase."""

    phase: str
    moment: Moment


class _Launch(NamedTuple):
    """A launch of `world_size` ranks, `local_size` of them on this machine, and the room that there is for those."""

    world_size: int
    local_size: int
    room: Room
    device_type: str

    def needs(self, config: TrainingConfig) -> dict[str, Need]:
        return needs(plan(config, self.world_size, self.device_type), self.local_size)

    def fits(self, config: TrainingConfig) -> bool:
        return all(need.moment.total <= _room_of(kind, self.room) for kind, need in self.needs(config).items())

    def fits_disk(self, config: TrainingConfig) -> bool:
        disk = sum(plan(config, self.world_size, self.device_type).disk.values())
        return self.fits(config) and disk <= self.room.disk


def needs(planned: Plan, local_size: int) -> dict[str, Need]:
    """When most of each kind of memory is needed: of the GPU by one rank, of the host by `local_size` ranks together.

    Without a GPU the device's bytes lie on the host, and there is one kind.
    """
    found, on_host = {GPU: _largest(planned.device)}, planned.host
    if planned.device_type != "cuda":
        found, on_host = {}, {name: Moment(at.name, at.parts | on_host[name].parts) for name, at in planned.device.items()}
    phase, most = _largest(on_host)
    return found | {HOST: Need(phase, Moment(most.name, {kind: size * local_size for kind, size in most.parts.items()}))}


def allocated_bytes(planned: Plan) -> int:
    """The device's peak as torch.cuda.max_memory_allocated counts it: without CUDA's own memory and the allocator's slack."""
    moments = planned.device.values()
    return max(sum(size for kind, size in at.parts.items() if kind not in OUTSIDE_TORCH) for at in moments)


def refuse_too_large(config: TrainingConfig, world_size: int, local_size: int, room: Room, device_type: str) -> None:
    """Refuses a run that would not fit in `room`, before anything of it is loaded.

    Raises:
        ValueError: a peak is above what there is; the line names it, its largest item and up to three configurations that fit.
    """
    launch = _Launch(world_size, local_size, room, device_type)
    for kind, (phase, at) in launch.needs(config).items():
        if at.total > _room_of(kind, room):
            item, ranks = _largest_kind(at), f" for {local_size} ranks" if kind == HOST and local_size > 1 else ""
            raise ValueError(
                f"{phase} ({at.name}) needs {gib(at.total)} of {kind}{ranks} and {gib(_room_of(kind, room))} are {room.which};"
                f" the largest item is {item}, {gib(at.parts[item])}; {_advice(config, launch)}"
            )


def offers(config: TrainingConfig, world_size: int, local_size: int, room: Room, device_type: str) -> list[Changes]:
    """At most NUM_OFFERS changes of `config` with which its plan fits in `room`, the smallest first.

    Each changes one field. Where no single field is enough, each changes two, or all that save memory.
    """
    launch = _Launch(world_size, local_size, room, device_type)

    def fits(changes: Changes) -> bool:
        return launch.fits(replace(config, **changes))

    savings = _savings(config, launch)
    found = [changes for field in savings if (changes := next(filter(fits, field), None))]
    for first, second in combinations(savings, 2) if not found else ():
        nearest = sorted(product(range(len(first)), range(len(second))), key=sum)
        both = next(filter(fits, (first[one] | second[other] for one, other in nearest)), None)
        found += [both] if both else []
    return (found or [changes for changes in [_greatest(savings)] if changes and fits(changes)])[: settings.NUM_OFFERS]


def short_words(config: TrainingConfig, world_size: int, local_size: int, device: torch.device, rates: Rates) -> str:
    """The plan in one line: each kind of memory against what is free, its largest item, and the hours to expect."""
    launch = _Launch(world_size, local_size, room_free(config, device), device.type)
    wanted, room = launch.needs(config).items(), launch.room
    words = [f"{gib(need.moment.total)} of {gib(_room_of(kind, room))} free {kind} ({_why(need)})" for kind, need in wanted]
    return f"The plan: {', '.join(words)}, {time_words(config, world_size, local_size, device.type, rates)}"


def comparison(planned: Plan, peaks: Peaks) -> dict[str, float]:
    """One rank's planned and measured peaks in GiB, as metrics.jsonl holds them; the GPU's as torch's allocator counts."""
    host = needs(planned, 1)[HOST].moment.total
    gpu = {"gpu_planned_gib": allocated_bytes(planned) / GIB, "gpu_peak_gib": peaks.gpu_bytes / GIB}
    on_host = {"host_planned_gib": host / GIB, "host_peak_gib": peaks.host_bytes / GIB}
    return gpu | on_host if planned.device_type == "cuda" else on_host


def comparison_words(record: dict) -> str:
    """A record that `comparison` made, for a person."""
    return ", ".join(
        f"{kind}: {gib(record[f'{name}_planned_gib'] * GIB)} planned, {gib(record[f'{name}_peak_gib'] * GIB)} measured"
        for name, kind in (("gpu", GPU), ("host", HOST))
        if f"{name}_planned_gib" in record
    )


def is_out_of_memory(fault: BaseException) -> bool:
    """Whether the GPU or the host had no memory left; torch raises RuntimeError for it and says so in its message."""
    if isinstance(fault, OSError):
        return fault.errno == errno.ENOMEM
    in_words = isinstance(fault, RuntimeError) and any(words in str(fault) for words in OUT_OF_MEMORY_WORDS)
    return in_words or isinstance(fault, MemoryError)


def out_of_memory_words(config: TrainingConfig, world_size: int, local_size: int, device_type: str, peaks: Peaks) -> str:
    """The plan beside the measured peaks of a run that was to fit, and changes that need OFFERED_MEMORY_SHARE of the plan."""
    planned = plan(config, world_size, device_type)
    wanted = {kind: _somewhat_less(need.moment) for kind, need in needs(planned, local_size).items()}
    found = offers(config, world_size, local_size, Room(wanted.get(GPU), wanted[HOST], 0, "planned"), device_type)
    advice = f"less is needed with {_listed(found)}" if found else "choose a smaller model"
    return f"{comparison_words(comparison(planned, peaks))}; {advice}"


def driver_words(fault: str, config: TrainingConfig) -> str:
    """What to do besides where CUDA itself had no memory left, and not torch's allocator, which names what it tried."""
    if DRIVER_OUT_OF_MEMORY_WORDS not in fault:
        return ""
    words = "; CUDA itself had no memory: another program may fill the GPU (nvidia-smi lists them)"
    if is_wsl(Path(KERNEL_FILE).read_text()):
        words += ", or WSL2 page-locks no more host memory, 0.5 to 1 GiB in all"
    if config.activation_checkpointing == "block_offload":
        words += '; activation_checkpointing="block" page-locks less'
    return words


def pageable_words(pageable_bytes: int, wanted_bytes: int) -> str:
    """What a person is told where the machine does not page-lock all that copies between host and GPU pass through."""
    return (
        f"Of {gib(wanted_bytes)} of host memory that copies to and from the GPU pass through, {gib(pageable_bytes)} cannot be"
        " page-locked on this machine (WSL2 allows 0.5 to 1 GiB). Results are the same, but the host waits for each of those"
        " copies, which are slower than others"
    )


def as_written(changes: Changes) -> str:
    """Changes as they are written in scripts/config.py."""
    return " and ".join(f"{name}={json.dumps(value) if isinstance(value, str) else value}" for name, value in changes.items())


def gib(num_bytes: float) -> str:
    """Bytes as a person reads them: in GiB, or in MiB below a tenth of one."""
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB / 10 else f"{num_bytes / MIB:.1f} MiB"


def table(name: str, config: TrainingConfig, num_ranks: int, device: torch.device) -> str:
    """The plan of one preset on this machine, as a person reads it: kinds by phases, what is free, the hours to expect."""
    planned, room = plan(config, num_ranks, device.type), room_free(config, device)
    wanted = needs(planned, num_ranks).items()
    verdicts = [_verdict(kind, need.moment.total, _room_of(kind, room), _why(need)) for kind, need in wanted]
    millions = config.num_parameters / 1e6
    size = f"{millions:,.1f} million" if config.num_parameters < 1e9 else f"{config.num_parameters / 1e9:,.2f} billion"
    ranks = "1 rank" if num_ranks == 1 else f"{num_ranks} ranks, each"
    rising = "" if config.first_tokens_per_step is None else f"{config.first_tokens_per_step:,} to "
    lines = [f"{name}: {size} parameters, {rising}{config.tokens_per_step:,} tokens a step, {ranks}", ""]
    lines += [" " * NAME_COLUMNS + "".join(f"{phase:>{NUMBER_COLUMNS}}" for phase in phases(config))]
    lines += _kinds(GPU if device.type == "cuda" else "what a GPU would hold, in host memory", planned.device)
    lines += _kinds(HOST, planned.host)
    lines += ["disk", *(_row(f"  {kind}", [num_bytes]) for kind, num_bytes in planned.disk.items() if num_bytes)]
    lines += ["", *verdicts, _verdict("disk", sum(planned.disk.values()), room.disk, "at the end")]
    lines += [
        f"preparing the data takes {gib(settings.SHARD_WORKER_BYTES)} of host memory for each of its processes, before all this"
    ]
    return "\n".join([*lines, time_words(config, num_ranks, num_ranks, device.type, measure_rates(config, device)), ""])


def time_words(config: TrainingConfig, world_size: int, local_size: int, device_type: str, rates: Rates) -> str:
    """How long a run takes on its ranks, at what speed, and how much of it the teacher alone takes."""
    per_second = tokens_per_second(config, world_size, local_size, device_type, rates)
    first = teacher_seconds(config, world_size, rates)
    whole, before = (duration(each) for each in (hours(config, per_second, first), first / 3600))
    alone = f", {before} of it the teacher alone," if first else ""
    return f"about {whole}{alone} for {config.num_steps:,} steps at {per_second:,.0f} tokens/s"


def duration(num_hours: float) -> str:
    """Hours for a person, minutes or seconds where there are few."""
    if num_hours >= 2:
        return f"{num_hours:,.1f} hours"
    return f"{num_hours * 60:,.1f} minutes" if num_hours >= 1 / 30 else f"{num_hours * 3600:,.0f} seconds"


def main() -> None:
    """Prints the plans of PRETRAIN and DISTILL for this machine; of DISTILL what is wrong, where its teacher is not there. Then
    what to train here, and without a GPU what each preset's card would do.
    """
    with settings.refusing():
        settings.refuse_arguments(sys.argv[1:])
        device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        usable_card(device)
        for name, config in {"PRETRAIN": settings.PRETRAIN, "DISTILL": settings.DISTILL}.items():
            ranks = max(1, torch.cuda.device_count())
            while config.rows_of_step(0) % (config.micro_batch_rows * ranks):
                ranks -= 1
            try:
                print(table(name, config, ranks, device))
            except ValueError as refusal:
                if config is settings.PRETRAIN:
                    raise
                print(f"{name}: {refusal}\n")
        print(offer_table(settings.PRETRAIN, max(1, torch.cuda.device_count()), device))
        if device.type == "cpu":
            print(presets_table())


def offer_table(base: TrainingConfig, world_size: int, device: torch.device) -> str:
    """What to train on this machine, a row for each of BUDGET_HOURS, and each row as it is pasted into scripts/config.py."""
    card = usable_card(device)
    if card is not None and base.precision == "bf16" and card.major < 8:
        base = replace(base, precision="fp16")
    free, share = room_free(base, device), settings.OFFERED_MEMORY_SHARE
    room = Room(free.gpu and int(share * free.gpu), int(share * free.host), int(share * free.disk), free.which)
    launch = _Launch(world_size, world_size, room, device.type)
    found = largest_runs(base, world_size, device, launch.fits_disk)
    lines = [
        f"What to train on this machine: the largest model that fits and has seen {TOKENS_A_PARAMETER} tokens a parameter",
        "(Hoffmann et al. 2022) in the time, at the measured rates. Batch and learning rate: DeepSeek LLM's (Bi et al. 2024).",
        "",
        f"{'':<10}{'parameters':>11}{'tokens':>9}{'text':>9}{'tokens/s':>10}{'GPU':>10}{'host':>10}{'rate':>9}{'batch':>10}{'hours':>7}",
    ]
    lines += [f"{name:<10}{_offer_words(offer, world_size, device.type)}" for name, offer in found.items()]
    lines += ["", "Paste one at the end of scripts/config.py and launch it as it is. With your own text, add corpus=(...).", ""]
    return "\n".join([*lines, *(pasted(name, offer.config) for name, offer in found.items() if offer)])


def pasted(name: str, config: TrainingConfig) -> str:
    """A configuration as a person pastes it at the end of scripts/config.py; it names its own folders."""
    folder = name.replace(" ", "-")
    own = asdict(replace(config, run_dir=f"runs/{folder}", data_dir=f"data/{folder}"))
    changes = {field: value for field, value in own.items() if value != getattr(settings.PRETRAIN, field)}
    written = [f"    {as_written({field: value})}," for field, value in changes.items()]
    return "\n".join([f"# {name}", "PRETRAIN = replace(", "    PRETRAIN,", *written, ")", ""])


def presets_table() -> str:
    """What each preset would do on a card that is sold, from data sheets."""
    lines = [
        "No GPU is here. What the presets of scripts/config.py would do on such cards: planned from data sheets, not measured.",
        "",
    ]
    lines += [f"{'':<10}{'':<17}{'parameters':>11}{'tokens/s':>10}{'GPU':>10}{'host':>10}{'days':>7}"]
    for name, (card, rates) in SOLD_CARDS.items():
        config = getattr(settings, name)
        per_second = tokens_per_second(config, 1, 1, "cuda", rates)
        wanted = needs(plan(config, 1, "cuda"), 1)
        sizes = "".join(f"{gib(wanted[kind].moment.total):>10}" for kind in (GPU, HOST))
        days = hours(config, per_second, 0) / 24
        lines += [f"{name:<10}{card:<17}{_count(config.num_parameters):>11}{per_second:>10,.0f}{sizes}{days:>7,.0f}"]
    return "\n".join([*lines, ""])


def _offer_words(offer: Offer | None, world_size: int, device_type: str) -> str:
    if offer is None:
        return f"  no model of width {WIDTHS[0]} or more fits and gets so far"
    config, wanted = offer.config, needs(plan(offer.config, world_size, device_type), world_size)
    gpu, host = (gib(wanted[kind].moment.total) if kind in wanted else "-" for kind in (GPU, HOST))
    counts = (
        f"{_count(config.num_parameters):>11}{_count(config.num_tokens):>9}{_count(BYTES_A_TOKEN * config.num_tokens) + 'B':>9}"
    )
    speed = f"{offer.tokens_per_second:>10,.0f}{gpu:>10}{host:>10}"
    return f"{counts}{speed}{config.learning_rate:>9.1e}{config.tokens_per_step:>10,}{offer.hours:>7,.1f}"


def _count(number: float) -> str:
    """A count as a person reads it: 4.2 M."""
    exponent = min(3, int(math.log10(max(number, 1)) // 3))
    return f"{number / 1000**exponent:,.3g} {' KMG'[exponent]}".strip()


def _room_of(kind: str, room: Room) -> int:
    return room.host if kind == HOST else room.gpu or 0


def _largest(moments: dict[str, Moment]) -> Need:
    return max((Need(*item) for item in moments.items()), key=lambda need: need.moment.total)


def _largest_kind(at: Moment) -> str:
    return max(at.parts, key=at.parts.__getitem__)


def _somewhat_less(at: Moment) -> int:
    reducible = sum(size for kind, size in at.parts.items() if kind not in FIXED)
    return at.total - int((1 - settings.OFFERED_MEMORY_SHARE) * reducible)


def _listed(found: list[Changes]) -> str:
    return ", or ".join(as_written(changes) for changes in found)


def _advice(config: TrainingConfig, launch: _Launch) -> str:
    found = offers(config, *launch)
    if found:
        return f"what fits: {_listed(found)}"
    changes = _greatest(_savings(config, launch)[:-1])
    least = replace(config, **changes)
    reached, numbers = launch.needs(least), range(1, config.num_layers)
    words = " and ".join(f"{gib(need.moment.total)} of {kind}" for kind, need in reached.items())
    layers = bisect_left(numbers, True, key=lambda number: not launch.fits(replace(least, num_layers=number)))
    is_teacher = any(_largest_kind(need.moment) == "teacher" for need in reached.values())
    smaller = f"num_layers={layers} with that fits" if layers else f"choose a smaller {'teacher' if is_teacher else 'model'}"
    return f"with {as_written(changes)} it still needs {words}; {smaller}"


def _savings(config: TrainingConfig, launch: _Launch) -> list[list[Changes]]:
    """For each field the changes that save memory, the smallest first, with the changes of other fields that they need."""
    halves = [config.context_length // 2**n for n in range(1, 16) if config.context_length % 2**n == 0]
    chunk = min(config.loss_chunk_rows, config.micro_batch_rows * config.context_length)
    rows = [n for n in range(config.micro_batch_rows - 1, 0, -1) if config.rows_of_step(0) % (n * launch.world_size) == 0]
    later = ACTIVATION_CHECKPOINTING[ACTIVATION_CHECKPOINTING.index(config.activation_checkpointing) + 1 :]
    top_k = settings.OFFERED_TEACHER_TOP_K
    is_beside = config.teacher_dir is not None and config.teacher_top_k is None
    savings = [
        [{"micro_batch_rows": n} for n in rows],
        [{"activation_checkpointing": mode} for mode in later if mode != "block_offload" or launch.device_type == "cuda"],
        [{"loss_chunk_rows": chunk // 2**n} for n in range(1, 16) if chunk // 2**n >= settings.FEWEST_OFFERED_CHUNK_ROWS],
        _offloading(config),
        [{"precision": "bf16"}] if config.precision == "fp32" else [],
        [{"teacher_top_k": top_k}] if is_beside and config.vocab_size > top_k else [],
        [{"context_length": length} for length in halves if length >= settings.SHORTEST_OFFERED_CONTEXT],
    ]
    return [changes for changes in savings if changes]


def _offloading(config: TrainingConfig) -> list[Changes]:
    """Gradients in fewer bytes, then gradients and the optimizer on the host."""
    if config.accumulate_on == "cpu":
        return []
    offload = {} if config.offload_optimizer else {"offload_optimizer": True}
    down = offload | {"accumulate_on": "cpu", "accumulation_precision": "fp32"}
    can_round = config.accumulation_precision == "fp32" and config.precision == "bf16"
    return [{"accumulation_precision": "bf16"}, down] if can_round else [down]


def _greatest(savings: list[list[Changes]]) -> Changes:
    return {name: value for changes in savings for name, value in changes[-1].items()}


def _kinds(title: str, moments: dict[str, Moment]) -> list[str]:
    kinds = dict.fromkeys(kind for at in moments.values() for kind in at.parts)
    rows = [_row(f"  {kind}", [at.parts.get(kind, 0) for at in moments.values()]) for kind in kinds]
    return [title, *rows, _row("  together", [at.total for at in moments.values()])]


def _row(name: str, sizes: list[int]) -> str:
    return f"{name:<{NAME_COLUMNS}}" + "".join(f"{gib(size) if size else '':>{NUMBER_COLUMNS}}" for size in sizes)


def _verdict(kind: str, needed: int, free: int, why: str) -> str:
    return f"{kind}: {gib(needed)} needed ({why}), {gib(free)} free: {'it fits' if needed <= free else 'IT DOES NOT FIT'}"


def _why(need: Need) -> str:
    kind = _largest_kind(need.moment)
    return f"{need.phase}, {gib(need.moment.parts[kind])} of it {kind}"


if __name__ == "__main__":
    main()
