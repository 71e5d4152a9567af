"""Stop strings: where a text ends, what is held back, and the same tokens as transformers."""

import functools
import itertools
from pathlib import Path

import pytest
from helpers import hugging_face
from transformers import StopStringCriteria

from medusa_jax import Generator, Tree
from medusa_jax.data.prompts import Request
from medusa_jax.data.tokenizer import ChatTokenizer
from medusa_jax.decoding.acceptance import Greedy
from medusa_jax.decoding.state import Output
from medusa_jax.errors import InputError
from medusa_jax.serving.conversations import Conversation
from medusa_jax.serving.growing_text import GrowingText, split
from medusa_jax.serving.options import DecodingOptions

BUSHY = Tree.from_lists([[0], [1], [2], [0, 0], [0, 1], [1, 0], [0, 0, 0]])
PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def shipped() -> Generator:
    """The model that ships with the package, whose trees accept several tokens a step."""
    return Generator.load(max_new_tokens=24)


def stopping(generator: Generator, *stop: str, **options: object) -> Generator:
    return generator.with_tree(generator.tree, stop=list(stop), **options)


def test_split_docstring_examples():
    assert split("ab EN", ["END"]) == ("ab ", "EN", False)
    assert split("ab ENDED", ["END"]) == ("ab ", "", True)


def first_stop(text: str, stop: tuple[str, ...]) -> str:
    """The text before the stop string that is complete first, letter by letter."""
    for end in range(1, len(text) + 1):
        found = [one for one in stop if text[:end].endswith(one)]
        if found:
            return text[: end - max(map(len, found))]
    return text


@pytest.mark.parametrize("stop", [("aab",), ("ab", "abb"), ("bab", "aba"), ("b", "aa"), ()])
def test_pieces_of_any_size_end_at_the_same_place(stop: tuple[str, ...]):
    """All texts of six letters in all cuts into two or three pieces."""
    for letters in itertools.product("ab", repeat=6):
        text = "".join(letters)
        for cuts in itertools.combinations_with_replacement(range(7), 2):
            pieces = text[: cuts[0]], text[cuts[0] : cuts[1]], text[cuts[1] :]
            shown, held, stopped = "", "", False
            for piece in pieces:
                new, held, stopped = split(held + piece, stop)
                shown += new
                assert not stopped or not held
                assert (shown + held == "".join(pieces)[: len(shown + held)]) or stopped
                if stopped:
                    break
            assert shown + held == first_stop(text, stop)
            assert stopped == any(one in text for one in stop)


@pytest.mark.slow
def test_a_growing_text_holds_back_what_may_become_a_stop_string(shipped: Generator):
    (whole,) = shipped.generate([PROMPT])
    stop = f"{whole.text[:12]}#", f"{whole.text[-4:]}#"
    text = GrowingText(shipped.text, whole.prompt_ids, stop)
    shown = [text.read([token]) or "".join(text.take()) for token in whole.token_ids]
    assert shown[0] == "" and len(whole.text) - len("".join(shown)) == 4
    assert text.finish() == "".join([*shown, *text.take()]) == whole.text
    assert not text.stopped


def test_an_output_that_is_stopped_keeps_the_steps_that_made_it():
    output = Output([1], [5, 2, 9, 4], [3, 1], "length")
    assert output.stopped(2) == Output([1], [5, 2], [3], "stop")
    assert output.stopped(3) == Output([1], [5, 2, 9], [3], "stop")
    assert output.stopped(4) == Output([1], [5, 2, 9, 4], [3, 1], "stop")


def test_an_answer_ends_inside_an_accepted_path(shipped: Generator):
    """Any string of three letters: text, tokens, steps and stats agree, streamed or not."""
    (whole,) = shipped.generate([PROMPT])
    ends = list(itertools.accumulate(whole.tokens_per_step))
    inside = 0
    for start in range(0, len(whole.text) - 3, 9):
        stop = whole.text[start : start + 3]
        generator = stopping(shipped, stop)
        (cut,) = generator.generate([PROMPT])
        assert cut.text == whole.text[: whole.text.index(stop)]
        assert cut.finish_reason == "stop"
        count = len(cut.token_ids)
        assert cut.token_ids == whole.token_ids[:count]
        decode = lambda ids: shipped.text.decode(whole.prompt_ids, ids)  # noqa: E731
        assert stop in decode(cut.token_ids) and stop not in decode(cut.token_ids[:-1])
        steps = len(cut.tokens_per_step)
        assert cut.tokens_per_step == whole.tokens_per_step[:steps]
        assert ends[steps - 1] >= count > ([0, *ends])[steps - 1]
        inside += count not in ends
        assert generator.stats.tokens == count and generator.engine.idle
        assert "".join(generator.stream(PROMPT)) == cut.text
    assert inside > 1


def test_a_conversation_goes_on_without_the_stop_string(shipped: Generator):
    generator = stopping(shipped, " was", "Lily")
    talks = [Conversation(Request((text, "Then")), i) for i, text in enumerate((PROMPT, "One day"))]
    alone = Conversation(Request(("Tom",)), 2)
    for _ in generator.converse([*talks, alone]):
        pass
    (whole,) = shipped.generate([PROMPT])
    first = first_stop(whole.text, (" was", "Lily")).strip()
    assert [one["content"] for one in talks[0].messages[:3]] == [PROMPT, first, "Then"]
    for talk in (*talks, alone):
        for completion in talk.completions:
            assert not any(stop in completion.text for stop in (" was", "Lily"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stories260K", "babyllama105", "poem"])
def test_tokens_equal_those_of_hugging_face(
    shared: Path, name: str, monkeypatch: pytest.MonkeyPatch
):
    """Theirs end with the token that completes a stop string; so do ours, whose text ends before.

    The strings begin and end in the middle of tokens. None begins in a prompt: theirs alone would
    end there.
    """
    directory = shared / "models" / name
    if name == "poem":  # whose tokenizer does not know the letters that theirs tries tokens with
        monkeypatch.setattr(StopStringCriteria.clean_tokenizer_vocab, "__defaults__", ("江", None))
    suppress = list(hugging_face.SUPPRESS[name])
    model = hugging_face.with_heads(directory)
    text = ChatTokenizer(directory, raw=True)
    options = DecodingOptions(raw=True, max_new_tokens=40, suppress_tokens=suppress)
    plain = Generator(model, text, Tree(), Greedy(), options)
    greedy = functools.partial(hugging_face.greedy, directory)
    rows = [0, 1, 3]
    texts = [hugging_face.TEXTS[name][row] for row in rows]
    prompts = [hugging_face.prompts(directory)[row] for row in rows]
    free = greedy(prompts, 15, suppress_tokens=suppress or None)
    whole = [text.decode(*both) for both in zip(prompts, free, strict=True)]
    stop = [whole[0][5:9], whole[1][7:10], whole[2][11:13]]
    expected = greedy(
        prompts,
        40,
        suppress_tokens=suppress or None,
        stop_strings=stop,
        tokenizer=hugging_face.tokenizer(directory),
    )
    for tree, slots in ((Tree(), 1), (BUSHY, 2)) if name == "stories260K" else ((BUSHY, 2),):
        generator = plain.with_tree(tree, stop=stop, batch_size=slots)
        for number, completion in enumerate(generator.generate(texts)):
            assert completion.token_ids == expected[number]
            theirs = text.decode(completion.prompt_ids, expected[number])
            assert completion.text == first_stop(theirs, tuple(stop))
            assert completion.finish_reason == "stop"
    assert min(map(len, expected)) < 40


def test_an_empty_stop_string_is_refused():
    with pytest.raises(InputError, match="stop is an empty string"):
        Generator.load(stop=["a", ""])
