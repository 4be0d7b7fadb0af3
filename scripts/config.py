"""Every number: TrainingConfig, its laws, the presets and the DeepSpeed dict. Nothing else in the project holds a default.

To change a run, edit PRETRAIN below. There are no command-line flags.
"""

import math
import os
import re
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from inspect import signature
from pathlib import Path

import torch

from ds.loader import BatchWarmup, rows_before, rows_of_step

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SCHEDULES, OPTIMIZERS = ("cosine", "linear", "wsd"), ("adamw", "muon")
ACTIVATION_CHECKPOINTING = ("none", "block", "block_offload")
PLACES = ("cpu", "gpu")
COMPILED_ON = {"never": (), "gpu": ("cuda",), "always": ("cuda", "cpu")}
TRACKERS = ("wandb", "trackio")
GGUF_PRECISIONS = ("f16", "bf16", "q8_0")
CHECKPOINTS = ("newest", "best")
DIVERGENCES = ("forward", "reverse")
STANDARD_LIBRARY = sysconfig.get_path("stdlib") + "/**/*.py"
AT_LEAST_ONE = (
    "tokens_per_shard", "tokenizer_sample_bytes", "context_length", "num_layers", "num_heads", "num_kv_heads", "hidden_size",
    "mlp_size", "tokens_per_step", "first_tokens_per_step", "batch_warmup_steps", "micro_batch_rows", "num_steps",
    "decay_steps", "muon_momentum_warmup_steps", "loss_chunk_rows", "log_every_steps", "eval_every_steps", "eval_tokens",
    "sample_every_steps", "sample_tokens", "sample_top_k", "save_every_steps", "keep_checkpoints", "max_skipped_steps",
    "rank_timeout_minutes", "shortest_document_characters", "longest_document_characters", "teacher_top_k",
)  # fmt: skip
OTHERS_AT_LEAST = {"warmup_steps": 0, "seed": 0, "spike_window_steps": 2, "silent_rank_seconds": 2, "head_size": 2}
AT_LEAST = dict.fromkeys(AT_LEAST_ONE, 1) | OTHERS_AT_LEAST | {"vocab_size": 257}
MAKE_TEACHER = "deepspeed scripts/train_pretrain.py makes a teacher, or name a Llama or Qwen3 folder of transformers' format"
LARGEST_SEED, LARGEST_NUMBER = 2**32 - 1, 1e300
# Part of the data order: over any so many steps the share of each source is exact.
WEIGHED_STEPS = 1000
NOT_NEGATIVE = ("validation_fraction", "min_learning_rate", "weight_decay", "sample_temperature")
BELOW_ONE = ("validation_fraction", "muon_momentum", "muon_first_momentum", "beta1", "beta2")

# Settings of the system: waits, threads, buffers and estimates. Memory and time estimates enter the plan alone, no result.
GIB, MIB = 2**30, 2**20
HOST_CHUNK_ROWS, HOST_CHUNK_LOGITS, HOST_CHUNK_QUERIES, HOST_CHUNK_SCORES, KERNEL_VARIANTS = 1024, 2**21, 64, 2**20, 64
# Of torch.compile: nothing is chosen by timing, so that the order of sums is the same in every launch.
COMPILER_OPTIONS = {"deterministic": True, "triton.autotune_pointwise": False, "compile_threads": 1}

RUN_DIR_WAIT_SECONDS = 60
RUN_DIR_POLL_SECONDS = 0.2
LAST_SAVE_SECONDS = 10
LONG_LOCK_SECONDS = 60
LOCK_POLL_SECONDS = 0.1
WATCH_BEAT_SECONDS = 0.25
COMPANY_SECONDS, COMPANY_CORES, TEAM_ELEMENTS = 1.0, 0.3, 2**16
SECOND_SIGNAL_AFTER_SECONDS = {"SIGINT": 0.3, "SIGTERM": 2.0}
LEAVE_SECONDS, LAST_WORDS_SECONDS = 3.0, 1.0
SAY_SECONDS = 1.0
VERDICT_SECONDS = 1.0
CONNECT_SECONDS, LABEL_PROGRESS_SECONDS, TRACKER_END_SECONDS = 60.0, 300, 10
HASH_THREADS, VERIFY_THREADS, LOAD_THREADS = 2, 8, 2
# By the C library's numbers (malloc.h): what it keeps at the top of its heap, and the size from which it asks the system anew.
MALLOC_OPTIONS = {-1: 2**30, -3: 2**25}
WRITE_BACK_BYTES = 32 * MIB
LOAD_PIECE_ELEMENTS = 2**22
OPTIMIZER_CHUNK_ELEMENTS = 2**24
GRADIENT_PIECE_ELEMENTS = 2**22
GRADIENT_CACHE_ELEMENTS = 2**18
NEWTON_SCHULZ_ITERATIONS = 5

CUDA_CONTEXT_BYTES, CUDA_LIBRARIES_BYTES = 256 * MIB, 256 * MIB
CUBLAS_WORKSPACE_BYTES = 64 * MIB
NUM_MULTIPROCESSORS = 192
# An estimate for cards on PCIe, not measured. Between A100s with NVLink it was 544 to 688 MB (NVIDIA/nccl, issue 964).
NCCL_COMMUNICATOR_BYTES = 256 * MIB
ALLOCATOR_SLACK_SHARE = 0.02
PROGRAM_BYTES = {"cuda": 2304 * MIB, "cpu": 480 * MIB}
COMPILER_BYTES = {"cuda": 512 * MIB, "cpu": 192 * MIB}
DATA_BYTES, FILE_PIECES_BYTES = 64 * MIB, 64 * MIB
PRODUCT_EFFICIENCY_SHARE = 0.6
RATE_SECONDS = 0.08
RATE_COPIED_BYTES = 32 * MIB
RATE_MOST_ROWS = {"cpu": 256, "cuda": 8192}

BUDGET_HOURS = {"8 hours": 8, "24 hours": 24, "7 days": 168}
NUM_OFFERS = 3
OFFERED_TEACHER_TOP_K = 32
FEWEST_OFFERED_CHUNK_ROWS = 64
SHORTEST_OFFERED_CONTEXT = 64
OFFERED_MEMORY_SHARE = 0.9
NUM_NAMED_DOCUMENTS, NAMED_DOCUMENT_TOKENS, FEW_DOCUMENTS = 3, 48, 10
SHARD_WORKER_BYTES, PROGRESS_SECONDS, DASK_SECONDS = 3 * 2**28, 60, 15
LABEL_ERROR_TOKENS = 8192


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """One run, whole: data, model, optimization, machine, paths. Fields stand in the order in which the data meets them.

    Units are in the names: `*_steps` are optimizer updates, `*_tokens` are tokens over all ranks, `*_rows` are windows of
    `context_length` tokens (for `loss_chunk_rows`: tokens). `None` in a field `*_every_steps` means never.

    Raises:
        ValueError: a value breaks a law; the message holds the value, the law and the nearest value that works.
    """

    run_dir: str = "runs/pretrain"
    data_dir: str = "data/stdlib"
    corpus: tuple[str, ...] = (STANDARD_LIBRARY,)
    corpus_weights: tuple[float, ...] | None = None
    corpus_exclude: tuple[str, ...] = ("site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "encodings")
    text_field: str = "text"
    document_separator: str | None = None
    skip_faulty_rows: bool = False
    shortest_document_characters: int | None = None
    longest_document_characters: int | None = None
    validation_corpus: tuple[str, ...] = ()
    validation_fraction: float = 0.05
    tokens_per_shard: int = 2**26
    vocab_size: int = 2048
    tokenizer_path: str | None = None
    begin_of_text: bool | None = None
    end_of_text: str | None = None
    tokenizer_sample_bytes: int = 2**26
    dask_scheduler: str | None = None

    context_length: int = 256
    mask_across_documents: bool = False
    hidden_size: int = 192
    num_layers: int = 3
    num_heads: int = 3
    num_kv_heads: int = 1
    head_size: int | None = None
    mlp_size: int = 448
    qk_norm: bool = True
    tie_embeddings: bool = False
    rope_theta: float = 10000.0
    rope_scaling: tuple[float, ...] | None = None
    norm_eps: float = 1e-5
    init_std: float = 0.04
    embedding_init_std: float = 0.3
    logits_init_std: float = 0.3

    tokens_per_step: int = 2048
    first_tokens_per_step: int | None = None
    batch_warmup_steps: int | None = None
    micro_batch_rows: int = 4
    num_steps: int = 500
    learning_rate: float = 6e-3
    min_learning_rate: float = 6e-4
    warmup_steps: int = 40
    schedule: str = "cosine"
    decay_steps: int | None = None
    optimizer: str = "muon"
    muon_learning_rate: float | None = None
    muon_momentum: float = 0.9
    muon_first_momentum: float | None = 0.8
    muon_momentum_warmup_steps: int | None = 100
    optimizer_state_precision: str = "bf16"
    beta1: float = 0.9
    beta2: float = 0.95
    adam_eps: float = 1e-8
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0

    precision: str = "bf16"
    offload_optimizer: bool = True
    accumulate_on: str = "cpu"
    accumulation_precision: str = "fp32"
    activation_checkpointing: str = "none"
    loss_chunk_rows: int = 1024
    compile_kernels: str = "never"

    log_every_steps: int = 1
    eval_every_steps: int | None = 200
    eval_tokens: int = 32768
    sample_every_steps: int | None = 200
    sample_prompt: str = "def"
    sample_tokens: int = 120
    sample_temperature: float = 0.8
    sample_top_k: int = 50
    sample_top_p: float = 1.0
    sample_repetition_penalty: float = 1.0
    sample_stop: tuple[str, ...] = ()
    sample_checkpoint: str = "newest"
    save_every_steps: int | None = 200
    keep_checkpoints: int = 2
    model_license: str | None = None
    gguf_precision: str = "bf16"
    tracker: str | None = None
    max_skipped_steps: int = 20
    spike_window_steps: int = 128
    spike_sigmas: float = 6.0
    rank_timeout_minutes: int = 60
    silent_rank_seconds: int = 120
    seed: int = 0
    init_from: str | None = None
    teacher_dir: str | None = None
    teacher_top_k: int | None = None
    distill_weight: float = 0.5
    distill_temperature: float = 1.0
    distill_divergence: str = "forward"

    def __new__(cls, *unnamed: object, **values: object) -> "TrainingConfig":
        names = [field.name for field in fields(cls)]
        with _refusing_presets():
            if unnamed:
                raise ValueError(f"TrainingConfig({unnamed[0]!r}) names no field; write field=value")
            for name in values.keys() - names:
                nearest = get_close_matches(name, names, n=1, cutoff=0.0)[0]
                raise ValueError(f"{name} is no field of TrainingConfig; nearest is {nearest}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        with _refusing_presets():
            for law in LAWS:
                law(self)

    @property
    def head_width(self) -> int:
        """Features of one attention head."""
        return self.head_size or self.hidden_size // self.num_heads

    @property
    def has_validation(self) -> bool:
        """Whether documents are held out: those of `validation_corpus`, or if it is empty `validation_fraction` by hash."""
        return bool(self.validation_corpus) or self.validation_fraction > 0

    @property
    def is_mixture(self) -> bool:
        """Whether the entries of `corpus` are read by weight, each a source of windows of its own."""
        return self.corpus_weights is not None and len(self.corpus) > 1

    @property
    def rows_per_step(self) -> int:
        """Windows that one optimizer step reads, over all ranks, once the batch has warmed up."""
        return self.tokens_per_step // self.context_length

    @property
    def batch_warmup(self) -> BatchWarmup | None:
        """How steps grow from `first_tokens_per_step` to `tokens_per_step`; None where all are of one size."""
        first, num_steps = self.first_tokens_per_step, self.batch_warmup_steps
        return None if first is None or num_steps is None else BatchWarmup(first // self.context_length, num_steps)

    @property
    def num_tokens(self) -> int:
        """Tokens that all steps read, over all ranks."""
        return self.tokens_before(self.num_steps)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights that the forward pass reads."""
        return PRECISIONS[self.precision]

    @property
    def block_matrix_parameters(self) -> int:
        """Parameters of one decoder block's matrices: attention and MLP."""
        attention = 2 * self.hidden_size * self.head_width * (self.num_heads + self.num_kv_heads)
        return attention + 3 * self.hidden_size * self.mlp_size

    @property
    def block_parameters(self) -> int:
        """Parameters of one decoder block: matrices and norms."""
        return self.block_matrix_parameters + 2 * self.hidden_size + (2 * self.head_width if self.qk_norm else 0)

    @property
    def bucket_elements(self) -> int:
        """Elements of DeepSpeed's buckets: one block, even because DeepSpeed aligns its all-gather to two."""
        return self.block_parameters + self.block_parameters % 2

    @property
    def num_parameters(self) -> int:
        """Parameters of the model; a tied head counts once."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        return embeddings + self.num_layers * self.block_parameters + self.hidden_size

    def rows_of_step(self, step: int) -> int:
        """Windows that the update after `step` steps reads, over all ranks; that after 0 steps reads the fewest."""
        return rows_of_step(step, self.rows_per_step, self.batch_warmup)

    def tokens_before(self, step: int) -> int:
        """Tokens that the first `step` steps read, over all ranks."""
        return rows_before(step, self.rows_per_step, self.batch_warmup) * self.context_length

    def accumulation_steps(self, world_size: int) -> int:
        """Micro-batches that each of `world_size` ranks runs in one step of `tokens_per_step`.

        Raises:
            ValueError: that or `first_tokens_per_step` is not a whole number of micro-batches for every rank.
        """
        tokens = self.micro_batch_rows * self.context_length * world_size
        _check_division(self, tokens, world_size)
        return self.tokens_per_step // tokens

    @staticmethod
    def deepspeed_config(config: "TrainingConfig", world_size: int) -> dict:
        """The dict that `deepspeed.initialize` gets: ZeRO stage 2, the optimizer on the host, nothing that syncs the device.

        Raises:
            ValueError: the batch does not divide over `world_size` ranks.
        """
        sums = config.precision if config.offload_optimizer else config.accumulation_precision
        betas, decay = [config.beta1, config.beta2], config.weight_decay
        adam = {"lr": config.learning_rate, "betas": betas, "eps": config.adam_eps, "weight_decay": decay}
        return {
            "train_batch_size": config.rows_per_step,
            "train_micro_batch_size_per_gpu": config.micro_batch_rows,
            "gradient_accumulation_steps": config.accumulation_steps(world_size),
            "gradient_clipping": config.max_grad_norm,
            "zero_optimization": {
                "stage": 2,
                "contiguous_gradients": True,
                "overlap_comm": False,
                "reduce_scatter": True,
                "reduce_bucket_size": config.bucket_elements,
                "allgather_bucket_size": config.bucket_elements,
                "offload_optimizer": {"device": "cpu" if config.offload_optimizer else "none", "pin_memory": False},
            },
            "bf16": {"enabled": config.precision == "bf16", "check_grad_overflow": True},
            "fp16": {"enabled": config.precision == "fp16", "loss_scale": 0, "initial_scale_power": 16},
            "data_types": {"grad_accum_dtype": sums},
            "optimizer": {"type": "AdamW", "params": adam},
            "steps_per_print": None,
            "wall_clock_breakdown": False,
            "timers": {"throughput": {"enabled": False, "synchronized": False}},
        }


# What help() and editors show of the class is the dataclass's own __init__, with every field.
TrainingConfig.__new__.__signature__ = signature(TrainingConfig.__init__)  # pyright: ignore[reportFunctionMemberAccess]
FLOATS = [field.name for field in fields(TrainingConfig) if field.type is float]
ABOVE_ZERO = ("muon_learning_rate", *(name for name in FLOATS if name not in NOT_NEGATIVE + BELOW_ONE))


def refuse_arguments(arguments: list[str]) -> None:
    """Lets the launcher's `--local_rank` pass and nothing else: a choice is a value in scripts/config.py.

    Raises:
        ValueError: there is any other argument.
    """
    others = [word for word in arguments if not re.fullmatch(r"--local[_-]rank=\d+", word)]
    words = " ".join(others)
    if others:
        raise ValueError(f"{words}: there are no command-line arguments; edit PRETRAIN or DISTILL in scripts/config.py")


@contextmanager
def refusing() -> Iterator[None]:
    """Ends the process in one line for each machine: with status 2 at a ValueError, with 130 at a Ctrl-C."""
    try:
        yield
    except ValueError as refusal:
        if os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0":
            print("refused:", str(refusal).replace("\n", r"\n"), file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("Stopped; the same command begins again", file=sys.stderr, flush=True)
        raise SystemExit(130) from None


def _refusing_presets() -> AbstractContextManager[None]:
    """`refusing` while this file is being read, so that a wrong preset ends every command in one line; else nothing."""
    return refusing() if getattr(__spec__, "_initializing", True) else nullcontext()


def _check_types(config: TrainingConfig) -> None:
    for field in fields(TrainingConfig):
        value, wanted = getattr(config, field.name), str(field.type).removeprefix("<class '").removesuffix("'>")
        if value is None and wanted.endswith("| None"):
            continue
        bare = wanted.removesuffix(" | None")
        kind = {"int": int, "float": (int, float), "bool": bool, "str": str}.get(bare, tuple)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"{field.name}={value!r} is not of type {wanted}; {_type_remedy(value, bare)}")
        texts = [text for text in (value if isinstance(value, tuple) else (value,)) if isinstance(text, str)]
        if any(text != text.encode(errors="replace").decode() for text in texts):
            raise ValueError(f"{field.name}={value!r} holds half a surrogate pair, which is no UTF-8; write it without")


def _type_remedy(value: object, kind: str) -> str:
    if kind == "int" and isinstance(value, float) and math.isfinite(value):
        return f"nearest is {round(value)}"
    if kind.startswith("tuple"):
        kind = "strings" if "str" in kind else "numbers"
        return f"write ({value!r},)" if isinstance(value, str) and kind == "strings" else f"write a tuple of {kind}"
    return f"write a value of type {kind}"


def _check_ranges(config: TrainingConfig) -> None:
    for field in fields(TrainingConfig):
        name, value = field.name, getattr(config, field.name)
        if isinstance(value, (int, float)) and not abs(value) < LARGEST_NUMBER:
            raise ValueError(f"{name}={str(value)[:20]} is not a finite number; the default is {field.default}")
        if value is None:
            continue
        if name in AT_LEAST and value < AT_LEAST[name]:
            raise ValueError(f"{name}={value} is below {AT_LEAST[name]}; nearest is {AT_LEAST[name]}")
        if name in ABOVE_ZERO and value <= 0:
            raise ValueError(f"{name}={value} is not above 0; the default is {field.default}")
        if name in NOT_NEGATIVE + BELOW_ONE and value < 0:
            raise ValueError(f"{name}={value} is negative; nearest is 0.0")
        if name == "seed" and value > LARGEST_SEED:
            raise ValueError(f"seed={value} has more than the 32 bits that torch keeps of it; nearest is {LARGEST_SEED}")
        if name in BELOW_ONE and value >= 1:
            raise ValueError(f"{name}={value} is not below 1; the default is {field.default}")


def _check_choices(config: TrainingConfig) -> None:
    sums = {"accumulate_on": PLACES, "accumulation_precision": ("bf16", "fp32")}
    memory = {"precision": tuple(PRECISIONS), **sums, "activation_checkpointing": ACTIVATION_CHECKPOINTING}
    learning = {"schedule": SCHEDULES, "optimizer": OPTIMIZERS, "optimizer_state_precision": ("bf16", "fp32")}
    use = {"sample_checkpoint": CHECKPOINTS, "gguf_precision": GGUF_PRECISIONS, "tracker": (None, *TRACKERS)}
    choices = {**learning, **memory, **use, "distill_divergence": DIVERGENCES, "compile_kernels": COMPILED_ON}
    for name, allowed in choices.items():
        if getattr(config, name) not in allowed:
            raise ValueError(f"{name}={getattr(config, name)!r} is unknown; one of {', '.join(map(repr, allowed))} works")
    rate = config.muon_learning_rate
    if rate is not None and config.optimizer != "muon":
        raise ValueError(f'muon_learning_rate={rate} has no effect with optimizer="adamw"; set muon_learning_rate=None')
    _check_pair(config, "muon_first_momentum", "muon_momentum_warmup_steps")


def _check_accumulation(config: TrainingConfig) -> None:
    if not config.offload_optimizer and config.accumulate_on == "cpu":
        raise ValueError('accumulate_on="cpu" has no effect with offload_optimizer=False; set accumulate_on="gpu"')
    if config.accumulation_precision == "bf16":
        sums, remedy = 'accumulation_precision="bf16"', 'set accumulation_precision="fp32"'
        if config.accumulate_on == "cpu":
            raise ValueError(f'{sums} does not go with accumulate_on="cpu", which is exact; {remedy}')
        if config.precision != "bf16":
            raise ValueError(f'{sums} is not for precision="{config.precision}"; {remedy}')


def _check_model(config: TrainingConfig) -> None:
    hidden_size, num_heads, num_kv_heads = config.hidden_size, config.num_heads, config.num_kv_heads
    if hidden_size % num_heads and (config.head_size is None or not config.qk_norm):
        broken, nearest = f"{num_heads=} does not divide {hidden_size=}", _nearest_divisor(hidden_size, num_heads)
        if config.head_size is None:
            raise ValueError(f"{broken}; nearest is {nearest}")
        raise ValueError(f"{broken}, which transformers' Llama needs; nearest is {nearest}, or set qk_norm=True")
    if num_heads % num_kv_heads:
        nearest = _nearest_divisor(num_heads, num_kv_heads)
        raise ValueError(f"{num_kv_heads=} does not divide {num_heads=}; nearest is {nearest}")
    width = config.head_width
    if width % 2:
        raise ValueError(f"head width {width} is odd and rotary embeddings rotate pairs; set head_size={width + 1}")


def _check_rope_scaling(config: TrainingConfig) -> None:
    scaling = config.rope_scaling
    if scaling is None:
        return
    is_right = len(scaling) == 4 and all(isinstance(number, (int, float)) and 0 < number < LARGEST_NUMBER for number in scaling)
    if not is_right or scaling[1] >= scaling[2]:
        raise ValueError(
            f"rope_scaling={scaling!r} is not (factor, low frequency factor, high frequency factor, original context length),"
            " above 0 and the second below the third, such as (8.0, 1.0, 4.0, 8192); set rope_scaling=None to scale nothing"
        )


def _nearest_divisor(number: int, wanted: int) -> int:
    return min((n for n in range(1, number + 1) if number % n == 0), key=lambda n: (abs(n - wanted), n))


def _check_division(config: TrainingConfig, tokens: int, world_size: int) -> None:
    law = f"is not a multiple of micro_batch_rows * context_length * world size = {tokens}"
    first, whole = config.first_tokens_per_step, config.tokens_per_step
    if whole % tokens:
        lower = whole // tokens * tokens
        nearest = f"nearest is {lower} and {lower + tokens}" if lower else f"nearest is {tokens}"
        raise ValueError(f"tokens_per_step={whole} {law}; {nearest}{_fewer_rows(config, whole, world_size)}")
    if first is not None and (first % tokens or whole % first or first == whole):
        sizes = [size for size in range(tokens, whole, tokens) if whole % size == 0]
        nearest = f"nearest is {min(sizes, key=lambda size: abs(size - first))}" if sizes else "set first_tokens_per_step=None"
        remedy = "" if whole % first or first == whole else _fewer_rows(config, first, world_size)
        law += f" that divides and is below tokens_per_step={whole}"
        raise ValueError(f"first_tokens_per_step={first} {law}; {nearest}{remedy}")


def _fewer_rows(config: TrainingConfig, step_tokens: int, world_size: int) -> str:
    """The most rows below `micro_batch_rows` that suit a step of so many tokens, as the end of a refusal; or nothing."""
    rows, rest = divmod(step_tokens, config.context_length)
    smaller = [n for n in range(1, min(config.micro_batch_rows, rows + 1)) if rows % (n * world_size) == 0 == rest]
    return f", or set micro_batch_rows={smaller[-1]}" if smaller else ""


def _check_pair(config: TrainingConfig, first: str, second: str) -> None:
    values = getattr(config, first), getattr(config, second)
    if values.count(None) == 1:
        named, other = f"{first}={values[0]} and {second}={values[1]}", second if values[0] is None else first
        raise ValueError(f"{named} go together; set {other}=None, or name both")


def _check_batch(config: TrainingConfig) -> None:
    batch_warmup_steps, eval_tokens, context_length = config.batch_warmup_steps, config.eval_tokens, config.context_length
    _check_pair(config, "first_tokens_per_step", "batch_warmup_steps")
    config.accumulation_steps(1)
    if batch_warmup_steps is not None and batch_warmup_steps > config.num_steps:
        raise ValueError(f"{batch_warmup_steps=} outlasts num_steps={config.num_steps}; nearest is {config.num_steps}")
    if eval_tokens < context_length:
        raise ValueError(f"{eval_tokens=} is less than one window of {context_length=}; nearest is {context_length}")


def _check_schedule(config: TrainingConfig) -> None:
    warmup_steps, decay_steps, num_steps = config.warmup_steps, config.decay_steps, config.num_steps
    least, most = config.min_learning_rate, config.learning_rate
    if warmup_steps >= num_steps:
        raise ValueError(f"{warmup_steps=} leaves nothing of {num_steps=}; nearest is {num_steps - 1}")
    if least > most:
        raise ValueError(f"min_learning_rate={least} is above learning_rate={most}; nearest is {most}")
    if (config.schedule == "wsd") != (decay_steps is not None):
        remedy = "set decay_steps" if config.schedule == "wsd" else "set decay_steps=None"
        raise ValueError(f'{decay_steps=} does not go with schedule="{config.schedule}"; {remedy}')
    if decay_steps is not None and warmup_steps + decay_steps > num_steps:
        nearest = num_steps - warmup_steps
        raise ValueError(f"{decay_steps=} after {warmup_steps=} outlasts {num_steps=}; nearest is {nearest}")


def _check_data(config: TrainingConfig) -> None:
    for name in ("run_dir", "data_dir", "text_field", "sample_prompt"):
        value = getattr(config, name)
        if not value:
            raise ValueError(f"{name} is empty; the default is {getattr(TrainingConfig, name)!r}")
        if name != "sample_prompt" and not value.isprintable():
            raise ValueError(f"{name}={value!r} holds a character that cannot be printed; write it without")
    for name in ("document_separator", "end_of_text", "dask_scheduler"):
        if getattr(config, name) == "":
            raise ValueError(f"{name} is empty; the default is None")
    shortest, longest = config.shortest_document_characters, config.longest_document_characters
    if shortest is not None and longest is not None and shortest > longest:
        raise ValueError(
            f"shortest_document_characters={shortest} is above longest, {longest}; set longest_document_characters={shortest}"
        )
    if not config.corpus or not all(config.corpus):
        raise ValueError(f"corpus={config.corpus!r} is empty; name at least one file, folder or glob")
    if not all(config.validation_corpus):
        raise ValueError("validation_corpus holds an empty name; set validation_corpus=() to hold out by validation_fraction")
    for name in ("corpus", "corpus_exclude", "validation_corpus", "sample_stop"):
        if not all(isinstance(item, str) for item in getattr(config, name)):
            raise ValueError(f"{name}={getattr(config, name)!r} holds something that is not a string; write a tuple of strings")
    if not config.has_validation and config.eval_every_steps is not None:
        nothing = f"validation_fraction=0 leaves nothing for eval_every_steps={config.eval_every_steps}"
        raise ValueError(f"{nothing}; set eval_every_steps=None or validation_fraction=0.01")
    if Path(config.run_dir).resolve() == Path(config.data_dir).resolve():
        raise ValueError(f'run_dir and data_dir are both {config.run_dir!r}; nearest is data_dir="{config.data_dir}-data"')
    if config.tokenizer_path is not None and config.vocab_size == 257:
        raise ValueError("vocab_size=257 means raw bytes and tokenizer_path names a tokenizer; set tokenizer_path=None")
    if config.tokenizer_path is None and (config.begin_of_text or config.end_of_text is not None):
        name = "begin_of_text" if config.begin_of_text else "end_of_text"
        raise ValueError(f"{name}={getattr(config, name)!r} has no effect without a tokenizer_path; set {name}=None")


def _check_weights(config: TrainingConfig) -> None:
    weights, num_rows = config.corpus_weights, WEIGHED_STEPS * config.rows_per_step
    if weights is None:
        return
    named, remedy = f"corpus_weights={weights!r}", "set corpus_weights=None to read by size"
    for weight in weights:
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < LARGEST_NUMBER:
            raise ValueError(f"{named}: {weight!r} is no number above 0; {remedy}")
    if len(weights) != len(config.corpus):
        raise ValueError(f"{named}: {len(weights)} numbers for {len(config.corpus)} entries of corpus; {remedy}")
    smallest = min(weights) / sum(weights)
    if smallest < 1 / num_rows:
        windows = f"one of the {num_rows:,} windows of {WEIGHED_STEPS:,} steps"
        raise ValueError(f"{named}: a share of {smallest:.2g} is below {windows}; write a share of 1/{num_rows} or more")


def _check_teacher(config: TrainingConfig) -> None:
    teacher_top_k, vocab_size = config.teacher_top_k, config.vocab_size
    if config.distill_weight > 1:
        raise ValueError(f"distill_weight={config.distill_weight} is above 1; nearest is 1.0")
    if teacher_top_k is not None and config.teacher_dir is None:
        raise ValueError(f"{teacher_top_k=} has no effect without a teacher_dir; set teacher_top_k=None")
    if teacher_top_k is not None and teacher_top_k >= vocab_size:
        raise ValueError(f"{teacher_top_k=} leaves no tail of {vocab_size=}; nearest is {vocab_size - 1}")


def _check_use(config: TrainingConfig) -> None:
    if config.sample_top_p > 1:
        raise ValueError(f"sample_top_p={config.sample_top_p} is above 1; nearest is 1.0")
    if config.model_license is not None and not (config.model_license and config.model_license.isprintable()):
        raise ValueError(
            f"model_license={config.model_license!r} is no name of a licence, such as 'apache-2.0'; set model_license=None"
        )
    if not all(config.sample_stop):
        raise ValueError("sample_stop holds an empty text, which every text holds; set sample_stop=() to stop at none")


LAWS = (
    _check_types, _check_ranges, _check_choices, _check_accumulation, _check_model, _check_rope_scaling, _check_batch,
    _check_schedule, _check_data, _check_weights, _check_teacher, _check_use,
)  # fmt: skip

FOR_CARDS = {
    "validation_fraction": 0.005, "vocab_size": 32768, "tokenizer_path": None, "begin_of_text": None, "end_of_text": None,
    "tokenizer_sample_bytes": 2**28, "qk_norm": True, "tie_embeddings": True, "init_std": 0.02, "schedule": "cosine",
    "warmup_steps": 1000, "decay_steps": None, "first_tokens_per_step": None, "batch_warmup_steps": None, "optimizer": "muon",
    "muon_learning_rate": None, "muon_momentum": 0.95, "muon_first_momentum": 0.85, "muon_momentum_warmup_steps": 300,
    "optimizer_state_precision": "bf16", "beta1": 0.9, "beta2": 0.95, "precision": "bf16", "offload_optimizer": True,
    "accumulate_on": "cpu", "accumulation_precision": "fp32", "loss_chunk_rows": 1024, "log_every_steps": 1, "eval_every_steps":
    500, "eval_tokens": 2**20, "sample_every_steps": 500, "save_every_steps": 500, "keep_checkpoints": 2, "init_from": None,
    "teacher_dir": None, "teacher_top_k": None,
}  # fmt: skip

PRETRAIN = TrainingConfig()
DISTILL = replace(
    PRETRAIN, run_dir="runs/distill", teacher_dir=PRETRAIN.run_dir, init_from=None, hidden_size=128, num_layers=3,
    num_heads=2, num_kv_heads=1, head_size=None, mlp_size=352,
)  # fmt: skip
GPU_4GB = replace(
    PRETRAIN, **FOR_CARDS, run_dir="runs/gpu-4gb", data_dir="data/gpu-4gb", context_length=2048, hidden_size=1536,
    num_layers=30, num_heads=24, num_kv_heads=6, head_size=64, mlp_size=4096, rope_theta=10000.0, tokens_per_step=2**18,
    micro_batch_rows=4, activation_checkpointing="block", num_steps=61_000, learning_rate=7e-4, min_learning_rate=7e-5,
)  # fmt: skip
GPU_6GB = replace(
    PRETRAIN, **FOR_CARDS, run_dir="runs/gpu-6gb", data_dir="data/gpu-6gb", context_length=2048, hidden_size=2048,
    num_layers=27, num_heads=16, num_kv_heads=8, head_size=128, mlp_size=6144, rope_theta=10000.0, tokens_per_step=2**19,
    micro_batch_rows=4, activation_checkpointing="block", num_steps=54_000, learning_rate=5e-4, min_learning_rate=5e-5,
)  # fmt: skip
GPU_8GB = replace(
    PRETRAIN, **FOR_CARDS, run_dir="runs/gpu-8gb", data_dir="data/gpu-8gb", context_length=2048, hidden_size=2560,
    num_layers=27, num_heads=20, num_kv_heads=4, head_size=128, mlp_size=7680, rope_theta=10000.0, tokens_per_step=2**19,
    micro_batch_rows=4, activation_checkpointing="block", num_steps=80_000, learning_rate=4e-4, min_learning_rate=4e-5,
)  # fmt: skip
GPU_12GB = replace(
    PRETRAIN, **FOR_CARDS, run_dir="runs/gpu-12gb", data_dir="data/gpu-12gb", context_length=4096, hidden_size=3072,
    num_layers=36, num_heads=24, num_kv_heads=8, head_size=128, mlp_size=8192, rope_theta=500_000.0, tokens_per_step=2**20,
    micro_batch_rows=4, activation_checkpointing="block_offload", num_steps=71_000, learning_rate=3e-4, min_learning_rate=3e-5,
)  # fmt: skip
GPU_16GB = replace(
    PRETRAIN, **FOR_CARDS, run_dir="runs/gpu-16gb", data_dir="data/gpu-16gb", context_length=4096, hidden_size=3584,
    num_layers=36, num_heads=28, num_kv_heads=4, head_size=128, mlp_size=9728, rope_theta=500_000.0, tokens_per_step=2**20,
    micro_batch_rows=4, activation_checkpointing="block_offload", num_steps=94_000, learning_rate=3e-4, min_learning_rate=3e-5,
)  # fmt: skip
GPU_24GB = replace(
    PRETRAIN, **FOR_CARDS, run_dir="runs/gpu-24gb", data_dir="data/gpu-24gb", context_length=4096, hidden_size=4096,
    num_layers=36, num_heads=32, num_kv_heads=8, head_size=128, mlp_size=12288, rope_theta=500_000.0, tokens_per_step=2**21,
    micro_batch_rows=4, activation_checkpointing="block_offload", num_steps=68_000, learning_rate=2e-4, min_learning_rate=2e-5,
)  # fmt: skip
GPUS_8X80GB = replace(
    PRETRAIN, **FOR_CARDS, run_dir="runs/gpus-8x80gb", data_dir="data/gpus-8x80gb", context_length=4096, hidden_size=5120,
    num_layers=48, num_heads=40, num_kv_heads=8, head_size=128, mlp_size=17408, rope_theta=500_000.0, tokens_per_step=2**22,
    micro_batch_rows=8, activation_checkpointing="block", num_steps=76_000, learning_rate=2e-4, min_learning_rate=2e-5,
)  # fmt: skip
