"""What the training of the shipped model starts from: its tokenizer, its shape and its data.

Writes, from the TinyStories texts and the schema-guided dialogues named below,

    base/           tokenizer with its chat template, and config.json
    draft/          the same tokenizer, and the shape of a draft model
    stories.txt     stories as they are
    tales.jsonl     each again, twice: told to a user who gave its first words
    dialogues.jsonl task dialogues
    valid_*.jsonl   held out, to choose by (trees, settings)
    test_*.jsonl    held out, to report; prompts_*.jsonl their first user turns

The held-out stories are the last 400 of `tinystories_test.txt`, and no training
text repeats one of them. Nor is a held-out prompt ever asked in training: many
stories begin alike, and heads know by heart what comes after "Once upon a time".
All choices are drawn from one seed.
"""

import dataclasses
import json
import random
import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from medusa_jax import json_files
from medusa_jax.cli import runner
from medusa_jax.data.corpus import Corpus
from medusa_jax.options import option

EXAMPLE = "python recipes/shipped_model.py --text ../shared/text --chat ../shared/chat"

END = "<|endoftext|>"
NEXT = r"(?<!\n)\n(?!\n)"  # paragraphs have an empty line between them, stories none
TEXTS = {
    "tinystories_val.txt": re.escape(END),
    "tinystories_a.txt": NEXT,
    "tinystories_b.txt": re.escape(END),
    "tinystories_test.txt": re.escape(END),
}
HELD_OUT = 200  # of each kind, for validation and again for the test
SPECIAL = ("<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>")
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'user' %}{{ '<|user|>' + message.content }}"
    "{% elif message.role == 'assistant' %}"
    "{{ '<|assistant|>' + message.content + eos_token }}"
    "{% else %}{{ raise_exception('this model knows user and assistant, no ' + message.role) }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DRAFT_SHAPE = SHAPE | {  # about 1.1 million parameters, half of them the embedding
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "head_dim": 32,
}
PLAIN = str.maketrans({"“": '"', "”": '"', "’": "'", "‘": "'", "—": "-", "–": "-", "…": "..."})

Messages = list[dict[str, str]]


def stories(path: Path, separator: str) -> Iterator[str]:
    """Whole stories of a file: ASCII, 40 words or more, ending as a sentence does."""
    whole = path.read_text(encoding="utf-8").translate(PLAIN)
    for document in re.split(separator, whole):
        text = "\n".join(line.strip() for line in document.split("\n") if line.strip())
        if text.isascii() and len(text.split()) >= 40 and text[-1] in ".!?\"'":
            yield text


def told(story: str, rng: random.Random, taken: Collection[str] = ()) -> Messages:
    """A story as an answer: to its first 2 to 16 words or, now and then, to a plain wish.

    Words are added to a prompt for as long as it is `taken`.
    """
    words, count = story.split(" "), rng.randint(2, 16)
    asked = " ".join(words[:count]).strip()
    if rng.random() < 0.05:
        asked = rng.choice(("Tell me a story.", "Please tell me a story."))
    while asked in taken:
        count += 1
        asked = " ".join(words[:count]).strip()
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": story}]


def dialogues(path: Path) -> Iterator[Messages]:
    """The dialogues of a ShareGPT file that the corpus reader accepts."""
    for document in Corpus([str(path)]):
        yield list(document.messages)


def tokenizer(texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE, digits one by one."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=["<|user|>", "<|assistant|>"],
    )
    wrapped.chat_template = TEMPLATE
    return wrapped


def save(tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Writes it in the older form, which transformers 4 reads as well as 5.

    There a merge is a string of two parts, and the class has its name of transformers 4.
    """
    tokenizer.save_pretrained(str(directory))
    file = directory / "tokenizer.json"
    whole = json_files.read_object(file)
    whole["model"]["merges"] = [" ".join(pair) for pair in whole["model"]["merges"]]
    file.write_text(json.dumps(whole, indent=2, ensure_ascii=False), encoding="utf-8")
    settings = {
        "bos_token": tokenizer.bos_token,
        "eos_token": tokenizer.eos_token,
        "pad_token": tokenizer.pad_token,
        "additional_special_tokens": list(SPECIAL[3:]),
        "clean_up_tokenization_spaces": False,
        "model_max_length": tokenizer.model_max_length,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    json_files.write(directory / "tokenizer_config.json", settings)


def write_lines(path: Path, records: Iterable[Any]) -> None:
    """JSON Lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


@dataclasses.dataclass(kw_only=True)
class Options:
    """The options."""

    text: str = option(help="directory of the TinyStories files")
    chat: str = option(help="directory of sgd_sharegpt.json.gz")
    output: str = option("data/shipped", help="directory to write")
    vocab_size: int = option(4096, least=300, help="of the tokenizer")
    dialogues: int = option(5000, least=0, help="how many to learn from")
    seed: int = option(0, help="of all choices")


def run(options: Options) -> None:
    """Writes everything to the output directory."""
    rng, out = random.Random(options.seed), Path(options.output)
    out.mkdir(parents=True, exist_ok=True)
    texts = {
        name: list(stories(Path(options.text) / name, separator))
        for name, separator in TEXTS.items()
    }
    last = texts["tinystories_test.txt"]
    texts["tinystories_test.txt"], held = last[: -2 * HELD_OUT], last[-2 * HELD_OUT :]
    known = set(held)
    train = [one for some in texts.values() for one in dict.fromkeys(some) if one not in known]
    talks = list(dialogues(Path(options.chat) / "sgd_sharegpt.json.gz"))
    rng.shuffle(talks)
    held_talks, talks = talks[: 2 * HELD_OUT], talks[2 * HELD_OUT :][: options.dialogues]
    said = ["\n".join(message["content"] for message in talk) for talk in talks]
    vocabulary = tokenizer(train + said, options.vocab_size)
    for name, shape in (("base", SHAPE), ("draft", DRAFT_SHAPE)):
        save(vocabulary, out / name)
        json_files.write(out / name / "config.json", shape | {"vocab_size": len(vocabulary)})

    (out / "stories.txt").write_text(f"\n{END}\n".join(train), encoding="utf-8")
    tales = [told(one, rng) for _ in range(2) for one in train]
    taken = {one[0]["content"] for one in tales}
    write_lines(out / "tales.jsonl", ({"messages": one} for one in tales))
    write_lines(out / "dialogues.jsonl", ({"messages": talk} for talk in talks))
    held_tales: list[Messages] = []
    for story in held:
        held_tales.append(told(story, rng, taken))
        taken.add(held_tales[-1][0]["content"])
    for name, kept in (("tales", held_tales), ("dialogues", held_talks)):
        for part, some in (("valid", kept[:HELD_OUT]), ("test", kept[HELD_OUT:])):
            write_lines(out / f"{part}_{name}.jsonl", ({"messages": one} for one in some))
            prompts = ({"prompt": one[0]["content"], "category": name} for one in some)
            write_lines(out / f"prompts_{part}_{name}.jsonl", prompts)
    print(f"{len(train)} stories, {len(talks)} dialogues, vocabulary {len(vocabulary)}")


if __name__ == "__main__":
    runner.command(run, Options, __doc__ or "", EXAMPLE)
