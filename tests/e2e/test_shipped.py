"""The model that comes with the project: what a newcomer's two commands show."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from safetensors.numpy import load_file

from medusa_jax.checkpoints.hub import shipped as shipped_file
from medusa_jax.checkpoints.load import Model, load_model
from medusa_jax.data.prompts import read_requests
from medusa_jax.data.tokenizer import ChatTokenizer
from medusa_jax.decoding.acceptance import Acceptance, Greedy, Lossless, Typical
from medusa_jax.decoding.decoder import Decoder
from medusa_jax.decoding.state import outputs
from medusa_jax.drafting.dynamic_tree import DynamicTree
from medusa_jax.drafting.of_heads import drafter_of_heads
from medusa_jax.drafting.tree import Tree
from medusa_jax.serving import tree_store

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


@pytest.fixture(autouse=True, scope="module")
def _no_trees_of_this_machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("MEDUSA_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def shipped() -> Model:
    return load_model(shipped_file(""))


def test_it_is_small_and_whole(shipped: Model):
    files = [file for file in shipped_file("").rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 32e6
    assert {"README.md", "config.json", "tokenizer.json", tree_store.BESIDE} <= {
        f.name for f in files
    }
    assert shipped.heads.num_heads >= 4
    assert shipped.heads.shared


def found_tree(model: Model, scheme: Acceptance) -> Tree | DynamicTree:
    found = tree_store.find(model, scheme, 1, "float32")
    assert found is not None
    return tree_store.tree_of(found.tuning)


def test_a_tree_tuned_for_it_comes_with_it(shipped: Model):
    greedy, lossless, typical = (
        found_tree(shipped, scheme) for scheme in (Greedy(), Lossless(1.0), Typical())
    )
    assert greedy.size > 1
    assert lossless.size >= 1  # the root alone, where nothing is to be gained
    assert typical == greedy  # the nearest that was tuned


def test_a_story_and_the_ratio(run: Any):
    code, out, err = run("--prompt", "Once upon a time", "--compare", "--max_new_tokens", "80")
    assert code == 0
    assert out.startswith("Once upon a time")
    assert len(out.split()) > 40
    assert "mean accepted length" in err
    assert "1 of 1 texts are the same" in err


def test_a_table_is_booked_and_the_answer_ends_by_itself(run: Any):
    code, out, _ = run("--chat", stdin="I want to book a table at a restaurant.\n")
    answer = out.strip()
    assert code == 0
    assert 3 < len(answer.split()) < 60
    assert answer[-1] in ".?!"
    assert any(word in answer.lower() for word in ("restaurant", "city", "eat", "time"))


def test_hugging_face_writes_the_same_text(shipped: Model):
    prompt = ChatTokenizer(shipped.directory).encode(
        [{"role": "user", "content": "One day, a dog"}]
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        shipped.directory, dtype=torch.float32, trust_remote_code=False
    )
    expected = theirs.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones((1, len(prompt)), dtype=torch.long),
        do_sample=False,
        max_new_tokens=40,
    )
    tree = Tree.published("mc_sim_7b_63").cut(8)
    decoder = Decoder(shipped.config, drafter_of_heads(shipped.heads, tree), capacity=128)
    state = decoder.prefill(shipped.params, [prompt], max_new_tokens=40)
    (ours,) = outputs(decoder.generate(shipped.params, state))
    assert ours.token_ids == expected[0, len(prompt) :].tolist()


def test_its_prompts_can_be_read():
    requests = list(read_requests(shipped_file("prompts.jsonl")))
    assert len(requests) >= 50
    assert {request.category for request in requests} == {"tales", "dialogues"}


def test_its_config_is_a_plain_llamas():
    config = json.loads(shipped_file("config.json").read_text())
    assert config["model_type"] == "llama"
    assert not [key for key in config if "medusa" in key]


def test_other_programs_find_its_backbone_alone():
    """vLLM loads each safetensors file of a directory, and refuses unknown tensors."""
    (weights,) = shipped_file("").glob("*.safetensors")
    assert {name.split(".")[0] for name in load_file(weights)} == {"model"}


TEXT = "Once upon  a time,\n Ben's 12,345 cats... <|user|>Tell me!</s> hé 漢字 \t 🙂"
IDS = [512, 525, 225, 263, 418, 16, 203, 662, 363, 225, 21, 22, 16, 23, 24, 25, 3875, 2317, 18, 225,
       3, 2879, 387, 5, 2, 307, 132, 107, 225, 167, 125, 100, 166, 260, 250, 225, 202, 225, 177,
       258, 252, 229]  # fmt: skip


def test_its_tokenizer_is_written_for_transformers_4_too():
    """There a merge is a string, and the class has another name; ids are those of before."""
    settings = json.loads(shipped_file("tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert all(
        isinstance(merge, str) and merge.count(" ") == 1
        for merge in json.loads(shipped_file("tokenizer.json").read_text())["model"]["merges"]
    )
    tokenizer = ChatTokenizer(shipped_file("")).tokenizer
    assert tokenizer.encode(TEXT, add_special_tokens=False) == IDS
    assert tokenizer.all_special_tokens == ["<s>", "</s>", "<pad>", "<|user|>", "<|assistant|>"]
