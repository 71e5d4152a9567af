"""Hydra heads of real models: the texts of plain decoding, batched and single."""

from pathlib import Path

import pytest
from helpers.hydra import hydra_of_medusa

from medusa_jax import Generator
from medusa_jax.checkpoints.hub import shipped
from medusa_jax.drafting.tree import Tree
from medusa_jax.serving.options import dynamic_tree

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
PROMPTS = ["Once upon a time, there was", "Tom had a red ball. One day", "The dog"]


@pytest.fixture(params=["shipped", "stories260K"])
def generator(request: pytest.FixtureRequest, tmp_path: Path) -> Generator:
    """Truncated heads of two layers that share a projection; and of a layer, with their own."""
    model, heads = shipped(""), shipped("medusa")
    if request.param != "shipped":
        models = request.getfixturevalue("shared") / "models"
        model, heads = models / request.param, models / f"{request.param}-medusa"
    return Generator.load(
        str(model),
        str(hydra_of_medusa(heads, tmp_path / "hydra")),
        drafter="hydra", raw=True, batch_size=3, max_new_tokens=40, max_length=64,
        autoregressive=True,
    )  # fmt: skip


def test_text_is_that_of_plain_decoding(generator: Generator):
    """In a batch by a grown tree, and row by row by a static tree."""
    plain = [one.token_ids for one in generator.generate(PROMPTS)]
    batched = generator.with_tree(dynamic_tree(generator.model, 6, 3))
    single = generator.with_tree(Tree.from_lists([[0], [1], [0, 0], [0, 0, 0]]), batch_size=1)
    for hydra in (batched, single):
        assert [one.token_ids for one in hydra.generate(PROMPTS)] == plain
        assert hydra.stats.mean_accepted_length > 1.3
