"""Prompts to ids and ids to text, on the real tokenizers."""

import json
import random
import re
from pathlib import Path

import pytest
from helpers.tokenizers import byte_fallback, byte_level
from transformers import AutoTokenizer

from medusa_jax.checkpoints.hub import shipped
from medusa_jax.data.chat_templates import TEMPLATES
from medusa_jax.data.tokenizer import ChatTokenizer, TextStream
from medusa_jax.errors import InputError


@pytest.fixture(scope="module")
def text(shared) -> ChatTokenizer:
    return ChatTokenizer(shared / "models/stories260K")


def _user(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


def test_a_base_model_gets_bos_and_the_text(text, golden):
    for record in golden:
        assert text.encode(_user(record["prompt"])) == record["prompt_ids"]


def test_a_conversation_needs_a_template(text, shared):
    messages = [*_user("Hi"), {"role": "assistant", "content": "Hello"}, *_user("Bye")]
    with pytest.raises(InputError, match=r"no chat template.*vicuna, zephyr"):
        text.encode(messages)
    raw = ChatTokenizer(shared / "models/stories260K", raw=True)
    assert raw.encode(messages) == raw.encode(_user("Hi\nHello\nBye"))


TURNS = [
    {"role": "user", "content": "Hi there"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye"},
]
VICUNA = (
    "<s>A chat between a curious user and an artificial intelligence assistant. The assistant "
    "gives helpful, detailed, and polite answers to the user's questions. "
    "USER: Hi there ASSISTANT: Hello.</s>USER: Bye ASSISTANT:"
)
ZEPHYR = "<s><|user|>\nHi there</s>\n<|assistant|>\nHello.</s>\n<|user|>\nBye</s>\n<|assistant|>\n"


@pytest.mark.parametrize(("name", "expected"), [("vicuna", VICUNA), ("zephyr", ZEPHYR)])
def test_built_in_templates(shared, name, expected):
    """FastChat's Vicuna v1.1 and Zephyr's model card, written out."""
    text = ChatTokenizer(shared / "models/stories260K", template=name)
    assert text.encode(TURNS) == text.tokenizer.encode(expected, add_special_tokens=False)
    system = [{"role": "system", "content": "Be brief."}, *TURNS]
    assert "Be brief." in text.tokenizer.decode(text.encode(system))
    assert "curious user" not in text.tokenizer.decode(text.encode(system))


def test_the_models_name_chooses_a_template(shared, tmp_path):
    directory = tmp_path / "medusa-Vicuna-7b"
    directory.symlink_to(shared / "models/stories260K")
    assert ChatTokenizer(directory).template is None  # a link is followed to the real name
    directory.unlink()
    directory.mkdir()
    for file in (shared / "models/stories260K").iterdir():
        (directory / file.name).symlink_to(file)
    assert "USER: " in (ChatTokenizer(directory).template or "")


def test_a_template_file(shared, tmp_path):
    file = tmp_path / "own.jinja"
    file.write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    text = ChatTokenizer(shared / "models/stories260K", template=str(file))
    expected = text.tokenizer.encode("[Hi there][Hello.][Bye]", add_special_tokens=False)
    assert text.encode(TURNS) == expected
    with pytest.raises(InputError, match="no chat template 'alpaca'"):
        ChatTokenizer(shared / "models/stories260K", template="alpaca")


BRIEF = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
SEVERAL = {"default": BRIEF, "tool_use": "TOOLS " + BRIEF}


def _save_templates(directory: Path, templates: dict[str, str], form: str) -> Path:
    """Saves named templates in one of the ways of published models."""
    file = directory / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    if form == "list":
        named = [{"name": name, "template": value} for name, value in templates.items()]
        file.write_text(json.dumps({**settings, "chat_template": named}))
    elif form == "dict":
        file.write_text(json.dumps({**settings, "chat_template": templates}))
    else:
        (directory / "additional_chat_templates").mkdir()
        for name, value in templates.items():
            path = f"additional_chat_templates/{name}.jinja"
            (directory / ("chat_template.jinja" if name == "default" else path)).write_text(value)
    return directory


@pytest.mark.parametrize("form", ["list", "dict", "files"])
@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_several_templates(tmp_path, make, form):
    directory = _save_templates(make(tmp_path), SEVERAL, form)
    text = ChatTokenizer(directory)
    theirs = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    assert text.render(TURNS, answer=True) == theirs.apply_chat_template(TURNS, tokenize=False)
    assert ChatTokenizer(directory, template="tool_use").template == SEVERAL["tool_use"]
    assert ChatTokenizer(directory, template="vicuna").template == TEMPLATES["vicuna"]


@pytest.mark.parametrize("form", ["list", "dict", "files"])
def test_several_templates_without_a_default(tmp_path, form):
    others = {"rag": BRIEF, "tool_use": BRIEF}
    directory = _save_templates(byte_level(tmp_path), others, form)
    with pytest.raises(InputError, match=r"templates rag, tool_use and no default: choose one"):
        ChatTokenizer(directory)
    assert ChatTokenizer(directory, template="rag").template == BRIEF
    assert ChatTokenizer(directory, raw=True).template is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe\x00", "own.jinja cannot be read"),
        (b"a" * 2**21, "own.jinja has more than 1,048,576 char"),
    ],
)
def test_files_that_are_no_templates(tmp_path, content, message):
    directory, file = byte_level(tmp_path), tmp_path / "own.jinja"
    file.write_bytes(content)
    with pytest.raises(InputError, match=message):
        ChatTokenizer(directory, template=str(file))
    with pytest.raises(InputError, match=r"no chat template '.*': expected vicuna, zephyr or"):
        ChatTokenizer(directory, template=str(tmp_path))
    (directory / "chat_template.jinja").write_bytes(content)
    with pytest.raises(InputError, match=str(directory)):
        ChatTokenizer(directory)
    with pytest.raises(InputError, match=message):  # what was given comes first
        ChatTokenizer(directory, template=str(file))


def test_halves_of_characters_are_replaced(tmp_path):
    for make in (byte_level, byte_fallback):
        text = ChatTokenizer(make(tmp_path / make.__name__))
        assert text.encode(_user("caf\udce9")) == text.encode(_user("caf\ufffd"))


def test_no_tokenizer(tmp_path):
    with pytest.raises(InputError, match="no readable tokenizer"):
        ChatTokenizer(tmp_path)


@pytest.mark.parametrize("name", ["stories260K", "babyllama105", "poem"])
@pytest.mark.parametrize("content", ["Once upon a time,  there\n\nwas “é”.", "主题：明月 春风\n"])
def test_streamed_pieces_make_up_the_whole_text(shared, name, content):
    """Token by token, in pairs, and at once; bytes of one character held back until complete."""
    text = ChatTokenizer(shared / "models" / name)
    ids = text.tokenizer.encode(content, add_special_tokens=False)
    prompt, rest = text.encode(_user("Tom")), [*ids, 2]
    whole = text.decode(prompt, rest)
    for size in (1, 2):
        stream = TextStream(text, prompt)
        pieces = [stream.push(rest[i : i + size]) for i in range(0, len(rest), size)]
        assert "".join(pieces) + stream.finish() == whole
        assert not any("�" in piece for piece in pieces)
    decode = text.tokenizer.decode
    expected = decode([*prompt, *rest], skip_special_tokens=True)
    assert expected == decode(prompt, skip_special_tokens=True) + whole


def _random_ids(rng: random.Random, text: ChatTokenizer) -> list[int]:
    """Tokens of all sorts, half of them bytes, and some that the tokenizer lacks."""
    bytes_or_all = rng.choice([range(3, 259), range(len(text.tokenizer) + 9)])
    return rng.choices(bytes_or_all, k=rng.randrange(12))


@pytest.mark.parametrize("make", ["shipped", byte_level, byte_fallback])
def test_random_tokens_never_end_a_stream(tmp_path, make):
    """Pieces make up the text, which is that of all ids at once unless a byte is broken."""
    text = ChatTokenizer(shipped() if make == "shipped" else make(tmp_path))
    rng, whole = random.Random(0), 0
    for _ in range(1000):
        prompt, ids = _random_ids(rng, text), _random_ids(rng, text)
        stream = TextStream(text, prompt)
        pieces = [stream.push([token_id]) for token_id in ids]
        said = "".join(pieces) + stream.finish()
        assert said == text.decode(prompt, ids)
        said.encode()
        known = [i for i in (*prompt, *ids) if i < len(text.tokenizer)]
        before, after = (
            text.tokenizer.decode([i for i in part if i in known], skip_special_tokens=True)
            for part in (prompt, [*prompt, *ids])
        )
        if "\ufffd" not in before + after:
            assert before + said == after
            whole += 1
    assert whole > 20


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"\n\xf0|there", "\n\ufffd there"),
        (b"\n\xf0\xe6\x9c\x88|there", "\n\ufffd月 there"),
        (b"\xe6\x9c\x88\xe6\x9c", "月\ufffd"),
        (b"\xf0|there", "\ufffd there"),
        (b"|there\xf0\x9f\x98\x80", " there😀"),
        (b"\xff\xfe|there\x80", "\ufffd\ufffd there\ufffd"),
    ],
)
@pytest.mark.parametrize("prompt", ["", "Hello"])
def test_broken_bytes_are_those_of_a_utf8_decoder(tmp_path, prompt, data, said):
    """Byte tokens, with "|" for the start of the word "there"."""
    text = ChatTokenizer(byte_fallback(tmp_path))
    vocabulary = text.tokenizer.get_vocab()
    ids = []
    for part in re.findall(rb"\|[a-z]+|[^|]", data):
        if part[:1] == b"|":
            ids += text.tokenizer.encode(part[1:].decode(), add_special_tokens=False)
        else:
            ids.append(vocabulary[f"<0x{part[0]:02X}>"])
    said = said.lstrip(" ") if not prompt else said  # as the whole text begins
    assert text.decode(text.encode(_user(prompt)) if prompt else [], ids) == said


@pytest.mark.parametrize("cut", [1, 2])
@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_a_prompt_may_end_within_a_character(tmp_path, make, cut):
    """The stream completes it, and does not say the prompt again."""
    text = ChatTokenizer(make(tmp_path))
    ids = text.tokenizer.encode("hi 月", add_special_tokens=False)
    assert text.decode(ids[:-cut], [*ids[-cut:], *ids[:1]])[0] == "月"
    assert text.decode(ids[:-cut], []) in ("", "\ufffd")


def test_half_a_character_comes_out_at_the_end(shared):
    """Byte tokens of '月' (E6 9C 88) without the last one."""
    text = ChatTokenizer(shared / "models/stories260K")
    half = text.tokenizer.encode("月", add_special_tokens=False)[:-1]
    stream = TextStream(text, [1])
    assert "�" not in stream.push(half)
    assert "�" in stream.finish()
