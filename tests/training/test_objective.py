"""Training modes: what learns, at which rate, and that every short cut gives the same step."""

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.models import TINY, TinyModel, stacked
from helpers.tiers import slow_except

from medusa_jax.drafting.medusa_heads import HeadsConfig
from medusa_jax.model.weight import Adapter, Weight
from medusa_jax.param_paths import flat, joined, nested
from medusa_jax.training import lora
from medusa_jax.training.objective import Objective, report
from medusa_jax.training.optimizer import optimizer
from medusa_jax.training.remat import Remat
from medusa_jax.training.settings import Backbone, Config, Heads, Lora, Loss, Optim
from medusa_jax.training.step import init_state, make_step
from medusa_jax.training.weights import plan, split

ROWS, LENGTH = 4, 12


def make_batch(pieces: int = 1, seed: int = 0) -> dict[str, jax.Array]:
    """Arrays [A, B, T]: two documents a row, prompts not learnt."""
    tokens = np.random.default_rng(seed).integers(0, TINY.vocab_size, (ROWS, LENGTH))
    segments = np.repeat([[1] * 7 + [2] * 5], ROWS, 0)
    positions = np.repeat([[*range(7), *range(5)]], ROWS, 0)
    learnt = np.ones((ROWS, LENGTH), bool)
    learnt[:, :2] = learnt[0, 7:9] = False  # so that pieces hold different numbers of targets
    arrays = {"tokens": tokens, "segments": segments, "positions": positions, "learnt": learnt}
    return {key: jnp.asarray(a).reshape(pieces, -1, LENGTH) for key, a in arrays.items()}


def config_of(mode: str, **changes: Any) -> Config:
    return Config(
        mode=mode,
        model=Backbone(dtype="float32", remat=False),
        heads=Heads(number=3),
        lora=changes.get("lora", Lora(rank=2, alpha=4.0, dropout=0.0)),
        loss=changes.get("loss", Loss(chunk=5)),
        optim=changes.get("optim", Optim(learning_rate=0.01, warmup_steps=0, clip=0.0)),
    )


@dataclasses.dataclass
class Setup:
    """Everything a step needs, of the tiny model."""

    objective: Objective
    rule: optax.GradientTransformation
    trainable: dict[str, Any]
    frozen: dict[str, Any]

    def step(self, batch: dict[str, jax.Array], *, with_lm: bool = True, **changes: Any) -> Any:
        objective = dataclasses.replace(self.objective, **changes)
        compiled = make_step(objective, self.rule, optax.constant_schedule(0.2), 0)
        state = init_state(jax.tree.map(jnp.copy, self.trainable), self.rule)
        return compiled(state, self.frozen, batch, np.bool_(with_lm))


def setup_of(tiny: TinyModel, config: Config) -> Setup:
    table = plan(config, tiny.config, tiny.heads)
    leaves = flat(stacked(tiny.params, 2))
    for path, one in table.items():
        if path.startswith("adapters/"):  # B is not zero, so that adapters are seen
            key = lora.path_key(jax.random.key(3), path)
            leaves[path] = 0.1 * jax.random.normal(key, one.shape)
        if path.startswith("teacher/"):
            leaves[path] = leaves[path.replace("teacher/", "backbone/", 1)]
    trainable, frozen = split({path: leaves[path] for path in table}, table)
    objective = Objective.of(config, tiny.config, tiny.heads)
    return Setup(objective, optimizer(config, 10), trainable, frozen)


MODES = {
    "medusa1": config_of("medusa1"),
    "full": config_of("medusa2", lora=Lora(rank=0)),
    "lora": config_of("medusa2"),
    "distilled lora": config_of("medusa2", loss=Loss(chunk=5, distill=True)),
    "distilled full": config_of("medusa2", lora=Lora(rank=0), loss=Loss(chunk=5, distill=True)),
}


@pytest.mark.slow
@pytest.mark.parametrize("mode", slow_except(MODES, "medusa1"))
def test_what_learns_changes_and_what_is_frozen_has_no_place_in_the_state(
    tiny: TinyModel, mode: str
):
    setup = setup_of(tiny, MODES[mode])
    tops = {"medusa1": {"heads"}, "full": {"heads", "backbone"}, "lora": {"heads", "adapters"}}
    assert setup.trainable.keys() == tops[mode.removeprefix("distilled ")]
    state, _ = setup.step(make_batch())
    before, after = flat(setup.trainable), flat(state.trainable)
    same = [path for path in before if np.array_equal(before[path], after[path])]
    assert same == []
    moments = jax.tree.leaves(state.opt_state)
    size = sum(leaf.size for leaf in before.values())
    assert sum(leaf.size for leaf in moments if leaf.ndim) == 2 * size


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["medusa1", "full", "distilled lora"])
def test_pieces_remat_and_chunks_give_the_same_step(tiny: TinyModel, mode: str):
    setup = setup_of(tiny, MODES[mode])
    state, result = setup.step(make_batch(), chunk=0)
    other, same = setup.step(make_batch(pieces=4), remat=Remat(), chunk=4)
    chex.assert_trees_all_close(same, result, rtol=1e-5)
    # Adam's first update is the gradient's sign: where it is all but zero, signs may differ.
    chex.assert_trees_all_close(other.opt_state, state.opt_state, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_what_medusa1_learns_does_not_depend_on_the_loss_of_the_lm_head(tiny: TinyModel):
    setup = setup_of(tiny, MODES["medusa1"])
    state, result = setup.step(make_batch())
    same, without = setup.step(make_batch(), with_lm=False)
    chex.assert_trees_all_equal(same, state)
    assert (float(without.terms.lm.loss), float(without.terms.lm.count)) == (0, 0)
    assert float(result.terms.lm.loss) > 1


@pytest.mark.slow
def test_the_loss_is_the_papers(tiny: TinyModel):
    """Sections 2.2.1 and 2.2.2, written out for one document without padding."""
    tokens = make_batch()["tokens"][0]
    batch = {
        "tokens": tokens,
        "segments": jnp.ones_like(tokens),
        "positions": jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape),
        "learnt": jnp.ones(tokens.shape, bool),
    }
    from medusa_jax.drafting.medusa_heads import MedusaHeads
    from medusa_jax.model.backbone import Backbone as Module
    from medusa_jax.model.backbone import causal_mask

    module, mask = Module(tiny.config), causal_mask(LENGTH)
    variables = {"params": tiny.params["backbone"]}
    hidden, _ = module.apply(variables, tokens, batch["positions"], mask)
    lm = module.apply(variables, hidden, method="unembed")
    heads = MedusaHeads(tiny.heads).apply({"params": tiny.params["heads"]}, hidden, lambda x: x)

    def entropy(logits: Any, offset: int) -> Any:
        losses = optax.softmax_cross_entropy_with_integer_labels
        return losses(logits[:, :-offset], tokens[:, offset:]).mean()

    heads_loss = sum(0.8**k * entropy(head, k + 1) for k, head in enumerate(heads, start=1))
    step_arrays = jax.tree.map(lambda array: array[None], batch)
    for mode, expected in (
        ("medusa1", heads_loss),
        ("medusa2", entropy(lm, 1) + 0.2 * heads_loss),
    ):
        objective = Objective(tiny.config, tiny.heads, mode)
        params, counts = stacked(tiny.params, 2), objective.counts(step_arrays)
        loss, terms = jax.jit(objective.loss)(params, {}, batch, counts, 0.2)
        assert loss == pytest.approx(float(expected), rel=1e-5)
        assert report(terms, 0.2, objective)["loss"] == pytest.approx(float(loss), rel=1e-5)


@pytest.mark.slow
def test_new_adapters_leave_the_backbone_as_it_was_and_folding_is_applying(tiny: TinyModel):
    setup = setup_of(tiny, MODES["lora"])
    fresh = {
        path: lora.init(path, leaf.shape, jax.random.key(0))
        for path, leaf in flat({"adapters": setup.trainable["adapters"]}).items()
    }
    batch = jax.tree.map(lambda array: array[0], make_batch())
    start = nested(fresh) | {"heads": setup.trainable["heads"]}
    model = stacked(tiny.params, 2)
    bare = jax.jit(Objective(tiny.config, tiny.heads, "medusa2").terms)
    terms = jax.jit(setup.objective.terms)
    plain = bare(model, {}, batch)
    chex.assert_trees_all_close(terms(start, setup.frozen, batch), plain, rtol=1e-5)

    adapted = terms(setup.trainable, setup.frozen, batch)
    assert abs(float(adapted.lm.loss - plain.lm.loss)) > 0.1
    leaves, adapters = flat(model), flat(setup.trainable)
    for path in leaves:
        name = path.replace("backbone/", "adapters/", 1).removesuffix("/weight")
        if f"{name}/a" in adapters:
            a, b = adapters[f"{name}/a"], adapters[f"{name}/b"]
            adapter = Adapter(a, b, setup.objective.adapter_scale)
            leaves[path] = lora.folded(Weight(leaves[path], adapter=adapter))
    chex.assert_trees_all_close(bare(nested(leaves), {}, batch), adapted, rtol=1e-4)


@pytest.mark.slow
def test_every_projection_and_the_lm_head_is_adapted(tiny: TinyModel):
    adapted = flat(setup_of(tiny, MODES["lora"]).trainable["adapters"])
    names = {path.rsplit("/", 1)[0] for path in adapted}
    linears = ("attention/query", "attention/key", "attention/value", "attention/out")
    linears += ("mlp/gate", "mlp/up", "mlp/down")
    assert names == {f"layers/{name}" for name in linears} | {"lm_head"}
    assert adapted["layers/mlp/up/a"].shape == (2, 2, TINY.hidden_size)  # [L, R, in]
    assert adapted["layers/mlp/up/b"].shape == (2, TINY.ffn_size, 2)


@pytest.mark.slow
def test_the_teacher_is_the_network_without_adapters(tiny: TinyModel):
    setup = setup_of(tiny, MODES["distilled lora"])
    batch = jax.tree.map(lambda array: array[0], make_batch())
    terms = jax.jit(setup.objective.terms)
    assert terms(setup.trainable, setup.frozen, batch).kl > 0.1
    none = jax.tree.map(jnp.zeros_like, setup.trainable["adapters"])
    fresh = setup.trainable | {"adapters": none}
    assert terms(fresh, setup.frozen, batch).kl == pytest.approx(0, abs=1e-5)
    counts = setup.objective.counts(make_batch())
    kl = functools.partial(
        setup.objective.loss, batch=batch, counts=counts, heads_weight=0.0, key=None
    )
    grads = jax.jit(jax.grad(lambda params: kl(params, setup.frozen)[0]))(fresh)
    assert optax.tree.norm(grads) < 1e-5  # at its minimum


@pytest.mark.slow
def test_dropout_is_another_each_step_and_off_in_evaluation(tiny: TinyModel):
    setup = setup_of(tiny, config_of("medusa2", lora=Lora(rank=2, alpha=40.0, dropout=0.5)))
    batch = jax.tree.map(lambda array: array[0], make_batch())
    run = jax.jit(setup.objective.terms)
    found = [run(setup.trainable, setup.frozen, batch, jax.random.key(i)) for i in (1, 2, 1)]
    losses = [float(terms.lm.loss) for terms in found]
    assert losses[0] != losses[1]
    assert losses[0] == losses[2]
    without = dataclasses.replace(setup.objective, adapter_dropout=0.0)
    chex.assert_trees_all_close(
        run(setup.trainable, setup.frozen, batch),
        jax.jit(without.terms)(setup.trainable, setup.frozen, batch),
    )


@pytest.mark.slow
def test_bfloat16_computes_near_float32_and_keeps_float32_masters(tiny: TinyModel):
    setup = setup_of(tiny, MODES["full"])
    _, exact = setup.step(make_batch())
    state, near = setup.step(make_batch(), dtype="bfloat16")
    assert near.terms.lm.loss == pytest.approx(float(exact.terms.lm.loss), rel=0.02)
    assert near.terms.lm.loss != exact.terms.lm.loss
    assert {leaf.dtype for leaf in jax.tree.leaves(state.trainable)} == {jnp.dtype("float32")}


@pytest.mark.slow
def test_heads_biases_included_learn_at_four_times_the_rate(tiny: TinyModel):
    """Adam's first update is rate x sign(gradient)."""
    setup = setup_of(tiny, MODES["full"])
    state, _ = setup.step(make_batch())
    for path, after in flat(state.trainable).items():
        moved = np.abs(after - flat(setup.trainable)[path])
        expected = 0.04 if path.startswith("heads/") else 0.01
        assert np.median(moved[moved > 1e-6]) == pytest.approx(expected, rel=0.01), path


def test_a_part_of_the_backbone_can_learn_alone(tiny: TinyModel):
    optim = Optim(trained="layers/mlp/.*", learning_rate=0.01, warmup_steps=0)
    setup = setup_of(tiny, config_of("medusa2", lora=Lora(rank=0), optim=optim))
    assert setup.trainable["backbone"]["layers"].keys() == {"mlp"}
    assert setup.frozen["backbone"].keys() == {"embed", "final_norm", "layers", "lm_head"}
    assert "mlp" not in setup.frozen["backbone"]["layers"]
    together = joined(setup.trainable, setup.frozen)
    assert flat(together).keys() == flat(stacked(tiny.params, 2)).keys()


@pytest.mark.slow
def test_medusa1_forms_no_gradient_of_the_backbone():
    """A backbone of 12 MB under activations of a few KB: its gradient could not hide."""
    model = dataclasses.replace(
        TINY, hidden_size=256, ffn_size=256, vocab_size=64, num_layers=8, windows=()
    )
    heads = HeadsConfig(1, 1, 256, 64)
    batch = jax.tree.map(lambda array: array[:, :1], make_batch())
    temporaries = {}
    for mode in ("medusa1", "medusa2"):
        config = config_of(mode, lora=Lora(rank=0))
        table = plan(config, model, heads)
        shapes = {p: jax.ShapeDtypeStruct(one.shape, jnp.float32) for p, one in table.items()}
        trainable, frozen = split(shapes, table)
        rule = optimizer(config, 10)
        state = jax.eval_shape(functools.partial(init_state, optimizer=rule), trainable)
        step = make_step(Objective.of(config, model, heads), rule, optax.constant_schedule(0.2), 0)
        memory = step.lower(state, frozen, batch, False).compile().memory_analysis()
        temporaries[mode] = memory.temp_size_in_bytes
        backbone = sum(leaf.size for path, leaf in shapes.items() if "backbone" in path) * 4
        assert backbone > 3e6
        if mode == "medusa1":
            assert memory.temp_size_in_bytes < backbone / 4
            # In goes the state, out comes the state: of the heads alone.
            heads_state = 3 * sum(x.size for p, x in shapes.items() if "heads" in p) * 4
            assert memory.output_size_in_bytes < heads_state + 10_000
    assert temporaries["medusa2"] > backbone  # the same measure sees a gradient where there is one
