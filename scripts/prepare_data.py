"""Entry: corpus -> tokenizer -> shards. Owns the names in data_dir and its manifest, which is written last.

    data_dir/manifest.json  tokenizer.json  train-00000.bin ...  validation-00000.bin ...
    data_dir/labels-0123456789abcdef/train-00000.labels ...  a teacher's labels of each token

Knows nothing of windows but how long one is, nor of the model. To change a value, edit scripts/config.py.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer

from ds import pieces as making
from ds import tokenizer as bpe
from ds.corpus import Reading, Tally, documents, is_held_out, part_documents
from ds.encoder import check_token_files, disagreement, encode, encoder_of, plain_encoder
from ds.files import CorpusFile, Part, corpus_digest, corpus_files, fixed_part, is_url, whole_parts
from ds.loader import count_windows
from ds.pieces import SPLITS, Made, Piece, Recipe, Source
from ds.shards import TokenStream, open_shard, sync_folder, verify_shard
from scripts import config as settings
from scripts.config import PRETRAIN, TrainingConfig, refuse_arguments, refusing
from scripts.engine.distributed import Workers, completed
from scripts.plan.machine import room_free
from scripts.report import CUT_OR_NAME, data_notes, data_table, draw_data
from scripts.run.storage import hold, link, write_text

FORMAT_VERSION = 1
BUILDING = "unfinished-shards"
# The fields that decide the data: the manifest holds them, and data made with other values is refused.
FIELDS = (
    "corpus", "corpus_exclude", "text_field", "validation_fraction", "tokens_per_shard", "vocab_size", "tokenizer_path",
    "begin_of_text", "end_of_text", "tokenizer_sample_bytes",
)  # fmt: skip
# Those that came later; a manifest without them was made with their defaults.
LATER_FIELDS = (
    "document_separator", "skip_faulty_rows", "shortest_document_characters", "longest_document_characters",
    "validation_corpus",
)  # fmt: skip


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
        return encode(plain_encoder(self.tokenizer), text.encode()).tolist()

    def token_num_bytes(self) -> list[int]:
        """How many bytes of text each id stands for: (V,)."""
        return [len(piece) for piece in bpe.token_bytes(self.tokenizer)]

    def refuse_other_tokenizer(self, model_dir: str | Path, what: str) -> None:
        """Raises ValueError, which begins with `what`, unless the tokenizer of the model in `model_dir` is the shards'."""
        found = bpe.difference(self.tokenizer, bpe.load(model_dir, end_of_text=self.manifest.get("end_of_text")))
        if found is not None:
            raise ValueError(
                f"{what}: its tokenizer is not that of the shards in {self.folder}: {found}; prepare the data in another"
                f" data_dir with tokenizer_path={str(model_dir)!r}"
            )

    @property
    def sources(self) -> tuple[Source, ...]:
        """Which tokens of `train` each entry of `corpus` gave; empty in data from before manifests said so."""
        return making.train_sources(self.manifest)

    @property
    def held_out_sources(self) -> tuple[Source, ...]:
        """Which tokens of `validation` each entry of `validation_corpus`, or else of `corpus`, gave."""
        return making.held_out_sources(self.manifest)

    @property
    def folder(self) -> Path:
        """Where the shards are."""
        return self.train.shards[0].path.parent


def prepare(config: TrainingConfig) -> Data:
    """Opens data_dir, which it builds first when there is no manifest; a failed build leaves what was there untouched.

    Raises ValueError when the corpus or the tokenizer is unfit, or as `open_data`.
    """
    if not _manifest_path(config).exists():
        _build(config)
    shutil.rmtree(Path(config.data_dir) / BUILDING, ignore_errors=True)  # A kill right at the end leaves it.
    return open_data(config)


def open_data(config: TrainingConfig) -> Data:
    """Opens what `prepare` built, hashes every shard and checks all against the config; writes nothing.

    Raises ValueError when there is no manifest, a field or the corpus has changed, the tokenizer or a shard is damaged, missing
    or not the manifest's, or a split, or with weights a source of the training tokens, is shorter than one window.
    """
    content = _read_manifest(config)
    manifest = json.loads(content)
    _check_fields(config, manifest)
    _check_corpus(config, manifest)
    tokenizer = _open_tokenizer(config, manifest)
    train = _open_split(config, manifest, "train")
    validation = _open_split(config, manifest, "validation") if config.has_validation else None
    _check_windows(config, manifest, train.num_tokens, validation.num_tokens if validation else 0)
    return Data(manifest, train, validation, tokenizer, sha256(content).hexdigest())


def sample_documents(config: TrainingConfig, files: list[CorpusFile]) -> Iterator[bytes]:
    """Training documents for the tokenizer: each file gives in proportion to its size, tokenizer_sample_bytes in all."""
    held_out = _held_out_test(config)
    corpus_bytes, num_due, num_taken = sum(file.num_bytes for file in files) or 1, 0.0, 0
    for file in files:
        num_due += config.tokenizer_sample_bytes * file.num_bytes / corpus_bytes
        if file.tokens or num_taken >= num_due:
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
    """What the manifest says of one shard; `sha256` in hex; `source` counts the entries of the corpus it is made from."""

    name: str
    num_tokens: int
    sha256: str
    source: int = 0


class _Build(NamedTuple):
    """What a build is made from, and the folder where what is finished waits for the rest."""

    config: TrainingConfig
    files: list[CorpusFile]
    held_out: list[CorpusFile]
    folder: Path

    @property
    def head(self) -> dict[str, Any]:
        """What decides the data, as the manifest holds it."""
        digests = {"corpus_digest": corpus_digest(self.files), "validation_corpus_digest": corpus_digest(self.held_out)}
        return {"format_version": FORMAT_VERSION, **_fields(self.config, FIELDS + LATER_FIELDS), **digests}


def _manifest_path(config: TrainingConfig) -> Path:
    return Path(config.data_dir) / "manifest.json"


def _build(config: TrainingConfig) -> None:
    _check_apart(config)
    files, held_out = (corpus_files(names, config.corpus_exclude) for names in (config.corpus, config.validation_corpus))
    check_token_files(files + held_out, config.tokenizer_path, config.vocab_size)
    sizes = [file.num_bytes for file in files + held_out]
    print(f"corpus: {len(sizes):,} files, {sum(sizes) / 1e6:.1f} MB", flush=True)
    try:
        with _building_folder(Path(config.data_dir)) as folder:
            if not _manifest_path(config).exists():
                _check_outside(config)
                _build_in(_Build(config, files, held_out, folder))
    except OSError as error:
        raise ValueError(f"data_dir={config.data_dir!r} cannot be written ({error.strerror}); name another folder") from error


def _check_apart(config: TrainingConfig) -> None:
    for entry in config.corpus + config.validation_corpus:
        root = Path(entry) if Path(entry).is_dir() else fixed_part(Path(entry)) if "**" in entry else None
        for name in ("data_dir", "run_dir"):
            path = getattr(config, name)
            if root is not None and Path(path).resolve().is_relative_to(root.resolve()):
                raise ValueError(_inside(name, config, entry))


def _inside(name: str, config: TrainingConfig, entry: str) -> str:
    return f"{name}={getattr(config, name)!r} lies in the corpus {entry!r} and would become text; name a folder outside"


def _check_outside(config: TrainingConfig) -> None:
    """Raises ValueError where the corpus reaches data_dir by a link or a wildcard, as a file beside the shards shows."""
    data_dir = Path(config.data_dir).resolve()
    with NamedTemporaryFile(prefix=f"{SPLITS[0]}-", suffix=".bin", dir=data_dir):
        for entry in config.corpus + config.validation_corpus:
            found = [] if is_url(entry) else corpus_files((entry,), config.corpus_exclude)
            if any(Path(file.path).resolve().is_relative_to(data_dir) for file in found):
                raise ValueError(_inside("data_dir", config, entry))


@contextmanager
def _building_folder(data_dir: Path) -> Iterator[Path]:
    """The folder in data_dir where finished pieces wait for the others, also after a kill. One process has it at a time."""
    folder = data_dir / BUILDING
    descriptor = hold(folder, f"{folder} is in use: waiting for the process that prepares the data there")
    try:
        yield folder
    except ValueError:
        if not any(folder.glob("*.records")):
            shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        os.close(descriptor)


def _build_in(build: _Build) -> None:
    config, folder, started = build.config, build.folder, time.monotonic()
    tokenizer = _kept_tokenizer(build)
    recipe = _recipe(build, tokenizer)
    made = _distinct(config, recipe, _made(config, recipe, making.pieces_of(build.files, build.held_out)))
    manifest: dict = build.head | {"tokenizer_fingerprint": recipe.fingerprint} | making.contents(made, config.corpus)
    try:
        for line in data_notes(config, manifest, making.met(made)):
            print(line, flush=True)
        _check_windows(config, manifest, *(manifest[split]["num_tokens"] for split in SPLITS))
    except ValueError:
        shutil.rmtree(folder)
        raise
    draw_data(manifest, folder / "data.png")
    _publish(folder, Path(config.data_dir), manifest, making.final_names(made))
    print(data_table(manifest, time.monotonic() - started), flush=True)


def _kept_tokenizer(build: _Build) -> Tokenizer:
    """That of an earlier attempt at the same build, or a new one, which is kept."""
    path, head_path = build.folder / "tokenizer.json", build.folder / "head.json"
    try:
        tokenizer, head = bpe.load(path), json.loads(head_path.read_bytes())
    except (OSError, ValueError):
        tokenizer, head = None, None
    if tokenizer is None or head != build.head | {"tokenizer_fingerprint": bpe.fingerprint(tokenizer)}:
        tokenizer = _make_tokenizer(build.config, build.files)
        write_text(path, bpe.to_json(tokenizer))
        write_text(head_path, json.dumps(build.head | {"tokenizer_fingerprint": bpe.fingerprint(tokenizer)}))
    print(f"tokenizer: {build.config.vocab_size} tokens", flush=True)
    return tokenizer


def _recipe(build: _Build, tokenizer: Tokenizer) -> Recipe:
    """How each piece is made; the first documents decide whether tiktoken may encode."""
    config = build.config
    words = disagreement(encoder_of(tokenizer), documents(whole_parts(build.files), _reading(config), Tally()))
    if words is not None:
        print(f"tokenizer: tiktoken gives other ids for {words!r}; tokenizers encodes instead", flush=True)
    return Recipe(
        folder=str(build.folder.resolve()), fingerprint=bpe.fingerprint(tokenizer), is_fast=words is None, num_threads=None,
        vocab_size=config.vocab_size, tokens_per_shard=config.tokens_per_shard, reading=_reading(config),
        validation_fraction=config.validation_fraction, shortest_characters=config.shortest_document_characters,
        longest_characters=config.longest_document_characters,
    )  # fmt: skip


def _made(config: TrainingConfig, recipe: Recipe, pieces: list[Piece]) -> list[Made]:
    """Every piece with what became of it, in order; those that are not there yet are made."""
    results = {number: result for number, piece in enumerate(pieces) if (result := making.finished(recipe, piece))}
    missing = {number: piece for number, piece in enumerate(pieces) if number not in results}
    workers = _workers(config, [*missing.values()])
    recipe = recipe._replace(num_threads=None if workers == Workers(1, None) else 1)
    jobs = {number: partial(making.write_piece, recipe, piece) for number, piece in missing.items()}
    results |= completed(jobs, {number: piece.num_bytes for number, piece in missing.items()}, workers, "shards")
    return [Made(piece, results[number]) for number, piece in enumerate(pieces)]


def _distinct(config: TrainingConfig, recipe: Recipe, made: list[Made]) -> list[Made]:
    """The same without the documents that repeat an earlier one."""
    dropped = making.duplicates(Path(recipe.folder), [each.result.records for each in made])
    pieces = [each.piece for each in made]
    jobs = {number: partial(making.drop_documents, recipe, pieces[number], places) for number, places in dropped.items()}
    sizes = {number: pieces[number].num_bytes for number in jobs}
    results = completed(jobs, sizes, _workers(config, [pieces[number] for number in jobs]), "duplicates")
    return [each._replace(result=results.get(number, each.result)) for number, each in enumerate(made)]


def _workers(config: TrainingConfig, pieces: list[Piece]) -> Workers:
    """As many processes as there are cores, work and room in memory for; one for what only this process has in its memory."""
    room = room_free(config, torch.device("cpu")).host // settings.SHARD_WORKER_BYTES
    work = -(-sum(piece.num_bytes for piece in pieces) // making.PIECE_BYTES)
    is_here = any(part.path.startswith("memory:") for piece in pieces for part in piece.parts)
    return Workers(1 if is_here else max(1, min(len(os.sched_getaffinity(0)), work, room)), config.dask_scheduler)


def _reading(config: TrainingConfig) -> Reading:
    return Reading(config.text_field, config.document_separator, config.skip_faulty_rows)


def _held_out_test(config: TrainingConfig) -> Callable[[bytes], bool]:
    """Tells whether a document of the corpus is held out: it is in validation_corpus, or its hash says so."""
    if not config.validation_corpus:
        return lambda document: is_held_out(document, config.validation_fraction)
    files = corpus_files(config.validation_corpus, config.corpus_exclude)
    held_out = {sha256(document).digest() for document in documents(whole_parts(files), _reading(config), Tally())}
    return lambda document: sha256(document).digest() in held_out


def _publish(folder: Path, data_dir: Path, manifest: dict, names: dict[str, str]) -> None:
    """Gives data_dir what is finished, under its final names, the manifest last. After a kill the next launch does it again."""
    for name, final in {"tokenizer.json": "tokenizer.json", "data.png": "data.png", **names}.items():
        link(folder / name, data_dir / final)
    sync_folder(data_dir)
    write_text(data_dir / "manifest.json", json.dumps(manifest, indent=1) + "\n")
    sync_folder(data_dir)
    shutil.rmtree(folder, ignore_errors=True)  # A process that opens the data removes it too.


def _make_tokenizer(config: TrainingConfig, files: list[CorpusFile]) -> Tokenizer:
    if config.vocab_size == 257:
        return bpe.raw_bytes()
    if config.tokenizer_path is None:
        return bpe.train(sample_documents(config, files), config.vocab_size)
    tokenizer = bpe.load(config.tokenizer_path, begin_of_text=config.begin_of_text, end_of_text=config.end_of_text)
    num_ids = bpe.vocab_size(tokenizer)
    if config.vocab_size not in (num_ids, bpe.padded_vocab_size(config.tokenizer_path, num_ids)):
        raise ValueError(
            f"vocab_size={config.vocab_size} is not that of tokenizer_path={config.tokenizer_path!r}; nearest is {num_ids}"
        )
    return tokenizer


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
    if config.is_mixture and "sources" not in manifest:
        old = f"data_dir={config.data_dir!r} was prepared before data said which entry of corpus gave which tokens"
        raise ValueError(f"corpus_weights={config.corpus_weights!r}: {old}; name another data_dir, or set corpus_weights=None")


def _check_corpus(config: TrainingConfig, manifest: dict) -> None:
    if any(map(is_url, config.corpus + config.validation_corpus)):
        return  # No launch waits for the network.
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
        if (shard.num_tokens, shard.sha256) != (entry.num_tokens, entry.sha256):
            raise ValueError(f"{shard.path} is not the shard that manifest.json names; {_delete(config)}")
    return TokenStream(shards, manifest["tokenizer_fingerprint"])


def _check_windows(config: TrainingConfig, manifest: dict, num_train: int, num_validation: int) -> None:
    checks = [("training window", num_train, "add documents or lower context_length")]
    for name, num_tokens in making.train_sources(manifest) if config.is_mixture else ():
        add = "add documents to it that neither validation_corpus nor an earlier entry holds"
        remedy = f"{add}, or leave it out of corpus and its weight out of corpus_weights"
        checks.append((f"training window of {name!r}", num_tokens, remedy))
    if config.has_validation:
        remedy = "raise validation_fraction, add documents, or set validation_fraction=0 and eval_every_steps=None"
        remedy = "add files to validation_corpus" if config.validation_corpus else f"{remedy}; {CUT_OR_NAME}"
        checks.append(("held-out window", num_validation, remedy))
    for kind, num_tokens, remedy in checks:
        if not count_windows(num_tokens, config.context_length):
            words = f"{num_tokens} tokens are fewer than context_length + 1 = {config.context_length + 1}"
            raise ValueError(f"corpus too small for one {kind}: {words}; {remedy}")


if __name__ == "__main__":
    main()
