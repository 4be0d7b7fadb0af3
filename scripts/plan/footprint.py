"""The plan: bytes by kind at every moment of a run, from the configuration alone. Builds nothing and looks at no machine.

Letters are decoder.py's: B rows, T positions, D width, H heads, G kv heads, K head width, F mlp, V vocabulary; besides,
M = B * T tokens of a micro-batch, L layers, C tokens of a loss chunk, N parameters, k ids of a label. A rank is one process;
"the device" is its GPU, or host memory in a run without one.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from scripts import config as settings
from scripts.config import COMPILED_ON, PRECISIONS, TrainingConfig
from scripts.model.attention import backward_kernel_bytes, flash_attends, host_bytes, padded_width
from scripts.model.huggingface import teacher_config
from scripts.model.operations import product_dtype
from scripts.plan.machine import moments_bytes, pinned_bytes

PHASES = ("initialisation", "training step", "save and load")
TEACHER_ALONE = "teacher alone"
HOST_MOMENTS = {
    TEACHER_ALONE: "reading weights and writing labels", "initialisation": "DeepSpeed's copies", "training step": "the update",
    "save and load": "reading and writing files",
}  # fmt: skip
BLOCK_PARTS = ("an MLP's last product", "an MLP's first products", "attention", "attention's first products")
LABEL_CHUNK_BYTES, LABEL_COPIES = 24, 4
DOCUMENT_BYTES, WINDOW_BYTES = 19, 33


class Moment(NamedTuple):
    """A moment's name, and bytes by kind that are held then."""

    name: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes of all kinds."""
        return sum(self.parts.values())


class Plan(NamedTuple):
    """One rank's largest moment of each phase on the `device` and on the `host` beside it, and bytes on the `disk`."""

    device_type: str
    device: dict[str, Moment]
    host: dict[str, Moment]
    disk: dict[str, int]


def phases(config: TrainingConfig) -> tuple[str, ...]:
    """A run's phases in their order. With `teacher_top_k` the teacher's own comes first, before anything of the student."""
    return PHASES if config.teacher_top_k is None else (TEACHER_ALONE, *PHASES)


def plan(config: TrainingConfig, world_size: int, device_type: str | None = None) -> Plan:
    """Bytes by kind of one of `world_size` ranks at the largest moment of each phase, from the configuration alone.

    `device_type` is "cuda", "cpu" for a run without a GPU, whose device is host memory too, or None for "cuda", whatever this
    machine has. The host's bytes are one rank's: a machine needs them once for each rank that it runs. Raises ValueError when
    teacher_dir describes no model, or the batch does not divide over `world_size` ranks.
    """
    kind, names = device_type or "cuda", phases(config)
    device = {phase: max(device_moments(config, world_size, kind, phase), key=lambda at: at.total) for phase in names}
    return Plan(kind, device, {phase: _host_moment(config, world_size, kind, phase) for phase in names}, _disk(config))


def device_moments(config: TrainingConfig, world_size: int, device_type: str, phase: str) -> Iterator[Moment]:
    """What one rank holds on the device at each moment of a phase that can be its largest, without kinds of zero bytes.

    On a GPU, CUDA's own memory and the allocator's count, and cuBLAS's workspaces for the main thread and autograd's. On
    several ranks NCCL's communicators do too, of the world and of DeepSpeed's clone of it (deepspeed/utils/groups.py).
    """
    for at in _moments(_Model(config, device_type), world_size, phase):
        parts = {kind: num_bytes for kind, num_bytes in at.parts.items() if num_bytes}
        if device_type == "cuda":
            parts["cuBLAS's workspaces"] = settings.CUBLAS_WORKSPACE_BYTES
            parts["allocator's slack"] = int(settings.ALLOCATOR_SLACK_SHARE * sum(parts.values()))
            parts["CUDA and its libraries"] = settings.CUDA_CONTEXT_BYTES + settings.CUDA_LIBRARIES_BYTES
            if world_size > 1:
                parts["NCCL's communicators"] = 2 * settings.NCCL_COMMUNICATOR_BYTES
        yield Moment(at.name, parts)


def checkpoint_bytes(config: TrainingConfig) -> int:
    """Bytes of a checkpoint's tensors, all ranks together: N weights, float32 masters and moments."""
    return config.num_parameters * (config.dtype.itemsize + 4) + moments_bytes(config)


class _Model:
    """A model and its micro-batch on one kind of device.

    `storage` and `products` are bytes of an element in weights and in matrix products, `cast` those of one that is copied for
    products (0 where they read it as stored). The others are counts: `tokens` M, `places` of tokens in groups of documents, M
    where they are not masked, `chunk` C, `queries` H * K, `keys` G * K, `padded_queries` and `padded_keys` with the zeros that
    a GPU's attention needs; `rows` are the tokens that operations without a GPU take at a time, `wide_logits` the elements.
    """

    def __init__(self, config: TrainingConfig, device_type: str) -> None:
        self.config, self.device_type, self.storage = config, device_type, config.dtype.itemsize
        self.products = product_dtype(config.dtype, torch.device(device_type)).itemsize
        self.cast = self.products * (self.products != self.storage)
        self.tokens = config.micro_batch_rows * config.context_length
        is_grouped = config.mask_across_documents and device_type == "cuda"
        self.places = self.tokens + self.tokens // 4 * is_grouped
        self.rows, self.chunk = min(self.tokens, settings.HOST_CHUNK_ROWS), min(self.tokens, config.loss_chunk_rows)
        self.width, self.mlp, self.vocabulary = config.hidden_size, config.mlp_size, config.vocab_size
        self.queries, self.keys = config.num_heads * config.head_width, config.num_kv_heads * config.head_width
        self.padded_head = padded_width(config.head_width) if device_type == "cuda" else config.head_width
        self.padded_queries, self.padded_keys = (heads * self.padded_head for heads in (config.num_heads, config.num_kv_heads))
        self.hidden_bytes = self.storage * self.tokens * self.width
        self.made_logits_bytes = self.chunk * self.vocabulary * (4 + self.products * (self.products < 4))
        at_once = max(1, settings.HOST_CHUNK_LOGITS // self.vocabulary) if device_type == "cpu" else self.chunk
        self.wide_logits = min(self.chunk, at_once) * self.vocabulary

    def cast_bytes(self, num_rows: int) -> int:
        """A copy of (num_rows, D) elements for matrix products."""
        return self.cast * num_rows * self.width

    def has_flash(self, needs_gradient: bool) -> bool:
        """Whether attention needs no copy of k and v for every head: not even on the worst GPU, and never without one."""
        config = self.config
        return self.device_type == "cpu" or flash_attends(None, config.dtype, config.head_width, needs_gradient)

    def attended_keys(self, needs_gradient: bool) -> int:
        """Elements a token of k, or of v, as attention reads them."""
        return self.padded_keys if self.has_flash(needs_gradient) else self.padded_queries


def _teacher_beside(student: _Model) -> _Model | None:
    """The teacher that is on the device together with the student; with `teacher_top_k` it never is."""
    teacher = teacher_config(student.config) if student.config.teacher_top_k is None else None
    return None if teacher is None else _Model(teacher, student.device_type)


def _moments(student: _Model, world_size: int, phase: str) -> Iterator[Moment]:
    config, held = student.config, _held(student, world_size)
    largest = max(_group_elements(config))
    if phase == TEACHER_ALONE:
        yield from _teacher_before_student(student)
    elif phase == "initialisation":
        yield from () if config.teacher_top_k else _teacher_before_student(student)
        kept = {kind: held[kind] for kind in ("weights", "optimizer state", "teacher")}
        yield Moment("flattening the weights", kept | {"one group, flattened by DeepSpeed": largest * student.storage})
        yield Moment("making the sums", kept | {"sums of gradients": held["sums of gradients"]})
    elif phase == "training step":
        for at in _micro_batch(student, world_size):
            yield Moment(at.name, held | at.parts)
        piece = 24 * min(largest // world_size, settings.GRADIENT_PIECE_ELEMENTS) * (config.optimizer_state_precision == "bf16")
        cast = max(4 * largest // world_size + piece, 8 * _largest_matrix(config)) * (not config.offload_optimizer)
        update = {"one group's gradient, cast by DeepSpeed": cast} | _orthogonal(student, world_size)
        yield Moment("the update", held | update)
    else:
        yield Moment("writing the weights", held)


def _held(student: _Model, world_size: int) -> dict[str, int]:
    config, teacher = student.config, _teacher_beside(student)
    own, sums = -(-config.num_parameters // world_size), PRECISIONS[config.accumulation_precision].itemsize
    return {
        "weights": config.num_parameters * student.storage,
        "sums of gradients": own * sums * (config.accumulate_on == "gpu"),
        "optimizer state": 0 if config.offload_optimizer else own * 4 + -(-moments_bytes(config) // world_size),
        "teacher": 0 if teacher is None else teacher.config.num_parameters * teacher.storage,
        "DeepSpeed's bucket": config.bucket_elements * student.storage if world_size > 1 else 0,
    }


def _group_elements(config: TrainingConfig) -> list[int]:
    """Parameters of the optimizer's groups: the embedding or head, a block's matrices, all norms."""
    matrices = config.block_matrix_parameters
    norms = config.num_layers * (config.block_parameters - matrices) + config.hidden_size
    return [config.vocab_size * config.hidden_size, matrices, norms]


def _largest_matrix(config: TrainingConfig) -> int:
    return config.hidden_size * max(config.vocab_size, config.mlp_size, config.num_heads * config.head_width)


def _orthogonal(student: _Model, world_size: int) -> dict[str, int]:
    """Muon's work on one block, whose matrices are on every rank, and on its largest."""
    config, block = student.config, student.config.block_matrix_parameters
    short, long = sorted((config.hidden_size, max(config.mlp_size, config.num_heads * config.head_width)))
    iterating = student.storage * short * long + student.products * short * (2 * long + 2 * short)
    exchanged = (block // world_size + 2 * max(block, world_size * short * long)) * (world_size > 1)
    num_bytes = student.storage * (block + exchanged) + iterating
    return {"one block's matrices in Muon": num_bytes * (config.optimizer == "muon")}


def _inputs(config: TrainingConfig) -> dict[str, int]:
    ids, rotary = config.micro_batch_rows * (config.context_length + 1), config.context_length * config.head_width
    per_token = (4 * config.head_width + DOCUMENT_BYTES) * config.mask_across_documents
    documents = config.micro_batch_rows * config.context_length * per_token
    return {"ids and rotary table": 8 * ids + 4 * rotary, "documents": documents, "labels": _label_bytes(config)}


def _label_bytes(config: TrainingConfig) -> int:
    """A micro-batch's labels in memory: for each token k int32, k float16 and a float32. 0 without `teacher_top_k`."""
    num_bytes = 6 * config.teacher_top_k + 4 if config.teacher_top_k else 0
    return config.micro_batch_rows * config.context_length * num_bytes


def _teacher_before_student(student: _Model) -> Iterator[Moment]:
    """A teacher alone: its forward, its held-out loss, or with `teacher_top_k` labels and a float32 a token of the rest."""
    described, top_k = teacher_config(student.config), student.config.teacher_top_k
    if described is None:
        return
    teacher = _Model(described, student.device_type)
    held = {"teacher": described.num_parameters * teacher.storage} | _inputs(described)
    yield Moment("the teacher's forward", held | {"teacher's forward": _forward_bytes(teacher, False)})
    name, labels, chunk = "the teacher's held-out loss", 0, teacher.made_logits_bytes + teacher.cast_bytes(teacher.chunk)
    if top_k is not None:
        name, labels = "the labels", _label_bytes(student.config) + 4 * teacher.tokens
        chunk = max(chunk, teacher.chunk * (8 * teacher.vocabulary + 12 * top_k))
    hidden = {"teacher's hidden states": teacher.hidden_bytes, "labels": labels}
    yield Moment(name, held | hidden | {"loss chunk": chunk + teacher.cast_bytes(teacher.vocabulary)})


def _micro_batch(student: _Model, world_size: int) -> Iterator[Moment]:
    """What a micro-batch takes beside what is held. The last block's backward comes first and has most activations; in the next
    its gradients are copied down too, as many as scripts/engine/updates.py allows. On several ranks DeepSpeed reduces them in a
    bucket, and a matrix larger than the bucket in two copies of its gradient.
    """
    config, always, block = student.config, _inputs(student.config), _kept_block_bytes(student)
    bucket, several = config.bucket_elements * student.storage, world_size > 1
    is_copied = student.device_type == "cuda" and not several and config.accumulate_on == "cpu"
    down = {"gradients being copied to the host": bucket * is_copied}
    matrix = student.storage * student.vocabulary * student.width
    of_block, of_matrix = ({"gradients being reduced by DeepSpeed": size * several} for size in (bucket, 2 * matrix))
    saved = {"none": config.num_layers * block, "block": config.num_layers * student.hidden_bytes}
    activations = {"saved activations": saved.get(config.activation_checkpointing, student.hidden_bytes)}
    yield from _forwards_with_teacher(student, activations)
    for at in _loss(student):
        yield Moment(at.name, always | activations | at.parts | of_matrix)
    for num_above in range(min(2, config.num_layers)):
        for at in _block_backward(student, block, num_above):
            yield Moment(at.name, always | at.parts | (down if num_above else {}) | of_block)
    yield Moment("the embedding's backward", always | _embedding_backward(student) | down | of_matrix)


def _forwards_with_teacher(student: _Model, activations: dict[str, int]) -> Iterator[Moment]:
    """The forward of a teacher beside the student, and the student's, during which the teacher's hidden states are kept."""
    if (teacher := _teacher_beside(student)) is None:
        return
    yield Moment("the teacher's forward", _inputs(teacher.config) | {"teacher's forward": _forward_bytes(teacher, False)})
    hidden = {"teacher's hidden states": teacher.hidden_bytes} | activations
    block = _forward_bytes(student, True) - student.hidden_bytes
    if student.config.activation_checkpointing == "none":
        block = student.storage * student.tokens * (student.mlp + student.width)
    yield Moment("the forward", _inputs(student.config) | hidden | {"one block's forward": block})


def _forward_bytes(model: _Model, needs_gradient: bool) -> int:
    """The most that a forward which keeps nothing takes: a block's input, and what its attention or its MLP makes of it."""
    s, m, d, q, k = model.storage, model.tokens, model.width, model.queries, model.keys
    projected = s * m * (d + (q + 2 * k) + (q + k if model.config.qk_norm else 0))
    if model.device_type == "cpu":
        return max(4 * s * m * d, *_forward_on_host(model, projected))
    padded, read = model.padded_queries, model.attended_keys(needs_gradient)
    rotating = max(6 * m * q, s * m * q + 6 * m * k)
    padding = s * m * (q + k + padded + 2 * model.padded_keys) * (padded > q)
    sums = 4 * m * model.config.num_heads * (needs_gradient or model.has_flash(False))
    attending = s * m * (2 * padded + 2 * read - k * (read == k)) + sums
    producing = s * m * (padded + q * (padded > q) + d)
    groups = s * (m * (2 * q + k) + model.places * (q + 2 * k + padded)) * (model.places > m)
    attending = groups + attending * model.places // m
    return max(projected + max(rotating, padding, attending, producing), 3 * s * m * (d + model.mlp), 4 * s * m * d)


def _forward_on_host(model: _Model, projected: int) -> Iterator[int]:
    """The moments of a block: q, k and v, attention, its last product, the MLP's first products and its last."""
    s, w, m, r, d, f = model.storage, model.products, model.tokens, model.rows, model.width, model.mlp
    q, k, cast = model.queries, model.keys, model.cast
    yield s * m * (d + q + 2 * k) + cast * d * (q + 2 * k) + _normed_rows(model, q)
    yield projected + host_bytes(model.config, has_backward=False)
    yield projected + s * m * q + cast * (m * q + d * q) + 4 * m * d + s * m * d * (s < 4)
    yield s * m * 2 * (d + f) + cast * 2 * d * f + _normed_rows(model, f)
    yield s * m * (3 * d + 2 * f) + cast * d * f + r * (4 * f + max(4 * f * (s < 4), w * d * (w != s)))


def _normed_rows(model: _Model, widest: int) -> int:
    """Some rows in a norm and a product `widest` wide. The rows before them are kept until these have been made."""
    rows = 4 * model.rows * model.width
    in_norm = rows * (2 + (model.storage < 4) + (model.tokens > model.rows))
    return max(in_norm, rows + model.products * model.rows * widest)


def _kept_block_bytes(model: _Model) -> int:
    """A block's input, hidden states between attention and MLP, q, k, v, attention's output, gate and up, what qk_norm reads,
    a GPU's sums. Without flash attention k and v are kept for every head; with zeros after heads, the output without them too.
    """
    config, q, k, is_grouped = model.config, model.queries, model.keys, model.places > model.tokens
    is_copied = model.padded_queries > q or is_grouped
    elements = model.tokens * (2 * (model.width + model.mlp) + q * is_copied)
    attended = 2 * (model.padded_queries + model.attended_keys(True))
    elements += attended * model.places
    sums = model.places * 4 * config.num_heads * (1 if model.has_flash(True) or not is_grouped else 2)
    sums = sums if model.device_type == "cuda" else 0
    normed = model.storage * (q + k) + 4 * (config.num_heads + config.num_kv_heads)
    return elements * model.storage + sums + model.tokens * (normed if config.qk_norm else 0)


def _loss(student: _Model) -> Iterator[Moment]:
    """The loss, at the chunk in which logits or their gradient take most, and its backward, with what the last norm keeps. A
    chunk's gradient of logits takes three float32 (C, V) with a teacher, two with labels, else one, on the host of fewer rows.
    In fp16 the head's gradient is added up in float32 even of one chunk, and made of float32 on the host.
    """
    teacher, is_split = _teacher_beside(student), student.chunk < student.tokens or student.config.precision == "fp16"
    s, w, head = student.storage, student.products, student.vocabulary * student.width
    last = {"last norm's activations": student.hidden_bytes + 4 * student.tokens}
    hidden, logits = 2 * student.hidden_bytes + 16 * student.tokens, student.chunk * student.vocabulary
    multiplying = w * (logits + max(student.chunk * student.width, min(head, logits) if is_split else head))
    part = min(student.vocabulary, max(1, logits // student.width // 2))
    is_half_on_host = student.config.precision == "fp16" and student.device_type == "cpu"
    multiplying += 4 * student.chunk * (part + student.width) * is_half_on_host
    chunk = hidden + student.cast_bytes(student.chunk) + student.cast_bytes(student.vocabulary)
    made, top_k, beside = w * logits + 4 * student.wide_logits * (w < 4), student.config.teacher_top_k, {}
    if top_k is not None:
        made = 8 * logits + LABEL_CHUNK_BYTES * student.chunk * top_k
    if teacher is not None:
        made = 4 * logits + max(8 * logits, teacher.made_logits_bytes + teacher.cast_bytes(teacher.chunk))
        chunk, beside = chunk + teacher.cast_bytes(teacher.vocabulary), {"teacher's hidden states": teacher.hidden_bytes}
    parts = {"gradients in flight": 4 * head * is_split, "loss chunk": chunk + max(made, multiplying)}
    yield Moment("the loss", last | parts | beside)
    gradients = head * ((4 if is_split else w) + s * (is_split and s < 4 or w != s))
    yield Moment("the loss's backward", last | {"loss chunk": hidden // 2, "gradients in flight": gradients})


def _block_backward(student: _Model, block: int, num_above: int) -> Iterator[Moment]:
    """A block's backward in its order, when `num_above` blocks are done. What it kept, `block` bytes, goes as it is used up."""
    mode, num_left = student.config.activation_checkpointing, student.config.num_layers - num_above
    hidden, gates = student.hidden_bytes, 2 * student.storage * student.tokens * student.mlp
    tied = student.storage * student.vocabulary * student.width * student.config.tie_embeddings
    works = (_work_on_gpu if student.device_type == "cuda" else _work_on_host)(student)
    for part, kept, work in zip(BLOCK_PARTS, (block, block - gates, block - gates - hidden, hidden), works, strict=True):
        if mode == "none":
            saved = {"saved activations": (num_left - 1) * block + kept}
        else:
            inputs = min(num_left, 2) if mode == "block_offload" else num_left
            saved = {"saved activations": inputs * hidden, "one block's recomputation": kept - hidden}
        flying = {"gradients in flight": work.get("gradients in flight", 0) + tied}
        yield Moment(f"the backward of {part}", saved | work | flying)


def _work_on_gpu(model: _Model) -> Iterator[dict[str, int]]:
    """All rows in one product, in the storage dtype. When attention's gradients are made, its output without zeros is gone."""
    s, m, d, f, q = model.storage, model.tokens, model.width, model.mlp, model.queries
    gradient, gates, padded = s * m * d, 2 * s * m * f, model.padded_queries
    yield {"one block's backward": gradient + gates, "gradients in flight": s * d * f}
    yield {"one block's backward": 3 * gradient + gates, "gradients in flight": 2 * s * d * f}
    made = gradient + s * m * (2 * (padded + model.attended_keys(True)) - q * (padded > q))
    if model.places > m:
        made = gradient + s * (m * q + model.places * (3 * padded + 2 * model.attended_keys(True) + q + 2 * model.keys))
    kernel = backward_kernel_bytes(model.config)
    yield {"one block's backward": made, "kernels' own work": kernel, "gradients in flight": s * d * q}
    outputs = q + 2 * model.keys
    yield {"one block's backward": 3 * gradient + s * m * outputs, "gradients in flight": s * d * outputs}


def _work_on_host(model: _Model) -> Iterator[dict[str, int]]:
    """Some rows at a time: those before are kept until the next have been made. Weights and gradients are cast where products
    are wider than storage; `narrow` is a product that is cast to float32. Sums of weights' gradients are float32.
    """
    s, w, m, r, d, f = model.storage, model.products, model.tokens, model.rows, model.width, model.mlp
    last, cast, copied, matrix = m > r, model.cast, 4 * (s < 4), d * f
    gradient, gates, narrow = s * m * d, 2 * s * m * f, w * r * f * (w < 4)
    read, made = r * (2 * copied * f + cast * d), r * 8 * f
    piece = max(read * (1 + last) + made * last, read + made * (1 + last) + narrow, read + made + 4 * r * f + w * matrix)
    yield {"one block's backward": gradient + gates + cast * matrix + piece, "gradients in flight": 4 * matrix}
    yield _first_products_on_host(model, [f, f])
    made = s * m * model.queries + host_bytes(model.config, has_backward=True)
    yield {"one block's backward": gradient + made}
    yield _first_products_on_host(model, [model.queries, model.keys, model.keys])


def _first_products_on_host(model: _Model, widths: list[int]) -> dict[str, int]:
    """The backward of a norm and of products of such widths, all made of its result."""
    s, w, d, rows, last = model.storage, model.products, model.width, 4 * model.rows * model.width, model.tokens > model.rows
    matrix, cast = d * max(widths), model.rows * model.cast * max(widths)
    casting = rows * 4 + cast * (1 + last) + w * matrix
    piece = max(rows * (3 + 3 * last) + cast * last, casting, rows * 3 + cast + s * (s < 4) * d * sum(widths))
    made = s * model.tokens * (2 * d + sum(widths)) + model.cast * d * sum(widths)
    return {"one block's backward": made + piece, "gradients in flight": 4 * d * sum(widths)}


def _embedding_backward(model: _Model) -> dict[str, int]:
    """torch's own on a GPU, sorted, with float32 sums of a few rows each; on the host a float32 sum of the whole table. A tied
    table's gradient is the sum of this one and the head's.
    """
    s, table, hidden = model.storage, model.vocabulary * model.width, model.tokens * model.width
    tied = s * table * model.config.tie_embeddings
    gradients, kernel = 4 * table + max(4 * hidden, s * table) * (s < 4), 0
    if model.device_type == "cuda":
        gradients, kernel = s * table, 4 * model.width * (model.tokens // 10 + min(model.tokens, model.vocabulary))
    flying = {"gradients in flight": max(gradients + tied, 3 * tied)}
    return flying | {"kernels' own work": kernel, "one block's backward": model.hidden_bytes}


def _host_moment(config: TrainingConfig, world_size: int, device_type: str, phase: str) -> Moment:
    own, size = -(-config.num_parameters // world_size), config.dtype.itemsize
    partition, sums = -(-max(_group_elements(config)) // world_size), PRECISIONS[config.accumulation_precision].itemsize
    staging, piece = pinned_bytes(2 * size * partition, device_type), min(partition, settings.GRADIENT_PIECE_ELEMENTS)
    if config.accumulate_on == "gpu":
        staging += 2 * pinned_bytes(sums * piece, device_type) * (device_type == "cuda") + 4 * piece * (sums < 4)
    parts = {"the program": settings.PROGRAM_BYTES[device_type], "the data": settings.DATA_BYTES}
    parts["torch's compiler"] = settings.COMPILER_BYTES[device_type] * (device_type in COMPILED_ON[config.compile_kernels])
    locked = {kind: f"page-locked {kind}" if device_type == "cuda" else kind for kind in ("staging", "block inputs")}
    if phase in (TEACHER_ALONE, "training step"):
        parts["labels being read"] = LABEL_COPIES * _label_bytes(config)
    if phase == TEACHER_ALONE:
        parts["numbers of windows"] = WINDOW_BYTES * (config.num_tokens // config.context_length)
    elif config.offload_optimizer:
        parts |= {"master weights": 4 * own, "gradients": 4 * own * (config.accumulate_on == "cpu")}
        first = {"DeepSpeed's staging, until it is replaced": size * (own + _largest_matrix(config)) + staging}
        moments = {"the optimizer's moments": -(-moments_bytes(config) // world_size), locked["staging"]: staging}
        parts |= first if phase == "initialisation" else moments
    if phase in (TEACHER_ALONE, "save and load"):
        parts["pieces of files"] = settings.FILE_PIECES_BYTES
    if phase in ("training step", "save and load") and config.activation_checkpointing == "block_offload":
        one_input = size * config.micro_batch_rows * config.context_length * config.hidden_size
        parts[locked["block inputs"]] = (config.num_layers - 1) * pinned_bytes(one_input, device_type)
    return Moment(HOST_MOMENTS[phase], {kind: num_bytes for kind, num_bytes in parts.items() if num_bytes})


def _disk(config: TrainingConfig) -> dict[str, int]:
    """Bytes on the disk that are known: the tokens that the run reads and the checkpoints. Metrics and pictures are small."""
    token, num_tokens = 2 if config.vocab_size <= 2**16 else 4, config.num_tokens
    record = 0 if config.teacher_top_k is None else (token + 2) * config.teacher_top_k + 4
    saved = checkpoint_bytes(config) * (config.save_every_steps is not None)
    return {
        "shards of the tokens it reads": num_tokens * token,
        "the teacher's labels": num_tokens * record,
        "checkpoints": config.keep_checkpoints * saved,
        "the best one": saved * (config.eval_every_steps is not None),
        "the one before the decay": saved * (config.decay_steps is not None),
        "the checkpoint being written": saved,
    }
