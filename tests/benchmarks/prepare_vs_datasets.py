"""MB/s and memory of a preparation beside `datasets.map` with the same tokenizer and as many processes, and what takes time.

`python tests/benchmarks/prepare_vs_datasets.py` needs `pip install datasets`, 12 GB of disk and half an hour. It prints and
writes tests/benchmarks/results/prepare_vs_datasets.json. Rows of JSON from this Python's own sources, in turns; each process
begins with an empty cache of its own. Memory is the sum of what the processes hold alone and their shares of the rest (PSS).
"""

import json
import os
import platform
import random
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import psutil

ROOT = Path(__file__).parents[2]
RESULT = Path(__file__).parent / "results" / "prepare_vs_datasets.json"
ROUNDS, SMALL_BYTES, LARGE_BYTES = 3, 120_000_000, 5_000_000_000
VOCAB_SIZES = (2048, 32768)
OURS = """
import sys
from scripts.config import TrainingConfig
from scripts.prepare_data import prepare
if __name__ == "__main__":
    corpus, folder, tokenizer, vocab_size = sys.argv[1:]
    prepare(TrainingConfig(
        corpus=(corpus,), corpus_exclude=(), data_dir=folder + "/data", run_dir=folder + "/run", vocab_size=int(vocab_size),
        tokenizer_path=tokenizer or None,
    ))
"""
THEIRS = """
import os, sys
corpus, folder, tokenizer, _ = sys.argv[1:]
os.environ |= {"HF_HOME": folder, "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
from datasets import load_dataset
from tokenizers import Tokenizer
if __name__ == "__main__":
    fast = Tokenizer.from_file(tokenizer)
    encode = lambda rows: {"ids": [each.ids for each in fast.encode_batch_fast(rows["text"], add_special_tokens=False)]}
    rows = load_dataset("json", data_files=corpus, split="train")
    rows.map(encode, batched=True, num_proc=len(os.sched_getaffinity(0)), remove_columns=["text"])
"""
PARTS = """
import sys, time
from itertools import islice
from ds import tokenizer as bpe
from ds.corpus import Reading, Tally, documents
from ds.encoder import encode_documents, encoder_of, plain_encoder
from ds.files import Part
corpus, _, path, _ = sys.argv[1:]
start = time.perf_counter()
with open(corpus, "rb") as file:
    while file.read(2**20):
        pass
disk = time.perf_counter()
found = list(documents([Part(corpus, 0, None)], Reading("text", None, False), Tally()))
read = time.perf_counter()
tokenizer = bpe.load(path)
encoder = encoder_of(tokenizer)
some = found[: len(found) // 4]
made = time.perf_counter()
for _ in encode_documents(encoder, some, 1):
    pass
encoded = time.perf_counter()
for _ in encode_documents(plain_encoder(tokenizer), some, 1):
    pass
num_bytes = sum(map(len, some))
print(disk - start, read - disk, num_bytes / (encoded - made) / 1e6, num_bytes / (time.perf_counter() - encoded) / 1e6)
"""


class Taken(NamedTuple):
    """What a process and its children took."""

    seconds: float
    peak_gib: float


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small = write_corpus(folder / "small.jsonl", SMALL_BYTES)
        for vocab_size in VOCAB_SIZES:
            rows.append(compare(folder, small, vocab_size))
        large = write_corpus(folder / "large.jsonl", LARGE_BYTES)
        taken = run(OURS, folder, large, folder / f"tokenizer-{VOCAB_SIZES[0]}.json", VOCAB_SIZES[0])
        rows.append(
            {"corpus_gb": LARGE_BYTES / 1e9, "mb_per_second": LARGE_BYTES / 1e6 / taken.seconds, "peak_gib": taken.peak_gib}
        )
    publish(rows)


def compare(folder: Path, corpus: Path, vocab_size: int) -> dict:
    """Both ways in turns, and the parts of ours."""
    tokenizer = make_tokenizer(folder, corpus, vocab_size)
    ours, theirs = [], []
    for _ in range(ROUNDS):
        ours.append(run(OURS, folder, corpus, tokenizer, vocab_size))
        theirs.append(run(THEIRS, folder, corpus, tokenizer, vocab_size))
    megabytes = corpus.stat().st_size / 1e6
    words = [sys.executable, "-c", PARTS, str(corpus), "", str(tokenizer), ""]
    done = subprocess.run(
        words, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True, capture_output=True, text=True
    )
    disk, read, fast, plain = map(float, done.stdout.split())
    return {
        "vocab_size": vocab_size,
        "ours_mb_per_second": megabytes / statistics.median(each.seconds for each in ours),
        "datasets_mb_per_second": megabytes / statistics.median(each.seconds for each in theirs),
        "times_as_fast": statistics.median(b.seconds / a.seconds for a, b in zip(ours, theirs, strict=True)),
        "ours_peak_gib": max(each.peak_gib for each in ours),
        "datasets_peak_gib": max(each.peak_gib for each in theirs),
        "disk_mb_per_second": megabytes / disk,
        "rows_to_documents_mb_per_second": megabytes / read,
        "tiktoken_mb_per_second": fast,
        "tokenizers_mb_per_second": plain,
    }


def write_corpus(path: Path, num_bytes: int) -> Path:
    """Rows of some hundred words each from the standard library; no two of them are the same."""
    draw, words = random.Random(0), []
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        words += file.read_text(errors="replace").split(" ")
    with path.open("w") as file:
        while file.tell() < num_bytes:
            first = draw.randrange(len(words) - 1500)
            text = " ".join([str(draw.random()), *words[first : first + draw.randint(50, 1500)]])
            file.write(json.dumps({"text": text}) + "\n")
    return path


def make_tokenizer(folder: Path, corpus: Path, vocab_size: int) -> Path:
    """The tokenizer that a preparation of the corpus trains; it marks no beginning of documents."""
    sys.path.insert(0, str(ROOT))
    from ds import tokenizer as bpe
    from ds.corpus import Reading, Tally, documents
    from ds.files import Part

    path, sample, num_bytes = folder / f"tokenizer-{vocab_size}.json", [], 0
    for document in documents([Part(str(corpus), 0, None)], Reading("text", None, False), Tally()):
        sample.append(document)
        num_bytes += len(document)
        if num_bytes > 2**25:
            break
    path.write_text(bpe.to_json(bpe.train(sample, vocab_size)))
    return path


def run(code: str, folder: Path, corpus: Path, tokenizer: Path, vocab_size: int) -> Taken:
    """Runs `code` as a script in a folder of its own, and looks at the memory of it and its children."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        script = Path(name) / "script.py"
        script.write_text(code)
        words = [sys.executable, str(script), str(corpus), name, str(tokenizer), str(vocab_size)]
        start, peak_bytes = time.perf_counter(), 0
        process = subprocess.Popen(words, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL)
        while process.poll() is None:
            peak_bytes = max(peak_bytes, held_bytes(process.pid))
            time.sleep(1)
        assert process.returncode == 0, code
        return Taken(time.perf_counter() - start, peak_bytes / 2**30)


def held_bytes(process: int) -> int:
    """PSS of a process and all below it."""
    total = 0
    try:
        for each in [psutil.Process(process), *psutil.Process(process).children(recursive=True)]:
            total += each.memory_full_info().pss
    except psutil.Error:
        pass
    return total


def publish(rows: list[dict]) -> None:
    """Prints and writes what was measured."""
    machine = {"cores": len(os.sched_getaffinity(0)), "processor": platform.processor(), "python": platform.python_version()}
    versions = {name: version(name) for name in ("datasets", "tokenizers", "tiktoken", "pyarrow", "numpy")}
    RESULT.write_text(json.dumps({"machine": machine, "versions": versions, "rows": rows}, indent=1) + "\n")
    for row in rows:
        print(", ".join(f"{name} {value:,.2f}" for name, value in row.items()))


if __name__ == "__main__":
    main()
