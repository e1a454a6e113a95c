"""Tokenizers of GGUF files (`jaxpar.data.gguf_tokenizer`) against `transformers` reading the same file."""

import io
import json
from pathlib import Path

import pytest

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")
sentencepiece = pytest.importorskip("sentencepiece")
tokenizers = pytest.importorskip("tokenizers")

from gguf_files import write  # noqa: E402

from jaxpar.data import gguf_tokenizer  # noqa: E402
from jaxpar.data.tokenizers import Tokenizer, TokenizerFile  # noqa: E402
from jaxpar.errors import UserError  # noqa: E402
from jaxpar.models.gguf_file import GGUFFile, vocabulary  # noqa: E402

SOURCE = Path(json.__file__).parent
CORPUS = [line for file in sorted(SOURCE.glob("*.py")) for line in file.read_text().splitlines()]
TEXTS = [
    "The capital of France is",
    "  two  spaces\n\n\n\tand a tab ",
    "def decode(self, s, _w=WHITESPACE.match):\n    return 12345 + x**2  # don't\r\n",
    "héllo Ünïcode 한국어 🤗 \x00\x07 \u2581 ﬁ",
    "a<|end|>b<think>c <s>",
    "",
    " ",
]
SMALLEST_MODEL = {"block_count": 1, "context_length": 8, "embedding_length": 8, "attention.head_count": 1}


@pytest.fixture(scope="module")
def sentences() -> dict:
    """A SentencePiece vocabulary with scores, bytes, control and user-defined tokens."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=out,
        vocab_size=600,
        model_type="bpe",
        byte_fallback=True,
        control_symbols=["<|end|>"],
        user_defined_symbols=["<think>"],
        minloglevel=2,
    )
    model = sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())
    ids = range(model.vocab_size())
    kinds = ((model.is_byte, 6), (model.is_unknown, 2), (model.is_control, 3))
    types = [next((kind for is_it, kind in kinds if is_it(i)), 1) for i in ids]
    types[model.piece_to_id("<think>")] = 4
    return {
        "model": "llama",
        "tokens": [model.id_to_piece(i) for i in ids],
        "scores": [float(model.get_score(i)) for i in ids],
        "token_type": types,
        "bos_token_id": model.bos_id(),
        "eos_token_id": model.eos_id(),
        "unknown_token_id": model.unk_id(),
    }


@pytest.fixture(scope="module")
def bytes_of() -> dict:
    """A byte-level vocabulary with merges."""
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|end|>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    trained.train_from_iterator(CORPUS, trainer)
    model = json.loads(trained.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return {
        "model": "gpt2",
        "tokens": [*tokens, "<think>"],
        "merges": [" ".join(m) for m in model["merges"]],
        "token_type": [3, 3, *[1] * (len(tokens) - 2), 4],
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


def both(folder, arch: str, entries: dict):
    """Ours and theirs, from one file."""
    keys = {**SMALLEST_MODEL, "general.name": "x"}
    path = write(folder / "model.gguf", arch, keys, {}, tokenizer=entries)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder, gguf_file="model.gguf")
    return gguf_tokenizer.build(vocabulary(GGUFFile(path))), theirs


def same(ours, theirs, texts=TEXTS):
    for text in texts:
        ids = theirs(text)["input_ids"]
        assert ours.encode(text).ids == ids, text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
@pytest.mark.parametrize("add_bos", [True, False, None])
def test_sentencepiece(arch, add_bos, sentences, tmp_path):
    more = {} if add_bos is None else {"add_bos_token": add_bos}
    ours, theirs = both(tmp_path, arch, {**sentences, **more})
    assert (ours.encode("a").ids[0] == sentences["bos_token_id"]) == (add_bos is not False)
    same(ours, theirs)


def test_sentencepiece_with_spaces_as_tokens(sentences, tmp_path):
    """Gemma's files store tokens of several spaces as spaces."""
    tokens, n = list(sentences["tokens"]), len(sentences["tokens"])
    entries = {
        **sentences,
        "tokens": [*tokens, "  ", "    "],
        "scores": [*sentences["scores"], -1000.0, -1000.0],
        "token_type": [*sentences["token_type"], 4, 4],
    }
    ours, theirs = both(tmp_path, "gemma3", entries)
    assert ours.encode("a" + 4 * " ").ids[-1] == n + 1
    same(ours, theirs)


def test_without_a_leading_space(sentences, tmp_path):
    """`add_space_prefix` false is honoured, where transformers' import drops it."""
    ours, _ = both(tmp_path, "llama", {**sentences, "add_space_prefix": False})
    assert ours.decode(ours.encode("of a").ids) == "of a"
    assert not ours.id_to_token(ours.encode("of").ids[1]).startswith("\u2581")


@pytest.mark.parametrize("pre", [None, "default", "llama-bpe", "qwen2", "tekken"])
def test_byte_level(pre, bytes_of, tmp_path):
    ours, theirs = both(
        tmp_path, "llama", {**bytes_of, **({"pre": pre} if pre else {}), "add_bos_token": pre == "qwen2"}
    )
    same(ours, theirs)
    assert ours.encode("<|end|>", add_special_tokens=False).ids == [1]


def test_digits_one_by_one(bytes_of, tmp_path):
    ours, _ = both(tmp_path, "llama", {**bytes_of, "pre": "smollm"})
    assert [ours.id_to_token(i) for i in ours.encode("123").ids] == ["1", "2", "3"]


def test_as_any_other_tokenizer(sentences, tmp_path):
    """What the rest of jaxpar uses: through the configuration, by the file's name."""
    path = write(tmp_path / "model.gguf", "llama", SMALLEST_MODEL, {}, tokenizer=sentences)
    found = TokenizerFile(str(path)).load()
    assert isinstance(found, Tokenizer)
    assert (found.size, found.eod, found.bos) == (600, sentences["eos_token_id"], sentences["bos_token_id"])
    ids = found.encode("of the decoder")
    assert found.bos not in ids
    assert found.decode([found.bos, *ids, found.eod]) == "of the decoder"


@pytest.mark.parametrize("kind", ["sentences", "bytes_of"])
def test_saved_beside_exported_weights(kind, request, tmp_path):
    ours, _ = both(tmp_path, "llama", request.getfixturevalue(kind) | {"add_bos_token": True})
    (tmp_path / "saved").mkdir()
    files = gguf_tokenizer.save(tmp_path / "model.gguf", tmp_path / "saved")
    assert sorted(files) == sorted((tmp_path / "saved").iterdir())
    same(ours, transformers.AutoTokenizer.from_pretrained(tmp_path / "saved"))


def test_what_cannot_be_rebuilt(sentences, bytes_of, tmp_path):
    def build(entries):
        return gguf_tokenizer.load(write(tmp_path / "x.gguf", "llama", {}, {}, tokenizer=entries))

    with pytest.raises(UserError, match="of the kind 'rwkv'; known are"):
        build({**sentences, "model": "rwkv"})
    with pytest.raises(UserError, match="by the rule 'klingon'; known are"):
        build({**bytes_of, "pre": "klingon"})
    with pytest.raises(UserError, match="has no merges"):
        build({**bytes_of, "merges": ""})
    with pytest.raises(UserError, match="0 scores for 600 tokens"):
        build({k: v for k, v in sentences.items() if k != "scores"})
