"""Entry: corpus -> tokenizer -> shards. Owns the names in data_dir and its manifest, which is written last.

    data_dir/manifest.json  tokenizer.json  train-00000.bin ...  validation-00000.bin ...
    data_dir/labels-0123456789abcdef/train-00000.labels ...  a teacher's labels of each token

Knows nothing of windows but how long one is, nor of the model. To change a value, edit scripts/config.py.
"""

import json
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import tee
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from ds import tokenizer as bpe
from ds.corpus import Reading, Tally, documents, is_held_out, part_documents
from ds.files import CorpusFile, Part, corpus_digest, corpus_files, fixed_part
from ds.loader import count_windows
from ds.shards import LabelStream, TokenStream, open_shard, sync_folder, verify_shard, write_shard
from scripts.config import FEW_DOCUMENTS, PRETRAIN, TrainingConfig, refuse_arguments, refusing
from scripts.run.storage import write_text

FORMAT_VERSION = 1
# Part of the format: a block of labels has at least so many tokens, so that its digest of 32 bytes adds little to it.
LEAST_BLOCK_TOKENS = 64
# The fields that decide the data: the manifest holds them, and data made with other values is refused.
FIELDS = (
    "corpus", "corpus_exclude", "text_field", "validation_fraction", "tokens_per_shard", "vocab_size", "tokenizer_path",
    "begin_of_text", "end_of_text", "tokenizer_sample_bytes",
)  # fmt: skip
# Those that came later; a manifest without them was made with their defaults.
LATER_FIELDS = ("document_separator", "skip_faulty_rows", "validation_corpus")
CUT_OR_NAME = "document_separator cuts a file into documents, and validation_corpus names held-out files"


class Data(NamedTuple):
    """Checked data. No `validation` where nothing is held out; `fingerprint` is the sha256 (hex) of manifest.json."""

    manifest: dict
    train: TokenStream
    validation: TokenStream | None
    tokenizer: Tokenizer
    fingerprint: str

    @property
    def tokenizer_json(self) -> str:
        """The contents of tokenizer.json."""
        return bpe.to_json(self.tokenizer)

    @property
    def end_of_text_id(self) -> int:
        """The id that ends each document."""
        return bpe.end_of_text_id(self.tokenizer)

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`, what is no UTF-8 replaced."""
        return bpe.decode(self.tokenizer, ids).decode(errors="replace")

    def encode(self, text: str) -> list[int]:
        """The ids of `text`."""
        return bpe.encode(self.tokenizer, text.encode()).tolist()

    def token_num_bytes(self) -> list[int]:
        """How many bytes of text each id stands for: (V,)."""
        return [len(piece) for piece in bpe.token_bytes(self.tokenizer)]

    def refuse_other_tokenizer(self, model_dir: str | Path, what: str) -> None:
        """Raises ValueError, which begins with `what`, unless the tokenizer of the model in `model_dir` is the shards'."""
        found = bpe.difference(self.tokenizer, bpe.load(model_dir, end_of_text=self.manifest.get("end_of_text")))
        if found is not None:
            raise ValueError(
                f"{what}: its tokenizer is not that of the shards in {self._folder}: {found}; prepare the data in another"
                f" data_dir with tokenizer_path={str(model_dir)!r}"
            )

    def labels(self, top_k: int, context_length: int, vocab_size: int, identity: str) -> LabelStream:
        """The files beside the shards that keep a teacher's labels of the training windows; the first call makes them empty.

        `identity` (sha256 hex) tells the teacher and the settings that made them. Raises ValueError when the labels there are
        not of these shards or this identity, or when there is no room for them.
        """
        labels = LabelStream(
            folder=self._folder / f"labels-{identity[:16]}",
            stream=self.train,
            top_k=top_k,
            vocab_size=vocab_size,
            block_tokens=context_length * -(-LEAST_BLOCK_TOKENS // context_length),
            num_positions=count_windows(self.train.num_tokens, context_length) * context_length,
            identity=identity,
        )
        try:
            labels.create()
        except OSError as fault:
            raise ValueError(
                f"{labels.folder} cannot be written ({fault.strerror}); make room for the teacher's labels"
            ) from None
        labels.check()
        return labels

    @property
    def _folder(self) -> Path:
        return self.train.shards[0].path.parent


def prepare(config: TrainingConfig) -> Data:
    """Opens data_dir, which it builds first when there is no manifest; a failed build leaves what was there untouched.

    Raises ValueError when the corpus or the tokenizer is unfit, or as `open_data`.
    """
    if not _manifest_path(config).exists():
        _build(config)
    return open_data(config)


def open_data(config: TrainingConfig) -> Data:
    """Opens what `prepare` built, hashes every shard and checks all against the config; writes nothing.

    Raises ValueError when there is no manifest, a field or the corpus has changed, the tokenizer or a shard is damaged, missing
    or not the manifest's, or a split is shorter than one window.
    """
    content = _read_manifest(config)
    manifest = json.loads(content)
    _check_fields(config, manifest)
    _check_corpus(config, manifest)
    tokenizer = _open_tokenizer(config, manifest)
    train = _open_split(config, manifest, "train")
    validation = _open_split(config, manifest, "validation") if config.has_validation else None
    _check_windows(config, train.num_tokens, validation.num_tokens if validation else 0)
    return Data(manifest, train, validation, tokenizer, sha256(content).hexdigest())


def sample_documents(config: TrainingConfig, files: list[CorpusFile]) -> Iterator[bytes]:
    """Training documents for the tokenizer: each file gives in proportion to its size, tokenizer_sample_bytes in all."""
    held_out = _held_out_test(config)
    corpus_bytes = sum(file.num_bytes for file in files) or 1
    num_due, num_taken = 0.0, 0
    for file in files:
        num_due += config.tokenizer_sample_bytes * file.num_bytes / corpus_bytes
        if num_taken >= num_due:
            continue
        for document in part_documents(Part(file.path, 0, None), _reading(config), Tally()):
            if held_out(document):
                continue
            yield document[: config.tokenizer_sample_bytes - num_taken]
            num_taken += len(document)
            if num_taken >= num_due:
                break


def main() -> None:
    """`python scripts/prepare_data.py`; exit status 0, or 2 when it refuses."""
    with refusing():
        refuse_arguments(sys.argv[1:])
        data = prepare(PRETRAIN)
    print(f"data: {data.train.num_tokens:,} training tokens in {PRETRAIN.data_dir}")


class _ShardEntry(NamedTuple):
    """What the manifest says of one shard; `sha256` in hex."""

    name: str
    num_tokens: int
    sha256: str


@dataclass
class _Split:
    """One split while it is built: counts, the shards that are written, the ids that wait for the next shard."""

    name: str
    folder: Path
    config: TrainingConfig
    fingerprint: str
    num_documents: int = 0
    num_bytes: int = 0
    num_tokens: int = 0
    shards: list[dict] = field(default_factory=list)
    waiting: list[np.ndarray] = field(default_factory=list)
    num_waiting: int = 0

    def add(self, document: bytes, ids: np.ndarray) -> None:
        """Takes a document and its (T,) ids, and writes every shard that is full."""
        self.num_documents += 1
        self.num_bytes += len(document)
        while len(ids):
            taken, ids = np.split(ids, [self.config.tokens_per_shard - self.num_waiting])
            self.waiting.append(taken)
            self.num_waiting += len(taken)
            if self.num_waiting == self.config.tokens_per_shard:
                self.write_waiting()

    def write_waiting(self) -> None:
        """Writes the ids that wait, if there are any, as one shard."""
        if not self.num_waiting:
            return
        path = self.folder / f"{self.name}-{len(self.shards):05d}.bin"
        num_tokens = write_shard(path, self.waiting, self.config.vocab_size, self.fingerprint)
        self.shards.append(_ShardEntry(path.name, num_tokens, open_shard(path).sha256)._asdict())
        self.num_tokens += num_tokens
        self.waiting, self.num_waiting = [], 0

    def summary(self) -> dict:
        return {name: getattr(self, name) for name in ("num_documents", "num_bytes", "num_tokens", "shards")}


def _manifest_path(config: TrainingConfig) -> Path:
    return Path(config.data_dir) / "manifest.json"


def _build(config: TrainingConfig) -> None:
    _check_apart(config)
    files = corpus_files(config.corpus, config.corpus_exclude)
    num_bytes = sum(file.num_bytes for file in files)
    print(f"corpus: {len(files):,} files, {num_bytes / 1e6:.1f} MB", flush=True)
    try:
        with _building_folder(Path(config.data_dir)) as folder:
            _build_in(folder, config, files)
            _move(folder, Path(config.data_dir))
    except OSError as error:
        raise ValueError(f"data_dir={config.data_dir!r} cannot be written ({error.strerror}); name another folder") from error


def _check_apart(config: TrainingConfig) -> None:
    for entry in config.corpus + config.validation_corpus:
        root = Path(entry) if Path(entry).is_dir() else fixed_part(Path(entry)) if "**" in entry else None
        for name in ("data_dir", "run_dir"):
            path = getattr(config, name)
            if root is not None and Path(path).resolve().is_relative_to(root.resolve()):
                raise ValueError(f"{name}={path!r} lies in the corpus {entry!r} and would become text; name a folder outside")


@contextmanager
def _building_folder(data_dir: Path) -> Iterator[Path]:
    """A folder inside data_dir for this process, removed at the end; those of dead processes of this machine go too."""
    owner = f"building-{socket.gethostname()}-"
    for left in data_dir.glob(f"{owner}*"):
        process = left.name.removeprefix(owner)
        if process.isdecimal() and not _is_alive(int(process)):
            shutil.rmtree(left)
    folder = data_dir / f"{owner}{os.getpid()}"
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return process != os.getpid()


def _build_in(folder: Path, config: TrainingConfig, files: list[CorpusFile]) -> None:
    tokenizer = _make_tokenizer(config, files)
    print(f"tokenizer: {config.vocab_size} tokens", flush=True)
    fingerprint, held_out, tally = bpe.fingerprint(tokenizer), _held_out_test(config), Tally()
    train, validation = (_Split(name, folder, config, fingerprint) for name in ("train", "validation"))
    num_in_both, validation_files = 0, corpus_files(config.validation_corpus, config.corpus_exclude)
    for document, ids in _encoded(config, tokenizer, files, tally):
        is_out = held_out(document)
        num_in_both += is_out and bool(validation_files)
        if not is_out or not validation_files:
            (validation if is_out else train).add(document, ids)
    for document, ids in _encoded(config, tokenizer, validation_files, tally) if validation_files else ():
        validation.add(document, ids)
    train.write_waiting()
    validation.write_waiting()
    _report(config, tally, num_in_both)
    _check_windows(config, train.num_tokens, validation.num_tokens)
    bytes_per_token = (train.num_bytes + validation.num_bytes) / (train.num_tokens + validation.num_tokens)
    counts = f"{train.num_tokens:,} training tokens, {validation.num_tokens:,} held out"
    print(f"shards: {counts}, {bytes_per_token:.2f} bytes a token", flush=True)
    write_text(folder / "tokenizer.json", bpe.to_json(tokenizer))
    digests = {"corpus_digest": corpus_digest(files), "validation_corpus_digest": corpus_digest(validation_files)}
    head = {"format_version": FORMAT_VERSION, **_fields(config, FIELDS + LATER_FIELDS), **digests}
    met = {f"num_{kind}": tally.counts.get(kind, 0) for kind in ("empty", "invalid", "faulty")} | {"num_in_both": num_in_both}
    splits = {split.name: split.summary() for split in (train, validation)}
    manifest = head | {"tokenizer_fingerprint": fingerprint} | met | splits
    write_text(folder / "manifest.json", json.dumps(manifest, indent=1) + "\n")


def _reading(config: TrainingConfig) -> Reading:
    return Reading(config.text_field, config.document_separator, config.skip_faulty_rows)


def _held_out_test(config: TrainingConfig) -> Callable[[bytes], bool]:
    """Tells whether a document of the corpus is held out: it is in validation_corpus, or its hash says so."""
    if not config.validation_corpus:
        return lambda document: is_held_out(document, config.validation_fraction)
    files = corpus_files(config.validation_corpus, config.corpus_exclude)
    parts = [Part(file.path, 0, None) for file in files]
    held_out = {sha256(document).digest() for document in documents(parts, _reading(config), Tally())}
    return lambda document: sha256(document).digest() in held_out


def _encoded(config: TrainingConfig, tokenizer: Tokenizer, files: list[CorpusFile], tally: Tally) -> zip:
    """Each document with its (T,) ids and the end of text."""
    plain, to_encode = tee(documents([Part(file.path, 0, None) for file in files], _reading(config), tally))
    end_of_text_id = bpe.end_of_text_id(tokenizer)
    encoded = (bpe.with_end_of_text(ids, end_of_text_id) for ids in bpe.encode_documents(tokenizer, to_encode))
    return zip(plain, encoded, strict=True)


def _report(config: TrainingConfig, tally: Tally, num_in_both: int) -> None:
    documents, invalid, empty, faulty = (tally.counts.get(kind, 0) for kind in ("documents", "invalid", "empty", "faulty"))
    skipped = f"{empty:,} empty, {faulty:,} faulty rows skipped"
    print(f"documents: {documents:,}, {invalid:,} not UTF-8; {skipped}, {num_in_both:,} left to held out", flush=True)
    notes = {
        "faulty": "faulty rows",
        "separator": "files that may be many documents",
        "json": ".json files read as text, not rows",
    }
    for kind in [kind for kind in notes if kind in tally.first]:
        print(f"note: {tally.counts[kind]:,} {notes[kind]}, the first: {tally.first[kind]}", flush=True)
    if documents < FEW_DOCUMENTS and config.has_validation and not config.validation_corpus:
        print(f"note: only {documents} documents, each held out whole or not at all; {CUT_OR_NAME}", flush=True)


def _make_tokenizer(config: TrainingConfig, files: list[CorpusFile]) -> Tokenizer:
    if config.vocab_size == 257:
        return bpe.raw_bytes()
    if config.tokenizer_path is None:
        return bpe.train(sample_documents(config, files), config.vocab_size)
    tokenizer = bpe.load(config.tokenizer_path, begin_of_text=config.begin_of_text, end_of_text=config.end_of_text)
    num_ids = bpe.vocab_size(tokenizer)
    if config.vocab_size not in (num_ids, _padded_vocab_size(config.tokenizer_path, num_ids)):
        raise ValueError(
            f"vocab_size={config.vocab_size} is not that of tokenizer_path={config.tokenizer_path!r}; nearest is {num_ids}"
        )
    return tokenizer


def _padded_vocab_size(path: str, num_ids: int) -> int | None:
    """The rows of the embedding of the model whose folder or tokenizer `path` is: some have more than there are ids."""
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    try:
        size = json.loads((folder / "config.json").read_text())["vocab_size"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return size if isinstance(size, int) and size > num_ids else None


def _move(folder: Path, data_dir: Path) -> None:
    for path in sorted(folder.iterdir(), key=lambda path: path.name == "manifest.json"):
        if path.name == "manifest.json":
            sync_folder(data_dir)
        os.replace(path, data_dir / path.name)
    sync_folder(data_dir)


def _fields(config: TrainingConfig, names: tuple[str, ...]) -> dict:
    return json.loads(json.dumps({name: getattr(config, name) for name in names}))


def _read_manifest(config: TrainingConfig) -> bytes:
    """The bytes of manifest.json, once it is known to be JSON of this version."""
    path = _manifest_path(config)
    try:
        content = path.read_bytes()
        version = json.loads(content)["format_version"]
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); run scripts/prepare_data.py") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged; {_delete(config)}") from error
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} is of version {version}, not of version {FORMAT_VERSION}; {_delete(config)}")
    return content


def _delete(config: TrainingConfig) -> str:
    return f"delete data_dir={config.data_dir!r}, or name another, and prepare the data again"


def _check_fields(config: TrainingConfig, manifest: dict) -> None:
    fields = _fields(config, FIELDS + LATER_FIELDS).items()
    manifest = _fields(TrainingConfig(), LATER_FIELDS) | manifest
    changed = [f"{name}={value!r} was {manifest.get(name)!r}" for name, value in fields if manifest.get(name) != value]
    if changed:
        raise ValueError(f"data_dir={config.data_dir!r} was prepared otherwise: {', '.join(changed)}; {_delete(config)}")


def _check_corpus(config: TrainingConfig, manifest: dict) -> None:
    try:
        files, held_out = (corpus_files(names, config.corpus_exclude) for names in (config.corpus, config.validation_corpus))
    except ValueError:
        return  # The corpus need not be on the machine that trains.
    is_same = not held_out or corpus_digest(held_out) == manifest.get("validation_corpus_digest")
    if not is_same or corpus_digest(files) != manifest.get("corpus_digest"):
        raise ValueError(
            f"corpus has changed since data_dir={config.data_dir!r} was prepared; to go on with that data put the corpus back"
            " or move it away, for the new corpus name another data_dir and another run_dir"
        )


def _open_tokenizer(config: TrainingConfig, manifest: dict) -> Tokenizer:
    try:
        is_old = "begin_of_text" not in manifest  # its documents begin with their text, whatever the template says
        tokenizer = bpe.load(Path(config.data_dir) / "tokenizer.json", begin_of_text=False if is_old else None)
    except ValueError as error:
        raise ValueError(f"{str(error).split(';')[0]}; {_delete(config)}") from error
    if bpe.fingerprint(tokenizer) != manifest.get("tokenizer_fingerprint"):
        raise ValueError(f"{config.data_dir}/tokenizer.json differs from the tokenizer of the shards; {_delete(config)}")
    return tokenizer


def _open_split(config: TrainingConfig, manifest: dict, name: str) -> TokenStream:
    try:
        entries = [_ShardEntry(**entry) for entry in manifest[name]["shards"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{_manifest_path(config)} is damaged; {_delete(config)}") from error
    paths = [Path(config.data_dir, entry.name) for entry in entries]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(verify_shard, paths))
    shards = tuple(map(open_shard, paths))
    for shard, entry in zip(shards, entries, strict=True):
        if (len(shard.ids), shard.sha256) != (entry.num_tokens, entry.sha256):
            raise ValueError(f"{shard.path} is not the shard that manifest.json names; {_delete(config)}")
    return TokenStream(shards, manifest["tokenizer_fingerprint"])


def _check_windows(config: TrainingConfig, num_train: int, num_validation: int) -> None:
    checks = [("training", num_train, "add documents or lower context_length")]
    if config.has_validation:
        remedy = "raise validation_fraction, add documents, or set validation_fraction=0 and eval_every_steps=None"
        remedy = "add files to validation_corpus" if config.validation_corpus else f"{remedy}; {CUT_OR_NAME}"
        checks.append(("held-out", num_validation, remedy))
    for kind, num_tokens, remedy in checks:
        if not count_windows(num_tokens, config.context_length):
            words = f"{num_tokens} tokens are fewer than context_length + 1 = {config.context_length + 1}"
            raise ValueError(f"corpus too small for one {kind} window: {words}; {remedy}")


if __name__ == "__main__":
    main()
