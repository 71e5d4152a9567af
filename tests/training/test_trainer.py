"""Whole runs: what they leave behind, and what they refuse."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import chex
import jax
import numpy as np
import pytest
import torch
from helpers.head_files import one_by_one, stored
from helpers.paths import ROOT
from helpers.runs import WORDS, lines, train
from safetensors.numpy import load_file

from medusa_jax import Decoder, Greedy, Tree, export, load_model, outputs
from medusa_jax.convert import convert
from medusa_jax.drafting.of_heads import drafter_of_heads
from medusa_jax.errors import InputError
from medusa_jax.model.backbone import Backbone, causal_mask
from medusa_jax.param_paths import joined
from medusa_jax.training import lora, scanned_backbone, settings
from medusa_jax.training.checkpoints import Checkpoints
from medusa_jax.training.config_file import read_config
from medusa_jax.training.mesh import make_mesh
from medusa_jax.training.weights import heads_shape, load, model_shape, plan


@pytest.mark.e2e
@pytest.mark.slow
def test_a_run_leaves_config_metrics_checkpoints_and_heads(place: Path, finished: Path):
    config = settings.from_dict(json.loads((finished / "config.json").read_text()))
    assert (config.optim.steps, config.model.path) == (24, str(place / "model"))
    logged = [line for line in lines(finished) if "loss" in line]
    assert [line["step"] for line in logged] == list(range(1, 25))
    contract = {"loss", "lm_loss", "head_loss", "head_top1", "learning_rate"}
    assert all(contract <= line.keys() and len(line["head_top1"]) == 2 for line in logged)
    assert logged[-1]["head_loss"] < logged[0]["head_loss"]
    held_out = [line["step"] for line in lines(finished) if "eval_perplexity" in line]
    assert held_out == [0, 8, 16, 24]
    assert Checkpoints(finished).steps == [16, 20, 24]  # the newest three
    assert json.loads((finished / "heads/config.json").read_text()) == {
        "medusa_num_heads": 2,
        "medusa_num_layers": 1,
        "base_model_name_or_path": str(place / "model"),
    }


@pytest.mark.e2e
@pytest.mark.slow
def test_heads_are_exported_in_the_originals_layout_and_read_back(place: Path, finished: Path):
    tensors = load_file(finished / "heads/medusa_lm_head.safetensors")
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    assert shapes == {
        f"{i}.{name}": shape
        for i in range(2)
        for name, shape in (
            ("0.linear.weight", (16, 16)),
            ("0.linear.bias", (16,)),
            ("1.weight", (42, 16)),
        )
    }
    pickled = torch.load(finished / "heads/medusa_lm_head.pt", weights_only=True)
    assert {name: tensor.numpy().tobytes() for name, tensor in pickled.items()} == {
        name: tensor.tobytes() for name, tensor in tensors.items()
    }
    model = load_model(place / "model", finished / "heads")
    state = Checkpoints(finished)._manager.restore(24)
    trained = state["trainable"]["heads"]
    heads = stored(model.params["heads"])
    for head in ("head_0", "head_1"):
        np.testing.assert_array_equal(heads[head]["vocab"], trained[head]["vocab"])
        block = heads[head]["block_0"]
        np.testing.assert_array_equal(block["weight"], trained[head]["block_0"]["weight"])
        assert np.abs(trained[head]["block_0"]["bias"]).max() > 0  # biases learn too


@pytest.mark.e2e
@pytest.mark.slow
def test_another_config_in_the_same_directory_is_refused(place: Path, finished: Path):
    code, err = train(place, finished, "--config.optim.learning_rate=0.5", "--config.seed=3")
    assert code == 2
    assert "optim.learning_rate: 0.003 -> 0.5" in err
    assert "seed: 0 -> 3" in err
    before = lines(finished)
    code, err = train(place, finished, "--config.run.log_every=3")  # how, not what
    assert code == 0, err
    assert lines(finished) == before


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
def test_medusa2_is_exported_as_one_model_that_decodes_as_before(
    place: Path, finished: Path, tmp_path: Path, rank: int
):
    """Full, and LoRA with KL from a tied model, from the heads of the first stage."""
    flags = ["--config.mode=medusa2", f"--config.heads.path={finished}"]
    flags += [f"--config.lora.rank={rank}", f"--config.loss.distill={bool(rank)}"]
    flags += ["--config.optim.learning_rate=0.05"]
    code, err = train(place, tmp_path / "run", *flags)
    assert code == 0, err
    merged = load_model(tmp_path / "run/model")
    assert merged.heads.num_heads == 2
    assert merged.config.tied == (rank == 0)
    settings_file = json.loads((tmp_path / "run/model/config.json").read_text())
    assert (settings_file["medusa_num_heads"], settings_file["medusa_num_layers"]) == (2, 1)
    assert (tmp_path / "run/model/tokenizer.json").is_file()
    start, trained = (
        one_by_one(model.params["backbone"])["layer_0"]["mlp"]["gate_up"]["weight"]
        for model in (load_model(place / "model"), merged)
    )
    assert np.abs(trained.data - start.data).max() > 1e-3

    decoder = Decoder(merged.config, drafter_of_heads(merged.heads, Tree.chain(2)), Greedy())
    state = decoder.prefill(merged.params, [[0, 5, 6]], max_new_tokens=9)
    (output,) = outputs(decoder.generate(merged.params, state))
    tokens = jax.numpy.asarray([[0, 5, 6, *output.token_ids]])
    assert tokens.shape == (1, 12)
    before = trained_logits(tmp_path / "run", tokens)
    assert np.argmax(before[0, 2:-1], -1).tolist() == output.token_ids
    backbone: Any = Backbone(merged.config)
    variables = {"params": merged.params["backbone"]}
    positions = jax.numpy.arange(12)[None]
    hidden, _ = backbone.apply(variables, tokens, positions, causal_mask(12))
    after = backbone.apply(variables, hidden, method="unembed")
    np.testing.assert_allclose(after, before, atol=1e-4)


@pytest.mark.e2e
@pytest.mark.slow
def test_truncated_heads_through_both_stages_to_vllm(place: Path, tmp_path: Path):
    """The map is chosen once, from the data; a resumed run and a second stage keep it.

    Heads for all tokens that share the lm_head can be those that the first stage begins with.
    """
    flags = ["--config.heads.shared=True", "--config.optim.steps=3"]
    code, err = train(place, tmp_path / "whole", *flags)
    assert code == 0, err
    flags += ["--config.heads.truncated=12", f"--config.heads.path={tmp_path / 'whole'}"]
    code, err = train(place, tmp_path / "one", *flags)
    assert code == 0, err
    ids = json.loads((tmp_path / "one/data.json").read_text())["token_map"]
    assert len(set(ids)) == 12 and set(ids) != set(range(12))
    assert train(place, tmp_path / "one", *flags)[0] == 0  # resumes, and has nothing to do
    flags += ["--config.mode=medusa2", f"--config.heads.path={tmp_path / 'one'}"]
    code, err = train(place, tmp_path / "two", *flags)
    assert code == 0, err

    merged = load_model(tmp_path / "two/model")
    assert (merged.heads.truncated, merged.heads.shared) == (12, True)
    assert merged.params["heads"]["token_map"].tolist() == ids
    # Shared rows are those of the lm_head as it was trained.
    rows = merged.params["backbone"]["lm_head"].rows(np.array(ids))
    chex.assert_trees_all_equal(merged.params["heads"]["vocab"], rows)
    convert(str(tmp_path / "two/model"), "vllm", tmp_path / "vllm", as_is=True)
    served = load_model(tmp_path / "two/model", tmp_path / "vllm")
    chex.assert_trees_all_equal(served.params["heads"], merged.params["heads"])


@pytest.mark.e2e
@pytest.mark.slow
def test_pretraining_begins_with_random_weights_and_writes_a_model(place: Path, tmp_path: Path):
    flags = ["--config.mode=pretrain", "--config.model.random=true"]
    code, err = train(place, tmp_path / "run", *flags)
    assert code == 0, err
    held_out = [line["eval_lm_loss"] for line in lines(tmp_path / "run") if "eval_lm_loss" in line]
    assert held_out[0] == pytest.approx(np.log(len(WORDS)), abs=0.1)  # knows nothing yet
    assert held_out[-1] < held_out[0] - 0.2
    model = load_model(tmp_path / "run/model")
    assert model.heads.num_heads == 0
    assert "medusa" not in (tmp_path / "run/model/config.json").read_text()


def trained_logits(workdir: Path, tokens: Any) -> Any:
    """Logits of the checkpoint itself, adapters beside the weights, as the trainer has them."""
    config = settings.from_dict(json.loads((workdir / "config.json").read_text()))
    weights = load(config, make_mesh(settings.Mesh(), jax.devices()[:1]), with_learnt=False)
    state = Checkpoints(workdir)._manager.restore(24)
    params = joined(state["trainable"], weights.frozen)
    scale = config.lora.alpha / config.lora.rank if config.adapted else 0.0
    backbone = params["backbone"]
    if config.adapted:
        backbone = lora.attached(backbone, params["adapters"], scale)
    batch = {"tokens": tokens, "segments": tokens * 0, "positions": jax.numpy.arange(12)[None]}
    hidden = scanned_backbone.hidden_states(weights.model, backbone, batch)
    return Backbone(weights.model).apply({"params": backbone}, hidden, method="unembed")


@pytest.mark.e2e
@pytest.mark.slow
def test_any_checkpoint_can_be_exported(finished: Path, tmp_path: Path):
    run = str(finished)
    export.run(export.Options(workdir=run, output=str(tmp_path / "last")))
    name = "heads/medusa_lm_head.safetensors"
    assert (tmp_path / "last" / name).read_bytes() == (finished / name).read_bytes()
    at16 = export.Options(workdir=run, output=str(tmp_path / "at16"), step=16)
    export.run(at16)
    assert (tmp_path / "at16" / name).read_bytes() != (finished / name).read_bytes()
    with pytest.raises(InputError, match="no checkpoint of step 5; it has 16, 20, 24"):
        export.run(export.Options(workdir=run, step=5))
    with pytest.raises(InputError, match="heads exists already"):
        export.run(at16)


BAD = {
    "unknown field": (["--config.optim.lerning_rate=1"], "did you mean 'optim.learning_rate'?"),
    "wrong type": (["--config.optim.batch_size=many"], "optim.batch_size"),
    "no dashes": (["config.optim.steps=5"], "not understood: config.optim.steps=5"),
    "no steps": (["--config.optim.steps=-5"], "optim.steps must be at least 0, got -5"),
    "dropout": (["--config.lora.dropout=1.0"], "lora.dropout is 1.0; expected 0 or more, and less"),
    "nothing held out": (["--config.data.eval_fraction=0"], "nothing to hold out"),
    "unknown mode": (["--config.mode=medusa3"], "mode is 'medusa3'; expected medusa1, medusa2"),
    "too long rows": (
        ["--config.data.sequence_length=65"],
        "data.sequence_length 65 exceeds the model's context of 64 tokens",
    ),
    "no such data": (["--config.data.train=('nowhere.txt',)"], "nowhere.txt does not exist"),
    "kept": (
        ["--config.model.kept=('gates',)"],
        "model.kept is 'gates'; expected query, key",
    ),
    "kept twice": (
        ["--config.model.kept=('up',)", "--config.model.offloaded=('input', 'up')"],
        "model.kept and model.offloaded both name up; expected each array in one memory",
    ),
    "mesh": (["--config.mesh.data=3"], "needs 3 devices"),
    "pieces": (["--config.optim.accumulation=3"], "does not divide into"),
    "heads of another run": (["--config.heads.path=nowhere"], "nowhere does not exist"),
    "distilling heads alone": (["--config.loss.distill=true"], "needs mode 'medusa2'"),
    "batch": (["--config.optim.batch_size=5000"], "fewer than optim.batch_size 5000"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_settings_get_one_message(place: Path, tmp_path: Path, name: str):
    flags, message = BAD[name]
    code, err = train(place, tmp_path / "run", *flags)
    assert code == 2
    assert message in err
    assert len([line for line in err.splitlines() if line.startswith("error:")]) == 1


def test_a_text_is_no_tuple_of_texts():
    backbone = settings.Backbone(offloaded="input")  # pyrefly: ignore
    with pytest.raises(InputError, match=r"model.offloaded is the text 'input'; expected a tuple"):
        settings.check(settings.Config(model=backbone))


def test_nothing_left_to_learn_after_truncation(place: Path, tmp_path: Path):
    data = tmp_path / "long.jsonl"
    turns = [
        {"from": "human", "value": " ".join(["w1"] * 30)},
        {"from": "gpt", "value": " w2"},
    ]
    data.write_text((json.dumps({"conversations": turns}) + "\n") * 3)
    code, err = train(place, tmp_path / "run", f"--config.data.train=('{data}',)")
    assert code == 2
    assert "none has an assistant's token left within data.sequence_length 16" in err


@pytest.mark.e2e
@pytest.mark.slow
def test_the_step_compiles_for_devices_that_are_not_here(place: Path):
    command = [sys.executable, "train.py", "--config", place / "config.py"]
    done = subprocess.run(
        [*command, "--compile_only", "cpu:4", "--config.mesh.fsdp=4"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "cpu:4 (data 1 x fsdp 4 x tensor 1):" in done.stdout
    assert "GiB per device" in done.stdout
    done = subprocess.run([*command, "--compile_only", "v9:2"], cwd=ROOT, capture_output=True)
    assert done.returncode == 2
    assert b"expected cpu:8, h100, or v4, v5e" in done.stderr


CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("[!_]*.py"))


@pytest.mark.parametrize("name", CONFIGS)
def test_shipped_configs_are_sound(name: str):
    file = ROOT / f"configs/{name}.py"
    config = read_config(str(file), [])
    settings.check(config)
    assert f"--config configs/{name}.py" in file.read_text()
    if config.model.shape:  # the others' models lie beside a maintainer's checkout
        model = model_shape(config, absent=True)
        assert config.data.sequence_length <= model.context
        plan(config, model, heads_shape(config, model))
