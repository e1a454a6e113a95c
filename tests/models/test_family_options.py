"""Tables and options of the families: both directions, what fits, what is refused and how. Needs no transformers."""

import dataclasses
import json
import math

import numpy as np
import pytest
from family_examples import BY_NAME, EXAMPLES
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpar.models import convert, decoder
from jaxpar.models.config import ModelConfig
from jaxpar.models.families import FAMILIES
from jaxpar.models.families.table import meaning
from jaxpar.models.feedforward.dense import MLP, GatedMLP
from jaxpar.models.norms import LayerNorm, RMSNorm
from jaxpar.models.positions import FactorScaling, Learned, LinearScaling, Llama3Scaling, NoPositions, Rope, YarnScaling
from jaxpar.models.spec import flatten


@pytest.mark.parametrize("gguf", [False, True])
@pytest.mark.parametrize("name", EXAMPLES)
def test_layouts_turn_round(name, gguf):
    """Every row: its shape there follows from ours, and reading undoes writing."""
    specs = flatten(decoder.spec(EXAMPLES[name]))
    for row in BY_NAME[name].table(specs):
        _, layout = row.column(gguf)
        shape = specs[row.paths[0]].shape[1:] if row.stacked else specs[row.paths[0]].shape
        shape = shape if len(row.paths) == 1 else (len(row.paths), *shape)
        ours = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
        theirs = layout.write(ours)
        assert theirs.shape == layout.theirs(shape)
        np.testing.assert_array_equal(layout.read(theirs, shape), ours)


def test_interleaved_halves():
    """ggml turns neighbours, we turn halves: row 2i + j of theirs is row i + half * j of ours."""
    (row,) = (row for row in BY_NAME["llama"].rows if row.path == "layers/attention/query/kernel")
    layout = row.column(gguf=True)[1]
    ours = np.arange(8.0).reshape(1, 1, 8)  # one input, one head of size 8
    assert layout.write(ours)[:, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


scalings = st.one_of(
    st.none(),
    st.builds(LinearScaling, st.floats(1, 16)),
    st.builds(Llama3Scaling, st.floats(1, 16), st.floats(0.5, 2), st.floats(3, 8), st.integers(8, 64)),
    st.builds(
        YarnScaling,
        st.floats(1, 16),
        st.integers(8, 64),
        st.floats(16, 64),
        st.floats(0.5, 2),
        st.none() | st.floats(0.5, 2),
        st.booleans(),
    ),
    st.builds(FactorScaling, st.tuples(*[st.floats(1, 16)] * 4), st.floats(0.5, 2)),
)
ropes = st.builds(
    Rope, st.floats(100, 1e6), scalings, st.none() | st.floats(100, 1e6), st.sampled_from([1.0, 1.0, 0.5])
)
configs = st.builds(
    ModelConfig,
    vocabulary=st.integers(8, 64),
    layers=st.integers(1, 7),
    width=st.sampled_from([16, 32]),
    heads=st.sampled_from([2, 4]),
    kv_heads=st.sampled_from([None, 1, 2]),
    head_size=st.just(8),
    hidden=st.none() | st.integers(1, 64),
    context=st.integers(8, 128),
    norm=st.builds(RMSNorm, st.floats(1e-8, 1e-2), st.booleans()) | st.builds(LayerNorm, st.just(1e-5), st.booleans()),
    norm_placement=st.sampled_from(["pre", "post", "pre_post"]),
    qk_norm=st.booleans(),
    positions=ropes | st.just(Learned()) | st.just(NoPositions()),
    feedforward=st.builds(GatedMLP, st.sampled_from(["silu", "gelu", "gelu_tanh", "relu"]), st.booleans())
    | st.builds(MLP, st.sampled_from(["silu", "gelu", "gelu_tanh", "relu"]), st.booleans()),
    qkv_bias=st.booleans(),
    attention_out_bias=st.booleans(),
    window=st.none() | st.integers(1, 16),
    window_pattern=st.lists(st.booleans(), min_size=1, max_size=7).map(tuple),
    attention_scale=st.none() | st.just(1.0) | st.just(24**-0.5) | st.floats(0.1, 2),
    attention_cap=st.none() | st.floats(1, 50),
    logit_cap=st.none() | st.floats(1, 50),
    tied_embeddings=st.booleans(),
    embedding_scale=st.none() | st.just(4.0),
    dropout=st.sampled_from([0.0, 0.1]),
)


def near(cfg: ModelConfig):
    """Configurations that differ from this one in a few fields: many of them fit its family."""
    drawn = configs.flatmap(
        lambda other: st.sets(st.sampled_from([f.name for f in dataclasses.fields(cfg)]), max_size=3).map(
            lambda names: {name: getattr(other, name) for name in names}
        )
    )

    def with_changes(changes):
        try:
            return dataclasses.replace(cfg, **changes)
        except ValueError:
            return cfg

    return drawn.map(with_changes)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(list(EXAMPLES.values())).flatmap(near))
def test_what_fits_comes_back_and_what_does_not_is_told(cfg):
    """Any configuration and family: a reason, or a `config.json` that means the same and rows for all parameters."""
    specs = flatten(decoder.spec(cfg))
    for family in FAMILIES:
        reason = family.misfit(cfg)
        if reason is None:
            written = json.loads(json.dumps(family.from_config(cfg)))
            assert meaning(family.to_config(written)) == meaning(cfg)
            assert {path for row in family.table(specs) for path in row.paths} == set(specs)
        else:
            assert len(reason) > 10


MISFITS = {
    "two norms": (EXAMPLES["llama"].replace(norm_placement="post"), "norm_placement is 'post'"),
    "cap of attention": (EXAMPLES["gemma3_text"].replace(attention_cap=50.0), "attention_cap is 50.0"),
    "scale that is no root": (EXAMPLES["gemma3_text"].replace(attention_scale=0.3), "attention_scale"),
    "one bias of two": (EXAMPLES["llama"].replace(attention_out_bias=True), "attention_out_bias is True"),
    "grouped gpt2": (EXAMPLES["gpt2"].replace(kv_heads=2), "kv_heads is 2"),
    "no positions": (EXAMPLES["llama"].replace(positions=NoPositions()), "positions is NoPositions"),
    "part of a head": (EXAMPLES["llama"].replace(positions=Rope(fraction=0.5)), "positions"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_models_that_no_family_holds(name, tmp_path):
    cfg, expected = MISFITS[name]
    with pytest.raises(ValueError, match="cannot be written as a Hugging Face model") as e:
        convert.save_hf(cfg, {}, tmp_path / "model")
    assert expected in str(e.value)
    assert not list(tmp_path.iterdir())


LLAMA = BY_NAME["llama"].from_config(EXAMPLES["llama"])
QWEN2 = BY_NAME["qwen2"].from_config(EXAMPLES["qwen2"])
GEMMA3 = BY_NAME["gemma3_text"].from_config(EXAMPLES["gemma3_text"])
REFUSED = {
    "unknown rope type": ("llama", LLAMA, {"rope_parameters": {"rope_type": "spiral"}}, "'spiral' is unknown"),
    "dynamic rope": ("llama", LLAMA, {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic' changes"),
    "old dynamic rope": ("llama", LLAMA, {"rope_parameters": None, "rope_scaling": {"type": "dynamic"}}, "'dynamic'"),
    "long and short": (
        "llama",
        LLAMA,
        {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}},
        "short_factor that differs",
    ),
    "rope without factor": ("llama", LLAMA, {"rope_parameters": {"rope_type": "llama3"}}, "has no 'low_freq_factor'"),
    "rope with more": ("llama", LLAMA, {"rope_parameters": {"rope_type": "default", "factor": 2.0}}, "take 'factor'"),
    "part of a head": ("llama", LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    "rope by kind": (
        "llama",
        LLAMA,
        {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}},
        "rope_parameters has several",
    ),
    "scaled local rope": (
        "gemma3_text",
        GEMMA3,
        {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
        "sliding_attention layers are scaled",
    ),
    "unknown activation": ("llama", LLAMA, {"hidden_act": "mish"}, "hidden_act = 'mish'"),
    "unknown option": ("llama", LLAMA, {"use_magic": True}, "use_magic = True is not an option"),
    "quantised": ("llama", LLAMA, {"quantization_config": {"bits": 4}}, "quantization_config"),
    "missing size": ("llama", LLAMA, {"num_hidden_layers": None}, "no 'num_hidden_layers'"),
    "text for a number": ("llama", LLAMA, {"hidden_size": "16"}, "hidden_size must be an integer of at least 1"),
    "heads that do not divide": ("llama", LLAMA, {"head_dim": None, "hidden_size": 18}, "not divisible"),
    "groups that do not divide": ("llama", LLAMA, {"num_key_value_heads": 3}, "not divisible by model.kv_heads"),
    "encoder": ("llama", LLAMA, {"is_encoder_decoder": True}, "is_encoder_decoder = True"),
    "too few layer types": ("qwen2", QWEN2, {"layer_types": ["full_attention"]}, "1 entries for num_hidden_layers = 3"),
    "unknown layer type": ("qwen2", QWEN2, {"layer_types": ["conv"] * 3}, "layer_types has 'conv'"),
    "window that is off": ("qwen2", QWEN2, {"use_sliding_window": False}, "use_sliding_window is false"),
    "no window": ("qwen2", QWEN2, {"sliding_window": 0}, "sliding_window must be an integer"),
    "cap of attention": ("gemma3_text", GEMMA3, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
    "both directions": ("gemma3_text", GEMMA3, {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    "scale by layer": (
        "gpt2",
        BY_NAME["gpt2"].from_config(EXAMPLES["gpt2"]),
        {"scale_attn_by_inverse_layer_idx": True},
        "scale_attn_by_inverse_layer_idx",
    ),
    "two dropouts": ("gpt2", BY_NAME["gpt2"].from_config(EXAMPLES["gpt2"]), {"embd_pdrop": 0.5}, "embd_pdrop differ"),
    "unknown family": ("bert", {}, {}, "model_type is 'bert'"),
}


@pytest.mark.quick
@pytest.mark.parametrize("name", REFUSED)
def test_options_that_are_refused(name, tmp_path):
    kind, whole, changes, expected = REFUSED[name]
    (tmp_path / "config.json").write_text(json.dumps({**whole, "model_type": kind, **changes}))
    with pytest.raises(ValueError) as e:  # noqa: PT011
        convert.load_hf(tmp_path)
    assert expected in str(e.value)
    assert "\n" not in str(e.value)


STRANGE = [
    *(None, "", "x", -1, 0, 1, 1.5, 10**5, True, False, [], [1], {}, {"a": 1}, math.nan, -math.inf),
    *({"rope_type": kind} for kind in (3, ["yarn"], "yarn", "llama3", "longrope", None)),
    *({"rope_theta": base} for base in (None, "x", 0, 1, -5.0)),
    {"rope_type": "yarn", "factor": 0, "original_max_position_embeddings": 0},
    {"rope_type": "llama3", "factor": 2, "low_freq_factor": 1, "high_freq_factor": 1},
    {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]},
    {"full_attention": 3},
    {"sliding_attention": {"rope_theta": []}},
]


@pytest.mark.parametrize("name", EXAMPLES)
def test_strange_values_end_in_one_sentence(name):
    """Every option, every kind of nonsense: a configuration that works, or a sentence."""
    hf = BY_NAME[name].from_config(EXAMPLES[name])
    old = ("rope_scaling", "rope_theta", "partial_rotary_factor", "rope_local_base_freq", "text_config", "layer_types")
    told = set()
    for option in {*hf, *old}:
        for value in STRANGE:
            try:
                cfg = BY_NAME[name].to_config({**hf, option: value})
            except ValueError as e:
                told.add(str(e))
            else:
                assert isinstance(hash(cfg), int)
                for table in (cfg.positions.table(cfg) if cfg.layers < 99 else {}).values():
                    assert np.isfinite(table).all()
    assert len(told) > 50
    for sentence in told:
        assert "config.json" in sentence or "model." in sentence
        assert "\n" not in sentence
