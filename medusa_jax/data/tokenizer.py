"""Text to token ids and back: raw prompts, chat templates, and text as tokens arrive."""

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from medusa_jax.errors import InputError

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": ...}

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


class ChatTokenizer:
    """A tokenizer, and the way a conversation is written for one model.

    Attributes:
      tokenizer: the Hugging Face tokenizer.
      template: a Jinja chat template, or None where the model has none.
      raw: write BOS and the text as it is, never a template.
    """

    def __init__(self, directory: Path, *, raw: bool = False, template: str | None = None) -> None:
        """Loads the tokenizer of a model directory.

        Args:
          template: a built-in name, or a file with a Jinja template; default:
            the tokenizer's own, else the built-in one that the model's name fits.

        Raises:
          InputError: no tokenizer there, or no such template.
        """
        # transformers says on every start that it found no PyTorch, which we do not use.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        from transformers import AutoTokenizer

        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(str(directory))
        except Exception as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(f"{directory} holds no readable tokenizer: {reason}") from None
        if not getattr(tokenizer, "is_fast", False):
            raise InputError(f"{directory} holds a slow tokenizer; a tokenizer.json is needed")
        tokenizer.model_max_length = int(1e9)  # the decoder checks lengths, with better words
        self.tokenizer = tokenizer
        self.raw = raw
        self.template = _template(template, tokenizer, directory)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokenizer's end-of-sequence token."""
        eos = self.tokenizer.eos_token_id
        return () if eos is None else (eos,)

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation that the model shall continue.

        A model without a template is a base model: a single user message is
        then BOS and the text as it is, as with `raw`, where the messages of a
        longer conversation are joined by line breaks.

        Raises:
          InputError: a longer conversation, but no template and not `raw`.
        """
        if self.raw or (self.template is None and len(messages) == 1):
            text = "\n".join(message["content"] for message in messages)
            bos = self.tokenizer.bos_token_id
            ids = self.tokenizer.encode(text, add_special_tokens=False)
            return ids if bos is None else [bos, *ids]
        if self.template is None:
            raise InputError(
                "the tokenizer has no chat template, which a conversation needs: give a built-in "
                f"one ({', '.join(TEMPLATES)}) or a Jinja file, or decode it raw"
            )
        return self._apply(messages, tokenize=True, add_generation_prompt=True)

    def render(self, messages: Sequence[Message], *, answer: bool) -> str:
        """A conversation as the template writes it; with `answer`, up to where one would begin."""
        return self._apply(messages, tokenize=False, add_generation_prompt=answer)

    def _apply(self, messages: Sequence[Message], **how: bool) -> Any:
        try:
            return self.tokenizer.apply_chat_template(
                list(messages), chat_template=self.template, return_dict=False, **how
            )
        except Exception as error:
            raise InputError(f"the chat template refuses this conversation: {error}") from None

    def decode(self, prompt_ids: Sequence[int], token_ids: Iterable[int]) -> str:
        """The text of `token_ids` after a prompt, special tokens left out."""
        stream = TextStream(self, prompt_ids)
        return stream.push(token_ids) + stream.finish()


class TextStream:
    """Text of tokens as they arrive: whole characters only, spaces as in one piece."""

    def __init__(self, text: ChatTokenizer, prompt_ids: Sequence[int]) -> None:
        from tokenizers.decoders import DecodeStream

        self._tokenizer = text.tokenizer
        self._stream = DecodeStream(list(prompt_ids), skip_special_tokens=True)
        self._held: list[int] = []

    def push(self, token_ids: Iterable[int]) -> str:
        """Text that became complete with these tokens; may be empty."""
        pieces = []
        for token_id in token_ids:
            piece = self._stream.step(self._tokenizer.backend_tokenizer, int(token_id))
            self._held = [] if piece else [*self._held, int(token_id)]
            pieces.append(piece or "")
        return "".join(pieces)

    def finish(self) -> str:
        """What was held back: bytes that never became a whole character."""
        return self._tokenizer.decode(self._held, skip_special_tokens=True) if self._held else ""


def _template(choice: str | None, tokenizer: Any, directory: Path) -> str | None:
    if choice in TEMPLATES:
        return TEMPLATES[choice]
    if choice is not None:
        if not Path(choice).is_file():
            raise InputError(
                f"no chat template {choice!r}: expected {', '.join(TEMPLATES)} or a Jinja file"
            )
        return Path(choice).read_text(encoding="utf-8")
    if tokenizer.chat_template:
        return tokenizer.chat_template
    # A hub snapshot is models--owner--name/snapshots/revision.
    name = "/".join(directory.resolve().parts[-3:]).lower()
    named = re.search("|".join(TEMPLATES), name)
    return TEMPLATES[named.group()] if named else None
