"""GGUF files against `transformers` reading the same file, against the `gguf` package, and against damage."""

import numpy as np
import pytest

gguf = pytest.importorskip("gguf")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from gguf_files import names_of_table, sizes_of, tensors_of, write  # noqa: E402

from jaxpar.models import convert, decoder  # noqa: E402
from jaxpar.models.families import FAMILIES  # noqa: E402
from jaxpar.models.gguf_file import GGUFFile, vocabulary  # noqa: E402
from jaxpar.models.positions import FactorScaling, LinearScaling, Rope  # noqa: E402
from jaxpar.models.spec import flatten  # noqa: E402

torch.set_num_threads(1)
TYPES = gguf.GGMLQuantizationType
VOCABULARY = 40
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
TOKENIZER = {
    "model": "gpt2",
    "tokens": [f"t{i}" for i in range(VOCABULARY)],
    "merges": ["t 1"],
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EPSILON = "attention.layer_norm_rms_epsilon"
# Transformers takes 128 for the head size of every Qwen3 file, and 256 for Gemma 3's attention scale.
CASES = {
    "llama": ("LlamaConfig", "llama", SIZES, {"rope.dimension_count": 8, "rope.freq_base": 500.0, EPSILON: 1e-6}, 0.0),
    "qwen2": (
        "Qwen2Config",
        "qwen2",
        {**SIZES, "tie_word_embeddings": True},
        {"rope.freq_base": 1e4, EPSILON: 1e-6},
        0.0,
    ),
    "qwen3": (
        "Qwen3Config",
        "qwen3",
        {**SIZES, "head_dim": 128},
        {"attention.key_length": 128, "attention.value_length": 128, "rope.freq_base": 1e4, EPSILON: 1e-6},
        0.0,
    ),
    "gemma3": (
        "Gemma3TextConfig",
        "gemma3",
        {**SIZES, "num_hidden_layers": 6, "head_dim": 256, "sliding_window": 8},
        {"attention.key_length": 256, "attention.sliding_window": 8, "rope.freq_base": 1e6, EPSILON: 1e-6},
        1.0,
    ),
    "gpt2": (
        "GPT2Config",
        "gpt2",
        {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "tie_word_embeddings": True},
        {"attention.layer_norm_epsilon": 1e-5},
        0.0,
    ),
}


def reference(name: str):
    kind, arch, options, keys, plus = CASES[name]
    config = getattr(transformers, kind)(**options)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    sizes = sizes_of(config) if name != "gpt2" else gpt2_sizes(config)
    return arch, model, {**sizes, **keys}, tensors_of(model, arch, plus)


def gpt2_sizes(config) -> dict:
    return {
        "context_length": config.n_positions,
        "embedding_length": config.n_embd,
        "block_count": config.n_layer,
        "feed_forward_length": 4 * config.n_embd,
        "attention.head_count": config.n_head,
    }


def types_of(tensors: dict) -> dict:
    """Some of the matrices in other types: rows of 32 hold one block."""
    kinds = {"ffn_down": TYPES.Q8_0, "attn_k.": TYPES.F16, "ffn_up": TYPES.Q5_0, "attn_output": TYPES.BF16}
    return {n: kind for n, x in tensors.items() for part, kind in kinds.items() if part in n and x.ndim == 2}


@pytest.mark.parametrize("name", CASES)
def test_logits(name, tmp_path):
    """The same file here and in `transformers`, with tensors of several types."""
    arch, _, keys, tensors = reference(name)
    path = write(tmp_path / "model.gguf", arch, keys, tensors, types_of(tensors), TOKENIZER)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    cfg, params = convert.load(path)
    tokens = np.random.default_rng(0).integers(3, VOCABULARY, (2, 24), np.int32)
    with torch.no_grad():
        theirs = model(torch.from_numpy(tokens).long(), use_cache=False).logits.numpy()
    ours = np.asarray(decoder.apply(cfg, params, tokens).logits)
    assert theirs.std() > 0.3
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_names_are_those_of_the_package(name):
    """Every row that this architecture can hold, against `gguf.get_tensor_name_map`."""
    arch = CASES[name][1]
    (family,) = (f for f in FAMILIES if f.gguf == arch)
    table = gguf.get_tensor_name_map(next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == arch), 3)
    for ours, hf in names_of_table(family, 3).items():
        base, suffix = hf.rsplit(".", 1)
        assert f"{table.get_name(base)}.{suffix}" == ours


def test_whole_file_is_read_as_the_package_reads_it(tmp_path):
    """Every type of value, and every tensor."""
    keys = {"general.name": "tÜst", "int": 7, "on": True, "real": 0.5, "texts": ["a", "", "ü"], "reals": [0.5, -1.0]}
    tensors = {"a": np.arange(64.0).reshape(2, 32), "b": np.ones(3), "c": np.full((2, 2, 32), 0.25)}
    path = write(tmp_path / "x.gguf", "llama", {**keys, "ints": [1, -2]}, tensors, {"a": TYPES.Q4_0, "c": TYPES.F16})
    ours, theirs = GGUFFile(path), gguf.GGUFReader(path)
    fields = {k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    assert ours.metadata == fields
    assert list(ours.tensors) == [t.name for t in theirs.tensors]
    for tensor in theirs.tensors:
        np.testing.assert_array_equal(ours.read(tensor.name), gguf.dequantize(tensor.data, tensor.tensor_type))
        assert ours.tensors[tensor.name].start == tensor.data_offset


def test_frequency_factors(tmp_path):
    """What Llama 3.1 files store (and transformers' import drops): it equals the scaling that it was computed from."""
    arch, _, keys, tensors = reference("llama")
    scaling = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0}
    scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    config = transformers.LlamaConfig(**SIZES, rope_parameters=scaling)
    plain = Rope(500.0).frequencies(8, local=False)[0]
    scaled = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config).inv_freq.numpy()
    tensors["rope_freqs.weight"] = plain / scaled
    cfg, _ = convert.load(write(tmp_path / "model.gguf", arch, keys, tensors, tokenizer=TOKENIZER))
    assert isinstance(cfg.positions.scaling, FactorScaling)
    np.testing.assert_allclose(cfg.positions.frequencies(8, local=False)[0], scaled, rtol=1e-6)
    assert convert.family_of(cfg).name == "llama"


def test_linear_scaling_and_biases(tmp_path):
    """Options that transformers' import drops are honoured."""
    arch, _, keys, tensors = reference("gemma3")
    keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0, "rope.freq_base_swa": 500.0}
    keys |= {"final_logit_softcapping": 30.0, "attention.sliding_window_pattern": 3}
    cfg = convert.load_config(write(tmp_path / "gemma.gguf", arch, keys, tensors, tokenizer=TOKENIZER))
    assert cfg.positions == Rope(1e6, LinearScaling(8.0), local_base=500.0)
    assert cfg.logit_cap == 30.0
    assert [cfg.slides(i) for i in range(6)] == [True, True, False] * 2

    arch, _, keys, tensors = reference("llama")
    for layer in range(2):
        for part, size in {"attn_q": 32, "attn_k": 16, "attn_v": 16, "attn_output": 32}.items():
            tensors[f"blk.{layer}.{part}.bias"] = np.arange(size)
    cfg, params = convert.load(write(tmp_path / "llama.gguf", arch, keys, tensors, tokenizer=TOKENIZER))
    assert cfg.qkv_bias
    assert cfg.attention_out_bias
    bias = flatten(params)["layers/attention/query/bias"]
    assert bias[0, 0].tolist() == [0, 2, 4, 6, 1, 3, 5, 7]  # the halves of a head, no longer interleaved


def test_vocabulary(tmp_path):
    path = write(
        tmp_path / "x.gguf", "llama", {}, {}, tokenizer={**TOKENIZER, "eot_token_id": 5, "add_bos_token": True}
    )
    found = vocabulary(GGUFFile(path))
    assert (found.model, found.bos, found.stops, found.add_bos, found.merges) == ("gpt2", 1, (2, 5), True, [("t", "1")])
    assert convert.token_ids(path) == convert.TokenIds(1, (2, 5), None)
    assert convert.tokenizer_path(path) == path


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    arch, _, keys, tensors = reference("llama")
    return write(tmp_path_factory.mktemp("gguf") / "llama.gguf", arch, keys, tensors, tokenizer=TOKENIZER)


def test_a_torn_file_at_any_place(llama, tmp_path):
    """One sentence wherever the file ends: in the header, between tensors, in the last of them."""
    data = llama.read_bytes()
    rng = np.random.default_rng(0)
    for length in [0, 3, 4, 8, 23, *rng.integers(0, len(data), 40).tolist(), len(data) - 40]:
        (tmp_path / "torn.gguf").write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"is not a GGUF file|is cut short") as e:
            convert.load(tmp_path / "torn.gguf")
        assert "\n" not in str(e.value)


def test_a_corrupted_header(llama, tmp_path):
    """Any byte changed: still a model, or one sentence."""
    data = llama.read_bytes()
    first = min(tensor.start for tensor in GGUFFile(llama).tensors.values())
    rng = np.random.default_rng(0)
    told = set()
    for _ in range(200):
        changed = bytearray(data)
        changed[rng.integers(4, first)] = rng.integers(256)
        (tmp_path / "x.gguf").write_bytes(changed)
        try:
            convert.load(tmp_path / "x.gguf")
        except ValueError as e:
            told.add(str(e))
    assert len(told) > 20
    assert not [sentence for sentence in told if "\n" in sentence]


REFUSED = {
    "experts": ({"expert_count": 8}, {}, r"llama\.expert_count = 8 is not supported"),
    "unknown key": ({"attention.magic": 1.0}, {}, r"llama\.attention\.magic = 1\.0 is not a key"),
    "unknown scaling": ({"rope.scaling.type": "spiral"}, {}, "'spiral' is not one of"),
    "part of a head": ({"rope.dimension_count": 4, "attention.key_length": 8}, {}, "the head size is 8"),
    "missing tensor": ({}, {"blk.1.ffn_up.weight": None}, "no tensor 'blk.1.ffn_up.weight'"),
    "text for a number": ({"block_count": "2"}, {}, r"llama\.block_count must be a positive integer, got '2'"),
    "no heads": ({"attention.head_count": 0}, {}, r"llama\.attention\.head_count must be a positive integer, got 0"),
    "unknown tensor": ({}, {"blk.1.extra.weight": np.ones(3)}, "'blk.1.extra.weight' has no place"),
    "other shape": ({}, {"blk.0.attn_q.weight": np.ones((8, 32))}, r"shape \(8, 32\), and its configuration asks"),
    "some biases": ({}, {"blk.0.attn_q.bias": np.ones(32)}, "some exist and some do not"),
    "parts": ({"split.count": 2}, {}, "one of several parts"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_files_that_are_refused(name, tmp_path):
    more, changed, expected = REFUSED[name]
    arch, _, keys, tensors = reference("llama")
    tensors = {k: v for k, v in {**tensors, **changed}.items() if v is not None}
    path = write(tmp_path / "x.gguf", arch, {**keys, **more}, tensors, tokenizer=TOKENIZER)
    with pytest.raises(ValueError, match=expected):
        convert.load(path)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        convert.load(tmp_path / "nowhere.gguf")
    (tmp_path / "x.gguf").write_bytes(b"PK\x03\x04" * 9)
    with pytest.raises(ValueError, match="is not a GGUF file"):
        convert.load(tmp_path / "x.gguf")
    path = write(tmp_path / "y.gguf", "mamba", {}, {"a": np.ones(3)})
    with pytest.raises(ValueError, match="holds a 'mamba' model; known are llama, qwen2, qwen3, gemma3, gpt2"):
        convert.load(path)
    data = bytearray(path.read_bytes())
    data[4] = 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="is of version 0x1"):
        convert.load(path)
    with pytest.raises(ValueError, match="carries no vocabulary"):
        vocabulary(GGUFFile(write(tmp_path / "z.gguf", "llama", {}, {})))
