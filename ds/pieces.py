"""A piece of the corpus -> its shards: what one worker does. Owns the files that wait in the building folder.

    unfinished-shards/tokenizer.json
    unfinished-shards/0123456789abcdef.json  0123456789abcdef.records  0123456789abcdef-train-00000.bin ...

A piece counts once its .json is there, which is written last. What it becomes depends on nothing outside it. So any number of
workers, on any number of machines, writes the same bytes, and what is there is not made again. Knows nothing of training.
"""

import json
import os
import signal
from codecs import getincrementaldecoder
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256
from itertools import groupby, tee
from multiprocessing import parent_process
from pathlib import Path
from threading import Thread
from typing import NamedTuple

import numpy as np

from ds import encoder as encoding
from ds import tokenizer as bpe
from ds.corpus import Reading, Tally, is_document, is_held_out, part_documents
from ds.encoder import Encoder, encode_documents, encoder_of, plain_encoder, with_end_of_text
from ds.files import CorpusFile, Part, corpus_pieces, is_url
from ds.shards import TokenStream, open_shard, published, sync_folder, write_shard

SPLITS = ("train", "validation")
# How much of the corpus is one piece: what a kill costs each worker at most.
PIECE_BYTES = 2**26
# One document: half of its sha256 in two numbers, how long it is, and the number of its split.
RECORD = np.dtype([(name, "<u8") for name in ("high", "low", "num_bytes", "num_characters", "num_tokens")] + [("split", "u1")])
# So many tokens are put into shards at once, and so many bytes are counted at once.
BATCH_TOKENS = 2**20
COUNTED_BYTES = 2**20
# So many documents are compared at once, which bounds the memory; a larger corpus is gone through several times.
COMPARED_DOCUMENTS = 2**23
# A document of n characters is counted in the class floor(LENGTH_CLASSES * log2(n)).
LENGTH_CLASSES = 4


class Recipe(NamedTuple):
    """What is the same for all pieces. `folder` is the building folder, `fingerprint` the tokenizer's; `is_fast`: whether
    tiktoken encodes where it can; `num_threads` of a worker, None for as many as there are cores.
    """

    folder: str
    fingerprint: str
    is_fast: bool
    num_threads: int | None
    vocab_size: int
    tokens_per_shard: int
    reading: Reading
    validation_fraction: float
    shortest_characters: int | None
    longest_characters: int | None


class Piece(NamedTuple):
    """Some of the corpus: its parts and their bytes, the number of the entry of `corpus` or `validation_corpus` that names it,
    the split that its documents go to (None: their hash decides), and how large and from when its files are, so that a file
    that was mended is read again.
    """

    parts: tuple[Part, ...]
    num_bytes: int
    source: int
    split: str | None
    states: str


class WrittenShard(NamedTuple):
    """A shard in the building folder; `sha256` in hex."""

    name: str
    num_tokens: int
    sha256: str


class Summary(NamedTuple):
    """One split of a piece. `lengths` counts its documents by class of length (see LENGTH_CLASSES)."""

    num_documents: int
    num_bytes: int
    num_tokens: int
    lengths: dict[str, int]
    shards: list[WrittenShard]


class Result(NamedTuple):
    """What became of a piece: its splits; what was met, as in `Tally`; the name of the file of its records; how many documents
    were dropped because an earlier one is the same.
    """

    splits: dict[str, Summary]
    counts: dict[str, int]
    first: dict[str, str]
    records: str
    num_duplicates: int


class Source(NamedTuple):
    """An entry of a corpus: its name, and how many tokens of a split are its own. They follow each other in the order of the
    entries.
    """

    name: str
    num_tokens: int


class Made(NamedTuple):
    """A piece and what became of it."""

    piece: Piece
    result: Result


def pieces_of(files: list[CorpusFile], held_out: list[CorpusFile]) -> list[Piece]:
    """All pieces, those of `held_out` first, so that of a document in both the held-out one stays. Without any, the hashes of
    documents decide which are held out. The files of an entry stay together.
    """
    sizes, found = {file.path: file.num_bytes for file in files + held_out}, []
    times = {path: 0 if is_url(path) else Path(path).stat().st_mtime_ns for path in sizes}
    for group, split in ((held_out, SPLITS[1]), (files, SPLITS[0] if held_out else None)):
        for source in range(1 + max((file.source for file in group), default=0)):
            own = [file for file in group if file.source == source]
            found += [Piece(parts, 0, source, split, "") for parts in corpus_pieces(own, PIECE_BYTES)]
    lengths = [sum((part.stop or sizes[part.path]) - part.start for part in piece.parts) for piece in found]
    states = [json.dumps([(sizes[part.path], times[part.path]) for part in piece.parts]) for piece in found]
    return [piece._replace(num_bytes=length, states=state) for piece, length, state in zip(found, lengths, states, strict=True)]


def name_of(recipe: Recipe, piece: Piece) -> str:
    """The name of a piece in the building folder: it tells all that decides what the piece becomes."""
    decisive = [*recipe._replace(folder="", is_fast=False, num_threads=None), *piece._replace(source=0)]
    return sha256(json.dumps(decisive).encode()).hexdigest()[:16]


def finished(recipe: Recipe, piece: Piece) -> Result | None:
    """What became of a piece, if all of it is there."""
    return _finished(recipe, name_of(recipe, piece))


def start_worker() -> None:
    """Begins a worker process: it leaves Ctrl-C to the process that it works for, and ends with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=_end_with_parent, daemon=True).start()


def write_piece(recipe: Recipe, piece: Piece) -> Result:
    """Reads, encodes and writes a piece. Raises ValueError as `part_documents`, `encode_documents` and `token_documents` do,
    OSError where the folder cannot be written.
    """
    name, tally = name_of(recipe, piece), Tally()
    drafts = [_Draft(recipe, f"{name}-{split}") for split in SPLITS]
    with published(Path(recipe.folder) / f"{name}.records", os.replace) as file:
        for some in _batches(_encoded(recipe, piece, tally)):
            records = np.array([each.record for each in some], RECORD)
            for split, draft in enumerate(drafts):
                draft.add([each.ids for each in some if each.record.split == split], records[records["split"] == split])
            file.write(records.tobytes())
    return _publish(recipe, name, drafts, Result({}, tally.counts, tally.first, f"{name}.records", 0))


def drop_documents(recipe: Recipe, piece: Piece, dropped: np.ndarray) -> Result:
    """What a finished piece is without the documents whose numbers are `dropped` (N,) int64. It is written beside the piece,
    which stays whole: where the same command goes on with another corpus, other documents repeat an earlier one.
    """
    result, name = finished(recipe, piece), f"{name_of(recipe, piece)}-{sha256(dropped.tobytes()).hexdigest()[:16]}"
    assert result is not None, piece
    done = _finished(recipe, name)
    if done is not None:
        return done
    records = np.fromfile(Path(recipe.folder) / result.records, RECORD)
    is_kept = np.ones(len(records), bool)
    is_kept[dropped] = False
    drafts = [_Draft(recipe, f"{name}-{split}") for split in SPLITS]
    for number, draft in enumerate(drafts):
        is_mine = records["split"] == number
        shards = tuple(open_shard(Path(recipe.folder, shard.name)) for shard in result.splits[SPLITS[number]].shards)
        borders = np.cumsum([0, *records["num_tokens"][is_mine]])
        for run in _runs(is_kept[is_mine]):
            ids = TokenStream(shards, recipe.fingerprint).parts(int(borders[run.start]), int(borders[run.stop]))
            draft.add(ids, records[is_mine][run])
    return _publish(recipe, name, drafts, result._replace(num_duplicates=len(dropped)))


def duplicates(folder: Path, names: list[str]) -> dict[int, np.ndarray]:
    """The documents that are byte for byte an earlier one: the number of a file of records -> numbers (N,) int64 in it."""
    num_documents = sum((folder / name).stat().st_size for name in names) // RECORD.itemsize
    num_rounds, found = -(-num_documents // COMPARED_DOCUMENTS), [np.empty((2, 0), np.int64)]
    for turn in range(num_rounds):
        columns = []
        for number, name in enumerate(names):
            records = np.fromfile(folder / name, RECORD)
            places = np.flatnonzero(records["high"] % np.uint64(num_rounds) == turn)
            columns.append(
                np.array([records["high"][places], records["low"][places], np.full(len(places), number), places], "<u8")
            )
        high, low, numbers, places = np.concatenate(columns, axis=1)
        order = np.lexsort((low, high))  # It is stable: of equal documents the first comes first.
        is_again = (np.diff(high[order]) == 0) & (np.diff(low[order]) == 0)
        again = order[1:][is_again]
        found.append(np.array([numbers[again], places[again]], np.int64))
    numbers, places = np.concatenate(found, axis=1)
    return {number: np.sort(places[numbers == number]) for number in np.unique(numbers).tolist()}


def met(made: list[Made]) -> Tally:
    """What was met in all pieces, and where first."""
    counts = sum((Counter(each.result.counts) for each in made), Counter())
    return Tally(dict(counts), {kind: where for each in reversed(made) for kind, where in each.result.first.items()})


def contents(made: list[Made], sources: tuple[str, ...]) -> dict:
    """What a manifest says of the documents that were left out, of each entry of the corpus, and of both splits."""
    counts = met(made).counts
    left_out = {f"num_{kind}": counts.get(kind, 0) for kind in ("empty", "invalid", "faulty", "short", "long")}
    left_out["num_duplicates"] = sum(each.result.num_duplicates for each in made)
    trained = [(each.piece.source, each.result.splits[SPLITS[0]]) for each in made if each.piece.split != SPLITS[1]]
    tokens = [{"name": name, "num_tokens": 0} for name in sources]
    for source, split in trained:
        tokens[source]["num_tokens"] += split.num_tokens
    return left_out | {"sources": tokens} | {name: _whole_split(made, name) for name in SPLITS}


def train_sources(manifest: dict) -> tuple[Source, ...]:
    """The entries of the corpus with their training tokens; none in a manifest from before there were sources."""
    return tuple(Source(**each) for each in manifest.get("sources", ()))


def held_out_sources(manifest: dict) -> tuple[Source, ...]:
    """The same of the held-out tokens, which are from the entries of `validation_corpus` where there are any."""
    names, num_tokens = manifest.get("validation_corpus") or [name for name, _ in train_sources(manifest)], Counter()
    for shard in manifest[SPLITS[1]]["shards"]:
        num_tokens[shard.get("source", 0)] += shard["num_tokens"]
    return tuple(Source(name, num_tokens[number]) for number, name in enumerate(names))


def final_names(made: list[Made]) -> dict[str, str]:
    """The name of each shard in the building folder -> its name in the manifest that `contents` gives."""
    names = {}
    for split in SPLITS:
        shards = [shard for each in made for shard in each.result.splits[split].shards]
        names |= {shard.name: f"{split}-{number:05d}.bin" for number, shard in enumerate(shards)}
    return names


def length_class(num_characters: np.ndarray) -> np.ndarray:
    """The classes (N,) int64 in which documents of so many characters (N,), at least 1, are counted."""
    return np.floor(LENGTH_CLASSES * np.log2(num_characters)).astype(np.int64)


class _Record(NamedTuple):
    """The fields of RECORD."""

    high: int
    low: int
    num_bytes: int
    num_characters: int
    num_tokens: int
    split: bool


class _Encoded(NamedTuple):
    ids: np.ndarray
    record: _Record


@dataclass
class _Draft:
    """One split while it is written: the shards that are there, and the ids that wait for the next one."""

    recipe: Recipe
    name: str
    num_documents: int = 0
    num_bytes: int = 0
    lengths: Counter = field(default_factory=Counter)
    shards: list[WrittenShard] = field(default_factory=list)
    waiting: list[np.ndarray] = field(default_factory=list)
    num_waiting: int = 0

    def add(self, arrays: Iterable[np.ndarray], records: np.ndarray) -> None:
        """Takes the ids of some documents and their records, and writes every shard that is full."""
        self.num_documents += len(records)
        self.num_bytes += int(records["num_bytes"].sum())
        self.lengths.update(length_class(records["num_characters"]).tolist())
        for ids in arrays:
            while len(ids):
                taken, ids = np.split(ids, [self.recipe.tokens_per_shard - self.num_waiting])
                self.waiting.append(taken)
                self.num_waiting += len(taken)
                if self.num_waiting == self.recipe.tokens_per_shard:
                    self._write()

    def finish(self) -> Summary:
        """Writes what waits, and sums up."""
        if self.num_waiting:
            self._write()
        lengths = {str(number): count for number, count in sorted(self.lengths.items())}
        return Summary(self.num_documents, self.num_bytes, sum(shard.num_tokens for shard in self.shards), lengths, self.shards)

    def _write(self) -> None:
        path = Path(self.recipe.folder) / f"{self.name}-{len(self.shards):05d}.bin"
        num_tokens = write_shard(path, self.waiting, self.recipe.vocab_size, self.recipe.fingerprint)
        self.shards.append(WrittenShard(path.name, num_tokens, open_shard(path).sha256))
        self.waiting, self.num_waiting = [], 0


def _whole_split(made: list[Made], name: str) -> dict:
    splits, names = [each.result.splits[name] for each in made], final_names(made)
    lengths = sum((Counter(split.lengths) for split in splits), Counter())
    shards = [
        {"name": names[shard.name], "num_tokens": shard.num_tokens, "sha256": shard.sha256, "source": each.piece.source}
        for each in made
        for shard in each.result.splits[name].shards
    ]
    sums = {count: sum(getattr(split, count) for split in splits) for count in ("num_documents", "num_bytes", "num_tokens")}
    return sums | {"lengths": dict(sorted(lengths.items(), key=lambda pair: int(pair[0])))} | {"shards": shards}


def _finished(recipe: Recipe, name: str) -> Result | None:
    try:
        found = json.loads((Path(recipe.folder) / f"{name}.json").read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    splits = {name: Summary(*split) for name, split in found["splits"].items()}
    listed = {name: split._replace(shards=[WrittenShard(*shard) for shard in split.shards]) for name, split in splits.items()}
    names = [found["records"], *(shard.name for split in listed.values() for shard in split.shards)]
    return Result(**found | {"splits": listed}) if all(Path(recipe.folder, name).exists() for name in names) else None


def _publish(recipe: Recipe, name: str, drafts: list[_Draft], result: Result) -> Result:
    whole = result._replace(splits={split: draft.finish() for split, draft in zip(SPLITS, drafts, strict=True)})
    with published(Path(recipe.folder) / f"{name}.json", os.replace) as file:
        file.write(json.dumps(whole._asdict()).encode())
    sync_folder(Path(recipe.folder))
    return whole


@lru_cache(maxsize=1)
def _encoder(folder: str, fingerprint: str, is_fast: bool) -> Encoder:
    """The tokenizer of a building folder; `fingerprint` tells it from an earlier one there."""
    tokenizer = bpe.load(Path(folder) / "tokenizer.json")
    assert bpe.fingerprint(tokenizer) == fingerprint, folder
    return encoder_of(tokenizer) if is_fast else plain_encoder(tokenizer)


@lru_cache(maxsize=1)
def _token_reader(folder: str, fingerprint: str, is_fast: bool) -> encoding.TokenReader:
    return encoding.token_reader(_encoder(folder, fingerprint, is_fast))


def _encoded(recipe: Recipe, piece: Piece, tally: Tally) -> Iterator[_Encoded]:
    """Each document's ids, with the end of text, and its record."""
    encoder = _encoder(recipe.folder, recipe.fingerprint, recipe.is_fast)
    end = bpe.end_of_text_id(encoder.tokenizer)
    for document, ids in _documents(recipe, piece, encoder, tally):
        digest = sha256(document).digest()
        is_out = is_held_out(document, recipe.validation_fraction) if piece.split is None else piece.split == SPLITS[1]
        high, low = (int.from_bytes(half, "little") for half in (digest[16:24], digest[24:]))
        record = _Record(high, low, len(document), _num_characters(document), len(ids) + 1, is_out)
        yield _Encoded(with_end_of_text(ids, end), record)


def _documents(recipe: Recipe, piece: Piece, encoder: Encoder, tally: Tally) -> Iterator[encoding.TokenDocument]:
    """Part by part, text encoded and tokens as they are."""
    for is_text, parts in groupby(piece.parts, key=lambda part: part.tokens is None):
        if is_text:
            plain, to_encode = tee(_fitting(recipe, parts, tally))
            encoded = encode_documents(encoder, to_encode, recipe.num_threads)
            yield from (encoding.TokenDocument(*pair) for pair in zip(plain, encoded, strict=True))
            continue
        reader = _token_reader(recipe.folder, recipe.fingerprint, recipe.is_fast)
        for part in parts:
            for found in encoding.token_documents(reader, part):
                if is_document(found.document, part.path, tally) and _fits(recipe, part, found.document, tally):
                    yield found


def _fitting(recipe: Recipe, parts: Iterable[Part], tally: Tally) -> Iterator[bytes]:
    for part in parts:
        for document in part_documents(part, recipe.reading, tally):
            if _fits(recipe, part, document, tally):
                yield document


def _fits(recipe: Recipe, part: Part, document: bytes, tally: Tally) -> bool:
    """Whether the length of a document is within the bounds; it is counted if it is not."""
    shortest, longest = recipe.shortest_characters, recipe.longest_characters
    if shortest is None and longest is None:
        return True
    num_characters = _num_characters(document)
    kind = "short" if num_characters < (shortest or 0) else None
    kind = "long" if longest is not None and num_characters > longest else kind
    if kind:
        tally.count(kind, part.path)
    return kind is None


def _num_characters(document: bytes) -> int:
    """Counted in parts: a string of all takes 4 bytes a character where there is one emoji."""
    if len(document) <= COUNTED_BYTES:
        return len(document.decode("utf-8", "surrogateescape"))
    decoder, view = getincrementaldecoder("utf-8")("surrogateescape"), memoryview(document)
    starts = range(0, len(view), COUNTED_BYTES)
    return sum(len(decoder.decode(view[at : at + COUNTED_BYTES])) for at in starts) + len(decoder.decode(b"", final=True))


def _batches(encoded: Iterator[_Encoded]) -> Iterator[list[_Encoded]]:
    batch, num_tokens = [], 0
    for each in encoded:
        batch.append(each)
        num_tokens += len(each.ids)
        if num_tokens >= BATCH_TOKENS:
            yield batch
            batch, num_tokens = [], 0
    if batch:
        yield batch


def _runs(is_kept: np.ndarray) -> list[slice]:
    """The longest runs of True in (N,) bool."""
    borders = np.flatnonzero(np.diff(is_kept, prepend=False, append=False))
    return [slice(start, stop) for start, stop in borders.reshape(-1, 2).tolist()]


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
