"""Chat templates in their process: as transformers renders them, and within bounds."""

import os
import signal
import time
from typing import Any

import pytest
from transformers import AutoTokenizer

from medusa_jax.checkpoints.hub import shipped
from medusa_jax.data import rendering
from medusa_jax.data.chat_templates import TEMPLATES
from medusa_jax.data.rendering import Renderer, renderer
from medusa_jax.errors import InputError

CALL = {"type": "function", "function": {"name": "time", "arguments": {"zone": "Zürich <1>"}}}
TALKS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hi"}],
    [
        {"role": "system", "content": 'Be brief.\n\t"quoted" & <tagged> {{ 1 }} {% raw %}'},
        {"role": "user", "content": "月😀 \x00 \ue000 e\u0301"},
        {"role": "assistant", "content": "", "tool_calls": [CALL], "reasoning_content": "hm"},
        {"role": "tool", "content": "12", "name": "time"},
        {"role": "assistant", "content": " At noon. \n"},
    ],
]
HI = [(TALKS[0], True)]
# What templates of published models use: see the names.
FEATURES = {
    "loopcontrols": "{% for m in messages %}{% if loop.index > 3 %}{% break %}{% endif %}"
    "{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.content }}{% endfor %}",
    "strftime": "{{ strftime_now('%Y') }} {{ messages[0].content }}",
    "tojson": "{% for m in messages %}{{ m | tojson }}\n{{ m.content | tojson(indent=2) }}"
    "{{ m | tojson(sort_keys=true) }}{% endfor %}",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
    "{% endfor %}",
    "namespaces": "{%- set ns = namespace(seen=0, last='') -%}\n{%- for m in messages %}\n"
    "  {%- set ns.seen = ns.seen + 1 %}{% set ns.last = m.content.strip() %}\n{{- ns.last -}}\n"
    "{%- endfor %}{{ ns.seen }}",
    "macros": "{% macro turn(m) -%} <{{ m.role | upper }}> {{ m.content | trim }} {%- endmacro %}"
    "{% for m in messages %}{{ turn(m) }}{% endfor %}{{ tools is none }}{{ documents is none }}"
    "{{ tools is defined and thoughts is not defined }}",
    "reasoning": "{% for m in messages %}{{ m.reasoning_content }}{{ m.thinking }}{% endfor %}",
    "prompt": "    {% if add_generation_prompt %}\n{{ bos_token }}>>\n    {% endif %}\n",
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(str(shipped()), trust_remote_code=False)


@pytest.mark.parametrize("template", [*TEMPLATES.values(), *FEATURES.values()])
@pytest.mark.parametrize("answer", [False, True])
def test_texts_are_those_of_transformers(tokenizer, template, answer):
    for messages in TALKS:
        expected = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=answer
        )
        tokens = tokenizer.special_tokens_map
        assert renderer.render(template, tokens, [(messages, answer)]) == [expected]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must\n alternate') }}", "conversation: roles must alternate$"),
        ("{% if %}", "Expected an expression"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ missing.content }}", "'missing' is undefined"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "calls itself without an end"),
        ("{{ " + "(" * 99_999 + "1" + ")" * 99_999 + " }}", "nested too deeply"),
        ("{{ 'a' * 100000000000 }}", "more than 1,024 MiB of memory"),
        ("{{ 'a' | center(100000000000) }}", "more than 1,024 MiB of memory"),
        ("{{ (range(99999) | list) * 100000 }}", "more than 1,024 MiB of memory"),
        ("{{ 'a' * 20000000 }}", "writes 20,000,000 characters; at most 16,777,216"),
    ],
)
def test_what_a_template_must_not_do(template, message):
    with pytest.raises(InputError, match=message):
        renderer.render(template, {}, [(TALKS[0], True)])


def test_halves_of_characters_do_not_pass():
    messages = [{"role": "user", "content": "a\ud83d"}]
    template = "{{ messages[0].content }}{{ '\\ud800' }}"
    assert renderer.render(template, {}, [(messages, False)]) == ["a\ufffd\ufffd"]


@pytest.mark.parametrize("depth", [300, 900, 5000])
def test_tool_calls_of_any_depth(depth):
    """Read, or refused by this process or the other."""
    nested: list[Any] = []
    for _ in range(depth):
        nested = [nested]
    messages = [{"role": "assistant", "content": "a", "tool_calls": nested}]
    try:
        assert renderer.render("{{ messages[0].content }}", {}, [(messages, False)]) == ["a"]
        assert depth < 5000
    except InputError as error:
        assert depth > 300 and "nested too deeply" in str(error)


@pytest.fixture
def own():
    made = Renderer(seconds=0.3)
    yield made
    made.close()


@pytest.mark.slow
def test_a_template_without_an_end_is_ended_and_then_not_tried_again(own, monkeypatch):
    monkeypatch.setattr(rendering, "STRIKES", 1)
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    for template in (loops, "{{ 9 ** (9 ** 9) }}"):
        with pytest.raises(InputError, match=r"takes more than 0.3 s to render: its loops"):
            own.render(template, {}, HI)
        start = time.monotonic()
        with pytest.raises(InputError, match="beyond its bounds 1 times"):
            own.render(template, {}, HI)
        assert time.monotonic() - start < 1
    assert own.render("{{ messages[0].content }}", {}, HI) == ["Hi"]
    own._process.stdin.close()  # as when this process ends
    assert own._process.wait(timeout=20) == 0


@pytest.mark.slow
def test_another_process_follows_one_that_was_killed_or_interrupted(own, monkeypatch):
    """An answer that nobody waited for does not go to the next question."""
    assert own.render("a", {}, HI) == ["a"]
    first = own._process
    first.send_signal(signal.SIGINT)  # Ctrl-C is none of its business
    assert own.render("b", {}, HI) == ["b"] and own._process is first
    stdout = first.stdout

    class Interrupted:
        def readline(self) -> bytes:
            raise KeyboardInterrupt

        def close(self) -> None:
            stdout.close()

    monkeypatch.setattr(first, "stdout", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        own.render("c", {}, HI)
    assert first.poll() is not None
    assert own.render("d", {}, HI) == ["d"]
    os.kill(own._process.pid, signal.SIGKILL)
    with pytest.raises(InputError, match="its process ended with code -9"):
        own.render("e", {}, HI)
    assert own.render("e", {}, HI) == ["e"]
