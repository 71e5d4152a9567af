"""Log-probabilities of texts against Hugging Face's, whatever decodes them and runs beside."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from medusa_jax.checkpoints.load import load_model
from medusa_jax.decoding.acceptance import PerRow
from medusa_jax.decoding.decoder import Decoder
from medusa_jax.decoding.logprobs import token_logprobs
from medusa_jax.decoding.sampling import RowSampling
from medusa_jax.decoding.state import Output, outputs
from medusa_jax.drafting.medusa_heads import HeadsConfig, MedusaHeads
from medusa_jax.drafting.of_heads import drafter_of_heads
from medusa_jax.drafting.tree import Tree
from medusa_jax.serving.engine import Engine, run_jobs
from medusa_jax.serving.jobs import Job

MOST = 4
TREE = Tree.from_lists([[0], [1], [0, 0], [1, 0]])
SUPPRESS = (3, 5)


def test_token_logprobs_docstring_example():
    logits = jnp.log(jnp.array([[[0.5, 0.3, 0.2]]])) + 7
    chosen, top_ids, top = token_logprobs(logits, jnp.array([[1]]), 1)
    np.testing.assert_allclose(chosen, [[np.log(0.3)]], rtol=1e-5)
    np.testing.assert_array_equal(top_ids, [[[0]]])
    np.testing.assert_allclose(top, [[[np.log(0.5)]]], rtol=1e-5)


def check(model: transformers.PreTrainedModel, output: Output) -> None:
    """The output's log-probabilities are those of transformers."""
    ids, found = [*output.prompt_ids, *output.token_ids], output.logprobs
    assert found is not None
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, len(output.prompt_ids) - 1 : -1].float()
    whole = torch.log_softmax(logits, dim=-1).numpy()
    chosen = np.take_along_axis(whole, np.array(output.token_ids)[:, None], axis=1)[:, 0]
    np.testing.assert_allclose(found.chosen, chosen, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.top, -np.sort(-whole, axis=1)[:, :MOST], rtol=1e-4, atol=1e-4)
    at_ids = np.take_along_axis(whole, found.top_ids, axis=1)
    np.testing.assert_allclose(found.top, at_ids, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_logprobs_are_hugging_faces(llama: transformers.PreTrainedModel, saved: Path):
    """Greedy, sampled and typical rows in slots that are refilled and outgrown; some do not ask.

    And rows of plain decoding, which ask by the decoder.
    """
    model = load_model(saved)
    heads = HeadsConfig(2, 1, model.config.hidden_size, model.config.vocab_size)
    hidden = jnp.zeros((1, model.config.hidden_size))
    made = MedusaHeads(heads).init(jax.random.key(0), hidden, lambda x: x)
    params = model.params | {"heads": made["params"]}
    config = dataclasses.replace(model.config, context=256)
    drafter = drafter_of_heads(heads, TREE)
    decoder = Decoder(config, drafter, PerRow(), suppress=SUPPRESS, most_logprobs=MOST)
    asked = [(0.0, 0, 1.0), (1.1, 9, 0.9), (0.8, 0, 1.0, True), (0.0, 0, 1.0)]
    jobs = [
        Job([5 + i, 7, 11][: 1 + i % 3], (9, 20, 3, 150, 6)[i % 5], (i, 0), sampling=row)
        for i, row in enumerate(RowSampling(*row)._replace(logprobs=i % 4 < 3)
                                for i, row in enumerate(asked * 2))
    ]  # fmt: skip
    engine = Engine(decoder, params, slots=3, repetition_penalty=1.3)
    for job, output in zip(jobs, run_jobs(engine, jobs), strict=True):
        if job.sampling.logprobs:
            check(llama, output)
            assert len(output.stopped(2).logprobs.chosen) == 2
        else:
            assert output.logprobs is None
    plain = Decoder(config, most_logprobs=MOST)
    state = plain.generate(params, plain.prefill(params, [[5], [9, 8]], max_new_tokens=5))
    for output in outputs(state):
        check(llama, output)
