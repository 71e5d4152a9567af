"""Text to token ids and back: raw prompts, chat templates, and text as tokens arrive."""

import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from medusa_jax import json_files
from medusa_jax.data.byte_tokens import ByteTokens
from medusa_jax.data.chat_templates import TEMPLATES, given_template, own_template
from medusa_jax.data.messages import Message
from medusa_jax.data.pretrained import load_tokenizer
from medusa_jax.data.rendering import Unwritten, renderer
from medusa_jax.errors import InputError
from medusa_jax.gguf_file import is_gguf, open_gguf

MARK = "\ue000text\ue000"  # private-use characters, which no text has


class ChatTokenizer:
    """A tokenizer, and the way a conversation is written for one model.

    Attributes:
      tokenizer: the Hugging Face tokenizer.
      template: a Jinja chat template, or None where the model has none.
      raw: write BOS and the text as it is, never a template.
      vocab_size: the model's, or None where its settings do not tell.
    """

    def __init__(self, directory: Path, *, raw: bool = False, template: str | None = None) -> None:
        """Loads the tokenizer of a model directory or GGUF file, and never runs code from there.

        Args:
          template: a built-in name, a file with a Jinja template, or the name of a template of
            the model; default: see `own_template`.

        Raises:
          InputError: no tokenizer there, or no such template.
        """
        self.raw, self.template = raw, given_template(template)
        self.tokenizer = load_tokenizer(directory)
        if self.template is None and (template is not None or not raw):
            self.template = own_template(self.tokenizer.chat_template, template, directory)
        self.vocab_size = _vocab_size(directory)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A name for what makes token ids of a conversation, such as "sha256:2cf24dba5fb0a30e"."""
        parts = sorted(self.tokenizer.get_vocab().items()), self.template, self.raw
        digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        return f"sha256:{digest[:16]}"

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
          InputError: a longer conversation, but no template and not `raw`; the template refuses
            it or leaves a message out; or a token is not the model's.
        """
        ids = self._encode(messages)
        self.check_ids(ids)
        return ids

    def _encode(self, messages: Sequence[Message]) -> list[int]:
        if self.raw or (self.template is None and len(messages) == 1):
            text = json_files.whole_text("\n".join(message["content"] for message in messages))
            bos = self.tokenizer.bos_token_id
            ids = self.tokenizer.encode(text, add_special_tokens=False)
            return ids if bos is None else [bos, *ids]
        if self.template is None:
            raise InputError(
                "the tokenizer has no chat template, which a conversation needs: give a built-in "
                f"one ({', '.join(TEMPLATES)}) or a Jinja file, or decode it raw"
            )
        self.check_written(messages)
        text = self.render(messages, answer=True)
        return self.tokenizer.encode(text, add_special_tokens=False)

    def render(self, messages: Sequence[Message], *, answer: bool) -> str:
        """A conversation as the template writes it; with `answer`, up to where one would begin."""
        (text,) = self.render_all([(messages, answer)])
        return text

    def render_all(self, conversations: Sequence[Unwritten]) -> list[str]:
        """`render` of several conversations, which takes less time together."""
        assert self.template is not None
        return renderer.render(self.template, self.tokenizer.special_tokens_map, conversations)

    def check_written(self, messages: Sequence[Message]) -> None:
        """Checks that the template writes what not all templates know of.

        Raises:
          InputError: it leaves out a system message, a tool's text, or a call of a tool.
        """
        for i, message in enumerate(messages):
            role = message["role"]
            if role in ("system", "tool") and message["content"].strip():
                marked = [*messages[:i], message | {"content": MARK}, *messages[i + 1 :]]
                written = MARK in self.render(marked, answer=False)
            else:
                written = "tool_calls" not in message or "tool_calls" in (self.template or "")
            if not written:
                raise InputError(
                    f"the chat template leaves out turn {i + 1}, of role {role!r}: "
                    "give another template, or leave that turn out"
                )

    def check_ids(self, token_ids: Sequence[int]) -> None:
        """Checks that the model knows these tokens, before a vocabulary is indexed by them.

        Raises:
          InputError: it does not; names the first such token.
        """
        if self.vocab_size is None:
            return
        if max(token_ids, default=0) >= self.vocab_size:
            beyond = next(one for one in token_ids if one >= self.vocab_size)
            token = self.tokenizer.convert_ids_to_tokens(int(beyond))
            raise InputError(
                f"the tokenizer's {token!r} is token {beyond}, but the model's vocabulary ends at "
                f"{self.vocab_size - 1}: the model was not resized for its tokenizer"
            )

    def decode(self, prompt_ids: Sequence[int], token_ids: Iterable[int]) -> str:
        """The text of `token_ids` after a prompt, special tokens left out."""
        stream = TextStream(self, prompt_ids)
        return stream.push(token_ids) + stream.finish()


def _vocab_size(model: Path) -> int | None:
    """Tokens that a model knows, where its settings tell."""
    if is_gguf(model):
        embedding = open_gguf(model).tensors.get("token_embd.weight")
        return embedding.shape[0] if embedding else None
    config = model / "config.json"
    settings = json_files.read_object(config) if config.is_file() else {}
    return json_files.Fields(settings, str(config)).integer("vocab_size", 0) or None


class TextStream:
    """Text of tokens as they arrive: whole characters only, spaces as in one piece.

    What is no character becomes U+FFFD. A stream keeps what it has said. So a whole character
    stays where broken bytes follow it, which decoding all ids at once may spoil.
    """

    def __init__(self, text: ChatTokenizer, prompt_ids: Sequence[int]) -> None:
        from tokenizers.decoders import DecodeStream

        self._tokenizer = text.tokenizer
        self._bytes = ByteTokens(text.tokenizer.backend_tokenizer)
        self._held: list[int] = []
        prompt = list(self._bytes.whole(prompt_ids))
        # A stream that begins within a character would say its prompt again.
        broken = self._tokenizer.decode(prompt, skip_special_tokens=True).endswith("\ufffd")
        self._stream = DecodeStream([] if broken else prompt, skip_special_tokens=True)
        if broken:
            self._step(prompt)

    def push(self, token_ids: Iterable[int]) -> str:
        """Text that became complete with these tokens; may be empty."""
        return self._step(self._bytes.whole(token_ids))

    def finish(self) -> str:
        """What was held back: bytes that never became a whole character."""
        text = self._step(self._bytes.rest())
        if self._held:
            text += self._tokenizer.decode(self._held, skip_special_tokens=True)
        return text

    def _step(self, token_ids: Iterable[int]) -> str:
        pieces = []
        for token_id in token_ids:
            piece = self._stream.step(self._tokenizer.backend_tokenizer, token_id)
            self._held = [] if piece else [*self._held, token_id]
            pieces.append(piece or "")
        return "".join(pieces)
