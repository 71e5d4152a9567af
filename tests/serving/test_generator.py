"""The API of two lines, on the model that ships with the package."""

from pathlib import Path

import pytest

from medusa_jax import Generator, Lossless, Tree
from medusa_jax.errors import InputError


@pytest.fixture(scope="module")
def generator() -> Generator:
    return Generator.load(batch_size=2, max_new_tokens=24)


@pytest.mark.slow
def test_two_lines_write_a_story(generator: Generator):
    (completion,) = generator.generate(["Once upon a time"])
    assert completion.text.startswith("Once upon a time, there was")
    assert completion.finish_reason in ("stop", "length")
    assert len(completion.token_ids) <= 24
    assert completion.mean_accepted_length > 1.5


@pytest.mark.slow
def test_many_prompts_come_back_in_their_order(generator: Generator):
    prompts = ["Tom", "Once upon a time", "One day, Lily", "Ben and Mia", "The sun"]
    many = [one.token_ids for one in generator.generate(prompts, max_new_tokens=9)]
    alone = [generator.generate([prompt], max_new_tokens=9)[0].token_ids for prompt in prompts]
    assert many == alone
    plain = generator.with_tree(Tree())
    assert many == [one.token_ids for one in plain.generate(prompts, max_new_tokens=9)]


@pytest.mark.slow
def test_a_conversation_is_a_prompt_too(generator: Generator):
    messages = [{"role": "user", "content": "I want to book a table."}]
    (first,) = generator.generate([messages])
    messages += [
        {"role": "assistant", "content": first.text.strip()},
        {"role": "user", "content": "At 7 pm."},
    ]
    (second,) = generator.generate([messages])
    chat = generator.chat()
    assert "".join(chat.say("I want to book a table.")) == first.text
    assert "".join(chat.say("At 7 pm.")) == second.text
    assert chat.completion is not None and chat.completion.token_ids == second.token_ids
    assert [one["role"] for one in chat.history] == ["user", "assistant"] * 2


def test_a_stream_is_the_text_in_pieces(generator: Generator):
    (completion,) = generator.generate(["Once upon a time"])
    assert "".join(generator.stream("Once upon a time")) == completion.text


def test_options_may_be_objects():
    by_name = Generator.load(tree="mc_sim_7b_63", acceptance="lossless", temperature=0.5)
    by_object = Generator.load(tree=Tree.published("mc_sim_7b_63"), acceptance=Lossless(0.5))
    assert by_name.tree == by_object.tree and by_name.acceptance == by_object.acceptance


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trees": "auto"}, "unknown options: trees; expected"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"dtype": "float16"}, "dtype is 'float16'; expected float32, bfloat16"),
        ({"acceptance": "nucleus"}, "unknown acceptance 'nucleus'"),
        ({"model": "no/such/dir/here"}, "does not exist"),
        ({"max_length": 9999}, "max_length 9999 must lie in 2"),
    ],
)
def test_wrong_options_are_named(options: dict, message: str):
    with pytest.raises(InputError, match=message):
        Generator.load(**options)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "the prompt is empty"),
        ("word " * 600, "exceed the model's context"),
        ([{"role": "assistant", "content": "Hi"}], "the last message must be the user's"),
        ([{"role": "root", "content": "Hi"}], r"prompt 0: messages\[0\]: unknown speaker 'root'"),
        ([{"role": "user", "content": [{"type": "image"}]}], r"messages\[0\] needs a text"),
        ([], "prompt 0: 'messages' must be a non-empty list"),
    ],
)
def test_wrong_prompts_are_refused(generator: Generator, prompt: object, message: str):
    with pytest.raises(InputError, match=message):
        generator.generate([prompt])
    assert generator.engine.idle


def test_a_model_without_heads_says_what_to_do(shared: Path):
    with pytest.raises(InputError, match=r"no Medusa heads were found with .*/poem: give --heads"):
        Generator.load(shared / "models/poem")
