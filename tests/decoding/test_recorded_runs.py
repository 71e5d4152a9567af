"""The decoding loop writes what the original did, step by step: its recorded runs."""

import json

import pytest
from helpers.texts import decode
from helpers.tiers import slow_except

from medusa_jax.decoding.acceptance import Acceptance, Greedy, Typical
from medusa_jax.decoding.decoder import Decoder
from medusa_jax.drafting.of_heads import drafter_of_heads
from medusa_jax.drafting.tree import Tree

SMALL15 = Tree.from_lists(
    json.loads(
        "[[0],[1],[2],[0,0],[0,1],[0,2],[1,0],[1,1],[2,0],"
        "[0,0,0],[0,0,1],[0,1,0],[1,0,0],[0,0,0,0],[0,0,0,1]]"
    )
)
MODES = [("greedy", 0), ("typical", 0.7), ("typical", 1)]
RECORDED = ("mc_sim_7b_63", "vicuna_7b_stage2", "chain4", "small15")


@pytest.mark.parametrize("tree_name", slow_except(RECORDED, "chain4"))
@pytest.mark.parametrize(("mode", "temperature"), slow_except(MODES, ("greedy", 0)))
def test_recorded_runs_of_the_original(stories, golden, tree_name, mode, temperature):
    """Tokens and tokens per step of all 60 records, five prompts in one batch."""
    own = {"chain4": Tree.chain(4), "small15": SMALL15}
    tree = own.get(tree_name) or Tree.published(tree_name)
    scheme: Acceptance = Greedy() if mode == "greedy" else Typical(temperature)
    records = [
        record
        for record in golden
        if (record.get("tree"), record["mode"]) == (tree_name, mode)
        and record["temperature"] == temperature
    ]
    assert len(records) == 5
    results = decode(
        Decoder(stories.config, drafter_of_heads(stories.heads, tree), scheme),
        stories.params,
        [record["prompt_ids"] for record in records],
        max_new_tokens=[len(record["output_ids"]) for record in records],
    )
    for record, result in zip(records, results, strict=True):
        assert result.token_ids == record["output_ids"]
        assert result.tokens_per_step == record["tokens_per_step"]


def test_recorded_plain_runs(stories, golden):
    records = [record for record in golden if record["mode"] == "plain_greedy"]
    results = decode(
        Decoder(stories.config),
        stories.params,
        [record["prompt_ids"] for record in records],
        max_new_tokens=[len(record["output_ids"]) for record in records],
    )
    assert [r.token_ids for r in results] == [record["output_ids"] for record in records]
    assert all(set(result.tokens_per_step) == {1} for result in results)
