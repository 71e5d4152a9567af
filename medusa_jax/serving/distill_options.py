"""What `medusa_jax.distill` is told."""

import dataclasses
from typing import Any

from medusa_jax.errors import InputError
from medusa_jax.options import option
from medusa_jax.serving.options import DecodingOptions


@dataclasses.dataclass(kw_only=True)
class DistillOptions(DecodingOptions):
    """What to ask, and where the answers go."""

    data: list[str] = option([], action="append", metavar="SOURCE", help="a file .json, .jsonl, "
        ".parquet or .txt, or a hub dataset owner/name[:split]; may be given again")  # fmt: skip
    questions: int = option(0, least=0, help="instead of data: the model makes up so many "
        "questions, written as prompts that --data reads")  # fmt: skip
    output: str = option(metavar="FILE", help="JSON Lines; continued if it is there")
    words: str | None = option(None, metavar="N|N-M", help="plain text: how many first words are "
        "the prompt")  # fmt: skip
    max_documents: int = option(0, least=0, help="of each source; 0 for all")
    separator: str = option("<|endoftext|>", help="between the documents of a .txt file")
    unique: bool = option(False, help="ask the same prompt only once (greedy decoding answers it "
        "alike each time)")  # fmt: skip
    on_bad: str = option("skip", choices=("skip", "refuse"), help="what becomes of inputs that "
        "cannot be read or do not fit")  # fmt: skip
    minutes: float | None = option(None, help="begin nothing new after so many; a later run goes "
        "on")  # fmt: skip
    shard: str = option("0/1", metavar="I/N", help="every N-th input, beginning with the I-th")
    acceptance: Any = option("lossless", help="greedy | typical | lossless")
    max_new_tokens: int | None = option(2048, least=1, help="of an answer, or what fits")
    batch_size: int = option(16, least=1, help="conversations decoded together")

    def __post_init__(self) -> None:
        if self.acceptance == "lossless":
            usual = 1.0 if self.questions else 0.3  # Magpie, section 2.2; Medusa, section 3.2
            self.temperature = usual if self.temperature is None else self.temperature
            if self.temperature == 0:
                self.acceptance = "greedy"
        if bool(self.data) == bool(self.questions):
            raise InputError("distill asks what --data holds, or makes up --questions: give either")
