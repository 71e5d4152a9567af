"""Hydra heads in the trainer: their loss, what they learn that Medusa heads cannot, their files."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.hydra import hydra_shape, random_heads
from helpers.models import TINY, TinyModel, stacked
from helpers.runs import lines, train
from safetensors.numpy import load_file

from medusa_jax.checkpoints.load import load_model
from medusa_jax.drafting.hydra_heads import HydraHead, head_input
from medusa_jax.drafting.medusa_heads import HYDRA, MEDUSA, HeadsConfig
from medusa_jax.errors import InputError
from medusa_jax.training import settings
from medusa_jax.training.heads_objective import HeadsLoss
from medusa_jax.training.objective import Objective


def batch_of(tokens: np.ndarray, **more: Any) -> dict[str, jax.Array]:
    return {
        "tokens": jnp.asarray(tokens, jnp.int32),
        "segments": jnp.ones(tokens.shape, jnp.int32),
        "positions": jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape),
        "learnt": jnp.ones(tokens.shape, bool),
    } | more


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ce", "teacher"])
def test_the_loss_is_that_of_each_head_position_by_position(tiny: TinyModel, kind: str):
    """Of shared heads: the embeddings are of the tokens between, the target is t + k + 1."""
    heads = hydra_shape(tiny, num_layers=2, shared=True, vocab_size=0)
    params = stacked(tiny.params, 2) | {"heads": random_heads(heads)}
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((2, 9, TINY.hidden_size)).astype(np.float32)
    tokens = rng.integers(0, TINY.vocab_size, (2, 9))
    objective = Objective(TINY, heads, heads_loss=HeadsLoss(kind), chunk=6)
    batch = batch_of(tokens, hidden=jnp.asarray(hidden))
    counts = objective.counts(jax.tree.map(lambda array: array[None], batch))
    found, _ = jax.jit(objective.loss)(params, {}, batch, counts, 0.2)

    table, project = params["backbone"]["embed"]["embedding"], params["backbone"]["lm_head"]
    expected = 0.0
    for k in (1, 2, 3):
        last = 9 - k - 1  # before this position, the target is in the text
        between = jnp.stack([table[tokens[:, 1 + j : 1 + j + last]] for j in range(k)], axis=2)
        z = head_input(jnp.asarray(hidden[:, :last]), between)
        variables: Any = {"params": params["heads"][f"head_{k - 1}"]}
        logits: Any = HydraHead(heads).apply(variables, z, lambda x: x @ project.T)
        p = jax.nn.one_hot(tokens[:, k + 1 :], TINY.vocab_size)
        if kind == "teacher":
            p = jax.nn.softmax(hidden[:, k : k + last] @ project.T)
        expected -= 0.8**k * jnp.mean(jnp.sum(p * jax.nn.log_softmax(logits), axis=-1))
    assert found == pytest.approx(float(expected), rel=1e-4)


def two_successors(rows: int, length: int, seed: int) -> np.ndarray:
    """Texts in which each token has two successors, equally likely."""
    rng, tokens = np.random.default_rng(seed), np.zeros((rows, length), np.int64)
    tokens[:, 0] = rng.integers(0, 30, rows)
    for t in range(1, length):
        tokens[:, t] = (7 * tokens[:, t - 1] + rng.integers(0, 2, rows)) % 30
    return tokens


def learned(heads: HeadsConfig, model: TinyModel) -> Any:
    """Heads' terms of 80 steps, as they learn from hidden states that know the last token."""
    backbone = stacked(model.params, 2)["backbone"]
    objective, rule = Objective(TINY, heads), optax.adam(0.01)
    texts = jnp.asarray(np.stack([two_successors(8, 24, seed) for seed in range(8)]), jnp.int32)

    def step(carry: Any, number: jax.Array) -> Any:
        learns, moments = carry
        tokens = texts[number % 8]
        # In another order, for hidden states are no embeddings.
        hidden = backbone["embed"]["embedding"][tokens][..., ::-1]
        batch = {"tokens": tokens, "hidden": hidden}
        batch |= {"segments": jnp.ones_like(tokens), "learnt": jnp.ones(tokens.shape, bool)}
        counts = objective.counts(jax.tree.map(lambda array: array[None], batch))
        find = jax.grad(objective.loss, has_aux=True)
        params = {"heads": learns}, {"backbone": backbone}
        grads, terms = find(*params, batch, counts, 0.2, None, False)
        updates, moments = rule.update(grads["heads"], moments)
        return (optax.apply_updates(learns, updates), moments), terms.heads

    first = new_heads(heads)
    run = jax.jit(lambda: jax.lax.scan(step, (first, rule.init(first)), jnp.arange(80))[1])
    return run()


def new_heads(heads: HeadsConfig) -> Any:
    """Shared heads as they begin: they pass the hidden state on."""
    every, width = {}, heads.hidden_size
    for i in range(heads.num_heads):
        inputs = (i + 2 if heads.architecture == HYDRA else 1) * width
        layer = {"weight": jnp.zeros((width, inputs)), "bias": jnp.zeros(width)}
        every[f"head_{i}"] = {"block_0": layer}
        if heads.architecture == HYDRA:
            residual = layer | {"weight": jnp.eye(width, inputs)}
            every[f"head_{i}"] = {"linear_0": layer, "residual": residual}
    return every


@pytest.mark.slow
def test_they_learn_what_medusa_heads_cannot(tiny: TinyModel):
    """Which of two successors came is in the tokens between, and in no hidden state before."""
    found = {}
    for architecture in (MEDUSA, HYDRA):
        shape = hydra_shape(tiny, num_heads=2, shared=True, vocab_size=0)
        terms = learned(dataclasses.replace(shape, architecture=architecture), tiny)
        loss = terms.learnt.sum(axis=1)
        assert loss[-1] < 0.7 * loss[0]
        last = jax.tree.map(lambda leaf: leaf[-8:].mean(axis=0), terms)
        found[architecture] = [float(head.hits[0] / head.count) for head in last.heads]
        found[architecture].append(float(last.accepted[0, 0] / last.chains))
    for ours, theirs in zip(found[HYDRA], found[MEDUSA], strict=True):
        assert ours > 1.3 * theirs, found


def test_settings_that_hydra_heads_cannot_have():
    for wrong, message in (
        ({"layers": 0}, "heads.layers is 0; Hydra heads read their input by a block: 1 or more"),
        ({"selector": 4}, "heads.selector is 4; Hydra heads see the token before: expected 0"),
    ):
        heads = settings.Heads(architecture=HYDRA, **wrong)
        with pytest.raises(InputError, match=message):
            settings.check(settings.Config(heads=heads))


@pytest.mark.e2e
@pytest.mark.slow
def test_a_run_on_kept_states_and_a_run_with_the_backbone_from_its_heads(
    place: Path, tmp_path: Path
):
    """Both in the names of zankner/Hydra; truncated heads, then heads with the backbone."""
    kept = f"--config.data.hidden_states={tmp_path / 'states'}"
    shape = ["--config.heads.architecture=hydra", "--config.heads.shared=True"]
    shape += ["--config.heads.truncated=20", "--config.optim.steps=16"]
    code, err = train(place, tmp_path / "run", *shape, kept)
    assert code == 0, err
    held_out = [line for line in lines(tmp_path / "run") if "eval_head_loss" in line]
    assert held_out[-1]["eval_head_loss"] < 0.9 * held_out[0]["eval_head_loss"]
    written = load_file(tmp_path / "run/heads/hydra_lm_head.safetensors")
    assert {name: array.shape for name, array in written.items()} == {
        "token_map": (20,),
        "hydra_mlp.0.0.linear.weight": (16, 32),
        "hydra_mlp.0.0.linear.bias": (16,),
        "hydra_mlp.0.0.res_connection.weight": (16, 32),
        "hydra_mlp.0.0.res_connection.bias": (16,),
        "hydra_mlp.1.0.linear.weight": (16, 48),
        "hydra_mlp.1.0.linear.bias": (16,),
        "hydra_mlp.1.0.res_connection.weight": (16, 48),
        "hydra_mlp.1.0.res_connection.bias": (16,),
    }
    assert json.loads((tmp_path / "run/heads/config.json").read_text()) == {
        "hydra_num_heads": 2,
        "hydra_num_layers": 1,
        "hydra_head_arch": "mlp",
        "grounded_heads": True,
        "base_model_name_or_path": str(place / "model"),
    }
    model = load_model(tmp_path / "run/heads")
    assert model.heads == HeadsConfig(2, 1, 16, 0, True, 20, architecture=HYDRA)

    more = ["--config.mode=medusa2", "--config.lora.rank=2", "--config.loss.heads=teacher"]
    more += [f"--config.heads.path={tmp_path / 'run'}", "--config.optim.steps=4"]
    code, err = train(place, tmp_path / "joint", *shape, *more)
    assert code == 0, err
    merged = load_model(tmp_path / "joint/model")
    assert merged.heads == model.heads
    before, after = (m.params["heads"]["head_1"]["residual_linear_0"] for m in (model, merged))
    assert 0 < np.abs(after["bias"] - before["bias"]).max() < 0.5
