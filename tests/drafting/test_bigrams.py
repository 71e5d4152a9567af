"""Pairs of tokens: how they are counted and kept, and that they shape trees but never a text."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.head_files import VOCAB, edit_weights, heads_file, random_heads
from helpers.models import TinyModel
from safetensors.numpy import load_file

from medusa_jax.checkpoints import bigram_file
from medusa_jax.checkpoints.hub import shipped as shipped_file
from medusa_jax.checkpoints.load import load_model
from medusa_jax.data.tokenizer import ChatTokenizer
from medusa_jax.decoding.acceptance import Acceptance, Greedy, Lossless
from medusa_jax.decoding.decoder import Decoder
from medusa_jax.decoding.state import Output, outputs
from medusa_jax.drafting import bigrams
from medusa_jax.drafting.dynamic_tree import DynamicTree
from medusa_jax.drafting.of_heads import drafter_of_heads
from medusa_jax.drafting.tree import Tree
from medusa_jax.errors import InputError
from medusa_jax.tuning import bigram_counts

PROMPTS = [[1, 5, 9], [3], [7, 2, 11, 30, 4]]


def every(*texts: list[int]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Texts of which all tokens count."""
    return [(np.array(ids), np.ones(len(ids), bool)) for ids in texts]


def decode(
    model: TinyModel, tree: Tree | DynamicTree, scheme: Acceptance, **more: Any
) -> list[Output]:
    decoder = Decoder(model.config, drafter_of_heads(model.heads, tree), scheme, capacity=64)
    state = decoder.prefill(model.params | more, PROMPTS, max_new_tokens=40)
    return outputs(decoder.generate(model.params | more, state))


def test_counting_worked_example():
    tokens, scores = bigram_counts.count(every([1, 2, 1, 2], [2, 3]), most=3)
    assert tokens.tolist() == [2, 1, 3]
    expected = 0.4 * np.log([(2.5 / 7) / 0.5, (2.25 / 7) / 0.25, (2.25 / 7) / 0.25])
    np.testing.assert_allclose(scores[0], expected)


def test_only_what_counts_is_second_and_only_the_frequent_are_listed():
    ids, counted = np.array([9, 4, 4, 8, 4]), np.array([True, False, True, True, True])
    tokens, scores = bigram_counts.count([(ids, counted)], most=1)  # pairs: 4 4, 4 8, 8 4
    assert tokens.tolist() == [4]
    np.testing.assert_allclose(scores, [[0.4 * np.log((1 + 5 * 2 / 3) / (2 + 5) / (2 / 3))]])
    with pytest.raises(InputError, match="no two tokens in a row"):
        bigram_counts.count(every([7], []), most=4)


def test_links_worked_example(tmp_path: Path):
    path = bigram_file.save(tmp_path, np.array([2, 1]), np.array([[0, 0.1], [0, 0]]))
    table = jax.tree.map(jnp.asarray, bigram_file.load(path, vocab_size=5))
    found = bigrams.links(table, jnp.array([[2, 3]]), jnp.array([[3, 1]]))
    np.testing.assert_allclose(found, [[[0, 0.1], [0, 0]]], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [Greedy(), Lossless(0.8)], ids=["greedy", "lossless"])
def test_pairs_of_its_own_texts_lengthen_the_paths_and_leave_the_texts(
    tiny: TinyModel, scheme: Acceptance, tmp_path: Path
):
    """The lossless scheme draws by position, so it too writes the very same text."""
    plain = decode(tiny, Tree(), scheme)
    texts = every(*(one.prompt_ids + one.token_ids for one in plain))
    path = bigram_file.save(tmp_path, *bigram_counts.count(texts, most=30))
    table = jax.tree.map(jnp.asarray, bigram_file.load(path, tiny.config.vocab_size))
    tree = DynamicTree(6, 3, 10)
    without, with_them = decode(tiny, tree, scheme), decode(tiny, tree, scheme, bigrams=table)
    assert [one.token_ids for one in with_them] == [one.token_ids for one in plain]
    steps = [sum(len(one.tokens_per_step) for one in some) for some in (without, with_them)]
    assert steps[1] < steps[0]


def test_the_file_beside_heads_is_loaded_and_goes_with_them(saved: Path, tmp_path: Path, go: Any):
    (tmp_path / "heads").mkdir()
    heads = heads_file(tmp_path / "heads", random_heads(3))
    before = load_model(saved, heads)
    scores = np.arange(9.0).reshape(3, 3)
    path = bigram_file.save(heads.parent, np.array([5, 0, 23]), scores)
    # Other programs load each safetensors file beside the heads, but none of a folder.
    assert path == heads.parent / "medusa" / "bigrams.safetensors"
    for source in (heads, heads.parent, go(heads, "vllm"), go(heads, "mlc")):
        model = load_model(saved, source)
        table = model.params["bigrams"]
        assert model.fingerprint != before.fingerprint  # other trees are tuned for it
        np.testing.assert_array_equal(table["scores"], np.pad(scores, (0, 1)))
        assert table["rows"][jnp.array([5, 0, 23, 1])].tolist() == [0, 1, 2, 3]
    assert "bigrams" not in before.params


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": np.array([1, 24], np.int32)}, f"different tokens of a vocabulary of {VOCAB}"),
        ({"tokens": np.array([1, 1], np.int32)}, f"different tokens of a vocabulary of {VOCAB}"),
        ({"tokens": np.array([1], np.int32)}, r"expected tokens \[L\] and scores \[L, L\]"),
        ({"tokens": np.array(2, np.int32)}, r"expected tokens \[L\] and scores \[L, L\]"),
        ({"tokens": np.array([1.0, 2.0])}, "expected tokens in int32 and scores in float16"),
        ({"scores": np.full((2, 2), np.nan, np.float16)}, "scores that are no numbers"),
        ({"more": np.zeros(2)}, r"expected tokens \[L\] and scores \[L, L\]"),
    ],
)
def test_what_is_no_table_is_refused(
    saved: Path, tmp_path: Path, change: dict[str, np.ndarray], message: str
):
    heads = heads_file(tmp_path, random_heads(3))
    path = bigram_file.save(tmp_path, np.array([1, 2]), np.zeros((2, 2)))
    edit_weights(path, lambda tensors: tensors | change)
    with pytest.raises(InputError, match=message):
        load_model(saved, heads)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(InputError, match=r"bigrams\.safetensors is not a complete"):
        load_model(saved, heads)


@pytest.fixture
def count(run_module: Any):
    return functools.partial(run_module, "count_bigrams")


def test_the_command_counts_what_the_assistant_says(count: Any, tmp_path: Path):
    data = tmp_path / "answers.jsonl"
    data.write_text(
        '{"messages": [{"role": "user", "content": "once once"},'
        ' {"role": "assistant", "content": " dog cat dog"}]}\n{"neither": 1}\n'
    )
    code, said = count("--data", data, "--output", tmp_path, "--tokens", 50)
    assert code == 0
    text = ChatTokenizer(shipped_file(""))
    answer = text.tokenizer.encode(" dog cat dog</s>", add_special_tokens=False)
    assert f"{len(answer)} tokens read, 1 records left out; wrote pairs of" in said
    found = load_file(tmp_path / "medusa" / "bigrams.safetensors")
    assert set(found["tokens"].tolist()) == set(answer)
    table = bigram_file.load(tmp_path / "medusa" / "bigrams.safetensors", 4096)
    dog, cat = (int(table["rows"][answer[i]]) for i in (0, 1))
    assert table["scores"][dog, cat] > 0 > table["scores"][dog, dog]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--tokens", 0), "--tokens must be 1 to 8192, got 0"),
        (("--output", "nowhere"), "--output nowhere is no directory"),
        (("--data", "none.jsonl"), "none.jsonl does not exist"),
        (("--on_bad", "refuse"), "record 2: expected one of the keys"),
    ],
)
def test_wrong_flags_exit_with_2_and_one_message(
    count: Any, tmp_path: Path, flags: tuple[object, ...], message: str
):
    data = tmp_path / "a.jsonl"
    data.write_text('{"text": "good"}\n{"neither": 1}\n')
    code, said = count("--data", data, "--output", tmp_path, *flags)
    assert code == 2
    assert message in said.splitlines()[-1]
    assert not (tmp_path / "medusa" / "bigrams.safetensors").exists()


@pytest.mark.slow
def test_the_shipped_table_is_one_of_its_model():
    stored = load_file(shipped_file("medusa/bigrams.safetensors"))
    assert stored["scores"].shape == (len(stored["tokens"]),) * 2
    model = load_model(shipped_file(""))
    text = ChatTokenizer(model.directory).tokenizer
    time, upon = (text.encode(word, add_special_tokens=False) for word in (" time", " upon"))
    table = model.params["bigrams"]
    rows, scores = np.asarray(table["rows"]), np.asarray(table["scores"])
    (a,) = text.encode(" a", add_special_tokens=False)
    assert scores[rows[upon[0]], rows[a]] > 0.5  # "upon a"
    assert scores[rows[time[0]], rows[upon[0]]] < 0.5  # "time upon"
