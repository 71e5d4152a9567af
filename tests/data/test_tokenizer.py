"""Prompts to ids and ids to text, on the real tokenizers."""

import pytest

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


def test_half_a_character_comes_out_at_the_end(shared):
    """Byte tokens of '月' (E6 9C 88) without the last one."""
    text = ChatTokenizer(shared / "models/stories260K")
    half = text.tokenizer.encode("月", add_special_tokens=False)[:-1]
    stream = TextStream(text, [1])
    assert "�" not in stream.push(half)
    assert "�" in stream.finish()
