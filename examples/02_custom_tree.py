"""Decode with trees of your own, on ids and without a tokenizer's help in the loop.

A tree is a list of rank lists: [0, 1] is head 1's best token, then head 2's second best. The root,
which the backbone has already chosen, is not listed. Each node's parent must be listed too.

    python examples/02_custom_tree.py
"""

from medusa_jax import Decoder, DynamicTree, Generator, MedusaDrafter, NoDraft, Tree, outputs

TREES = {
    "a chain of four": Tree.chain(4),
    "by hand, 6 tokens": Tree.from_lists([[0], [1], [0, 0], [0, 1], [0, 0, 0]]),
    "published, first 8 tokens": Tree.published("mc_sim_7b_63").cut(8),
    "built at each step, 8 tokens": DynamicTree(size=8, depth=4),
}


def main() -> None:
    """Prints the mask of one tree, then the mean accepted length of each."""
    hand = TREES["by hand, 6 tokens"]
    print("mask of the tree made by hand (row sees column):")
    for row in hand.mask:
        print("  " + " ".join("x" if sees else "." for sees in row))

    # The high level: text to text. `tree` may be a name, "grow:8", a JSON file, or an object.
    print(Generator.load(tree=hand).generate(["Tom had a dog"], max_new_tokens=32)[0].text)

    # The low level: token ids to token ids.
    generator = Generator.load()
    model = generator.model
    prompt = generator.text.encode([{"role": "user", "content": "Once upon a time"}])
    drafters = {name: MedusaDrafter(model.heads, tree) for name, tree in TREES.items()}
    texts = set()
    for name, drafter in {"plain decoding": NoDraft(), **drafters}.items():
        decoder = Decoder(model.config, drafter, capacity=128)
        state = decoder.prefill(model.params, [prompt], max_new_tokens=64)
        output = outputs(decoder.generate(model.params, state))[0]
        texts.add(tuple(output.token_ids))
        print(f"{output.mean_accepted_length:5.2f} tokens a step: {name}")
    print("the text does not depend on the tree:", len(texts) == 1)


if __name__ == "__main__":
    main()
