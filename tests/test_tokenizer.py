"""Laws of ds/tokenizer.py: every byte string comes back, nothing in a text is a special token, one fingerprint a mapping."""

import json
import pickle
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import Planted
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers

from ds import tokenizer as bpe
from ds.encoder import encode, encoder_of, plain_encoder

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


def plain_ids(tokenizer: Tokenizer, document: bytes) -> np.ndarray:
    """The ids that `tokenizers` gives."""
    return encode(plain_encoder(tokenizer), document)


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
def test_decode_gives_back_every_byte_string(loaded, name, document):
    tokenizer = {"trained": TRAINED, "raw": RAW, "loaded": loaded}[name]
    ids = plain_ids(tokenizer, document)
    assert ids.dtype == np.uint32 and ids.ndim == 1
    assert bpe.decode(tokenizer, ids) == document
    table = bpe.token_bytes(tokenizer)
    assert b"".join(table[number] for number in ids) == document


@pytest.mark.parametrize("tokenizer", [TRAINED, RAW], ids=["trained", "raw"])
@given(document=BYTES)
@example(document=b"<|endoftext|>")
def test_no_text_holds_the_end_of_text(tokenizer, document):
    assert bpe.end_of_text_id(tokenizer) not in plain_ids(tokenizer, document)


def test_special_tokens_spelled_out_are_ordinary_text_in_a_foreign_tokenizer(loaded):
    special = {number for number, token in loaded.get_added_tokens_decoder().items() if token.special}
    assert not special & set(plain_ids(loaded, b"<|im_end|><|pad|>").tolist())
    assert plain_ids(loaded, b"<think>").tolist() == [loaded.token_to_id("<think>")]


def test_end_of_text_is_the_last_id_and_has_no_bytes(loaded):
    for tokenizer, size in ((TRAINED, 600), (RAW, 257)):
        assert bpe.vocab_size(tokenizer) == size
        assert bpe.end_of_text_id(tokenizer) == size - 1
        assert bpe.decode(tokenizer, [size - 1, 65, size - 1]) == bpe.token_bytes(tokenizer)[65]
        assert len(bpe.token_bytes(tokenizer)) == size
    assert bpe.end_of_text_id(loaded) == loaded.token_to_id("<|im_end|>") != bpe.vocab_size(loaded) - 1


def test_training_is_deterministic_and_compresses():
    again = bpe.train(iter([SOURCE, HOSTILE]), 600)
    assert bpe.to_json(again) == bpe.to_json(TRAINED)
    assert bpe.fingerprint(again) == bpe.fingerprint(TRAINED)
    assert len(plain_ids(TRAINED, SOURCE)) < len(SOURCE) / 2


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
        assert plain_ids(again, HOSTILE).tolist() == plain_ids(tokenizer, HOSTILE).tolist()


@given(pair=st.lists(st.integers(0, 598), min_size=2, max_size=2, unique=True))
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


def changed(change: Callable[[dict], object]) -> Tokenizer:
    """TRAINED after a change of its tokenizer.json."""
    state = json.loads(bpe.to_json(TRAINED))
    change(state)
    return Tokenizer.from_str(json.dumps(state))


def swap(vocabulary: dict[str, int], one: int, other: int) -> None:
    tokens = {number: token for token, number in vocabulary.items()}
    vocabulary[tokens[one]], vocabulary[tokens[other]] = other, one


def swap_merges(state: dict) -> None:
    merges = state["model"]["merges"]
    merges[3], merges[4] = merges[4], merges[3]


def rename(vocabulary: dict[str, int], token: str, name: str) -> None:
    vocabulary[name] = vocabulary.pop(token)


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
LONG = {"id": 600, "content": "<|im_end\n|>" * 9, "special": True} | dict.fromkeys(
    ("single_word", "lstrip", "rstrip", "normalized"), False
)


@pytest.mark.parametrize(
    ("change", "phrase"),
    [
        (lambda s: None, None),
        (lambda s: s.update(decoder=None, normalizer={"type": "NFC"}, post_processor=BYTE_LEVEL), None),
        (lambda s: s["added_tokens"].append(LONG), "601 ids there, 600 here"),
        (lambda s: swap(s["model"]["vocab"], 33, 32), "id 32 is 'B' there and 'A' here"),
        (
            lambda s: rename(s["model"]["vocab"], "\u00ff", "\u2028\u202e" + "a" * 19),
            r" is '\u2028\u202eaaaaaaaaaaaaaaaaa…' there and 'ÿ' here",
        ),
        (lambda s: s["model"]["merges"].pop(), "merge 342 is nothing there and "),
        (swap_merges, "merge 3 is "),
        (lambda s: s["model"].update(ignore_merges=True), "ignore_merges is True there and False here"),
        (lambda s: s["added_tokens"][0].update(special=False), "id 599, '<|endoftext|>', is added there and special here"),
        (
            lambda s: s["added_tokens"].insert(0, LONG | {"id": 65, "content": "b"}),
            "id 65, 'b', is special there and ordinary here",
        ),
        (lambda s: s["added_tokens"][0].update(content="<|im_end|>"), "id 599 is '<|im_end|>' there and '<|endoftext|>' here"),
        (lambda s: s.update(pre_tokenizer=BYTE_LEVEL), "the pre-tokenizer is ByteLevel there and Split, ByteLevel here"),
        (lambda s: s.update(pre_tokenizer=None), "the pre-tokenizer is none there and Split, ByteLevel here"),
        (
            lambda s: s["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex="a"),
            "the pre-tokenizers Split, ByteLevel have other settings there than here",
        ),
    ],
)
def test_first_difference_of_two_tokenizers_is_named(change, phrase):
    other = changed(change)
    found = bpe.difference(TRAINED, other)
    assert (found is None) == (phrase is None) == (bpe.fingerprint(other) == bpe.fingerprint(TRAINED))
    assert phrase is None or found is not None and phrase in found


PRE_TOKENIZERS = [BYTE_LEVEL, BYTE_LEVEL | {"use_regex": False}, {"type": "Digits", "individual_digits": True}, None]
CHANGES: st.SearchStrategy[Callable[[dict], object]] = st.one_of(
    st.tuples(st.integers(0, 9), st.integers(0, 9)).map(lambda pair: lambda s: swap(s["model"]["vocab"], *pair)),
    st.integers(0, 1).map(lambda number: lambda s: s["model"]["merges"].pop(-1 - number)),
    st.booleans().map(lambda value: lambda s: s["model"].update(ignore_merges=value)),
    st.booleans().map(lambda value: lambda s: s["added_tokens"][-1].update(special=value)),
    st.booleans().map(lambda value: lambda s: s["added_tokens"].insert(0, LONG | {"id": 65, "content": "b", "special": value})),
    st.sampled_from(PRE_TOKENIZERS).map(lambda part: lambda s: s.update(pre_tokenizer=part)),
    st.just(lambda s: s.update(decoder=None)),
)


@given(ours=st.lists(CHANGES, max_size=2), theirs=st.lists(CHANGES, max_size=2))
def test_there_is_a_difference_exactly_if_fingerprints_differ(ours, theirs):
    here, there = (changed(lambda s, some=some: [change(s) for change in some]) for some in (ours, theirs))
    for found in (bpe.difference(here, there), bpe.difference(there, here)):
        assert (found is None) == (bpe.fingerprint(here) == bpe.fingerprint(there))
        assert found is None or "\n" not in found and len(found) < 300


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


REFUSED_NORMALIZERS = [
    normalizers.NFD(),
    normalizers.NFKC(),
    normalizers.Lowercase(),
    normalizers.Sequence([normalizers.NFC(), normalizers.Strip()]),
]


def test_tokenizer_that_would_change_the_text_is_refused(tmp_path):
    def refusal_of(change) -> str:
        tokenizer = Tokenizer.from_str(bpe.to_json(TRAINED))
        change(tokenizer)
        return refusal(saved(tokenizer, tmp_path))

    for normalizer in REFUSED_NORMALIZERS:
        assert "has a normalizer" in refusal_of(lambda t, part=normalizer: setattr(t, "normalizer", part))
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
    for symbol in "a\u00ff\u00c2":
        del state["model"]["vocab"][symbol]
    assert "no token for 2 of the 256 bytes, the first is 0x61" in refusal(
        saved(Tokenizer.from_str(json.dumps(state)), tmp_path)
    )
    state = json.loads(bpe.to_json(RAW)) | {"added_tokens": []}
    assert "no end-of-text token" in refusal(saved(Tokenizer.from_str(json.dumps(state)), tmp_path))
    state["model"] = {"type": "WordLevel", "vocab": state["model"]["vocab"], "unk_token": "a"}
    assert "not a BPE" in refusal(saved(Tokenizer.from_str(json.dumps(state)), tmp_path))


def test_byte_symbols_are_those_of_the_library():
    assert set(bpe.BYTE_SYMBOLS) == set(pre_tokenizers.ByteLevel.alphabet())
    spelled = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str("".join(map(chr, range(128))))
    assert "".join(symbols for symbols, _ in spelled) == "".join(bpe.BYTE_SYMBOLS[:128])


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
        (lambda s: s.update(normalizer={"type": "Sequence", "normalizers": []}), "has a normalizer"),
        (lambda s: s.update(normalizer={"type": "Sequence", "normalizers": {"type": "NFC"}}), "has a normalizer"),
        (lambda s: s.update(normalizer={"type": "NFC", "also": "this"}), "has a normalizer"),
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


ABSURD_CHANGES = st.lists(st.tuples(st.sampled_from(places(SMALL)), ABSURD), min_size=1, max_size=3)


@given(changes=ABSURD_CHANGES)
def test_changed_tokenizer_is_refused_in_one_line_or_gives_back_every_text(tmp_path_factory, changes):
    check_refusal_or_text(tmp_path_factory.getbasetemp() / "tokenizer.json", changes)


@pytest.mark.slow
@given(changes=ABSURD_CHANGES)
@settings(max_examples=300)
def test_changed_tokenizer_is_refused_in_one_line_or_gives_back_every_text_in_many_examples(tmp_path_factory, changes):
    check_refusal_or_text(tmp_path_factory.getbasetemp() / "tokenizer.json", changes)


def check_refusal_or_text(path: Path, changes: list[tuple]) -> None:
    state = json.loads(json.dumps(SMALL))
    for place, value in changes:
        put(state, place, value)
    path.write_text(json.dumps(state))
    try:
        tokenizer = bpe.load(path)
    except ValueError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        ids = encode(encoder_of(tokenizer), HOSTILE)
        assert bpe.decode(tokenizer, ids) == HOSTILE and ids.tolist() == plain_ids(tokenizer, HOSTILE).tolist()


def put(state, place: tuple, value: object) -> None:
    for name in place[:-1]:
        if not isinstance(state, dict | list) or name not in (state if isinstance(state, dict) else range(len(state))):
            return
        state = state[name]
    if isinstance(state, dict) or (isinstance(state, list) and place[-1] in range(len(state))):
        state[place[-1]] = json.loads(json.dumps(value))


def test_panic_inside_the_library_is_a_refusal_and_an_interrupt_is_none(tmp_path, monkeypatch):
    state = SMALL | {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}
    saved(TRAINED, tmp_path)

    class Panics:
        from_str = staticmethod(lambda _: Tokenizer.from_str(json.dumps(state)))

    monkeypatch.setattr(bpe, "Tokenizer", Panics)
    assert "tokenizer.json cannot be read as a tokenizer (Precompiled" in refusal(tmp_path)

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Panics, "from_str", interrupt)
    with pytest.raises(KeyboardInterrupt):
        bpe.load(tmp_path)


LLAMA3_PATTERN = bpe.QWEN2_PATTERN.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)
SMOLLM_LACKS = bytes([4, 6, 0x13, 0x14, 0x16, 0x1D, 0xC0, 0xC1, 0xF1, 0xF2, *range(0xF5, 256)])


def published(pre_tokenizer: list[dict], special: list[str], added: list[str], **changes) -> dict:
    """A tokenizer.json as published ones are, with TRAINED's merges; `changes` are of the whole file."""
    state = json.loads(bpe.to_json(TRAINED))
    state["added_tokens"] = [
        LONG | {"id": 599 + number, "content": token, "special": token in special}
        for number, token in enumerate(special + added)
    ]
    state["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": pre_tokenizer}
    return state | {"post_processor": BYTE_LEVEL} | changes


def split(pattern: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def qwen3() -> dict:
    parts = [split(bpe.QWEN2_PATTERN), BYTE_LEVEL | {"trim_offsets": False, "use_regex": False}]
    return published(parts, ["<|endoftext|>", "<|im_end|>"], ["<tool_call>", "<think>"], normalizer={"type": "NFC"})


def llama3() -> dict:
    parts = [split(LLAMA3_PATTERN), BYTE_LEVEL | {"use_regex": False}]
    start = {"id": "<|begin_of_text|>", "ids": [599], "tokens": ["<|begin_of_text|>"]}
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|begin_of_text|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|begin_of_text|>": start},
    }
    state = published(parts, ["<|begin_of_text|>", "<|end_of_text|>"], [], post_processor=template)
    state["model"]["ignore_merges"] = True
    return state


def smollm() -> dict:
    """Special tokens first, then the bytes, of which 21 are missing, then what merges make."""
    state = published([{"type": "Digits", "individual_digits": True}, BYTE_LEVEL], ["<|endoftext|>", "<|im_end|>"], [])
    lacks = {bpe.BYTE_SYMBOLS[byte] for byte in SMOLLM_LACKS}
    kept = [token for token in state["model"]["vocab"] if not lacks & set(token)]
    for number, token in enumerate(state["added_tokens"]):
        token["id"] = number
    state["model"]["vocab"] = {token: number for number, token in enumerate(["<|endoftext|>", "<|im_end|>", *kept])}
    state["model"]["merges"] = [pair for pair in state["model"]["merges"] if not lacks & set("".join(pair))]
    return state


def gpt2() -> dict:
    return published([], ["<|endoftext|>"], []) | {"pre_tokenizer": BYTE_LEVEL}


def deepseek() -> dict:
    """Its tokenizer.json has no template: tokenizer_config.json beside it says what begins and ends a document."""
    parts = [
        split(r"\p{N}{1,3}"),
        split("[\u4e00-\u9fa5\u3040-\u309f]+"),
        split(LLAMA3_PATTERN),
        BYTE_LEVEL | {"use_regex": False},
    ]
    return published(parts, ["<\uff5cbegin\u2581of\u2581sentence\uff5c>", DEEPSEEK_END], ["<think>"])


DEEPSEEK_END = "<\uff5cend\u2581of\u2581sentence\uff5c>"
DEEPSEEK_CONFIG = {
    "add_bos_token": True,
    "bos_token": {"content": "<\uff5cbegin\u2581of\u2581sentence\uff5c>"},
    "eos_token": {"content": DEEPSEEK_END},
}
PUBLISHED = {"qwen3": qwen3(), "llama3": llama3(), "smollm": smollm(), "gpt2": gpt2(), "deepseek": deepseek()}


@pytest.fixture(scope="module")
def read(tmp_path_factory) -> dict[str, Tokenizer]:
    return read_published(tmp_path_factory.mktemp("published"))


def read_published(folder: Path) -> dict[str, Tokenizer]:
    """What `load` makes of each of PUBLISHED."""
    return {name: bpe.load(placed(folder, name, state)) for name, state in PUBLISHED.items()}


def placed(folder: Path, name: str, state: dict) -> Path:
    """A folder with a published tokenizer and what stands beside it."""
    (folder / "tokenizer.json").write_text(json.dumps(state))
    (folder / "tokenizer_config.json").write_text(json.dumps(DEEPSEEK_CONFIG if name == "deepseek" else {}))
    return folder


NFC_TEXT = "It's 2024, 12345 caf\u00e9s \u6f22\u5b57 \U0001f0a1\r\n\n\t <think> x_y;  \n Z"


@pytest.mark.parametrize("name", PUBLISHED)
@given(text=st.text(max_size=60) | st.text(st.sampled_from("a 1\n\u00e9e\u0301<think>.'t\u212b"), max_size=60))
@example(text=NFC_TEXT)
def test_published_tokenizer_gives_text_in_nfc_the_ids_of_its_own_library(read, name, text):
    text = unicodedata.normalize("NFC", text)
    assume(name != "smollm" or not set(text.encode()) & set(SMOLLM_LACKS))
    own = Tokenizer.from_str(json.dumps(PUBLISHED[name]))
    own.encode_special_tokens = True
    begin = [599] if name == "deepseek" else []
    assert plain_ids(read[name], text.encode()).tolist() == begin + own.encode(text, add_special_tokens=True).ids


@pytest.mark.parametrize("normalizer", [normalizers.NFC(), normalizers.Sequence([normalizers.NFC(), normalizers.NFC()])])
def test_nfc_is_left_out_so_that_text_stays_what_it_is(tmp_path, normalizer):
    tokenizer = Tokenizer.from_str(bpe.to_json(TRAINED))
    tokenizer.normalizer = normalizer
    again = bpe.load(saved(tokenizer, tmp_path))
    assert again.normalizer is None and bpe.to_json(again) == bpe.to_json(TRAINED)
    document = "e\u0301 \u212b".encode()
    assert tokenizer.encode(document.decode()).ids != plain_ids(again, document).tolist()
    assert bpe.decode(again, plain_ids(again, document)) == document


def test_published_tokenizer_keeps_its_sizes_and_its_end_of_text(read):
    assert {name: bpe.vocab_size(tokenizer) for name, tokenizer in read.items()} == {
        "qwen3": 603,
        "llama3": 601,
        "smollm": 580,
        "gpt2": 600,
        "deepseek": 602,
    }
    assert {name: bpe.end_of_text_id(tokenizer) for name, tokenizer in read.items()} == {
        "qwen3": 599,
        "llama3": 600,
        "smollm": 0,
        "gpt2": 599,
        "deepseek": 600,
    }


@pytest.mark.parametrize(
    "beside",
    [
        {"tokenizer_config.json": {"eos_token": DEEPSEEK_END}},
        {
            "tokenizer_config.json": {"eos_token": {"content": DEEPSEEK_END, "lstrip": False}},
            "config.json": {"eos_token_id": 9},
        },
        {"tokenizer_config.json": {"eos_token": None}, "config.json": {"eos_token_id": 600}},
        {"tokenizer_config.json": {"eos_token": "absent"}, "generation_config.json": {"eos_token_id": [600, 599]}},
        {"tokenizer_config.json": ["eos_token"], "config.json": {"eos_token_id": [True, -1, 2**64, {}, None, 600]}},
    ],
    ids=str,
)
def test_end_of_text_under_another_name_is_what_the_files_beside_say(tmp_path, beside):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(PUBLISHED["deepseek"]))
    message = refusal(path)
    assert "no end-of-text token that is known; name one of its own in end_of_text" in message and DEEPSEEK_END in message
    for name, content in beside.items():
        (tmp_path / name).write_text(json.dumps(content))
    for place in (path, tmp_path):
        assert bpe.end_of_text_id(bpe.load(place)) == 600
    assert bpe.end_of_text_id(bpe.load(path, end_of_text="<\uff5cbegin\u2581of\u2581sentence\uff5c>")) == 599


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("begin", [None, False, True])
def test_tokenizer_json_alone_holds_where_documents_begin_and_end(tmp_path, name, begin):
    folder = placed(tmp_path, name, PUBLISHED[name])
    for end in (None, *bpe.load(folder).get_vocab().keys() & {"<|im_end|>", "<|begin_of_text|>", "<think>"}):
        if begin and (name not in ("llama3", "deepseek") or end == "<|begin_of_text|>"):
            with pytest.raises(ValueError, match="^begin_of_text=True: [^\n]+; set begin_of_text=None$"):
                bpe.load(folder, begin_of_text=begin, end_of_text=end)
            continue
        first = bpe.load(folder, begin_of_text=begin, end_of_text=end)
        (tmp_path / "alone").mkdir(exist_ok=True)
        again = bpe.load(saved(first, tmp_path / "alone"))
        assert bpe.to_json(again) == bpe.to_json(first)
        ends = [(bpe.begin_of_text_id(each), bpe.end_of_text_id(each)) for each in (first, again)]
        assert ends[0] == ends[1] and (end is None or ends[0][1] == first.token_to_id(end))
        is_begun = begin is not False and name in ("llama3", "deepseek") and end != "<|begin_of_text|>"
        assert ends[0][0] == (599 if is_begun else None)
        assert bpe.token_bytes(first)[ends[0][1]] == b""


def test_ends_of_documents_change_neither_fingerprint_nor_difference(tmp_path):
    folder = placed(tmp_path, "llama3", PUBLISHED["llama3"])
    wanted = bpe.fingerprint(Tokenizer.from_str(json.dumps(PUBLISHED["llama3"])))
    for begin in (True, False):
        for end in ("<|begin_of_text|>", "<|end_of_text|>"):
            found = bpe.load(folder, begin_of_text=begin and end != "<|begin_of_text|>", end_of_text=end)
            assert bpe.fingerprint(found) == wanted and bpe.difference(found, bpe.load(folder)) is None


@pytest.mark.parametrize("token", ["a", "th", "de", "absent"])
def test_end_of_text_that_text_may_hold_or_that_is_not_there_is_refused(tmp_path, token):
    with pytest.raises(ValueError, match="tokenizer.json (does not give back the text|has no token 'absent'; name one)"):
        bpe.load(saved(TRAINED, tmp_path), end_of_text=token)
