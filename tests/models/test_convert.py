"""Folders of published models: damage, what is missing, and that nothing is half written. Needs no transformers."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from family_examples import BY_NAME, EXAMPLES, params_of
from safetensors.numpy import load_file, save_file

from jaxpar.models import convert, hf_folder
from jaxpar.models.families.table import meaning


@pytest.mark.quick
@pytest.mark.parametrize("name", EXAMPLES)
def test_every_family_holds_its_example(name, tmp_path):
    cfg, params = EXAMPLES[name], params_of(EXAMPLES[name])
    assert convert.family_of(cfg).name == name
    folder = convert.save_hf(cfg, params, tmp_path / "model", shard_bytes=4_000)
    again, read = convert.load_hf(folder)
    assert meaning(again) == meaning(cfg)
    assert jax.tree.structure(read) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, read, params)
    assert convert.load_config(folder) == again


def test_written_as_bfloat16(tmp_path):
    cfg, params = EXAMPLES["llama"], params_of(EXAMPLES["llama"])
    whole = convert.save_hf(cfg, params, tmp_path / "whole")
    half = convert.save_hf(cfg, params, tmp_path / "half", dtype="bfloat16")
    assert (half / "model.safetensors").stat().st_size < 0.6 * (whole / "model.safetensors").stat().st_size
    rounded = jax.tree.map(lambda x: x.astype(jax.numpy.bfloat16).astype(np.float32), params)
    jax.tree.map(np.testing.assert_array_equal, convert.load_hf(half)[1], rounded)


def test_options_that_change_nothing(tmp_path):
    harmless = {"torch_dtype": "bfloat16", "use_cache": True, "pretraining_tp": 1, "_name_or_path": "x", "top_k": 50}
    folder = convert.save_hf(EXAMPLES["llama"], params_of(EXAMPLES["llama"]), tmp_path / "model")
    hf = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**hf, **harmless}))
    assert convert.load_config(folder) == BY_NAME["llama"].to_config(hf)


@pytest.fixture
def folder(tmp_path) -> Path:
    return convert.save_hf(EXAMPLES["llama"], params_of(EXAMPLES["llama"]), tmp_path / "model")


@pytest.fixture
def sharded(tmp_path) -> Path:
    return convert.save_hf(EXAMPLES["llama"], params_of(EXAMPLES["llama"]), tmp_path / "sharded", shard_bytes=4_000)


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


QUERY = "model.layers.1.self_attn.q_proj.weight"
DAMAGES = {
    "missing tensor": (lambda t: t.pop(QUERY), f"no tensor '{QUERY}'"),
    "unknown tensor": (lambda t: t.update(extra=t[QUERY]), "'extra' has no place"),
    "one layer too many": (
        lambda t: t.update({"model.layers.3.mlp.up_proj.weight": t[QUERY]}),
        "'model.layers.3.mlp.up_proj.weight' has no place",
    ),
    "other shape": (lambda t: t.update({QUERY: np.zeros((16, 8), np.float32)}), "shape (16, 8), and its configuration"),
    "integers": (lambda t: t.update({QUERY: np.zeros((16, 16), np.int8)}), "is I8; only"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_tensors_that_do_not_fit(name, folder):
    change, expected = DAMAGES[name]
    rewrite(folder, change)
    with pytest.raises(ValueError) as e:  # noqa: PT011
        convert.load_hf(folder)
    assert expected in str(e.value)
    assert "\n" not in str(e.value)


def test_buffers_of_old_files_are_left_out(folder):
    rewrite(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}))
    convert.load_hf(folder)


def test_names_of_a_bare_model(folder):
    """The same model saved without its head's prefix."""

    def bare(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    expected = convert.load_hf(folder)[1]
    rewrite(folder, bare)
    jax.tree.map(np.testing.assert_array_equal, convert.load_hf(folder)[1], expected)


def test_a_tied_output_projection_in_the_file(tmp_path):
    cfg = EXAMPLES["mistral"]
    folder = convert.save_hf(cfg, params_of(cfg), tmp_path / "model")
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    convert.load_hf(folder)
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    with pytest.raises(ValueError, match=r"is true, but tensor lm_head\.weight is not the embedding"):
        convert.load_hf(folder)


@pytest.mark.parametrize("part", [0.0, 0.001, 0.1, 0.5, 0.999])
def test_a_torn_file(part, folder):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(part * len(data))])
    with pytest.raises(ValueError, match="is cut short, corrupted, or no safetensors file"):
        convert.load_hf(folder)


def test_folders_that_lack_something(tmp_path, folder, sharded):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        convert.load_hf(tmp_path / "nowhere")
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"names {shard.name}, which is not there"):
        convert.load_hf(sharded)
    (sharded / hf_folder.INDEX).write_text("{}")
    with pytest.raises(ValueError, match="has no weight_map"):
        convert.load_hf(sharded)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"it has pytorch_model\.bin, and only safetensors"):
        convert.load_hf(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not valid JSON"):
        convert.load_hf(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="holds a list"):
        convert.load_hf(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no config\.json"):
        convert.load_hf(folder)


def test_nothing_is_half_written(tmp_path, monkeypatch):
    """A writer that dies leaves no folder under the name, and the next one is not hindered by what it left."""
    cfg, params = EXAMPLES["llama"], params_of(EXAMPLES["llama"])
    save, calls = hf_folder.save_file, []

    def dies(*args, **options):
        calls.append(1)
        if len(calls) == 2:
            raise OSError("no space left on device")
        save(*args, **options)

    with monkeypatch.context() as m:
        m.setattr(hf_folder, "save_file", dies)
        with pytest.raises(OSError, match="no space"):
            convert.save_hf(cfg, params, tmp_path / "model", shard_bytes=4_000)
    assert not list(tmp_path.iterdir())
    (tmp_path / ".model.partial").mkdir()  # what a killed process leaves
    (tmp_path / ".model.partial" / "old").write_text("")
    convert.save_hf(cfg, params, tmp_path / "model")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]


def test_what_cannot_be_written(tmp_path, monkeypatch):
    cfg, params = EXAMPLES["llama"], params_of(EXAMPLES["llama"])
    folder = convert.save_hf(cfg, params, tmp_path / "model")
    with pytest.raises(FileExistsError, match="exists already"):
        convert.save_hf(cfg, params, folder)
    with pytest.raises(ValueError, match="written as float32 or bfloat16, not 'int8'"):
        convert.save_hf(cfg, params, tmp_path / "other", dtype="int8")
    with pytest.raises(ValueError, match="no family 'bert'"):
        convert.save_hf(cfg, params, tmp_path / "other", family="bert")
    with pytest.raises(ValueError, match="lack head/unembed/kernel"):
        convert.save_hf(cfg, {**params, "head": {"norm": params["head"]["norm"]}}, tmp_path / "other")
    with pytest.raises(ValueError, match=r"embedding/tokens has shape \(3, 3\), and \(31, 16\) is needed"):
        convert.save_hf(cfg, {**params, "embedding": {"tokens": np.zeros((3, 3))}}, tmp_path / "other")
    monkeypatch.setattr(hf_folder.shutil, "disk_usage", lambda path: hf_folder.shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(ValueError, match="bytes, and the disk of"):
        convert.save_hf(cfg, params, tmp_path / "other")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_tokenizer_and_ids_travel_along(tmp_path):
    ids = convert.TokenIds(bos=1, stops=(2, 5), padding=0)
    folder = convert.save_hf(EXAMPLES["llama"], params_of(EXAMPLES["llama"]), tmp_path / "a", ids=ids)
    assert convert.tokenizer_path(folder) is None
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text("{}")
    cfg, copy = convert.convert(folder, tmp_path / "b", dtype="bfloat16")
    assert meaning(cfg) == meaning(EXAMPLES["llama"])
    assert convert.tokenizer_path(copy) == copy / "tokenizer.json"
    assert (copy / "tokenizer_config.json").is_file()
    assert convert.token_ids(copy) == ids
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert convert.token_ids(copy).stops == (7,)


def test_arrays_of_jax_are_written(tmp_path):
    cfg = EXAMPLES["qwen3"]
    params = params_of(cfg)
    folder = convert.save_hf(cfg, jax.tree.map(jax.numpy.asarray, params), tmp_path / "model")
    jax.tree.map(np.testing.assert_array_equal, convert.load_hf(folder)[1], params)
