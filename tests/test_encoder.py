"""Laws of ds/encoder.py: one document, one array of ids, by whichever library, in whatever batches, in bounded memory."""

import json
import struct
import subprocess
import sys
import sysconfig
import tracemalloc
from itertools import repeat
from pathlib import Path
from random import Random

import fsspec
import numpy as np
import pytest
import tiktoken
from conftest import REPOSITORY
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_tokenizer import (
    BYTE_LEVEL,
    BYTES,
    HOSTILE,
    LLAMA3_PATTERN,
    LONG,
    NFC_TEXT,
    PUBLISHED,
    RAW,
    SMOLLM_LACKS,
    SOURCE,
    TRAINED,
    changed,
    plain_ids,
    read_published,
    split,
)
from tokenizers import Regex, Tokenizer, pre_tokenizers

from ds import encoder as encoding
from ds import files
from ds import tokenizer as bpe
from ds.encoder import (
    TokenDocument,
    check_token_files,
    disagreement,
    encode,
    encode_documents,
    encode_pieces,
    encoder_of,
    plain_encoder,
    token_documents,
    token_reader,
    with_end_of_text,
)
from ds.files import LLM_C, MEGATRON, NANOGPT, CorpusFile, Part, corpus_files

TEXT = st.text(max_size=80) | st.text(
    st.sampled_from("aA \t\r\n\u00a0\u2028'stvmlLrReE\u017f\u0130019\u0661.=<think>\u6f22\u00e9e\u0301"), max_size=80
)


@pytest.fixture(scope="module")
def read(tmp_path_factory) -> dict[str, Tokenizer]:
    return read_published(tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def encoders(read) -> dict[str, encoding.Encoder]:
    return {name: encoder_of(tokenizer) for name, tokenizer in (read | {"trained": TRAINED, "raw": RAW}).items()}


def encodable(name: str, document: bytes) -> bytes:
    return document.translate(None, SMOLLM_LACKS) if name == "smollm" else document


def fast(tokenizer: Tokenizer, documents: list[bytes], num_threads: int | None = 1) -> list[list[int]]:
    return [ids.tolist() for ids in encode_documents(encoder_of(tokenizer), documents, num_threads)]


@given(document=BYTES)
def test_raw_ids_are_the_bytes(document):
    assert bytes(plain_ids(RAW, document).tolist()) == document


def test_bytes_alone_are_tokens_only_where_nothing_else_is():
    """A vocabulary that lacks rare bytes may have merges and still no more ids than there are bytes."""
    state = json.loads(PUBLISHED_SMOLLM)
    made = ["".join(pair) for pair in state["model"]["merges"][:9]]
    singles = [token for token in state["model"]["vocab"] if len(token) == 1]
    state["model"] |= {"merges": state["model"]["merges"][:9], "vocab": {"<|endoftext|>": 0, "<|im_end|>": 1}}
    state["model"]["vocab"] |= {token: 2 + number for number, token in enumerate(dict.fromkeys([*singles, *made]))}
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.encode_special_tokens = True
    document = "".join(token for token in made if token.isascii()).encode()
    assert tokenizer.get_vocab_size() <= 257 and len(plain_ids(tokenizer, document)) < len(document)
    assert plain_ids(tokenizer, document).tolist() == tokenizer.encode(document.decode(), add_special_tokens=False).ids


PUBLISHED_SMOLLM = json.dumps(PUBLISHED["smollm"])


@pytest.mark.parametrize("name", ["trained", "raw", *PUBLISHED])
@given(
    documents=st.lists(BYTES, max_size=6), sizes=st.tuples(*[st.integers(1, 40)] * 3), num_threads=st.sampled_from([1, None])
)
def test_batches_and_streams_give_the_ids_of_each_document(encoders, name, documents, sizes, num_threads):
    encoder, documents = encoders[name], [encodable(name, document) for document in documents]
    wanted = [encode(encoder, document).tolist() for document in documents]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "BATCH_CHARACTERS", sizes[0])
        patch.setattr(encoding, "BATCH_PIECES", sizes[1])
        patch.setattr(bpe, "BLOCK_BYTES", sizes[2])
        together = list(encode_documents(encoder, iter(documents), num_threads))
        streamed = [list(encode_pieces(encoder, document, num_threads)) for document in documents]
    assert [ids.tolist() for ids in together] == wanted
    assert [np.concatenate(arrays).tolist() for arrays in streamed] == wanted
    assert all(ids.dtype == np.uint32 for ids in together + [ids for arrays in streamed for ids in arrays])
    begin = bpe.begin_of_text_id(encoder.tokenizer)
    assert all(arrays[0][:1].tolist() == ([] if begin is None else [begin]) for arrays in streamed)


def joined(pieces: list[str | bytes]) -> list[str | bytes]:
    """Without empty texts, and bytes that follow each other as one."""
    found: list[str | bytes] = []
    for piece in filter(None, pieces):
        last = found[-1] if found else ""
        if isinstance(piece, bytes) and isinstance(last, bytes):
            found[-1] = last + piece
        else:
            found.append(piece)
    return found


INVALID_TEXT = st.lists(
    TEXT.map(str.encode)
    | st.sampled_from([b"\xff", b"\xe6\xbc", b"\xf0\x9f\x82", b"a\n", b"\n\n", b" "])
    | st.binary(max_size=9)
).map(b"".join)


@given(document=INVALID_TEXT, size=st.integers(1, 9), block=st.integers(1, 12))
@example(document=b"\xe6\xbc", size=4, block=1)
def test_pieces_are_those_of_the_whole_document_whatever_the_block(document, size, block):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bpe, "PIECE_CHARACTERS", size)
        whole = joined(list(bpe.pieces(document)))
        patch.setattr(bpe, "BLOCK_BYTES", block)
        assert joined(list(bpe.pieces(document))) == whole
    assert b"".join(piece.encode() if isinstance(piece, str) else piece for piece in whole) == document
    assert all(len(piece) <= size for piece in whole if isinstance(piece, str))


@given(lines=st.lists(st.text(st.sampled_from("ab .,'\t\r\n\u00e91"), max_size=12).map(lambda text: text + "\nx"), min_size=1))
def test_cuts_at_line_ends_leave_no_trace(encoders, lines):
    document = "".join(lines).encode()
    for encoder in (encoders["trained"], plain_encoder(TRAINED)):
        whole = encode(encoder, document)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(bpe, "PIECE_CHARACTERS", 16)
            assert encode(encoder, document).tolist() == whole.tolist()


@given(document=BYTES, size=st.integers(1, 5))
def test_cuts_anywhere_lose_nothing(encoders, document, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bpe, "PIECE_CHARACTERS", size)
        assert bpe.decode(TRAINED, encode(encoders["trained"], document)) == document


@given(document=BYTES)
def test_end_of_text_comes_behind_a_document(document):
    ids = plain_ids(TRAINED, document)
    ended = with_end_of_text(ids, 599)
    assert ended.dtype == np.uint32 and ended.tolist() == [*ids.tolist(), 599]
    assert bpe.decode(TRAINED, ended) == document


@given(document=BYTES)
def test_begin_of_text_stands_before_a_document_and_counts_no_byte(read, document):
    ids, lengths = plain_ids(read["llama3"], document), [len(token) for token in bpe.token_bytes(read["llama3"])]
    assert ids[0] == 599 and 599 not in ids[1:]
    assert sum(lengths[number] for number in with_end_of_text(ids, 600)) == len(document)
    assert bpe.decode(read["llama3"], ids) == document


@given(document=BYTES, byte=st.sampled_from(list(SMOLLM_LACKS)), rest=BYTES)
def test_byte_without_a_token_is_refused_by_name_and_every_other_text_comes_back(encoders, document, byte, rest):
    encoder, document = encoders["smollm"], document.translate(None, SMOLLM_LACKS)
    assert bpe.decode(encoder.tokenizer, encode(encoder, document)) == document
    with pytest.raises(ValueError) as caught:
        next(encode_pieces(encoder, document + bytes([byte]) + rest))
    message = str(caught.value)
    assert "\n" not in message and "leave that document out" in message
    assert f"no token for the byte 0x{byte:02x}, which is byte {len(document)} of a document that begins" in message


@pytest.mark.parametrize("name", ["trained", *PUBLISHED])
@given(documents=st.lists(TEXT.map(str.encode) | BYTES, max_size=4))
@example(documents=[HOSTILE, NFC_TEXT.encode(), b"", bytes(range(256))])
def test_many_documents_get_the_ids_that_tokenizers_gives_each(encoders, name, documents):
    encoder, documents = encoders[name], [encodable(name, document) for document in documents]
    found = [ids.tolist() for ids in encode_documents(encoder, documents, 1)]
    assert found == [plain_ids(encoder.tokenizer, document).tolist() for document in documents]
    assert disagreement(encoder, documents) is None


def test_tiktoken_encodes_where_one_pattern_cuts_and_tokenizers_elsewhere(encoders):
    assert {name: encoder.fast is not None for name, encoder in encoders.items()} == {
        "qwen3": True, "llama3": True, "gpt2": True, "smollm": False, "deepseek": False, "trained": True, "raw": False,
    }  # fmt: skip
    for part, is_fast in ((BYTE_LEVEL, True), (BYTE_LEVEL | {"use_regex": False}, False), (QWEN2_CUTS, True), (None, False)):
        assert (encoder_of(with_parts(part)).fast is not None) == is_fast, part
    assert plain_encoder(TRAINED).fast is None


GPT2_CUTS, CUT_CHARACTERS = BYTE_LEVEL, "aLstlveRmd'1. \n"
QWEN2_CUTS, LLAMA3_CUTS = (
    {"type": "Sequence", "pretokenizers": [split(pattern), BYTE_LEVEL | {"use_regex": False}]}
    for pattern in (bpe.QWEN2_PATTERN, LLAMA3_PATTERN)
)
every_cut = pytest.mark.parametrize("part", [GPT2_CUTS, QWEN2_CUTS, LLAMA3_CUTS], ids=["gpt2", "qwen2", "llama3"])


def with_parts(part: dict | None, seed: int | None = None, ignore_merges: bool = False, added: bool = False) -> Tokenizer:
    """TRAINED with another pre-tokenizer, its merges in another order, whole words and added tokens."""

    def change(state: dict) -> None:
        state.update(pre_tokenizer=part)
        state["model"]["ignore_merges"] = ignore_merges
        if seed is not None:
            Random(seed).shuffle(state["model"]["merges"])
        if ignore_merges:
            state["model"]["vocab"] |= {"zqxj\u0120": 600, "qzq": 601}
        if added:
            names = [("<think>", False), ("\u00e9\u00e9", False), ("a a", False), ("<|im_end|>", True)]
            state["added_tokens"] += [
                LONG | {"id": 602 + number, "content": token, "special": special}
                for number, (token, special) in enumerate(names)
            ]

    tokenizer = changed(change)
    tokenizer.encode_special_tokens = True
    return tokenizer


@every_cut
@given(
    documents=st.lists(TEXT.map(str.encode) | BYTES | st.just(b" <|im_end|><think>a a zqxj qzq\xc3\xa9\xc3\xa9 "), max_size=4),
    seed=st.none() | st.integers(0, 99),
    added=st.booleans(),
    ignore_merges=st.booleans(),
)
@example(documents=[SOURCE, HOSTILE], seed=None, added=True, ignore_merges=True)
@example(documents=[SOURCE, HOSTILE], seed=1, added=True, ignore_merges=False)
def test_both_encoders_agree_with_merges_in_any_order(part, documents, seed, added, ignore_merges):
    tokenizer = with_parts(part, seed, ignore_merges, added)
    encoder = encoder_of(tokenizer)
    assert encoder.fast is not None or ignore_merges and seed is not None
    found = [ids.tolist() for ids in encode_documents(encoder, documents, 1)]
    assert found == [plain_ids(tokenizer, document).tolist() for document in documents]


def of_merges(merges: list[list[str]], more: list[str], ignore_merges: bool, part: dict | None = None) -> Tokenizer:
    """RAW with merges and the ids of what they make and of `more`, in this order, and another pre-tokenizer."""
    state = json.loads(bpe.to_json(RAW)) | ({"pre_tokenizer": part} if part else {})
    state["model"] |= {"merges": merges, "ignore_merges": ignore_merges}
    names = dict.fromkeys([*more, *map("".join, merges)])
    state["model"]["vocab"] |= {token: 257 + number for number, token in enumerate(names)}
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.encode_special_tokens = True
    return tokenizer


@st.composite
def merged(draw) -> Tokenizer:
    """A BPE of drawn merges, in any order, several for a token, over three letters; tokens that no merge makes, too."""
    tokens, merges = ["a", "b", "c"], []
    for _ in range(draw(st.integers(1, 8))):
        pair = [draw(st.sampled_from(tokens)), draw(st.sampled_from(tokens))]
        merges.append(pair)
        tokens += [] if "".join(pair) in tokens else ["".join(pair)]
    whole = draw(st.lists(st.text(st.sampled_from("abc"), min_size=2, max_size=5), max_size=3))
    if draw(st.booleans()):
        merges = draw(st.permutations(merges))
    return of_merges(merges, draw(st.permutations([*tokens[3:], *whole])), draw(st.booleans()))


TWICE_MADE = [["a", "bc"], ["a", "b"], ["c", "a"], ["b", "c"], ["ab", "c"]]


@example(tokenizer=of_merges(TWICE_MADE, [], False), documents=[b"abca"])
@given(tokenizer=merged(), documents=st.lists(st.text(st.sampled_from("aaabbc "), max_size=30).map(str.encode), max_size=9))
@settings(max_examples=200)
def test_any_merges_give_the_ids_of_tokenizers(tokenizer, documents):
    assert fast(tokenizer, documents) == [plain_ids(tokenizer, document).tolist() for document in documents]


@every_cut
@given(text=st.text(st.sampled_from(CUT_CHARACTERS), max_size=40))
@example(text="".join(f"a'{end} 1111 'a \n " for end in ("s", "t", "Re", "ve", "m", "ll", "d", "sd")))
def test_patterns_cut_alike_where_every_two_characters_are_a_token(part, text):
    symbols = [bpe.BYTE_SYMBOLS[ord(character)] for character in CUT_CHARACTERS]
    tokenizer = EVERY_PAIR.setdefault(
        json.dumps(part), of_merges([[one, other] for one in symbols for other in symbols], [], False, part)
    )
    assert fast(tokenizer, [text.encode()]) == [plain_ids(tokenizer, text.encode()).tolist()]


EVERY_PAIR: dict[str, Tokenizer] = {}
LIBRARY = [path.read_bytes() for path in sorted(Path(sysconfig.get_path("stdlib")).glob("[a-e]*.py"))]


@pytest.mark.parametrize("num_threads", [1, None])
def test_sources_of_the_standard_library_keep_their_ids(num_threads):
    tokenizer = bpe.train(LIBRARY[:9], 1024)
    assert fast(tokenizer, LIBRARY, num_threads) == [
        tokenizer.encode(document.decode(), add_special_tokens=False).ids for document in LIBRARY
    ]


@pytest.mark.parametrize("text", ["a", " ", "\n", "7", "\u6f22", "=", " a", " \t", "\r\n", "'s"], ids=repr)
def test_the_longest_piece_of_one_kind_is_encoded(encoders, text):
    document = (text * 2**16)[: 2**16 + 9].encode()
    for name in ("trained", "gpt2", "llama3"):
        assert encode(encoders[name], document).tolist() == plain_ids(encoders[name].tokenizer, document).tolist()


@pytest.mark.parametrize("text", [" ", "a"], ids=repr)
def test_a_run_that_a_pattern_could_not_scan_whole_is_cut_and_encoded(encoders, text):
    document = text.encode() * 2**20
    ids = encode(encoders["trained"], document)
    assert ids.tolist() == plain_ids(TRAINED, document).tolist() and bpe.decode(TRAINED, ids) == document


@pytest.mark.parametrize("kind", [r"\p{L}", r"\p{N}", r"\s"])
def test_both_libraries_know_the_same_letters_numbers_and_spaces(kind):
    numbers = [
        *range(0x3400),
        *range(0x4DB0, 0x4E10),
        *range(0x9FF0, 0xD800, 4),
        *range(0xE000, 0x20000),
        *range(0x2A6D0, 0x33500, 8),
    ]
    every = "".join(map(chr, numbers))
    theirs = pre_tokenizers.Split(Regex(kind + "+"), "removed").pre_tokenize_str(every)
    bytes_alone = {bytes([byte]): byte for byte in range(256)}
    found = tiktoken.Encoding("bytes", pat_str=kind + "+", mergeable_ranks=bytes_alone, special_tokens={}).encode_ordinary(
        every
    )
    assert {*every} - {*"".join(text for text, _ in theirs)} == {*bytes(found).decode()}


def test_first_text_that_differs_is_named(encoders):
    encoder = encoders["trained"]
    number = encoder.tokenizer.token_to_id("\u0120the")
    wrong = encoder._replace(fast=encoder.fast._replace(ids=np.where(encoder.fast.ids == number, 65, encoder.fast.ids)))
    documents = [b"a", b"\xff\xff", b"", b"some words and the others of it", b"of the", b"and so on"]
    assert disagreement(wrong, iter(documents)) == "some words and the o"
    assert disagreement(wrong, documents[:3]) is None and disagreement(wrong, []) is None
    assert disagreement(encoder, documents) is None and disagreement(plain_encoder(TRAINED), documents) is None
    with pytest.raises(ValueError, match="no token for the byte 0x04"):
        disagreement(encoders["smollm"]._replace(fast=wrong.fast), [b"a\x04"])


def peak_bytes(work) -> int:
    """How much Python and numpy hold at most during `work` beside what they held before."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        work()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["trained", "plain", "raw"])
def test_a_long_document_takes_its_ids_and_no_more(encoders, monkeypatch, name):
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 2**14)
    monkeypatch.setattr(bpe, "PIECE_CHARACTERS", 2**12)
    monkeypatch.setattr(bpe, "BLOCK_BYTES", 2**13)
    encoder = plain_encoder(TRAINED) if name == "plain" else encoders[name]
    line = "def f(x):\n    return 'a \u6f22\u5b57 \U0001f0a1'\n\n".encode()
    document = (line * 40 + b"\xff") * (2**20 // len(line) // 40)
    num_ids, fixed_bytes = len(encode(encoder, document)), 2**19
    assert num_ids * 4 > 2 * fixed_bytes
    assert peak_bytes(lambda: encode(encoder, document)) < num_ids * 4 * 1.13 + fixed_bytes
    assert peak_bytes(lambda: [None for _ in encode_pieces(encoder, document, 1)]) < fixed_bytes


def test_many_empty_documents_take_no_more_than_a_batch_of_them(encoders, monkeypatch):
    monkeypatch.setattr(encoding, "BATCH_PIECES", 2**7)
    documents = repeat(b"", 2000)
    assert peak_bytes(lambda: [None for _ in encode_documents(encoders["trained"], documents, 1)]) < 2**18


MEASURED = r"""
import resource, sys
from ds import encoder as encoding, tokenizer as bpe
kind, size = sys.argv[1], int(sys.argv[2])
tokenizer = bpe.raw_bytes() if kind == "raw" else bpe.train([b"def f(x): return 'abc'" * 9], 270)
make = encoding.plain_encoder if kind == "plain" else encoding.encoder_of
encoder = make(tokenizer)
line = b"x" * 20 + "def f(x): return '\u6f22\u5b57 \U0001f0a1'\n".encode()
encoding.encode(encoder, line * (2**23 // len(line)))
document = line * (size // len(line))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for ids in encoding.encode_pieces(encoder, document, 1): pass
streamed = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ids = encoding.encode(encoder, document)
whole = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(ids.nbytes, *(1024 * (peak - before) for peak in (streamed, whole)))
"""


@pytest.mark.parametrize("kind", ["raw", *(pytest.param(name, marks=pytest.mark.slow) for name in ("tiktoken", "tokenizers"))])
def test_the_process_grows_by_no_more_than_the_ids_of_a_document_of_64_mebibytes(kind):
    command = [sys.executable, "-c", MEASURED, kind.replace("tokenizers", "plain"), str(2**26)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY)
    ids_bytes, streamed, whole = map(int, run.stdout.split())
    fixed_bytes = 96 * 2**20
    assert ids_bytes > 2 * fixed_bytes and streamed < fixed_bytes and whole < ids_bytes + fixed_bytes


def write_megatron(path: Path, sequences: list[list[int]], borders: list[int], code: int = 8) -> Path:
    """As _IndexWriter and IndexedDatasetBuilder of megatron/core/datasets/indexed_dataset.py write them; `borders` are the
    numbers of the sequences before which documents begin, and their number.
    """
    dtype = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}[code]
    arrays = [np.array(sequence, dtype) for sequence in sequences]
    lengths, num_bytes = np.array([len(each) for each in arrays], "<i4"), np.array([each.nbytes for each in arrays], "<i8")
    path.write_bytes(b"".join(each.tobytes() for each in arrays))
    with path.with_suffix(".idx").open("wb") as file:
        file.write(b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(sequences), len(borders)))
        for array in (lengths, np.cumsum(num_bytes) - num_bytes, np.array(borders, "<i8")):
            file.write(array.tobytes())
    return path


def write_llm_c(path: Path, ids: list[int], magic: int = 20240520, version: int = 1) -> Path:
    """As write_datafile of dev/data/data_common.py in llm.c does; Llama 3's magic is 20240801 and its version 7."""
    header = np.zeros(256, np.int32)
    header[:3] = magic, version, len(ids)
    path.write_bytes(header.tobytes() + np.array(ids, "<u2" if magic == 20240520 else "<u4").tobytes())
    return path


def write_nanogpt(path: Path, ids: list[int]) -> Path:
    """As data/openwebtext/prepare.py of nanoGPT does."""
    path.write_bytes(np.array(ids, "<u2").tobytes())
    return path


def write_tokens(path: Path, kind: str, runs: list[list[int]]) -> Part:
    """All ids one after the other, a run of them a document of Megatron's; each kind once more with larger numbers."""
    ids = [number for run in runs for number in run]
    if kind == "Llama 3":
        return Part(str(write_llm_c(path, ids, 20240801, 7)), 0, None, LLM_C)
    if kind in (MEGATRON, "int32"):
        write_megatron(path, runs, list(range(len(runs) + 1)), 8 if kind == MEGATRON else 4)
        return Part(str(path), 0, None, MEGATRON)
    return Part(str((write_llm_c if kind == LLM_C else write_nanogpt)(path, ids)), 0, None, kind)


KINDS = (NANOGPT, LLM_C, "Llama 3", MEGATRON, "int32")
END = 599


def parts_at(part: Part, cuts: list[int]) -> list[Part]:
    """The part from cut to cut, as large files are read."""
    places = [0, *sorted({*cuts} - {0})]
    return [part._replace(start=start, stop=stop) for start, stop in zip(places, [*places[1:], None], strict=True)]


def between_ends(run: list[int]) -> list[list[int]]:
    """Those of one run of ids; behind the last end there is none."""
    found = [[]]
    for number in run:
        found = [*found, []] if number == END else [*found[:-1], [*found[-1], number]]
    return found[:-1] if run[-1:] == [END] else found


@pytest.fixture(scope="module")
def reader() -> encoding.TokenReader:
    return token_reader(plain_encoder(TRAINED))


def ids_of(found: list[TokenDocument]) -> list[list[int]]:
    return [document.ids.tolist() for document in found]


@pytest.mark.parametrize("kind", KINDS)
@given(
    runs=st.lists(st.lists(st.just(END) | st.integers(0, 598), max_size=12), max_size=5),
    cuts=st.lists(st.integers(0, 1200), max_size=4),
    block=st.integers(1, 20),
)
@example(runs=[[5, END, 6, 7, END, END], [], [END], [8]], cuts=list(range(1100)), block=3)
@example(runs=[[]], cuts=[1024], block=1)
def test_documents_of_a_file_of_tokens_are_what_stands_between_ends_wherever_it_is_cut(
    tmp_path_factory, reader, kind, runs, cuts, block
):
    part = write_tokens(tmp_path_factory.getbasetemp() / "a.bin", kind, runs)
    runs = runs if kind in (MEGATRON, "int32") else [[number for run in runs for number in run]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "PIECE_BYTES", block)
        whole = list(token_documents(reader, part))
        num_bytes = Path(part.path).stat().st_size
        in_parts = [list(token_documents(reader, each)) for each in parts_at(part, [cut for cut in cuts if cut < num_bytes])]
    assert ids_of(whole) == [ids for run in runs for ids in between_ends(run)]
    assert ids_of([document for found in in_parts for document in found]) == ids_of(whole)
    assert all(document == bpe.decode(TRAINED, ids) and ids.dtype == np.uint32 for document, ids in whole)


@given(lengths=st.lists(st.integers(0, 5), max_size=8), borders=st.lists(st.integers(0, 8), max_size=4))
def test_documents_of_megatron_hold_whole_sequences(tmp_path_factory, reader, lengths, borders):
    sequences = [[10 * number + place for place in range(length)] for number, length in enumerate(lengths)]
    borders = [0, *sorted(min(border, len(lengths)) for border in borders), len(lengths)]
    path = write_megatron(tmp_path_factory.getbasetemp() / "b.bin", sequences, borders)
    wanted = [sum(sequences[a:b], []) for a, b in zip(borders, borders[1:], strict=False)]
    whole = Part(str(path), 0, None, MEGATRON)
    assert ids_of(list(token_documents(reader, whole))) == wanted
    cut = parts_at(whole, list(range(path.stat().st_size)))
    assert ids_of([found for part in cut for found in token_documents(reader, part)]) == wanted


@pytest.mark.parametrize("code", [1, 2, 3, 4, 5, 8])
def test_every_type_of_whole_numbers_that_megatron_writes_is_read(tmp_path, reader, code):
    path = write_megatron(tmp_path / "a.bin", [[65, 127], [66]], [0, 1, 2], code)
    assert ids_of(list(token_documents(reader, Part(str(path), 0, None, MEGATRON)))) == [[65, 127], [66]]


@given(documents=st.lists(BYTES.filter(len), min_size=1, max_size=4), has_begin=st.booleans())
def test_tokens_of_a_text_are_that_text_and_its_ids_and_begin_once(read, tmp_path_factory, documents, has_begin):
    tokenizer, end = read["llama3"], bpe.end_of_text_id(read["llama3"])
    wanted = [plain_ids(tokenizer, document).tolist() for document in documents]
    written = [number for ids in wanted for number in (*(ids if has_begin else ids[1:]), end)]
    path = write_nanogpt(tmp_path_factory.getbasetemp() / "c.bin", written)
    found = list(token_documents(token_reader(plain_encoder(tokenizer)), Part(str(path), 0, None, NANOGPT)))
    assert [each.document for each in found] == documents and ids_of(found) == wanted


def token_refusal(reader: encoding.TokenReader, path: Path, kind: str) -> str:
    """What both say: the check before anything is made, and the reader."""
    file = CorpusFile(str(path), path.stat().st_size, 0, kind)
    with pytest.raises(ValueError, match="^[^\n]+$") as checked:
        check_token_files([file], "tokenizer", 600)
    with pytest.raises(ValueError) as caught:
        list(token_documents(reader, Part(str(path), 0, None, kind)))
    assert str(checked.value) == str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", [600, 65535])
def test_an_id_that_the_tokenizer_has_not_is_refused_with_its_place(tmp_path, reader, monkeypatch, kind, number):
    monkeypatch.setattr(files, "PIECE_BYTES", 4)
    part = write_tokens(tmp_path / "a.bin", kind, [[5, END], [6, 7, number]])
    with pytest.raises(ValueError) as caught:
        list(token_documents(reader, part))
    words = f"{part.path}, token 4: {number} is none of the tokenizer's 600 ids; is it of this tokenizer?"
    assert str(caught.value).startswith(words) and "\n" not in str(caught.value)


def test_negative_ids_and_holes_of_the_vocabulary_are_refused(tmp_path, reader):
    part = Part(str(write_megatron(tmp_path / "a.bin", [[5, -1]], [0, 1], 5)), 0, None, MEGATRON)
    with pytest.raises(ValueError, match="token 1: -1 is none"):
        list(token_documents(reader, part))
    is_id = reader.is_id.copy()
    is_id[5] = False
    with pytest.raises(ValueError, match="token 0: 5 is none"):
        list(token_documents(reader._replace(is_id=is_id), part))


def test_sizes_that_do_not_fit_are_refused_with_both_numbers(tmp_path, reader):
    path = tmp_path / "a.bin"
    path.write_bytes(b"\1\0\2")
    assert "has 3 bytes" in token_refusal(reader, path, NANOGPT)
    path.write_bytes(write_llm_c(path, [1, 2, 3]).read_bytes()[:-2])
    assert "has 1028 bytes, and a head and 3 tokens, as it says, have 1030" in token_refusal(reader, path, LLM_C)
    write_llm_c(path, [1], 20240522, 1)
    assert "llm.c's magic 20240522 and version 1" in token_refusal(reader, path, LLM_C)
    write_llm_c(path, [1], 20240520, 7)
    assert "llm.c's magic 20240520 and version 7" in token_refusal(reader, path, LLM_C)


MISFITS = {
    "has 81 bytes, and 2 sequences and 3 borders of documents have 82": lambda index: index[:-1],
    "has 10 bytes": lambda index: index[:10],
    "is of version 2 with tokens of type <u2": lambda index: index[:9] + b"\2" + index[10:],
    "tokens of type float32": lambda index: index[:17] + b"\7" + index[18:],
    "tokens of type code 9": lambda index: index[:17] + b"\x09" + index[18:],
    "has documents of sequences [0, 1] of 2": lambda index: index[:-8] + struct.pack("<q", 1),
    "has documents of sequences [1, 2] of 2": lambda index: index[:-24] + struct.pack("<q", 1) + index[-16:],
    "document 1 has 9 tokens of 2 bytes, from byte 4 up to 6": lambda index: index[:38] + struct.pack("<i", 9) + index[42:],
    "document 1 has 1 tokens of 2 bytes, from byte 2 up to 6": lambda index: index[:50] + struct.pack("<q", 2) + index[58:],
    "document 1 has the sequences from 7 up to 2 of 2": lambda index: index[:-16] + struct.pack("<qq", 7, 2),
}


@pytest.mark.parametrize("words", MISFITS)
def test_an_index_that_does_not_fit_its_tokens_says_what_does_not_fit(tmp_path, reader, words):
    path = write_megatron(tmp_path / "a.bin", [[1, 2], [3]], [0, 1, 2])
    index = path.with_suffix(".idx")
    index.write_bytes(MISFITS[words](index.read_bytes()))
    assert words in (message := token_refusal(reader, path, MEGATRON)) and message.startswith(f"{index}")


def test_an_index_that_misfits_in_the_middle_is_refused_where_it_is_read(tmp_path, reader):
    path = write_megatron(tmp_path / "a.bin", [[1], [2], [3]], [0, 1, 2, 3])
    index = path.with_suffix(".idx")
    content = index.read_bytes()
    index.write_bytes(content[:38] + struct.pack("<i", -1) + content[42:])
    with pytest.raises(ValueError, match="document 1 has -1 tokens of 2 bytes, from byte 2 up to 4 of its .bin, which does"):
        list(token_documents(reader, Part(str(path), 0, None, MEGATRON)))
    backwards = np.array([1, -1, 3], "<i4").tobytes() + np.array([0, 2, 0], "<i8").tobytes()
    index.write_bytes(content[:34] + backwards + content[70:])
    with pytest.raises(ValueError, match="document 1 has -1 tokens of 2 bytes, from byte 2 up to 0 of its .bin, which does"):
        list(token_documents(reader, Part(str(path), 0, None, MEGATRON)))
    late = np.array([1, 1, 0], "<i4").tobytes() + np.array([2, 4, 6], "<i8").tobytes()
    index.write_bytes(content[:34] + late + content[70:])
    with pytest.raises(ValueError, match="document 0 has 1 tokens of 2 bytes, from byte 2 up to 4 of its .bin, which does"):
        list(token_documents(reader, Part(str(path), 0, None, MEGATRON)))
    index.write_bytes(content)
    path.write_bytes(path.read_bytes() + b"\4\0")
    assert "document 2 has 1 tokens of 2 bytes, from byte 4 up to 8" in token_refusal(reader, path, MEGATRON)


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_meets_no_fault_that_lies_behind_its_documents(tmp_path, reader, monkeypatch, kind):
    monkeypatch.setattr(files, "PIECE_BYTES", 2)
    part = write_tokens(tmp_path / "a.bin", kind, [[1, END], [2, END], [3, END], [4, 700], [5]])
    first = part._replace(stop=2 + (1024 if part.tokens == LLM_C else 0))
    assert ids_of(list(token_documents(reader, first))) == [[1]]
    if part.tokens == MEGATRON:
        index = (tmp_path / "a.idx").read_bytes()
        (tmp_path / "a.idx").write_bytes(index[:46] + struct.pack("<i", 7) + index[50:])
        assert ids_of(list(token_documents(reader, first))) == [[1]]
    with pytest.raises(ValueError):
        list(token_documents(reader, part))


def check_refusal(corpus: str, tokenizer_path: str | None, vocab_size: int) -> str:
    with pytest.raises(ValueError, match="^[^\n]+$") as caught:
        check_token_files(corpus_files((corpus,), ()), tokenizer_path, vocab_size)
    return str(caught.value)


def test_tokens_need_a_tokenizer_that_fits_them(tmp_path):
    path = write_nanogpt(tmp_path / "a.bin", [1, 2, 3])
    assert "set tokenizer_path" in check_refusal(str(path), None, 300)
    assert "vocab_size=65537" in check_refusal(str(path), "there", 65537)
    for tokenizer_path, vocab_size in ((None, 257), ("there", 300), ("there", 65536)):
        check_token_files(corpus_files((str(path),), ()), tokenizer_path, vocab_size)
    write_llm_c(path, [1], 20240801, 7)
    check_token_files(corpus_files((str(path),), ()), "there", 128256)


def test_what_would_be_tokens_is_refused_with_what_to_do(tmp_path):
    write_nanogpt(tmp_path / "a.bin", [1, 2, 3])
    assert "names the file itself" in check_refusal(str(tmp_path), "there", 300)
    (tmp_path / "a.bin").write_bytes("text, and no tokens é".encode() * 20)
    assert "begins like text" in check_refusal(f"{tmp_path}/*.bin", "there", 300)
    write_megatron(tmp_path / "a.bin", [[1]], [0, 1])
    check_token_files(corpus_files((str(tmp_path),), ()), "there", 300)
    fsspec.filesystem("memory").pipe("/tokens/a.bin", b"\1\0")
    for way in ("memory://tokens", "memory://tokens/a.bin"):
        assert "download it first" in check_refusal(way, "there", 300)
    (tmp_path / "a.bin").unlink()
    assert "its .bin is not beside it" in check_refusal(str(tmp_path), "there", 300)


def test_an_unreadable_file_of_tokens_is_refused_in_one_line(tmp_path, reader):
    with pytest.raises(ValueError, match="^[^\n]+a.bin cannot be read [^\n]+$"):
        list(token_documents(reader, Part(f"{tmp_path}/a.bin", 0, None, NANOGPT)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_large_file_of_tokens_takes_a_document_and_a_block(tmp_path, reader, monkeypatch, kind):
    monkeypatch.setattr(files, "PIECE_BYTES", 2**13)
    runs = [[7] * 99 + [END]] * 1500
    part = write_tokens(tmp_path / "a.bin", kind, runs)
    path = tmp_path / "a.bin"
    assert path.stat().st_size > 2**18
    last = part._replace(start=path.stat().st_size - 2**10)
    for each in (part, last):
        assert peak_bytes(lambda each=each: [None for _ in token_documents(reader, each)]) < 2**17
