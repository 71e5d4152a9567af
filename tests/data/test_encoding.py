"""Documents to token ids: what is read, and exactly which of it is learnt."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.talks import CHATML, runs, talk

from medusa_jax.data.corpus import Corpus
from medusa_jax.data.encoding import encode
from medusa_jax.data.tokenizer import ChatTokenizer
from medusa_jax.errors import InputError

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content | trim + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# No end-of-sequence after the last answer, and no generation prompt of its own.
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ ' ' + m.content + ('' if loop.last else ' </s>') }}"
    "{% else %}{{ '[INST] ' + m.content + ' [/INST]' }}{% endif %}{% endfor %}"
)
# A prompt that ends in a space, which belongs to the answer's first token; one end for all.
SPACED = (
    "{% for m in messages %}{{ ('Q: ' if m.role == 'user' else 'A: ') + m.content }}"
    "{{ eos_token if loop.last and m.role != 'user' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}A: {% endif %}"
)
# As Qwen3: the last answer alone carries an (empty) thought, earlier ones lose theirs.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content.split('</think>')[-1] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Writes the number of turns first, which every further turn changes.
COUNTING = "{{ messages | length }}" + CHATML
ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}" + CHATML
)
MEASURING = CHATML.replace("m.content", "m.content ~ m.content | length")
FORGETFUL = CHATML.replace("m.content", "(m.content if m.role == 'user' else 'yes')")


ANSWERS = ("Hello there.", "月😀é — ok? ", "I\n\nsee</think>", "e")
TALKS = [
    talk("Hi", ANSWERS[0]),
    talk("Hi", ANSWERS[0], "Hello there.", ANSWERS[1], "月", ANSWERS[3], system="Be <brief>."),
    talk("Hi", ANSWERS[1], "Bye"),
    talk("a", "a", "a", "a", "a", "a"),
]


@pytest.mark.parametrize(
    ("template", "opening", "end"),
    [
        ("vicuna", " ", "</s>"),
        ("zephyr", "", "</s>"),
        (CHATML, "", "<|im_end|>"),
        (LLAMA3, "", "<|im_end|>"),
    ],
    ids=["vicuna", "zephyr", "chatml", "llama3"],
)
def test_answers_and_their_ends_are_learnt_and_nothing_else(make, corpus, template, opening, end):
    text = make(template)
    documents = list(encode(corpus(*TALKS, on_bad="refuse"), text))
    assert len(documents) == len(TALKS)
    for record, document in zip(TALKS, documents, strict=True):
        messages = record["messages"]
        whole = text.tokenizer.apply_chat_template(
            messages, chat_template=text.template, tokenize=True, return_dict=False
        )
        assert document.ids.tolist() == whole
        answers = [m["content"] for m in messages if m["role"] == "assistant"]
        if template == LLAMA3:
            answers = [answer.strip() for answer in answers]
        assert runs(text, document) == [f"{opening}{answer}{end}" for answer in answers]


@pytest.mark.parametrize("template", ["vicuna", "zephyr", CHATML, LLAMA3, LLAMA2, THINKING])
def test_learning_starts_where_decoding_would(make, corpus, template):
    """What is read before an answer is what decoding is given for the conversation so far."""
    text = make(template)
    for record in TALKS:
        (document,) = encode(corpus(record, on_bad="refuse"), text)
        starts = np.flatnonzero(np.diff(document.learnt.astype(int), prepend=0) == 1)
        answers = [i for i, m in enumerate(record["messages"]) if m["role"] == "assistant"]
        for start, i in zip(starts, answers, strict=True):
            assert document.ids[:start].tolist() == text.encode(record["messages"][:i])


def test_templates_that_write_the_last_answer_otherwise(make, corpus):
    record = talk("Hi", "Hello", "So?", "<think>w</think>Bye", "Why", ANSWERS[2] + "end")
    written = {}
    templates = {"llama2": LLAMA2, "thinking": THINKING, "spaced": SPACED}
    for name, template in templates.items():
        text = make(template)
        (document,) = encode(corpus(record, on_bad="refuse"), text)
        written[name] = runs(text, document)
    assert written["llama2"][0] == " Hello" and written["llama2"][2] == " I\n\nsee</think>end"
    assert written["spaced"][0] == " Hello" and written["spaced"][2].endswith("</think>end</s>")
    assert written["thinking"] == [
        "Hello<|im_end|>",
        "Bye<|im_end|>",
        "<think>\n\n</think>\n\nend<|im_end|>",
    ]


@pytest.mark.parametrize("template", ["vicuna", "zephyr", CHATML, LLAMA3, LLAMA2, THINKING])
@pytest.mark.parametrize("cut", ["Good mor", "e", " Good mor", "Good\n"])
def test_a_truncated_answer_ends_in_its_last_word(make, corpus, template, cut):
    text = make(template)
    record = talk("e", "Hello", "e e", cut, truncated=True)
    (document,) = encode(corpus(record, on_bad="refuse"), text)
    assert document.learnt[-1]
    parts, (whole,) = runs(text, document), [text.tokenizer.decode(document.ids)]
    assert parts[1].strip() == ("<think>\n\n</think>\n\n" * (template == THINKING) + cut).strip()
    assert whole.endswith(parts[1])
    (full,) = encode(corpus(talk("e", "Hello", "e e", cut), on_bad="refuse"), text)
    assert runs(text, full)[0] == parts[0]


def test_truncated_before_a_last_question(make, corpus):
    """The mark is about a last answer; here the last turn is a question."""
    text = make("zephyr")
    (document,) = encode(corpus(talk("a", "Hello", "b", truncated=True)), text)
    assert runs(text, document) == ["Hello</s>"]


def test_plain_text(make, corpus):
    records = [{"text": "Hello 月"}, {"text": "Hello"}, {"text": "Hello", "truncated": True}]
    for template in (None, "zephyr"):
        text = make(template)
        documents = list(encode(corpus(*records), text, end="</s>"))
        decoded = [text.tokenizer.decode(document.ids) for document in documents]
        assert decoded == ["<s>Hello 月</s>", "<s>Hello</s>", "<s>Hello"]
        assert all(document.learnt.tolist()[0] is False for document in documents)
        assert all(document.learnt[1:].all() for document in documents)
    (document,) = encode(corpus({"text": "Hello"}), text)
    assert text.tokenizer.decode(document.ids) == "<s>Hello"


def test_a_base_model_continues_prompts(make, corpus):
    text = make(None)
    docs = corpus(
        talk("Hello", " there."), talk("a", "b", "c", "d"), talk("a", " b", truncated=True)
    )
    whole, cut = encode(docs, text, end="</s>")
    assert text.tokenizer.decode(whole.ids) == "<s>Hello there.</s>"
    assert runs(text, whole) == [" there.</s>"]
    assert runs(text, cut) == [" b"]
    prompt = text.encode([{"role": "user", "content": "Hello"}])
    assert whole.ids[: len(prompt)].tolist() == prompt
    (skipped,) = docs.skipped
    assert skipped.startswith(f"{docs.sources[0]}, record 2: ")
    assert "no chat template, which a conversation of 4 turns needs" in skipped


@pytest.mark.parametrize(
    ("template", "record", "message"),
    [
        (COUNTING, talk("a", "b", "c", "d"), "the chat template rewrites earlier turns"),
        (MEASURING, talk("a", "b"), "answers cannot be found in it"),
        (FORGETFUL, talk("a", "b"), "answers cannot be found in it"),
        (ALTERNATING, talk("a", "b", system="s"), "refuses this .*: roles must alternate"),
        ("{{ undefined.content }}", talk("a", "b"), "the chat template refuses"),
    ],
)
def test_what_a_template_refuses_is_a_bad_record(make, corpus, template, record, message):
    text = make(template)
    good = {"text": "Hello"}
    skipping = corpus(good, record, good)
    assert len(list(encode(skipping, text))) == 2
    (skipped,) = skipping.skipped
    assert skipped.startswith(f"{skipping.sources[0]}, record 2: ")
    with pytest.raises(InputError, match=message):
        list(encode(corpus(good, record, on_bad="refuse"), text))


def test_an_unknown_end(make, corpus):
    with pytest.raises(InputError, match=r"data\.end '<\|end\|>' is no token"):
        list(encode(corpus({"text": "Hello"}), make(None), end="<|end|>"))


def test_batches_change_nothing(make, corpus):
    text, records = make("zephyr"), [*TALKS, {"text": "Hello"}, *TALKS]
    first = list(encode(corpus(*records), text))
    assert [d.origin[-8:] for d in first] == [f"record {i}" for i in range(1, 10)]
    for batch in (1, 4, 9):
        for one, other in zip(first, encode(corpus(*records), text, batch=batch), strict=True):
            assert one.origin == other.origin
            np.testing.assert_array_equal(one.ids, other.ids)
            np.testing.assert_array_equal(one.learnt, other.learnt)
            assert one.ids.dtype == np.int32 and one.learnt.dtype == bool


# Sentencepiece tokenizers: a space belongs to the word after it, strange characters are bytes.


@pytest.mark.parametrize("template", ["vicuna", SPACED], ids=["vicuna", "spaced"])
def test_sentencepiece_answers(shared, tmp_path, corpus, template):
    if template == SPACED:
        template = str(tmp_path / "spaced.jinja")
        Path(template).write_text(SPACED)
    text = ChatTokenizer(shared / "models/stories260K", template=template)
    (document,) = encode(corpus(talk("Tom", "Once 月😀.")), text)
    tokens = np.array(text.tokenizer.convert_ids_to_tokens(document.ids))
    data = b"".join(
        bytes([int(token[3:5], 16)]) if token.startswith("<0x") else token.encode()
        for token in tokens[document.learnt]
    )
    assert data.decode() == "▁Once▁月😀.</s>"
    assert tokens[document.learnt][0].startswith("▁")
    first = int(document.learnt.argmax())
    assert tokens[first - 1] == ":" and document.learnt[first:].all()


@pytest.mark.parametrize("legacy", [True, False])
def test_a_text_is_tokenized_as_a_prompt_is(shared, tmp_path, corpus, legacy):
    """Not "<s>" and the text as one string: newer tokenizers then leave out the first space."""
    directory = Path(shutil.copytree(shared / "models/stories260K", tmp_path / "model"))
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps({**settings, "legacy": legacy}))
    text = ChatTokenizer(directory)
    plain, chat = encode(corpus({"text": "Once upon"}, talk("Once", " upon")), text, end="</s>")
    expected = [*text.encode([{"role": "user", "content": "Once upon"}]), text.stop_ids[0]]
    assert plain.ids.tolist() == chat.ids.tolist() == expected
    assert plain.learnt.tolist() == [False] + [True] * (len(expected) - 1)
    prompt = len(text.encode([{"role": "user", "content": "Once"}]))
    assert chat.learnt.tolist() == [False] * prompt + [True] * (len(expected) - prompt)


@pytest.mark.slow
@pytest.mark.parametrize("template", ["vicuna", "zephyr"])
def test_real_dialogues(shared, template):
    """The first of 17,000: what is learnt is the answers, as written, and an end for each."""
    text = ChatTokenizer(shared / "models/stories260K", template=template)
    source = str(shared / "chat/sgd_sharegpt.json.gz")
    documents = list(Corpus([source], max_documents=40))
    for document, encoded in zip(
        documents, encode(Corpus([source], max_documents=40, on_bad="refuse"), text), strict=True
    ):
        answers = [m["content"] for m in document.messages if m["role"] == "assistant"]
        assert [run.strip() for run in runs(text, encoded)] == [a + "</s>" for a in answers]
