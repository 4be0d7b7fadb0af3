"""Everything before step one, in order: refusals, ranks, the lock on run_dir, data, teacher, model, engine. Knows no loop.

What only the trainer or an entry may do is given to `set_up` as functions.
"""

import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from glob import has_magic
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from scripts import memory
from scripts.config import (
    LAST_SAVE_SECONDS,
    MAKE_TEACHER,
    PROGRESS_SECONDS,
    RUN_DIR_POLL_SECONDS,
    RUN_DIR_WAIT_SECONDS,
    TrainingConfig,
)
from scripts.engine import distributed, offload, toolchain, truth_check, watch
from scripts.engine.distributed import Ranks, device_of, in_turn, largest, say, together
from scripts.model.activation_offload import storage_bytes
from scripts.model.decoder import Decoder, empty_model, initialise
from scripts.model.huggingface import load_weights
from scripts.plan import machine
from scripts.plan.machine import peak_bytes, refuse_on_this_device, room_free, room_in_all
from scripts.run import run_dir
from scripts.run.checkpoint import Checkpoint, Saved, load_state, newest_verified, room_for
from scripts.run.metrics import best_step, rewind_metrics, summary, unsaved_steps
from scripts.run.state import Progress, Run, Teaching, decay_start, learning_rate_at, progress_of
from scripts.run.teacher import LabelWindows, Teacher, find_teacher, open_teaching


class Given(NamedTuple):
    """What setup does not do itself: make or open the data, ask a teacher for labels (None: there are none), make DeepSpeed's
    engine, and train the truth check's tiny model, which takes the ranks first.
    """

    prepare: Callable[[TrainingConfig], Any]
    label: LabelWindows | None
    initialize: Callable[[TrainingConfig, Ranks, Decoder], Any]
    train_tiny: Callable[..., truth_check.Trained]


class Start(NamedTuple):
    """A launch on its way to a run: `lock` is the descriptor that holds run_dir, on rank 0 if run_dir is there already.
    `planned_tokens_per_second` is known to rank 0, once it has made the plan.
    """

    config: TrainingConfig
    ranks: Ranks
    watch: watch.Watch
    teacher: Teacher | None
    lock: int | None
    planned_tokens_per_second: float | None = None


def set_up(config: TrainingConfig, given: Given) -> Run | None:
    """Everything before step one. None when the run is already finished. Every rank must call this.

    Raises:
        ValueError: the configuration does not fit the machine, the ranks, the data, the teacher or what run_dir holds.
        SystemExit: 75 when a stop was requested meanwhile; 1 when there is no memory left.
    """
    distributed.forget_earlier_run()
    ranks = distributed.ranks_from_launcher()
    watching = watch.Watch(ranks.rank, ranks.local_rank, ranks.num_launchers, config.silent_rank_seconds)
    with ending_out_of_memory(config, ranks), watching.before_training(), ExitStack() as on_failure:
        teacher = distributed.together_before_joining(lambda: _refuse_alone(config, ranks), config, ranks)
        _say_what_slows(ranks)
        say(ranks, "Starting DeepSpeed. Its first start on a machine compiles the CPU Adam, which takes a minute or two.")
        with _compiling(config, ranks):
            distributed.join(config, ranks)
        distributed.connect(ranks, watching)
        lock = together(lambda: run_dir.hold_run(config, RUN_DIR_WAIT_SECONDS) if ranks.rank == 0 else None)
        on_failure.callback(release_lock, lock)
        with watch.sharing_cores():
            run = _open_run(Start(config, ranks, watching, teacher, lock), given)
        if run is not None:
            on_failure.pop_all()
    if run is None:
        watching.close(clean=True)
    return run


def wait_for_room(run: Run, saved: Saved, is_stopping: bool) -> bool:
    """Waits until the disk has room for a save that failed, at least LAST_SAVE_SECONDS, and says so. False where a stop is
    requested of a run that was not `is_stopping` before. Every rank must call this.
    """
    started, said_at = time.monotonic(), -math.inf
    while True:
        is_over = not is_stopping and run.watch.reason is not None
        free = together(lambda: room_for(saved))
        waits = time.monotonic() - started < LAST_SAVE_SECONDS or free < saved.num_bytes
        if largest(float(is_over)):
            return False
        if not largest(float(run.ranks.rank == 0 and waits)):
            return True
        if time.monotonic() - said_at > PROGRESS_SECONDS:
            said_at = time.monotonic()
            words = (
                f"{saved.folder} needs {memory.gib(saved.num_bytes)} and {memory.gib(free)} are free: make room, and the save"
            )
            say(run.ranks, f"Waiting to save: {words} is tried again. A Ctrl-C ends the run without its last steps")
        time.sleep(RUN_DIR_POLL_SECONDS)


def release_lock(lock: int | None) -> None:
    """Lets other launches have run_dir."""
    if lock is not None:
        os.close(lock)


@contextmanager
def ending_out_of_memory(config: TrainingConfig, ranks: Ranks) -> Iterator[None]:
    """Ends a run that has no memory left with status 1 and one line: the plan, what was measured, and what needs less."""
    try:
        yield
        return
    except (MemoryError, RuntimeError, OSError) as fault:
        if not memory.is_out_of_memory(fault):
            raise
        first_line = str(fault).splitlines()[0] if str(fault) else type(fault).__name__
    device_type = device_of(ranks).type
    words = memory.out_of_memory_words(config, ranks.world_size, ranks.local_size, device_type, peak_bytes())
    words += memory.driver_words(first_line, config)
    watch.say(f"failed: {first_line}; {words}; {watch.SAME_COMMAND}", sys.stderr)
    raise SystemExit(watch.FAILED)


def refuse_on_this_machine(config: TrainingConfig, world_size: int) -> None:
    """Checks what the fields alone cannot tell: the ranks and the paths of this machine.

    Raises:
        ValueError: the batch does not divide, or a path is not there.
    """
    config.accumulation_steps(world_size)
    for name in ("tokenizer_path", "init_from", "teacher_dir"):
        path = getattr(config, name)
        if path is not None and not Path(path).exists():
            remedy = MAKE_TEACHER if name == "teacher_dir" else "name a file or folder that exists"
            raise ValueError(f"{name}={path!r} is not there; {remedy}")
    for name in ("run_dir", "data_dir"):
        path = Path(getattr(config, name))
        there = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            raise ValueError(f"{name}={str(path)!r} cannot be written, because of {str(there)!r}; name another folder")
    if not (Path(config.data_dir) / "manifest.json").exists():
        for path in config.corpus + config.validation_corpus:
            if "://" not in path and not has_magic(path) and not Path(path).exists():
                raise ValueError(f"corpus: {path!r} is not there; name a file, folder or glob that exists")


def refuse_missing_tracker(config: TrainingConfig) -> None:
    """Raises ValueError where the package of `tracker` is not installed. A folder of its name is not the package."""
    try:
        if config.tracker is not None:
            version(config.tracker)
    except PackageNotFoundError:
        raise ValueError(f'tracker={config.tracker!r} is not installed; pip install -e ".[trackers]"') from None


def _refuse_alone(config: TrainingConfig, ranks: Ranks) -> Teacher | None:
    """All that a rank can refuse alone, without loading anything. The teacher, if there is one."""
    distributed.set_up_cuda()
    offload.refuse_other_versions()
    refuse_on_this_machine(config, ranks.world_size)
    refuse_on_this_device(config, device_of(ranks))
    toolchain.refuse_missing_compilers(config)
    run_dir.refuse_other_run(config)
    if ranks.rank == 0:
        refuse_missing_tracker(config)
    teacher = find_teacher(config)
    for fault in [] if teacher is None else teacher.faults:
        say(ranks, f"{fault}; learning from an older one")
    _refuse_too_large(config, ranks, room_in_all)
    return teacher


def _say_what_slows(ranks: Ranks) -> None:
    """A line for a card that torch cannot use, and one for swap in use."""
    words = [machine.swap_words(machine.proc_bytes("/proc/meminfo"))]
    if not torch.cuda.is_available() and not distributed.hides_cards() and machine.has_nvidia_card(machine.PCI_DEVICES):
        words.append(machine.unused_card_words(torch.version.cuda, machine.DRIVER_FILE))
    for line in filter(None, words):
        say(ranks, line)


def _refuse_too_large(config: TrainingConfig, ranks: Ranks, look: Callable) -> None:
    device = device_of(ranks)
    memory.refuse_too_large(config, ranks.world_size, ranks.local_size, look(config, device), device.type)


def _open_run(start: Start, given: Given) -> Run | None:
    config, ranks = start.config, start.ranks
    found = together(lambda: _newest_checkpoint(config, ranks))
    steps_done = 0 if found is None else found.state["step"]
    if len(set(distributed.gather_numbers(steps_done))) > 1:
        raise ValueError(f"run_dir={config.run_dir!r} does not hold the same on every machine; put it on a shared path")
    if steps_done == config.num_steps:
        say(ranks, f"This run is finished: {config.num_steps} steps. {summary(config)}")
        return None
    together(lambda: _refuse_too_large(config, ranks, room_free))
    if ranks.rank == 0:
        start = start._replace(planned_tokens_per_second=_say_plan(config, ranks))
    data, teaching = in_turn(lambda: given.prepare(config), config, ranks), None
    together(lambda: truth_check.refuse_failing_compiler(config, device_of(ranks)))
    if start.teacher is not None:
        teaching = open_teaching(start.teacher, config, ranks, data, label=given.label, found=found)
    return _assemble_run(start, given, data, found, teaching)


def _say_plan(config: TrainingConfig, ranks: Ranks) -> float:
    """Says what the run will take; the tokens/s that it expects."""
    device, launch = device_of(ranks), (config, ranks.world_size, ranks.local_size)
    rates = machine.measure_rates(config, device)
    watch.say(memory.short_words(*launch, device, rates), sys.stdout)
    return machine.tokens_per_second(*launch, device.type, rates)


def _newest_checkpoint(config: TrainingConfig, ranks: Ranks) -> Checkpoint | None:
    shorter = run_dir.shorter_run(config)
    found, faults = newest_verified(config, None if shorter is None else decay_start(shorter))
    for fault in faults:
        say(ranks, f"{fault}; going back to an older one")
    if shorter is not None and found is not None:
        say(ranks, _extension_words(config, shorter, found))
    lost = unsaved_steps(config) if found is None else 0
    if lost:
        say(ranks, f"{config.run_dir} holds {lost} steps and no checkpoint yet: beginning again at step 0")
    return found


def _extension_words(config: TrainingConfig, shorter: TrainingConfig, found: Checkpoint) -> str:
    """What a person is told of a run that goes on to more steps. Raises ValueError where its decay would have begun before."""
    step, begins = found.state["step"], decay_start(config)
    words = f"This run goes on from {shorter.num_steps} to {config.num_steps} steps, after step {step}"
    if begins is None:
        ended, goes_on = learning_rate_at(step - 1, shorter), learning_rate_at(step, config)
        return (
            f"{words}. It is not the run that {config.num_steps} steps would have made: the learning rate fell to {ended:.2e}"
            f" and goes on at {goes_on:.2e}"
        )
    if begins < step:
        nearest = config.num_steps - step
        raise ValueError(
            f"decay_steps={config.decay_steps} begins before {found.folder}, from which it goes on; nearest is {nearest}"
        )
    return f"{words}, before its decay, bit for bit as if it had been that long; decayed checkpoints stay as step-*.decayed"


def _assemble_run(start: Start, given: Given, data, found: Checkpoint | None, teaching: Teaching | None) -> Run:
    """The model and the engine, at the state of the checkpoint `found` or fresh; run_dir is claimed last."""
    config, ranks = start.config, start.ranks
    device = device_of(ranks)
    model = together(lambda: model_to_train(config, ranks, data, found))
    with _compiling(config, ranks):
        train_tiny = partial(given.train_tiny, ranks)
        truth_check.refuse_untrue_updates(config, ranks.rank, ranks.world_size, device, train_tiny)
        engine = given.initialize(config, ranks, model)
    machine.release_memory()
    with ExitStack() as on_failure:
        on_failure.callback(engine.destroy)
        _make_host_memory(config, ranks, engine)
        run = _begun(start, data, found, teaching, engine)
        on_failure.pop_all()
    return run


def _begun(start: Start, data, found: Checkpoint | None, teaching: Teaching | None, engine) -> Run:
    """The run, with the engine at the state of the checkpoint `found`, if any; run_dir is claimed last."""
    config, ranks, steps_done, progress = start.config, start.ranks, 0, Progress()
    if found is not None:
        steps_done, progress = found.state["step"], progress_of(found.state["progress"])
        together(lambda: load_state(engine, found))
        say(ranks, f"Continuing after step {steps_done} from {found.folder}")
    lock = together(lambda: _claim(start, steps_done, progress) if ranks.rank == 0 else None)
    return Run(
        config=config, ranks=ranks, device=device_of(ranks), engine=engine, data=data, first_step=steps_done, progress=progress,
        watch=start.watch, lock=lock, teaching=teaching, planned_tokens_per_second=start.planned_tokens_per_second,
    )  # fmt: skip


def _make_host_memory(config: TrainingConfig, ranks: Ranks, engine) -> None:
    """Makes all host memory that a step's copies pass through, and says how much of it is not page-locked, if any."""
    buffers, device = [*offload.staging_of(engine)], device_of(ranks)
    if config.activation_checkpointing == "block_offload":
        shape = torch.Size((config.micro_batch_rows, config.context_length, config.hidden_size))
        buffers += engine.module.host_inputs.prepare(device, shape, config.dtype, config.num_layers - 1)
    pageable_bytes = largest(float(storage_bytes([each for each in buffers if not each.is_pinned()])))
    if device.type == "cuda" and pageable_bytes:
        say(ranks, memory.pageable_words(int(pageable_bytes), storage_bytes(buffers)))


def _claim(start: Start, steps_done: int, progress: Progress) -> int | None:
    """Makes run_dir ready for this launch's records; the descriptor of its lock."""
    config = start.config
    try:
        run_dir.claim_run(config, steps_done)
        lock = run_dir.hold_run(config, 0) if start.lock is None else start.lock
        rewind_metrics(config, steps_done, progress.is_evaluated)
        run_dir.link_best(config, best_step(config))
        return lock
    except OSError as fault:
        raise ValueError(
            f"run_dir={config.run_dir!r} cannot be written: {fault.strerror}; make room in it, or name another folder"
        ) from None


@contextmanager
def _compiling(config: TrainingConfig, ranks: Ranks) -> Iterator[None]:
    with toolchain.compiling(config, ranks.local_rank) as lines:
        for line in lines:
            watch.say(line, sys.stdout)
        yield


def model_to_train(config: TrainingConfig, ranks: Ranks, data, found: Checkpoint | None) -> Decoder:
    """The model on this rank's device, with the weights of the checkpoint, of `init_from`, or fresh ones. Raises ValueError
    where the data is not what the checkpoint was trained on, or the tokenizer is not that of `init_from`.
    """
    if found is not None and found.state["data_fingerprint"] != data.fingerprint:
        raise ValueError(f"data_dir={config.data_dir!r} is not the data that {found.folder} was trained on; put that data back")
    if found is None and config.init_from is not None and (Path(config.init_from) / "tokenizer.json").exists():
        data.refuse_other_tokenizer(config.init_from, f"init_from={config.init_from!r}")
    model, source = empty_model(config, device_of(ranks)), config.init_from if found is None else found.folder
    if source is None:
        return initialise(model)
    load_weights(model, Path(source))
    return model
