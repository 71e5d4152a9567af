"""Optimizers: groups of parameters, their rates, decay and clipping, and the heads' weight."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from medusa_jax.errors import InputError
from medusa_jax.param_paths import flat
from medusa_jax.training.optimizer import group_of, groups, heads_weight, learning_rate, optimizer
from medusa_jax.training.settings import Config, Lora, Loss, Optim


def groups_of_ones(*shape: int) -> dict[str, Any]:
    """A matrix and two vectors of heads and backbone."""
    matrix, vector = jnp.ones(shape), jnp.ones(shape[0])
    return {
        "heads": {"head_0": {"vocab": matrix, "block_0": {"bias": vector}}},
        "backbone": {"lm_head": matrix, "final_norm": {"scale": vector}},
    }


@pytest.mark.slow
def test_the_norm_of_all_groups_together_is_clipped():
    optim = Optim(clip=1.0, learning_rate=0.1, warmup_steps=0, beta1=0.9)
    rule = optimizer(Config(mode="medusa2", lora=Lora(rank=0), optim=optim), 10)
    params = groups_of_ones(3, 2)
    grads = jax.tree.map(lambda leaf: 5 * leaf, params)
    _, state = rule.update(grads, rule.init(params), params)
    means = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state) if "mu" in str(path)]
    assert optax.tree.norm(means) == pytest.approx(0.1, rel=1e-5)  # (1 - beta1) x clip


@pytest.mark.slow
def test_only_matrices_decay():
    optim = Optim(weight_decay=0.1, learning_rate=0.01, heads_multiplier=4.0, warmup_steps=0)
    rule = optimizer(Config(mode="medusa2", lora=Lora(rank=0), optim=optim), 10)
    params = groups_of_ones(3, 2)
    nothing = jax.tree.map(jnp.zeros_like, params)
    updates, _ = rule.update(nothing, rule.init(params), params)
    found = {path: float(leaf.ravel()[0]) for path, leaf in flat(updates).items()}
    assert found == pytest.approx(
        {
            "heads/head_0/vocab": -0.04 * 0.1,
            "heads/head_0/block_0/bias": 0.0,
            "backbone/lm_head": -0.01 * 0.1,
            "backbone/final_norm/scale": 0.0,
        }
    )


@pytest.mark.slow
def test_muon_turns_each_layers_matrix_and_adam_the_rest():
    """Muon's update has equal singular values, layer by layer, and the RMS of AdamW's."""
    optim = Optim(kind="muon", learning_rate=0.01, warmup_steps=0, clip=0)
    rule = optimizer(Config(mode="pretrain", optim=optim), 10)
    stack = jax.random.normal(jax.random.key(0), (2, 16, 8))
    grads = {
        "backbone": {
            "layers": {"mlp": {"up": {"weight": stack}}, "mlp_norm": {"scale": stack[:, :, 0]}},
            "embed": {"embedding": stack[0]},
        }
    }
    params = jax.tree.map(jnp.zeros_like, grads)
    updates = flat(rule.update(grads, rule.init(params), params)[0])
    turned = updates["backbone/layers/mlp/up/weight"]
    for matrix, gradient in zip(turned, stack, strict=True):
        size = np.linalg.svd(matrix, compute_uv=False)
        assert size.max() / size.min() < 2.5 < np.divide(*np.linalg.svd(gradient)[1][[0, -1]])
        assert float(jnp.vdot(matrix, gradient)) < 0
        assert jnp.sqrt(jnp.mean(matrix**2)) == pytest.approx(0.2 * 0.01, rel=0.25)
    for path in ("backbone/embed/embedding", "backbone/layers/mlp_norm/scale"):
        step = -updates[path] / jnp.sign(flat(grads)[path])  # Nesterov's: a little over the rate
        np.testing.assert_allclose(step, step.ravel()[0], rtol=1e-3)
        assert 0.01 < step.ravel()[0] < 0.02


def test_every_parameter_is_in_exactly_one_group():
    table = groups(Config(mode="medusa2", lora=Lora(rank=2)))
    with pytest.raises(InputError, match=r"exactly one.*\n  surprise/weight is in none$"):
        group_of(["heads/head_0/vocab", "surprise/weight"], table)
    with pytest.raises(InputError, match="heads/head_0/vocab is in heads and all"):
        group_of(["heads/head_0/vocab"], table | {"all": ".*"})


def test_rates_over_a_run():
    rate: Any = learning_rate(Optim(learning_rate=1.0, warmup_steps=4), 12)
    found = [float(rate(step)) for step in range(12)]
    assert found[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert found[8] == pytest.approx(0.5)
    assert found == pytest.approx(sorted(found[:4]) + sorted(found[4:], reverse=True))
    assert 0 < found[-1] < 0.05
    flat_rate: Any = learning_rate(Optim(learning_rate=1.0, warmup_steps=0, schedule="constant"), 9)
    assert [float(flat_rate(step)) for step in (0, 8)] == [1.0, 1.0]


def test_ramps_of_the_heads_weight():
    steps = jnp.arange(0, 11)
    sine = heads_weight(Loss(heads_weight=0.01, ramp="sine"), 10)(steps)
    np.testing.assert_allclose(sine, 0.01 * np.sin(np.pi / 2 * np.arange(11) / 10), atol=1e-8)
    early = heads_weight(Loss(heads_weight=0.01, ramp="sine", ramp_fraction=0.5), 10)(steps)
    np.testing.assert_allclose(early[5:], 0.01)
    linear = heads_weight(Loss(heads_weight=0.4, ramp="linear"), 10)(steps)
    np.testing.assert_allclose(linear, 0.04 * np.arange(11), rtol=1e-6)
    assert heads_weight(Loss(heads_weight=0.2), 10)(jnp.asarray(0)) == pytest.approx(0.2)
