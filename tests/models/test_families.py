"""Every family against `transformers`: logits, greedy tokens, export, on random small models made here.

The reference runs with eager attention in float32. Rows of a batch are 32 tokens long and windows 8, so that the window
matters; weights are large, so that logits differ by more than the tolerance.
"""

import json

import jax
import numpy as np
import pytest

from jaxpar.generation import generate
from jaxpar.models import convert, decoder
from jaxpar.models.context import Context
from jaxpar.models.families import rope
from jaxpar.models.families.options import Options
from jaxpar.models.families.table import meaning
from jaxpar.models.spec import flatten

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)  # for models this small, threads cost more than they bring

ROWS, LENGTH, VOCABULARY, TOLERANCE = 3, 32, 61, 1e-4
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.5, 2.0, 4.0],
    "long_factor": [1.0, 1.5, 2.0, 4.0],
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
GEMMA3 = {
    **SIZES,
    "num_hidden_layers": 6,
    "head_dim": 16,
    "sliding_window": 8,
    "query_pre_attn_scalar": 24,
    "sliding_window_pattern": 3,
}
CASES = {
    "llama": ("LlamaConfig", {**SIZES, "attention_bias": True, "mlp_bias": True}),
    "llama3-tied": ("LlamaConfig", {**SIZES, "head_dim": 16, "tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "mistral": ("MistralConfig", {**SIZES, "sliding_window": 8, "rope_parameters": LONGROPE}),
    "mistral-whole": ("MistralConfig", {**SIZES, "sliding_window": None, "hidden_act": "gelu_pytorch_tanh"}),
    "qwen2": ("Qwen2Config", {**SIZES, "rope_parameters": YARN, "tie_word_embeddings": True}),
    "qwen2-windows": (
        "Qwen2Config",
        {**SIZES, "num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "qwen3": (
        "Qwen3Config",
        {**SIZES, "head_dim": 16, "num_key_value_heads": 1, "rope_parameters": {**YARN, "factor": 2.0}},
    ),
    "qwen3-bias": ("Qwen3Config", {**SIZES, "head_dim": 8, "attention_bias": True, "tie_word_embeddings": True}),
    "gemma3": ("Gemma3TextConfig", GEMMA3),
    "gemma3-scaled": (
        "Gemma3TextConfig",
        {
            **GEMMA3,
            "final_logit_softcapping": 5.0,
            "tie_word_embeddings": False,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
            },
        },
    ),
    "gpt2": ("GPT2Config", {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "gpt2-untied": (
        "GPT2Config",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 2,
            "n_inner": 40,
            "n_positions": 64,
            "activation_function": "gelu",
            "scale_attn_weights": False,
            "tie_word_embeddings": False,
        },
    ),
}


def randomise(model) -> None:
    """Weights large enough that attention and every bias and norm matter."""
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        plain_norm = "norm" in name or "ln_" in name
        with torch.no_grad():
            if plain_norm and name.endswith("weight"):
                p.copy_(p + 0.3 * noise)
            else:
                p.copy_(noise * (0.3 if p.ndim > 1 else 0.2))


class Case:
    """A model of `transformers`, the folder it was saved to, and ours from that folder."""

    def __init__(self, name: str, folder):
        kind, options = CASES[name]
        self.config = getattr(transformers, kind)(**options)
        self.model = transformers.AutoModelForCausalLM.from_config(self.config, attn_implementation="eager").eval()
        randomise(self.model)
        self.folder = folder / name
        self.model.save_pretrained(self.folder)
        self.cfg, self.params = convert.load_hf(self.folder)
        self.run = jax.jit(
            lambda params, tokens, positions, segments: (
                decoder.apply(self.cfg, params, tokens, Context(positions=positions, segments=segments)).logits
            )
        )

    def ours(self, tokens, positions=None, segments=None):
        positions = np.broadcast_to(np.arange(LENGTH), tokens.shape) if positions is None else positions
        segments = np.ones_like(tokens) if segments is None else segments
        return np.asarray(self.run(self.params, tokens, positions.astype(np.int32), segments.astype(np.int32)))

    def theirs(self, tokens, model=None, **options):
        with torch.no_grad():
            out = (model or self.model)(torch.from_numpy(tokens).long(), use_cache=False, **options)
        return out.logits.numpy()


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    return Case(request.param, tmp_path_factory.mktemp("families"))


def tokens_of(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, VOCABULARY, (ROWS, LENGTH), np.int32)


def close(ours, theirs):
    assert np.std(theirs) > 0.3, "logits that hardly differ would hide an error"
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)


def test_plain_batch(case):
    tokens = tokens_of(0)
    close(case.ours(tokens), case.theirs(tokens))


def test_padded_batch(case):
    """Padding left, right and none: theirs by a mask and positions, ours by segment 0."""
    tokens, real = tokens_of(1), np.ones((ROWS, LENGTH), np.int32)
    real[0, :5], real[1, -7:] = 0, 0
    positions = np.maximum(np.cumsum(real, axis=1) - 1, 0)
    theirs = case.theirs(tokens, attention_mask=torch.from_numpy(real), position_ids=torch.from_numpy(positions))
    ours = case.ours(tokens, positions, real)
    close(ours[real > 0], theirs[real > 0])


def test_packed_batch(case):
    """Several documents a row: each as if it ran alone."""
    tokens, lengths = tokens_of(2), [(10, 14, 5), (32,), (1, 17, 9, 4)]
    positions, segments = np.zeros((ROWS, LENGTH), np.int32), np.zeros((ROWS, LENGTH), np.int32)
    for row, documents in enumerate(lengths):
        start = 0
        for i, n in enumerate(documents):
            positions[row, start : start + n], segments[row, start : start + n] = np.arange(n), i + 1
            start += n
    ours = case.ours(tokens, positions, segments)
    for row, documents in enumerate(lengths):
        start = 0
        for n in documents:
            close(ours[row, start : start + n], case.theirs(tokens[row : row + 1, start : start + n])[0])
            start += n


def test_greedy_tokens(case):
    """By the full forward pass, and through the cache."""
    prompt, new = 6, 14
    tokens = np.zeros((ROWS, LENGTH), np.int32)
    tokens[:, :prompt] = tokens_of(3)[:, :prompt]
    theirs = case.model.generate(
        torch.from_numpy(tokens[:, :prompt]).long(),
        attention_mask=torch.ones(ROWS, prompt, dtype=torch.long),
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    ).numpy()
    for at in range(prompt, prompt + new):
        segments = np.broadcast_to(np.arange(LENGTH) < at, tokens.shape)
        tokens[:, at] = case.ours(tokens, segments=segments)[:, at - 1].argmax(-1)
    np.testing.assert_array_equal(tokens[:, : prompt + new], theirs)

    cached = generate(case.cfg, case.params, theirs[:, :prompt].tolist(), new_tokens=new)
    np.testing.assert_array_equal(cached, theirs[:, prompt:])


def test_export(case, tmp_path):
    """Written, `transformers` computes the very same; read back, nothing has changed."""
    ids = convert.token_ids(case.folder)
    kind = case.config.model_type
    folder = convert.save_hf(case.cfg, case.params, tmp_path / "out", family=kind, ids=ids, shard_bytes=20_000)
    assert len(list(folder.glob("*.safetensors"))) > 1
    again = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    assert type(again) is type(case.model)
    tokens = tokens_of(4)
    np.testing.assert_array_equal(case.theirs(tokens, again), case.theirs(tokens))
    for name, value in json.loads((case.folder / "config.json").read_text()).items():
        if name.endswith("token_id"):
            assert getattr(again.config, name) == value, name
    cfg, params = convert.load_hf(folder)
    assert meaning(cfg) == meaning(case.cfg)
    for path, value in flatten(params).items():
        np.testing.assert_array_equal(value, flatten(case.params)[path], err_msg=path)


def test_configuration_round_trip(case):
    """config.json -> ours -> config.json -> ours, and the old format of RoPE means the same."""
    family = convert.family_of(case.cfg, case.config.model_type)
    written = json.loads(json.dumps(family.from_config(case.cfg)))
    assert family.to_config(written) == case.cfg
    assert family.misfit(case.cfg) is None
    assert meaning(family.to_config(old_format(written))) == meaning(case.cfg)


def old_format(hf: dict) -> dict:
    """As configurations were written before transformers 5."""
    found = {k: v for k, v in hf.items() if k not in ("rope_parameters", "layer_types")}
    rope = hf.get("rope_parameters")
    if rope is None:
        return found
    if "layer_types" in hf and "query_pre_attn_scalar" in hf:
        found |= {"rope_local_base_freq": rope["sliding_attention"]["rope_theta"], "sliding_window_pattern": 3}
        rope = rope["full_attention"]
    scaling = {k: v for k, v in rope.items() if k not in ("rope_theta", "rope_type")}
    found["rope_theta"] = rope["rope_theta"]
    found["rope_scaling"] = {"type": rope["rope_type"], **scaling} if rope["rope_type"] != "default" else None
    return found


SCALINGS = {
    "default": {},
    "linear": {"factor": 8.0},
    "llama3": {
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "llama3-whole": {"factor": 8.0, "low_freq_factor": 2.0, "high_freq_factor": 3.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32768},
    "yarn-own": {"factor": 8.0, "original_max_position_embeddings": 4096, "attention_factor": 1.5, "beta_fast": 16.0},
    "yarn-untruncated": {"factor": 8.0, "original_max_position_embeddings": 4096, "truncate": False, "beta_slow": 2.0},
    "yarn-mscale": {"factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 0.7},
    "yarn-degenerate": {"factor": 4.0, "original_max_position_embeddings": 5},
    "longrope": {
        "short_factor": [1.0 + i / 64 for i in range(64)],
        "long_factor": [1.0 + i / 64 for i in range(64)],
        "original_max_position_embeddings": 4096,
    },
}


@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_of_rope(name):
    """At the sizes of published models, against transformers' own functions."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind, context, size = name.split("-")[0], 131_072, 128
    parameters = {"rope_type": kind, "rope_theta": 500_000.0, **SCALINGS[name]}
    config = transformers.LlamaConfig(
        hidden_size=4 * size, num_attention_heads=4, max_position_embeddings=context, rope_parameters=dict(parameters)
    )
    ours = rope.read(Options({"rope_parameters": parameters}, "llama"), context, size)
    frequencies, scale = ours.frequencies(size, local=False)
    if kind == "default":
        theirs, their_scale = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config).inv_freq, 1.0
    else:
        theirs, their_scale = ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=context)
    np.testing.assert_allclose(frequencies, theirs.numpy(), rtol=2e-6)
    assert scale == pytest.approx(their_scale, rel=1e-12)
    assert rope.read(Options({"rope_parameters": rope.write(ours, context)}, "llama"), context, size) == ours


def test_the_part_of_gemma_that_reads(tmp_path):
    """A file of a model that also sees: its language part is loaded, its vision part left out."""
    text = {k: v for k, v in GEMMA3.items() if k != "sliding_window_pattern"} | {"hidden_size": 32}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=60,
        boi_token_index=58,
        eoi_token_index=59,
    )
    model = transformers.Gemma3ForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    randomise(model)
    model.save_pretrained(tmp_path / "both")
    cfg, params = convert.load_hf(tmp_path / "both")
    tokens = np.random.default_rng(0).integers(3, 50, (2, 16), np.int32)
    with torch.no_grad():
        theirs = model(torch.from_numpy(tokens).long(), use_cache=False).logits.numpy()
    close(np.asarray(decoder.apply(cfg, params, tokens).logits), theirs)
