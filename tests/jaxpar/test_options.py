"""The command line that follows from dataclasses, and configurations to JSON and back."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxpar import options, serialise
from jaxpar.errors import UserError
from jaxpar.models.config import ModelConfig
from jaxpar.models.feedforward.dense import MLP, GatedMLP
from jaxpar.models.norms import LayerNorm, RMSNorm
from jaxpar.models.positions import Learned, LinearScaling, Llama3Scaling, NoPositions, Rope, YarnScaling
from jaxpar.parallel.mesh import MeshConfig


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits.

    Attributes:
      steps: most steps.
      width: a name that another group has too.
    """

    steps: int
    width: float = 1.0


@dataclasses.dataclass(frozen=True)
class Unlimited:
    """No limits."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
      folder: where it writes.
      model: the model.
      mesh: the mesh.
      limits: when it ends.
    """

    folder: str = "runs"
    model: ModelConfig = ModelConfig().as_given()
    mesh: MeshConfig = dataclasses.field(default=MeshConfig(), metadata={"parse": MeshConfig.parse})
    limits: Unlimited | Limits = Unlimited()


def run(*argv):
    return options.parse(Run(), argv, prog="jaxpar train")


@pytest.mark.quick
def test_names_in_full_and_by_their_ends():
    assert run("--model.layers", "2", "--folder=x") == run("--layers=2", "--folder", "x")
    assert run("--layers", "2").model.layers == 2
    assert run("--window-pattern", "True", "False").model.window_pattern == (True, False)
    assert run("--no-tied-embeddings").model.tied_embeddings is False
    assert run("--window", "None").model.window is None


@pytest.mark.quick
def test_sizes_that_follow_from_others_follow_on_the_command_line_too():
    model = run("--width", "64", "--heads", "8").model
    assert (model.head_size, model.kv_heads, model.hidden) == (8, 8, 256)
    assert run("--hidden", "100").model.hidden == 100


@pytest.mark.quick
def test_strategies_are_chosen_by_name_and_bring_their_own_fields():
    assert run("--norm", "layer-norm", "--norm.epsilon", "1e-3").model.norm == LayerNorm(epsilon=1e-3)
    assert run("--model.norm", "LayerNorm").model.norm == LayerNorm()
    assert run("--norm", "rms_norm").model.norm == RMSNorm()
    scaled = run("--scaling.factor", "3", "--positions.scaling", "yarn-scaling").model.positions
    assert scaled == Rope(scaling=YarnScaling(factor=3.0))
    assert run("--positions", "learned").model.positions == Learned()
    assert run("--limits", "limits", "--steps", "5").limits == Limits(5)
    assert run("--mesh", "data=2,tensor=4").mesh == MeshConfig(data=2, tensor=4)
    assert run("--mesh.fsdp", "2").mesh == MeshConfig(fsdp=2)


BAD = [
    (["--layer", "3"], "unknown option --layer; did you mean --model.layers"),
    (["--widht", "3"], "did you mean --model.width"),
    (["--norm", "layr-norm"], "--norm is one of rms-norm, layer-norm, but got 'layr-norm'; did you mean layer-norm"),
    (["--norm"], "--norm takes one value (rms-norm, layer-norm), got 0"),
    (["--layers", "many"], "--model.layers takes a whole number, got 'many'"),
    (["--layers"], "Missing value for argument '--model.layers'"),
    (["--heads", "5"], "model.width = 128 is not divisible by model.heads = 5"),
    (["--norm-placement", "middle"], "--model.norm-placement is one of pre, post, pre_post, but got 'middle'"),
    (["layers"], "'layers' is not an option"),
    (["--mesh", "dta=2"], "has no axis 'dta'"),
    (["--limits", "limits"], "--limits.steps"),
    (["--xyzzy", "3"], "unknown option --xyzzy; see --help"),
]


@pytest.mark.parametrize(("argv", "words"), BAD, ids=[" ".join(a) for a, _ in BAD])
def test_what_cannot_be_read_is_one_sentence(argv, words):
    with pytest.raises((UserError, ValueError)) as caught:
        run(*argv)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_help_lists_every_option_and_strategy(capsys):
    with pytest.raises(SystemExit) as end:
        run("--help")
    assert end.value.code == 0
    text = capsys.readouterr().out
    for entry in options.entries(Run()):
        if not entry.nested and not entry.members:
            assert entry.flag in text
    assert "--model.norm {rms-norm,layer-norm}" in " ".join(text.replace("│", " ").split())


@pytest.mark.quick
def test_kebab():
    assert [options.kebab(n) for n in ("LayerNorm", "RMSNorm", "MLP", "GatedMLP", "Llama3Scaling", "EMA")] == [
        "layer-norm",
        "rms-norm",
        "mlp",
        "gated-mlp",
        "llama3-scaling",
        "ema",
    ]


configs = st.builds(
    ModelConfig,
    layers=st.integers(1, 9),
    norm=st.sampled_from([RMSNorm(), LayerNorm(bias=False), RMSNorm(1e-6, True)]),
    positions=st.one_of(
        st.sampled_from([Learned(), NoPositions(), Rope()]),
        st.builds(
            Rope, scaling=st.sampled_from([None, LinearScaling(2.0), Llama3Scaling(), YarnScaling(truncate=False)])
        ),
    ),
    feedforward=st.sampled_from([GatedMLP("gelu"), MLP()]),
    window=st.one_of(st.none(), st.integers(1, 99)),
    window_pattern=st.lists(st.booleans(), min_size=1, max_size=6).map(tuple),
)


@given(configs)
def test_a_configuration_survives_json(cfg):
    there = json.loads(json.dumps(serialise.to_json(cfg)))
    back = serialise.from_json(ModelConfig, there)
    assert back == cfg
    assert hash(back) == hash(cfg)


def test_json_of_another_version_is_refused_with_a_sentence():
    good = serialise.to_json(ModelConfig())
    for change, words in [
        ({"colour": 3}, r"has the fields \['colour'\]"),
        ({"norm": {"kind": "BatchNorm"}}, "config.norm is of kind 'BatchNorm', but can be RMSNorm, LayerNorm"),
        ({"kind": "Other"}, "is a Other, but ModelConfig"),
        ({"norm": {"kind": "RMSNorm", "eps": 1}}, r"config.norm has the fields \['eps'\]"),
    ]:
        with pytest.raises(UserError, match=words):
            serialise.from_json(ModelConfig, {**good, **change})
    with pytest.raises(UserError, match=r"lacks the fields \['steps'\]"):
        serialise.from_json(Limits, {"kind": "Limits"})
