"""Each drafter in the engine writes what plain decoding writes; drafters are built by name."""

import dataclasses
from pathlib import Path

import pytest
from helpers.models import TINY, TinyModel
from serving.test_engine import JOBS, single

from medusa_jax.checkpoints.load import Model
from medusa_jax.checkpoints.parameters import Parameters
from medusa_jax.data.tokenizer import ChatTokenizer
from medusa_jax.decoding.acceptance import Greedy, Lossless
from medusa_jax.decoding.decoder import Decoder
from medusa_jax.drafting.draft_model import DraftModel
from medusa_jax.drafting.drafter import Drafter, NoDraft
from medusa_jax.drafting.dynamic_tree import DynamicTree
from medusa_jax.drafting.medusa_drafter import MedusaDrafter
from medusa_jax.drafting.medusa_ngram_drafter import MedusaNgramDrafter
from medusa_jax.drafting.ngram_drafter import NgramDrafter
from medusa_jax.drafting.tree import Tree
from medusa_jax.errors import InputError
from medusa_jax.serving import drafters
from medusa_jax.serving.drafters import (
    Recipe,
    check_vocabulary,
    draft_directory,
    drafter_of,
    from_heads,
    heads_directory,
)
from medusa_jax.serving.engine import Engine, run_jobs
from medusa_jax.serving.ladder import Chooser, Ladder

SMALLER = dataclasses.replace(TINY, num_layers=1, windows=())
TREE = Tree.from_lists([[0], [1], [0, 0]])


@pytest.fixture(scope="module")
def params(tiny: TinyModel) -> dict:
    """The tiny model, and its own first layer as a draft model: often right, often wrong."""
    backbone = dict(tiny.params["backbone"])
    del backbone["layer_1"]
    return tiny.params | {"draft": backbone}


@pytest.fixture(scope="module")
def plain(params) -> list[list[int]]:
    decoder = Decoder(TINY)
    return [single(decoder, params, job, stop_ids=(2,)).token_ids for job in JOBS[:6]]


@pytest.mark.slow
@pytest.mark.parametrize(
    "drafter", [NgramDrafter(Tree.chain(3)), DraftModel(SMALLER, TREE)], ids=["ngram", "draft"]
)
def test_text_is_that_of_plain_decoding(params, plain, drafter: Drafter, monkeypatch):
    """Slots are refilled, rows move to other batches, caches grow, and plain steps lie between."""
    turns = iter(range(10**6))
    monkeypatch.setattr(Chooser, "step", lambda self, rows, ready: ready[next(turns) % len(ready)])
    monkeypatch.setattr("medusa_jax.serving.load.MOST_STEPS", 3)
    ladder = Ladder((1, 3), (NoDraft(), drafter), (1.0, 2.0))
    engine = Engine(Decoder(TINY, drafter), params, slots=3, stop_ids=(2,), ladder=ladder)
    for rows in ladder.rows:
        for each in ladder.drafters:
            engine._batch.warm_up(JOBS[0], JOBS[0].tokens, rows, each)
    done = run_jobs(engine, JOBS[:6])
    assert [output.token_ids for output in done] == plain
    assert max(step for output in done for step in output.tokens_per_step) > 1
    engine.close()


@pytest.mark.slow
def test_drawn_text_is_that_of_a_single_row(params):
    """Guesses are drawn too, by the row's key and the place: not by the batch."""
    scheme = Lossless(0.9, top_k=20)
    decoder = Decoder(TINY, DraftModel(SMALLER, TREE, scheme), scheme, capacity=60)
    engine = Engine(decoder, params, slots=2, seed=5)
    done = run_jobs(engine, JOBS[:3])
    compiled = Decoder.run_prefill._cache_size(), Decoder.generate._cache_size()
    assert done == [single(decoder, params, job) for job in JOBS[:3]]
    # Prompts of one bucket and steps of all texts: a program each.
    assert Decoder.run_prefill._cache_size() == compiled[0] + 1
    assert Decoder.generate._cache_size() == compiled[1] + 1


def test_drafters_have_names(tiny: TinyModel, monkeypatch):
    ids_and_places = (), (), Path(), Path()
    model = Model(TINY, tiny.heads, Parameters.of(tiny.params), *ids_and_places, draft=SMALLER)
    recipe = Recipe(model, TREE, Greedy())
    drawn = dataclasses.replace(recipe, acceptance=Lossless(0.7))
    assert drafter_of("draft:DIR", recipe) == DraftModel(SMALLER, TREE)
    assert drafter_of("draft:DIR", drawn) == DraftModel(SMALLER, TREE, Lossless(0.7))
    assert drafter_of("ngram", dataclasses.replace(recipe, tree=Tree())) == NoDraft()
    assert drafter_of(None, recipe) == drafter_of("medusa", recipe)
    assert drafter_of("medusa", recipe) == MedusaDrafter(tiny.heads, TREE)
    monkeypatch.setitem(drafters.DRAFTERS, "mine", lambda recipe: NgramDrafter(recipe.tree, 2))
    assert drafter_of("mine", recipe) == NgramDrafter(TREE, 2)
    with pytest.raises(
        InputError,
        match=r"--drafter yours: .* known: medusa, hydra, medusa\+ngram, ngram, draft, mine",
    ):
        drafter_of("yours", recipe)
    grown = dataclasses.replace(recipe, tree=DynamicTree(4, 2))
    assert drafter_of("medusa", grown) == MedusaDrafter(tiny.heads, grown.tree)
    assert drafter_of(None, grown) == MedusaNgramDrafter(tiny.heads, grown.tree)
    assert drafter_of("medusa+ngram", grown) == drafter_of(None, grown)
    with pytest.raises(InputError, match="grow:SIZE"):
        drafter_of("medusa+ngram", recipe)
    with pytest.raises(InputError, match="chain:DEPTH"):
        drafter_of("draft:DIR", grown)
    with pytest.raises(InputError, match="without a draft model"):
        drafter_of(
            "draft", dataclasses.replace(recipe, model=dataclasses.replace(model, draft=None))
        )


def test_a_draft_model_is_named_after_a_colon():
    assert draft_directory("draft:some/dir:2") == "some/dir:2"
    assert draft_directory("ngram") is draft_directory(None) is None
    with pytest.raises(InputError, match="draft:DIR"):
        draft_directory("draft")


def test_heads_are_named_after_a_colon():
    assert heads_directory("hydra:some/dir:2") == heads_directory("medusa:some/dir:2")
    assert heads_directory("hydra:some/dir:2") == "some/dir:2"
    for name in ("hydra", "hydra:", "draft:dir", "ngram", None):
        assert heads_directory(name) is None
    assert from_heads("hydra:dir") and not from_heads("draft:hydra")


def test_other_ids_are_no_vocabulary_of_the_same_size(shared: Path):
    text = ChatTokenizer(shared / "models/stories260K", raw=True)
    check_vocabulary(text, shared / "models/stories260K")
    check_vocabulary(text, shared)  # no tokenizer
    with pytest.raises(InputError, match=r"other ids for [0-9,]+ of 512 tokens"):
        check_vocabulary(text, shared / "models/poem")
