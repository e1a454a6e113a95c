"""Tokenisers: bytes, tokenizer.json, sentencepiece. Those of GGUF files are tested with the models."""

import io
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpar.data.bpe import train_bpe
from jaxpar.data.sources.text import TextFiles
from jaxpar.data.tokenizers import Bytes, ByteTokenizer, Tokenizer, TokenizerFile, tokenizer_from
from jaxpar.errors import UserError

CORPUS = Path(json.__file__).read_text()
TEXTS = [
    "def decode(self, s):\n    return 12345 + x**2  # don't\r\n",
    "  two  spaces\n\n\n\tand a tab ",
    "héllo Ünïcode 한국어 🤗 \x00\x07 ﬁ",
    "a<|endoftext|>b",
    "",
    " ",
]


def check(tokenizer):
    """What holds for each of them."""
    assert isinstance(tokenizer, Tokenizer)
    assert 0 <= tokenizer.eod < tokenizer.size
    for text, together in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32
        assert ids.ndim == 1
        assert ((ids >= 0) & (ids < tokenizer.size)).all()
        np.testing.assert_array_equal(ids, together)
        np.testing.assert_array_equal(ids, tokenizer.encode(text.encode()))
    assert tokenizer.encode_batch([]) == []
    # Ids that stand for nothing, as an untrained model draws them.
    assert tokenizer.decode([tokenizer.size + 5]) == "\ufffd"
    assert tokenizer.decode([-1]) == "\ufffd"
    assert tokenizer.decode([tokenizer.eod]) == tokenizer.decode([]) == tokenizer.decode(np.zeros(0, np.int32)) == ""
    text = tokenizer.decode(tokenizer.encode("one two"))
    assert tokenizer.decode([*tokenizer.encode("one two"), tokenizer.eod]) == text


# Bytes


@pytest.mark.quick
def test_bytes():
    tokenizer = Bytes().load()
    check(tokenizer)
    assert (tokenizer.size, tokenizer.eod, tokenizer.bos, tokenizer.accepts_bytes) == (257, 256, None, True)
    assert tokenizer.encode("é").tolist() == [0xC3, 0xA9]


@pytest.mark.quick
@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=100))
def test_any_bytes_come_back(data):
    ids = ByteTokenizer().encode(data)
    assert ids.astype(np.uint8).tobytes() == data
    assert ByteTokenizer().decode(ids) == data.decode("utf-8", "replace")


@pytest.mark.quick
@settings(deadline=None, max_examples=200)
@given(st.text(max_size=100))
def test_any_text_comes_back(text):
    assert ByteTokenizer().decode(ByteTokenizer().encode(text)) == text


@pytest.mark.quick
@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(-5, 400), max_size=50))
def test_any_ids_give_a_string(ids):
    assert isinstance(ByteTokenizer().decode(ids), str)


# Byte-level BPE, trained by jaxpar


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    """The trained tokeniser, and its file."""
    pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("bpe")
    (folder / "corpus.txt").write_text(CORPUS)
    tokenizer = train_bpe(TextFiles(str(folder / "corpus.txt")), 400, folder / "made")
    return tokenizer, folder / "made" / "tokenizer.json"


def test_bpe(bpe):
    trained, file = bpe
    check(trained)
    assert trained.size == 400
    assert trained.eod == 0
    assert trained.bos is None
    assert os.listdir(file.parent) == ["tokenizer.json"]
    # It has learned something.
    assert len(trained.encode(CORPUS)) < 0.6 * len(CORPUS.encode())


@settings(deadline=None, max_examples=150)
@given(st.text(max_size=60).filter(lambda text: "<|endoftext|>" not in text))
def test_bpe_loses_nothing(bpe, text):
    assert bpe[0].decode(bpe[0].encode(text)) == text


def test_bpe_from_its_file(bpe):
    trained, file = bpe
    for path in (file, file.parent):
        for strategy in (TokenizerFile(str(path)), tokenizer_from(str(path))):
            loaded = strategy.load()
            assert loaded.identity == trained.identity
            assert (loaded.size, loaded.eod, loaded.bos) == (trained.size, trained.eod, trained.bos)
            for text in TEXTS:
                np.testing.assert_array_equal(loaded.encode(text), trained.encode(text))


def test_bpe_equals_its_own_package(bpe):
    tokenizers = pytest.importorskip("tokenizers")
    inner = tokenizers.Tokenizer.from_file(str(bpe[1]))
    for text in [*TEXTS, CORPUS]:
        assert bpe[0].encode(text).tolist() == inner.encode(text, add_special_tokens=False).ids
    ids = inner.encode(CORPUS).ids
    assert bpe[0].decode(ids) == inner.decode(ids) == CORPUS


def test_bpe_equals_transformers(bpe):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(bpe[1]))
    for text in [*TEXTS, CORPUS]:
        assert bpe[0].encode(text).tolist() == theirs.encode(text, add_special_tokens=False)


def test_bpe_is_deterministic(bpe, tmp_path):
    (tmp_path / "corpus.txt").write_text(CORPUS)
    train_bpe(TextFiles(str(tmp_path / "corpus.txt")), 400, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == bpe[1].read_bytes()


def test_bpe_of_a_tiny_text(tmp_path):
    pytest.importorskip("tokenizers")
    (tmp_path / "corpus.txt").write_text("aa")
    found = train_bpe(TextFiles(str(tmp_path / "corpus.txt")), 1000, tmp_path / "t.json")
    assert found.size == 257
    assert found.decode(found.encode("any é")) == "any é"


@pytest.mark.parametrize(
    ("content", "vocabulary", "out", "message"),
    [
        (b"text", 256, "t.json", "needs at least 257 ids .* got 256"),
        (b"", 300, "t.json", "there is no text in the text of"),
        (b"text \xff text", 300, "t.json", r"corpus\.txt: byte 5 of the text is not UTF-8"),
        (None, 300, "t.json", "the text source not found"),
        (b"text", 300, "corpus.txt/t.json", "cannot write .*t.json: "),
    ],
)
def test_bad_training(tmp_path, content, vocabulary, out, message):
    pytest.importorskip("tokenizers")
    if content is not None:
        (tmp_path / "corpus.txt").write_bytes(content)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(UserError, match=message) as error:
        train_bpe(TextFiles(str(tmp_path / "corpus.txt")), vocabulary, tmp_path / out)
    assert "\n" not in str(error.value)
    assert sorted(os.listdir(tmp_path)) == before


def test_training_that_fails_leaves_the_older_file(bpe, tmp_path, monkeypatch):
    import errno

    file = tmp_path / "tokenizer.json"
    file.write_text("older")
    (tmp_path / "corpus.txt").write_text(CORPUS)

    def full(self, *_, **__):
        self.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match=r"cannot write .*: No space left"):
        train_bpe(TextFiles(str(tmp_path / "corpus.txt")), 300, file)
    assert file.read_text() == "older"
    assert sorted(os.listdir(tmp_path)) == ["corpus.txt", "tokenizer.json"]


# tokenizer.json from elsewhere


def changed(bpe, folder, change):
    content = json.loads(bpe[1].read_text())
    change(content)
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(content))
    return TokenizerFile(str(file))


def test_truncation_and_padding_are_switched_off(bpe, tmp_path):
    def change(content):
        content["truncation"] = {"max_length": 4, "stride": 0, "strategy": "LongestFirst", "direction": "Right"}
        content["padding"] = {
            "strategy": {"Fixed": 50},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "<|endoftext|>",
        }

    found = changed(bpe, tmp_path, change).load()
    for text in TEXTS:
        np.testing.assert_array_equal(found.encode(text), bpe[0].encode(text))
    check(found)


def add(*names):
    """Further special tokens, with the next ids."""

    def change(content):
        for name in names:
            token = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            at = max(content["model"]["vocab"].values()) + 1 + len(content["added_tokens"]) - 1
            content["added_tokens"].append({"id": at, "content": name, "special": True, **token})

    return change


def test_the_end_of_a_document(bpe, tmp_path):
    strategy = changed(bpe, tmp_path, add("</s>", "<|stop|>"))
    assert strategy.load().eod == 0  # the best known name
    assert TokenizerFile(strategy.path, end="<|stop|>").load().eod == 401
    config = tmp_path / "tokenizer_config.json"
    for said in ("</s>", {"content": "</s>", "special": True}):
        config.write_text(json.dumps({"eos_token": said}))
        assert strategy.load().eod == 400
        assert TokenizerFile(strategy.path, end="<|stop|>").load().eod == 401
    for unusable in ('{"eos_token": "none such"}', "{", "[]", '{"eos_token": 7}'):
        config.write_text(unusable)
        assert strategy.load().eod == 0
    with pytest.raises(UserError, match=r"has no token 'zzz' to end a document with \(data\.tokenizer\.end\)"):
        TokenizerFile(strategy.path, end="zzz").load()
    # Another end is another cache.
    assert TokenizerFile(strategy.path, end="</s>").load().identity != strategy.load().identity


def test_one_id_more_where_there_is_no_end(bpe, tmp_path):
    def change(content):
        content["added_tokens"] = []
        content["model"]["vocab"]["nothing"] = content["model"]["vocab"].pop("<|endoftext|>")

    found = changed(bpe, tmp_path, change).load()
    assert (found.eod, found.size) == (400, 401)
    check(found)


def test_a_beginning(bpe, tmp_path):
    def change(content):
        add("<s>")(content)
        start = {"SpecialToken": {"id": "<s>", "type_id": 0}}
        content["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [start, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [400], "tokens": ["<s>"]}},
        }

    strategy = changed(bpe, tmp_path, change)
    found = strategy.load()
    assert found.bos == 400
    np.testing.assert_array_equal(found.encode(TEXTS[0]), bpe[0].encode(TEXTS[0]))
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    assert strategy.load().bos is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", r"tokenizer\.json is not a whole tokenizer\.json"),
        (b"", r"tokenizer\.json is not a whole tokenizer\.json"),
        (b"{}", r"is not a whole tokenizer\.json"),
        (b"[1]", r"is not a whole tokenizer\.json"),
        (b'{"model": {"type": "BPE", "vocab": {}, "merges": []}}', "tokenizer"),
        (b"\x00\xff" * 50, r"is not a whole tokenizer\.json"),
    ],
)
def test_a_corrupted_file(bpe, tmp_path, content, message):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        TokenizerFile(str(tmp_path)).load()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("part", [0.1, 0.5, 0.99])
def test_a_torn_file(bpe, tmp_path, part):
    data = bpe[1].read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(data[: int(part * len(data))])
    with pytest.raises(UserError, match=r"is not a whole tokenizer\.json") as error:
        TokenizerFile(str(tmp_path / "tokenizer.json")).load()
    assert len(str(error.value)) < 600


def test_bytes_that_are_not_utf8(bpe):
    with pytest.raises(UserError, match=r"byte 2 of the text is not UTF-8.*--tokenizer bytes"):
        bpe[0].encode(b"ab\xff")
    assert bpe[0].decode(bpe[0].encode("a\ud800b")) == "a?b"


@pytest.mark.quick
@pytest.mark.parametrize("missing", ["", "none.json"])
def test_a_missing_file(tmp_path, missing):
    path = str(tmp_path / missing) if missing else str(tmp_path)
    message = "was not found" if missing else r"holds no tokenizer\.json and no single sentencepiece \.model"
    with pytest.raises(UserError, match=message):
        TokenizerFile(path).load()
    if missing:
        with pytest.raises(UserError, match="was not found"):
            tokenizer_from(path)


@pytest.mark.quick
def test_the_word_bytes():
    assert tokenizer_from("bytes") == Bytes()


@pytest.mark.quick
@pytest.mark.parametrize(("name", "package"), [("tokenizer.json", "tokenizers"), ("a.model", "sentencepiece")])
def test_a_package_that_is_missing(tmp_path, monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / name).write_bytes(b"\x0a\x0b")
    with pytest.raises(UserError, match=rf"needs the package {package}: pip install 'jaxpar\[tokenizers\]'"):
        TokenizerFile(str(tmp_path / name)).load()


@pytest.mark.quick
def test_training_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"pip install 'jaxpar\[tokenizers\]'"):
        train_bpe(TextFiles(str(tmp_path)), 300, tmp_path)


# sentencepiece


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    sentencepiece = pytest.importorskip("sentencepiece")
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.splitlines()),
        model_writer=out,
        vocab_size=500,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    file = tmp_path_factory.mktemp("pieces") / "tokenizer.model"
    file.write_bytes(out.getvalue())
    return file


def test_sentencepiece(pieces):
    sentencepiece = pytest.importorskip("sentencepiece")
    inner = sentencepiece.SentencePieceProcessor(model_file=str(pieces))
    for path in (pieces, pieces.parent):
        found = TokenizerFile(str(path)).load()
        check(found)
        assert (found.size, found.eod, found.bos) == (500, inner.eos_id(), inner.bos_id())
        for text in [*TEXTS, CORPUS]:
            assert found.encode(text).tolist() == inner.encode(text)
    assert found.decode(found.encode("héllo 한국 words")) == "héllo 한국 words"
    assert found.identity != Bytes().load().identity
    with pytest.raises(UserError, match="has no token 'zzz'"):
        TokenizerFile(str(pieces), end="zzz").load()
    assert TokenizerFile(str(pieces), end="<s>").load().eod == inner.bos_id()


@pytest.mark.parametrize("how", ["cut", "empty", "text"])
def test_a_torn_sentencepiece_model(pieces, tmp_path, how):
    data = pieces.read_bytes()
    file = tmp_path / "a.model"
    file.write_bytes({"cut": data[: len(data) // 2 + 1], "empty": b"", "text": b"hello world"}[how])
    with pytest.raises(UserError, match=r"is neither a tokenizer\.json nor a sentencepiece model") as error:
        TokenizerFile(str(file)).load()
    assert "\n" not in str(error.value)
