"""Decode with the shipped model: a batch, a stream, and plain decoding for comparison.

    python examples/01_decode.py

The three prompts share two slots: the third takes the slot whose text ends first.
"""

from medusa_jax import Generator

PROMPTS = [
    "Once upon a time",
    "One day, Tom found a big red ball",
    [{"role": "user", "content": "The little cat was sad because"}],  # a conversation
]


def main() -> None:
    """Prints three texts, then streams one."""
    medusa = Generator.load(batch_size=2)
    plain = Generator.load(batch_size=2, autoregressive=True)
    ours = medusa.generate(PROMPTS, max_new_tokens=48)
    theirs = plain.generate(PROMPTS, max_new_tokens=48)
    for completion, reference in zip(ours, theirs, strict=True):
        print(completion.text)
        print(
            f"[{completion.mean_accepted_length:.2f} tokens a step, "
            f"finish_reason {completion.finish_reason}, "
            f"same text as plain decoding: {completion.text == reference.text}]\n"
        )
    for piece in medusa.stream("Lily went to the park", max_new_tokens=48):
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
