"""The decoding loop: equal to Hugging Face, and to itself when batched."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import hugging_face
from helpers.models import TINY, TinyModel, random_model
from helpers.texts import decode

from medusa_jax.checkpoints.load import load_model
from medusa_jax.decoding.acceptance import Greedy, Lossless, Typical
from medusa_jax.decoding.decoder import Decoder, padded
from medusa_jax.decoding.prefill import bucket
from medusa_jax.decoding.sampling import row_keys
from medusa_jax.decoding.state import Emitted, State, outputs
from medusa_jax.decoding.step import advance
from medusa_jax.drafting.of_heads import drafter_of_heads
from medusa_jax.drafting.tree import Tree
from medusa_jax.errors import InputError

BUSHY = Tree.from_lists([[0], [1], [2], [0, 0], [0, 1], [1, 0], [0, 0, 0]])
PROMPTS = [[1, 5], [7], [3, 9, 2, 30, 4, 11, 6], list(range(20))]


# --- against Hugging Face ---------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stories260K", "babyllama105", "poem"])
def test_greedy_text_equals_hugging_face(shared, name):
    """One prompt and a batch of eight unequal ones, with Medusa and without, until EOS."""
    directory = shared / "models" / name
    prompts, suppress = hugging_face.prompts(directory), hugging_face.SUPPRESS[name]
    expected = hugging_face.greedy(directory, prompts, 60, suppress_tokens=list(suppress) or None)
    model = hugging_face.with_heads(directory)
    for tree in (Tree(), BUSHY):
        drafter = drafter_of_heads(model.heads, tree)
        decoder = Decoder(model.config, drafter, Greedy(), suppress=suppress)
        for rows in (slice(0, 1), slice(None)):
            settings = {"max_new_tokens": 60, "stop_ids": model.stop_ids}
            results = decode(decoder, model.params, prompts[rows], **settings)
            assert [result.token_ids for result in results] == expected[rows]


@pytest.mark.slow
def test_greedy_text_past_a_sliding_window(tmp_path):
    """A random Mistral with a window of 8 tokens, 48 tokens on."""
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=8,
        max_position_embeddings=128,
        initializer_range=0.3,
        eos_token_id=None,
        bos_token_id=None,
    )
    MistralForCausalLM(config).save_pretrained(tmp_path)
    model = load_model(tmp_path)
    random = random_model(model.config)
    prompts = [[4, 8, 15], [16, 23, 42, 4, 8, 15, 16, 23, 42, 1, 2, 3]]
    expected = hugging_face.greedy(tmp_path, prompts, 48)
    assert len({token for text in expected for token in text}) > 10  # not a constant text
    for tree in (Tree(), BUSHY):
        decoder = Decoder(model.config, drafter_of_heads(random.heads, tree))
        params = model.params | {"heads": random.params["heads"]}
        results = decode(decoder, params, prompts, max_new_tokens=48)
        assert [result.token_ids for result in results] == expected


# --- against itself ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [Greedy(), Typical(1.0, sample_root=True), Lossless(0.8)])
def test_batched_rows_equal_single_rows(tiny: TinyModel, scheme):
    """Unequal prompts, limits and accepted lengths; sampling by each row's own key."""
    decoder = Decoder(tiny.config, drafter_of_heads(tiny.heads, BUSHY), scheme)
    limits = [30, 7, 50, 1]
    keys = row_keys(3, [(row, 0) for row in range(4)])
    batch = decode(decoder, tiny.params, PROMPTS, max_new_tokens=limits, keys=keys)
    assert [len(result.token_ids) for result in batch] == limits
    for row, result in enumerate(batch):
        (single,) = decode(
            decoder,
            tiny.params,
            PROMPTS[row : row + 1],
            max_new_tokens=limits[row],
            keys=keys[row : row + 1],
        )
        assert single == result


@pytest.mark.slow
def test_medusa_equals_plain_decoding(tiny: TinyModel):
    """Greedy, unequal prompts, some guesses right and some wrong."""
    settings = {"max_new_tokens": 60}
    plain = decode(Decoder(tiny.config), tiny.params, PROMPTS, **settings)
    for tree in (BUSHY, Tree.chain(3), Tree.chain(1)):
        medusa = decode(
            Decoder(tiny.config, drafter_of_heads(tiny.heads, tree)),
            tiny.params,
            PROMPTS,
            **settings,
        )
        assert [m.token_ids for m in medusa] == [p.token_ids for p in plain]
        lengths = [length for m in medusa for length in m.tokens_per_step]
        assert 1 in lengths and max(lengths) > 1


@pytest.mark.slow
def test_long_prompts_are_prefilled_in_blocks(tiny: TinyModel):
    """Blocks of 16, the last one moved back: the same text as in one pass."""
    prompts = [list(np.arange(length) % 37) for length in (61, 16, 17, 40)]
    decoder = Decoder(tiny.config, drafter_of_heads(tiny.heads, BUSHY), capacity=80)
    whole = decode(decoder, tiny.params, prompts, max_new_tokens=12)
    keys = row_keys(0, [(row, 0) for row in range(4)])
    inputs = padded(decoder, prompts, [12] * 4, [()] * 4, width=70)
    state = decoder.run_prefill(tiny.params, *inputs, keys, block=16)
    assert outputs(decoder.generate(tiny.params, state)) == whole
    # Blocks that hold padding alone are not run.
    inputs = padded(decoder, prompts[1:2], [12], [()], width=70)
    (alone,) = outputs(
        decoder.generate(
            tiny.params, decoder.run_prefill(tiny.params, *inputs, keys[1:2], block=16)
        )
    )
    assert alone == whole[1]


@pytest.mark.slow
def test_stream_yields_what_generate_writes(tiny: TinyModel):
    decoder = Decoder(tiny.config, drafter_of_heads(tiny.heads, BUSHY))
    settings = {"max_new_tokens": [25, 3], "stop_ids": [2]}
    expected = decode(decoder, tiny.params, PROMPTS[:2], **settings)
    steps = decoder.stream(tiny.params, decoder.prefill(tiny.params, PROMPTS[:2], **settings))
    texts: list[list[int]] = [[], []]
    while True:
        try:
            emitted = next(steps)
        except StopIteration as stop:
            final = stop.value
            break
        for row, text in enumerate(texts):
            text += emitted.tokens[row, : emitted.count[row]].tolist()
    assert texts == [result.token_ids for result in expected]
    assert outputs(final) == expected


@pytest.mark.slow
def test_a_row_ends_at_a_stop_token_inside_an_accepted_path(tiny: TinyModel):
    """Whatever token of the plain text is made a stop token, the text ends with it."""
    decoder = Decoder(tiny.config, drafter_of_heads(tiny.heads, BUSHY))
    (whole,) = decode(decoder, tiny.params, [[1, 5]], max_new_tokens=40)
    assert whole.finish_reason == "length"
    ends = np.cumsum(whole.tokens_per_step)
    inside = 0
    for token in set(whole.token_ids):
        first = whole.token_ids.index(token)
        (cut,) = decode(
            decoder, tiny.params, [[1, 5]], max_new_tokens=40, stop_ids=[token, 1_000_000]
        )
        assert cut.token_ids == whole.token_ids[: first + 1]
        assert cut.finish_reason == "stop"
        assert cut.tokens_per_step == whole.tokens_per_step[: len(cut.tokens_per_step)]
        inside += first + 1 not in ends
    assert inside  # some stop token stood before the end of its path


@pytest.mark.slow
def test_suppressed_tokens_are_never_made(tiny: TinyModel):
    (free,) = decode(Decoder(tiny.config), tiny.params, [[1, 5]], max_new_tokens=30)
    banned = tuple(sorted(set(free.token_ids)))[:3]
    for scheme in (Greedy(), Lossless(2.0), Typical(2.0)):
        decoder = Decoder(tiny.config, drafter_of_heads(tiny.heads, BUSHY), scheme, suppress=banned)
        (result,) = decode(decoder, tiny.params, [[1, 5]], max_new_tokens=60)
        assert not set(banned) & set(result.token_ids)


@pytest.mark.slow
def test_bfloat16_decodes(tiny: TinyModel):
    """The same dtype all the way: parameters, cache, hidden states."""
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny.params)
    decoder = Decoder(tiny.config, drafter_of_heads(tiny.heads, BUSHY))
    state = decoder.prefill(params, PROMPTS, max_new_tokens=8)
    assert {x.dtype for x in (*state.cache.keys, *state.cache.values)} == {jnp.dtype("bfloat16")}
    assert all(len(result.token_ids) == 8 for result in outputs(decoder.generate(params, state)))


# --- what is compiled -------------------------------------------------------------------------


@pytest.mark.slow
def test_nothing_recompiles_for_another_prompt_or_limit(tiny: TinyModel):
    decoder = Decoder(tiny.config, drafter_of_heads(tiny.heads, BUSHY))
    decode(decoder, tiny.params, [[1, 5], [2]], max_new_tokens=9, stop_ids=[3])
    compiled = []
    listener = lambda event, seconds, **_: compiled.append(event)  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        keys = row_keys(8, [(4, 4), (5, 5)])
        compiled.clear()
        decode(
            decoder,
            tiny.params,
            [list(range(11)), [9, 9]],
            max_new_tokens=[30, 2],
            stop_ids=[7],
            keys=keys,
        )
        compile_events = [event for event in compiled if "compile" in event]
    finally:
        jax.monitoring.clear_event_listeners()
    assert not compile_events


@pytest.mark.slow
def test_step_traces_once(tiny: TinyModel):
    chex.clear_trace_counter()
    decoder = Decoder(tiny.config, drafter_of_heads(tiny.heads, Tree.chain(2)))

    @chex.assert_max_traces(n=1)
    def advanced(params: dict, state: State) -> tuple[State, Emitted]:
        return advance(decoder.network, decoder.drafter, decoder.acceptance, params, state)

    step = jax.jit(advanced)
    state = decoder.prefill(tiny.params, [[1, 2]], max_new_tokens=9)
    params = decoder.drafter.prepare(tiny.params)
    for _ in range(3):
        state, _ = step(params, state)


# --- bad input --------------------------------------------------------------------------------


def test_capacity_is_checked_before_decoding(tiny: TinyModel):
    decoder = Decoder(tiny.config, drafter_of_heads(tiny.heads, BUSHY), capacity=32)
    with pytest.raises(
        InputError, match=r"prompt 1 has 20 tokens and 13 new .* 33 exceed a capacity of 32"
    ):
        decoder.prefill(tiny.params, [[1], [2] * 20], max_new_tokens=13)
    assert len(decode(decoder, tiny.params, [[2] * 20], max_new_tokens=12)[0].token_ids) == 12
    context = Decoder(tiny.config)
    with pytest.raises(InputError, match="the model's context of 128 tokens"):
        context.prefill(tiny.params, [[1] * 100], max_new_tokens=29)


@pytest.mark.parametrize(
    ("settings", "prompts", "message"),
    [
        ({}, [[1], []], "prompt 1 is empty"),
        ({}, [[40]], r"0\.\.39"),
        ({}, [[-1]], r"0\.\.39"),
        ({"max_new_tokens": 0}, [[1]], "at least 1, got 0"),
    ],
)
def test_bad_prompts(tiny: TinyModel, settings, prompts, message):
    with pytest.raises(InputError, match=message):
        Decoder(tiny.config).prefill(tiny.params, prompts, **({"max_new_tokens": 4} | settings))


def test_a_decoder_checks_its_parts(tiny: TinyModel):
    with pytest.raises(InputError, match=r"\[0, 0, 0, 0\] is 4 deep, but there are 3"):
        Decoder(tiny.config, drafter_of_heads(tiny.heads, Tree.chain(4)))
    with pytest.raises(InputError, match="capacity 129 exceeds the model's context of 128"):
        Decoder(tiny.config, capacity=129)
    with pytest.raises(InputError, match="rank 40 of a vocabulary of 40"):
        Decoder(tiny.config, drafter_of_heads(tiny.heads, Tree.from_lists([[40]])))


def test_bucket_example():
    assert [bucket(length) for length in (5, 17, 512, 700)] == [16, 32, 512, 1024]


@pytest.mark.slow
def test_shared_heads_use_the_backbones_own_projection(tiny: TinyModel):
    """Zero blocks and a shared lm_head: every head guesses what the backbone predicts next."""
    heads = dataclasses.replace(tiny.heads, shared=True)
    zero = {"block_0": {"bias": jnp.zeros((3, 32)), "weight": jnp.zeros((3, 32, 32))}}
    params = tiny.params | {"heads": zero}
    own = zero | {f"head_{i}": {"vocab": tiny.params["backbone"]["lm_head"]} for i in range(3)}
    decoder = Decoder(TINY, drafter_of_heads(heads, BUSHY))
    state = decoder.prefill(params, PROMPTS, max_new_tokens=4)
    same = Decoder(TINY, drafter_of_heads(tiny.heads, BUSHY)).prefill(
        tiny.params | {"heads": own}, PROMPTS, max_new_tokens=4
    )
    np.testing.assert_array_equal(state.draft.guesses, same.draft.guesses)
    np.testing.assert_array_equal(state.draft.guesses[:, 0, 0], state.root)
