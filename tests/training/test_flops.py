"""FLOPs of a step: counted in what is traced, and by the formula."""

import jax
import jax.numpy as jnp
import pytest
from helpers.paths import ROOT

from medusa_jax.training import aot, flops
from medusa_jax.training.config_file import read_config
from medusa_jax.training.settings import Backbone, Config, Data, Heads, Optim


def test_products_in_loops_and_branches():
    """x [2, 3] times w [3, 5] is 60; of two branches the cheaper counts."""
    x, w = jnp.ones((2, 3)), jnp.ones((3, 5))

    def product(x: jax.Array) -> jax.Array:
        return (x @ w)[:, :3]

    def whole(x: jax.Array, more: jax.Array) -> jax.Array:
        x = jax.jit(product)(x)
        x, _ = jax.lax.scan(lambda x, _: (product(x), None), x, None, length=4)
        x = jax.lax.while_loop(lambda x: jnp.sum(x) < 9, product, x)
        return jax.lax.cond(more, lambda x: product(product(x)), product, x)

    jaxpr = jax.jit(whole).trace(x, jnp.array(True)).jaxpr.jaxpr
    assert flops.traced(jaxpr, trips=7) == 60 * (1 + 4 + 7 + 1)


CASES = {
    "medusa1": {},
    "shared": {"heads": Heads(number=3, shared=True)},
    "hydra": {"heads": Heads("hydra", number=3, shared=True)},
    "lora": {"mode": "medusa2"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_step_computes_little_more_than_the_model_needs(name: str):
    """Without remat; attention computes its scores again and whole blocks of them."""
    config = Config(
        **{"heads": Heads(number=3)} | CASES[name],
        model=Backbone(shape="llama2-7b", remat=False),
        data=Data(sequence_length=1024),
        optim=Optim(batch_size=4, accumulation=2),
    )
    done, needed = aot.step_flops(config)
    assert 1 <= done / needed < 1.05


@pytest.mark.slow
def test_kept_products_save_most_of_what_a_recipe_computes_again():
    config = read_config(str(ROOT / "configs/vicuna7b_medusa2.py"))
    done, needed = aot.step_flops(config)
    config.model.kept = ("query", "key", "value", "gate", "up")
    assert 1 <= aot.step_flops(config)[0] / needed <= 1.15 < 1.3 < done / needed
