"""Laws of ds/tokenizer.py: every byte string comes back, nothing in a text is a special token, one fingerprint a mapping."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers

from ds import tokenizer as bpe

SOURCE = Path(bpe.__file__).read_bytes()
HOSTILE = (
    "<|endoftext|> é 漢字 \u00a0\u2028\ufeff e\u0301 don't  \r\n\t 123 <|im_end|> 🂡".encode()
    + b"\xff\xc3(\xed\xa0\x80\x00\xf4\x90"
)
BYTES = st.one_of(
    st.binary(max_size=200),
    st.text(max_size=100).map(str.encode),
    st.lists(st.one_of(st.text(max_size=9).map(str.encode), st.binary(max_size=3), st.just(b"<|endoftext|>"))).map(b"".join),
)
TRAINED = bpe.train([SOURCE, HOSTILE], 600)
RAW = bpe.raw_bytes()


def foreign() -> Tokenizer:
    """As Qwen3's or Llama 3's: ordinary added tokens, another end of text, a post-processor's worth of ids in between."""
    tokenizer = Tokenizer.from_str(bpe.to_json(TRAINED).replace("<|endoftext|>", "<|im_end|>"))
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("\u00e9\u00e9", normalized=False)])
    tokenizer.add_special_tokens(["<|pad|>"])
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=99)
    return tokenizer


def saved(tokenizer: Tokenizer, folder: Path) -> Path:
    path = folder / "tokenizer.json"
    path.write_text(bpe.to_json(tokenizer), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> Tokenizer:
    return bpe.load(saved(foreign(), tmp_path_factory.mktemp("foreign")))


@pytest.mark.parametrize("name", ["trained", "raw", "loaded"])
@given(document=BYTES)
@example(document=b"")
@example(document=bytes(range(256)))
@example(document=HOSTILE)
@settings(deadline=None, max_examples=100)
def test_decode_gives_back_every_byte_string(loaded, name, document):
    tokenizer = {"trained": TRAINED, "raw": RAW, "loaded": loaded}[name]
    ids = bpe.encode(tokenizer, document)
    assert ids.dtype == np.uint32 and ids.ndim == 1
    assert bpe.decode(tokenizer, ids) == document
    table = bpe.token_bytes(tokenizer)
    assert b"".join(table[number] for number in ids) == document


@given(document=BYTES)
@settings(deadline=None)
def test_raw_ids_are_the_bytes(document):
    assert bytes(bpe.encode(RAW, document).tolist()) == document


@pytest.mark.parametrize("tokenizer", [TRAINED, RAW], ids=["trained", "raw"])
@given(document=BYTES)
@example(document=b"<|endoftext|>")
@settings(deadline=None)
def test_no_text_holds_the_end_of_text(tokenizer, document):
    assert bpe.end_of_text_id(tokenizer) not in bpe.encode(tokenizer, document)


def test_special_tokens_spelled_out_are_ordinary_text_in_a_foreign_tokenizer(loaded):
    special = {number for number, token in loaded.get_added_tokens_decoder().items() if token.special}
    assert not special & set(bpe.encode(loaded, b"<|im_end|><|pad|>").tolist())
    assert bpe.encode(loaded, b"<think>").tolist() == [loaded.token_to_id("<think>")]


def test_end_of_text_is_the_last_id_and_has_no_bytes(loaded):
    for tokenizer, size in ((TRAINED, 600), (RAW, 257)):
        assert bpe.vocab_size(tokenizer) == size
        assert bpe.end_of_text_id(tokenizer) == size - 1
        assert bpe.decode(tokenizer, [size - 1, 65, size - 1]) == bpe.token_bytes(tokenizer)[65]
        assert len(bpe.token_bytes(tokenizer)) == size
    assert bpe.end_of_text_id(loaded) == loaded.token_to_id("<|im_end|>") != bpe.vocab_size(loaded) - 1


@given(documents=st.lists(BYTES, max_size=8), batch=st.integers(1, 40))
@settings(deadline=None)
def test_many_documents_give_the_ids_of_each(documents, batch):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bpe, "BATCH_CHARACTERS", batch)
        together = list(bpe.encode_documents(TRAINED, documents))
    assert [ids.tolist() for ids in together] == [bpe.encode(TRAINED, document).tolist() for document in documents]


@given(lines=st.lists(st.text(st.sampled_from("ab .,'\t\r\né1"), max_size=12).map(lambda text: text + "\nx"), min_size=1))
@settings(deadline=None)
def test_cuts_at_line_ends_leave_no_trace(lines):
    document = "".join(lines).encode()
    whole = bpe.encode(TRAINED, document)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bpe, "PIECE_CHARACTERS", 16)
        assert bpe.encode(TRAINED, document).tolist() == whole.tolist()


@given(document=BYTES, size=st.integers(1, 5))
@settings(deadline=None)
def test_cuts_anywhere_lose_nothing(document, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bpe, "PIECE_CHARACTERS", size)
        assert bpe.decode(TRAINED, bpe.encode(TRAINED, document)) == document


def test_training_is_deterministic_and_compresses():
    again = bpe.train(iter([SOURCE, HOSTILE]), 600)
    assert bpe.to_json(again) == bpe.to_json(TRAINED)
    assert bpe.fingerprint(again) == bpe.fingerprint(TRAINED)
    assert len(bpe.encode(TRAINED, SOURCE)) < len(SOURCE) / 2


def test_vocabulary_that_the_corpus_cannot_fill_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="vocab_size=4096: the corpus yields only 258 tokens; nearest is 258"):
        bpe.train([b"ab"], 4096)
    assert bpe.vocab_size(bpe.train([b"ab"], 258)) == 258


@pytest.mark.parametrize("tokenizer", [TRAINED, RAW], ids=["trained", "raw"])
def test_file_gives_back_the_tokenizer(tmp_path, tokenizer):
    path = saved(tokenizer, tmp_path)
    for place in (path, tmp_path, str(tmp_path)):
        again = bpe.load(place)
        assert bpe.fingerprint(again) == bpe.fingerprint(tokenizer)
        assert bpe.to_json(again) == bpe.to_json(tokenizer)
        assert bpe.encode(again, HOSTILE).tolist() == bpe.encode(tokenizer, HOSTILE).tolist()


@given(pair=st.lists(st.integers(0, 598), min_size=2, max_size=2, unique=True))
@settings(deadline=None, max_examples=20)
def test_fingerprint_changes_when_two_ids_are_swapped(pair):
    state = json.loads(bpe.to_json(TRAINED))
    vocabulary = state["model"]["vocab"]
    one, other = (next(token for token, number in vocabulary.items() if number == wanted) for wanted in pair)
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    assert bpe.fingerprint(Tokenizer.from_str(json.dumps(state))) != bpe.fingerprint(TRAINED)


def test_fingerprint_changes_with_merges_pre_tokenizer_and_added_tokens():
    def changed(change) -> str:
        state = json.loads(bpe.to_json(TRAINED))
        change(state)
        return bpe.fingerprint(Tokenizer.from_str(json.dumps(state)))

    def swap_merges(state):
        merges = state["model"]["merges"]
        merges[0], merges[1] = merges[1], merges[0]

    prints = {
        bpe.fingerprint(TRAINED),
        changed(swap_merges),
        changed(lambda state: state["pre_tokenizer"]["pretokenizers"].pop(0)),
        changed(lambda state: state["added_tokens"][0].update(content="<|im_end|>")),
        changed(lambda state: state["added_tokens"][0].update(special=False)),
        changed(lambda state: state["model"].update(ignore_merges=True)),
    }
    assert len(prints) == 6


def refusal(path: Path) -> str:
    with pytest.raises(ValueError) as caught:
        bpe.load(path)
    assert "\n" not in str(caught.value) and "tokenizer.json" in str(caught.value)
    return str(caught.value)


def test_tokenizer_that_is_absent_or_unreadable_is_refused(tmp_path):
    assert "is not there" in refusal(tmp_path)
    assert "is not there" in refusal(tmp_path / "absent" / "tokenizer.json")
    for content in (b"{", b"[]", b'{"model": 1}', b"\xff"):
        (tmp_path / "tokenizer.json").write_bytes(content)
        assert "cannot be read as a tokenizer" in refusal(tmp_path)


def test_tokenizer_that_would_change_the_text_is_refused(tmp_path):
    def refusal_of(change) -> str:
        tokenizer = Tokenizer.from_str(bpe.to_json(TRAINED))
        change(tokenizer)
        return refusal(saved(tokenizer, tmp_path))

    assert "normalizer" in refusal_of(lambda t: setattr(t, "normalizer", normalizers.NFC()))
    assert "pre-tokenizer 'Whitespace', not only" in refusal_of(
        lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.Whitespace())
    )
    nested = pre_tokenizers.Sequence([pre_tokenizers.ByteLevel(False), pre_tokenizers.Sequence([pre_tokenizers.Metaspace()])])
    assert "pre-tokenizer 'Metaspace'" in refusal_of(lambda t: setattr(t, "pre_tokenizer", nested))
    removing = pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel(False)])
    assert "does not give back" in refusal_of(lambda t: setattr(t, "pre_tokenizer", removing))
    assert "does not give back" in refusal_of(lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.ByteLevel(True)))
    assert "does not give back" in refusal_of(lambda t: t.add_tokens([AddedToken("<mask>", lstrip=True)]))
    assert "dropout" in refusal_of(lambda t: setattr(t.model, "dropout", 0.1))


def test_tokenizer_without_all_bytes_or_end_of_text_is_refused(tmp_path):
    state = json.loads(bpe.to_json(RAW))
    del state["model"]["vocab"]["\u00ff"]
    assert "no token for 1 of the 256 bytes, the first is 0xff" in refusal(
        saved(Tokenizer.from_str(json.dumps(state)), tmp_path)
    )
    state = json.loads(bpe.to_json(RAW)) | {"added_tokens": []}
    assert "no end-of-text token" in refusal(saved(Tokenizer.from_str(json.dumps(state)), tmp_path))
    state["model"] = {"type": "WordLevel", "vocab": state["model"]["vocab"], "unk_token": "a"}
    assert "not a BPE" in refusal(saved(Tokenizer.from_str(json.dumps(state)), tmp_path))


def test_byte_symbols_are_those_of_the_library():
    assert set(bpe._SYMBOLS) == set(pre_tokenizers.ByteLevel.alphabet())
    spelled = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str("".join(map(chr, range(128))))
    assert "".join(symbols for symbols, _ in spelled) == "".join(bpe._SYMBOLS[:128])


class Planted:
    """Makes its file when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("protocol", range(6))
def test_pickle_as_a_tokenizer_is_refused_and_never_runs(tmp_path, protocol):
    marker = tmp_path / "marker"
    planted = pickle.dumps(Planted(marker), protocol)
    for content in (planted, b"PK\x03\x04" + planted):
        (tmp_path / "tokenizer.json").write_bytes(content)
        assert "cannot be read as a tokenizer" in refusal(tmp_path)
    assert not marker.exists()
    pickle.loads(planted)
    assert marker.exists()


def test_absurdly_long_file_is_refused_unread(tmp_path):
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(2**40)
    assert "1099511627776 bytes are more than the 268435456" in refusal(tmp_path)


@pytest.mark.parametrize(
    "content", ["[" * 10**6, '{"model": ' * 10**6, '{"model": {"vocab": ' + "[" * 200 + "]" * 200 + "}}", "NaN"]
)
def test_absurd_json_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    assert "cannot be read as a tokenizer" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda s: s["model"]["vocab"].update(zzz=2**32 - 1), "has the id 4294967295, ids are below 16777216"),
        (lambda s: s["model"]["vocab"].update(zzz=2**32), "cannot be read as a tokenizer"),
        (lambda s: s["model"]["vocab"].update(zzz=-1), "cannot be read as a tokenizer"),
        (lambda s: s["model"]["vocab"].update(zzz=65), "gives the same id to several tokens"),
        (lambda s: s["model"].update(vocab={}), "cannot be read as a tokenizer"),
        (lambda s: s["model"].update(unk_token="<none>") or s.update(pre_tokenizer=None), "(Unk token `<none>` not found"),
        (lambda s: s["model"].update(continuing_subword_prefix="##" * 1000), "marks the parts of words"),
        (lambda s: s["model"].update(end_of_word_suffix="é"), "marks the parts of words"),
        (lambda s: s.update(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}), "has a normalizer"),
        (lambda s: s.update(pre_tokenizer={"type": "FixedLength", "length": 0}), "pre-tokenizer 'FixedLength'"),
        (lambda s: s.update(pre_tokenizer={"type": ["\n"] * 99}), r"pre-tokenizer ['\n', '\n'"),
        (lambda s: s.update(added_tokens=7), "cannot be read as a tokenizer"),
        (lambda s: s.update(model=[]), "cannot be read as a tokenizer"),
    ],
)
def test_absurd_tokenizer_is_refused(tmp_path, change, reason):
    state = json.loads(bpe.to_json(TRAINED))
    change(state)
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    assert reason in refusal(tmp_path)


def places(value: object, path: tuple = ()) -> list[tuple]:
    """The way to the first few entries of everything in a JSON value."""
    names = list(value)[:9] if isinstance(value, dict) else range(min(len(value), 3)) if isinstance(value, list) else ()
    inner = [place for name in names for place in places(value[name], (*path, name))]  # pyright: ignore[reportIndexIssue]
    return [path, *inner] if path else inner


SMALL = json.loads(bpe.to_json(bpe.train([HOSTILE], 260)))
PARTS: list[object] = [
    {"type": "BPE"},
    {"type": "ByteLevel"},
    {"type": "Digits"},
    {"type": "FixedLength", "length": 0},
    {"type": "Sequence", "pretokenizers": [[]]},
    {"type": "Split", "pattern": {"Regex": ""}, "behavior": "Removed", "invert": True},
    {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
    {"type": "Strip", "content": "a", "start": 99, "stop": 99},
    {"Regex": "(?:"},
    {"Regex": ""},
]
NUMBERS: list[object] = [None, True, -1, 0, 65, 2**31, 2**32 - 1, 2**64, 1e308]
ABSURD = st.sampled_from([*PARTS, *NUMBERS, "", "a", "\n", "##", [], {}, [[]], {"a": 1}, [["a", "b"]], ["a", "b"]])


@given(changes=st.lists(st.tuples(st.sampled_from(places(SMALL)), ABSURD), min_size=1, max_size=3))
@settings(deadline=None, max_examples=300)
def test_changed_tokenizer_is_refused_in_one_line_or_gives_back_every_text(tmp_path_factory, changes):
    path = tmp_path_factory.getbasetemp() / "tokenizer.json"
    state = json.loads(json.dumps(SMALL))
    for place, value in changes:
        put(state, place, value)
    path.write_text(json.dumps(state))
    try:
        tokenizer = bpe.load(path)
    except ValueError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        assert bpe.decode(tokenizer, bpe.encode(tokenizer, HOSTILE)) == HOSTILE


def put(state, place: tuple, value: object) -> None:
    for name in place[:-1]:
        if not isinstance(state, dict | list) or name not in (state if isinstance(state, dict) else range(len(state))):
            return
        state = state[name]
    if isinstance(state, dict) or (isinstance(state, list) and place[-1] in range(len(state))):
        state[place[-1]] = json.loads(json.dumps(value))


def test_panic_inside_the_library_is_a_refusal_and_an_interrupt_is_none(tmp_path):
    state = SMALL | {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}
    with pytest.raises(ValueError, match=r"here cannot be read as a tokenizer \(Precompiled"), bpe._naming(Path("here")):
        Tokenizer.from_str(json.dumps(state))
    with pytest.raises(KeyboardInterrupt), bpe._naming(Path("here")):
        raise KeyboardInterrupt
