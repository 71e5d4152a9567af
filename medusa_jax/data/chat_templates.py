"""Which chat template a model's conversations are written with."""

import re
from collections.abc import Mapping
from pathlib import Path

from medusa_jax.errors import InputError

MOST_CHARACTERS = 2**20  # of a template

# Templates of models whose tokenizers carry none (FastChat's conversation.py, Zephyr's model card).
TEMPLATES = {
    "vicuna": (
        "{{ bos_token }}"
        "{% if messages[0].role == 'system' %}{{ messages[0].content }}"
        "{% else %}A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
        "{% endif %}{{ ' ' }}"
        "{% for message in messages %}"
        "{% if message.role == 'user' %}{{ 'USER: ' + message.content + ' ' }}"
        "{% elif message.role == 'assistant' %}{{ 'ASSISTANT: ' + message.content + eos_token }}"
        "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    ),
    "zephyr": (
        "{{ bos_token }}"
        "{% for message in messages %}"
        "{{ '<|' + message.role + '|>\n' + message.content + eos_token + '\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    ),
}


def given_template(choice: str | None) -> str | None:
    """The template of a built-in name or a file; None for what is neither.

    Raises:
      InputError: a file holds no text, or more than MOST_CHARACTERS.
    """
    if choice is None or choice in TEMPLATES or not Path(choice).is_file():
        return TEMPLATES.get(choice or "")
    try:
        with open(choice, encoding="utf-8") as file:
            return _short(file.read(MOST_CHARACTERS + 1), choice)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the chat template {choice} cannot be read: {error}") from None


def own_template(
    own: str | Mapping[str, str] | None, name: str | None, directory: Path
) -> str | None:
    """The template that comes with a model, or None where it has none.

    Args:
      own: its template, or its templates by name.
      name: of one of them; default: of several the "default", and of none the built-in that the
        model's name fits.

    Raises:
      InputError: no template of that name, none of several is the default, or one is too long.
    """
    named = own if isinstance(own, Mapping) else {"default": own} if own else {}
    if name is None and not named:
        # A hub snapshot is models--owner--name/snapshots/revision.
        model = "/".join(directory.resolve().parts[-3:]).lower()
        fits = re.search("|".join(TEMPLATES), model)
        return TEMPLATES[fits.group()] if fits else None
    if name is None and "default" not in named:
        raise InputError(
            f"{directory} has the chat templates {', '.join(sorted(named))} and no default: "
            "choose one of them by name (--chat_template, data.template)"
        )
    if name is not None and name not in named:
        known = ", ".join([*TEMPLATES, *named])
        raise InputError(f"no chat template {name!r}: expected {known} or a Jinja file")
    return _short(named[name or "default"], str(directory))


def _short(template: str, origin: str) -> str:
    if len(template) > MOST_CHARACTERS:
        raise InputError(
            f"the chat template of {origin} has more than {MOST_CHARACTERS:,} characters"
        )
    return template
