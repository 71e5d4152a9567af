"""Draws docs/assets/tree_step.svg and docs/assets/token_stream.svg.

    python docs/draw_figures.py

Both figures show the greedy answer of the shipped model to "Once upon a time". The tables below
were recorded from `Decoder.step`: trees `grow:8` (tree step) and `grow:5` (token stream), float32.
"""

from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape

ASSETS = Path(__file__).parent / "assets"
INK, GRAY, LINE, GREEN, PALE, BLUE = (
    "#1f2328",
    "#818b98",
    "#d0d7de",
    "#1a7f37",
    "#dafbe1",
    "#0969da",
)
TINTS = ("#ddf4ff", "#fff8c5")

# One step of `grow:8`: token, parent slot and row of the drawing; slot 0 is the root.
TREE = (
    ("picked", -1, 1.0),
    ("it", 0, 1.0),
    ("up", 1, 0.5),
    ("and", 2, 0.5),
    ("wanted", 3, 0.0),
    ("looked", 3, 1.0),
    ("happy", 1, 2.0),
    ("and", 6, 2.0),
)
ACCEPTED = (0, 1, 2, 3, 5)
NEXT_ROOT = "at"

# The first ten steps of `grow:5`.
STEPS: tuple[str, ...] = (
    "Once| upon| a| time|,",
    " there| was| a| little| girl",
    " named| Lily|.| She| loved",
    " to| play| with| her",
    " toys| and| eat| yummy| food",
    ".| One| day|,| she",
    " found| a| big|,| red",
    " ball| in| her| yard|.",
    " She| picked| it",
    " up| and| looked| at| it",
)


def text(x: float, y: float, content: str, **style: object) -> str:
    """A text element; its attributes are written with `_` for `-`."""
    style = {"font_size": 13, "fill": INK} | style
    attributes = " ".join(f'{name.replace("_", "-")}="{value}"' for name, value in style.items())
    return f'<text x="{x:.1f}" y="{y:.1f}" {attributes}>{escape(content)}</text>'


def box(x: float, y: float, width: float, height: float, fill: str, stroke: str = LINE) -> str:
    """A rounded rectangle."""
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="4" '
        f'fill="{fill}" stroke="{stroke}"/>'
    )


def depth(slot: int) -> int:
    """Distance of a slot from the root."""
    parent = TREE[slot][1]
    return 0 if parent < 0 else depth(parent) + 1


def sees(query: int, key: int) -> bool:
    """True where the mask lets slot `query` attend to slot `key`: itself and its ancestors."""
    return query == key or (TREE[query][1] >= 0 and sees(TREE[query][1], key))


def node(x: float, y: float, label: str, slot: str, accepted: bool) -> list[str]:
    """A tree node: a box with its token, its slot number above it."""
    fill, stroke = (PALE, GREEN) if accepted else ("#ffffff", GRAY)
    return [
        box(x, y - 14, 70, 28, fill, stroke),
        text(x + 35, y + 5, label, text_anchor="middle", fill=INK if accepted else GRAY),
        text(x + 3, y - 18, slot, font_size=10, fill=GRAY),
    ]


def edge(x: float, y: float, to_x: float, to_y: float, accepted: bool) -> str:
    """A curve from the right side of a parent to the left side of its child."""
    middle = (x + to_x) / 2
    color, width = (GREEN, 2.5) if accepted else (LINE, 1.5)
    return (
        f'<path d="M{x:.1f} {y:.1f} C{middle:.1f} {y:.1f} {middle:.1f} {to_y:.1f} '
        f'{to_x:.1f} {to_y:.1f}" fill="none" stroke="{color}" stroke-width="{width}"/>'
    )


def tree_step() -> str:
    """The tree of one step with its accepted path, and its attention mask."""
    left, top, across, down = 24, 96, 92, 62
    at = [(left + across * depth(slot), top + down * row) for slot, (_, _, row) in enumerate(TREE)]
    parts = [text(left, 32, "1. Draft: the heads guess, the guesses form a tree", font_weight=600)]
    parts.append(text(left, 52, "text so far: ... a big, red ball in her yard. She", fill=GRAY))
    for slot, (_, parent, _) in enumerate(TREE):
        if parent >= 0:
            (x, y), (to_x, to_y) = at[parent], at[slot]
            parts.append(edge(x + 70, y, to_x, to_y, slot in ACCEPTED))
    x, y = at[ACCEPTED[-1]]
    parts.append(
        f'<path d="M{x + 70} {y} H{x + across}" stroke="{BLUE}" stroke-width="2" '
        'stroke-dasharray="4 3"/>'
    )
    parts.append(box(x + across, y - 14, 46, 28, "#ffffff", BLUE))
    parts.append(text(x + across + 23, y + 5, NEXT_ROOT, text_anchor="middle", fill=BLUE))
    parts.append(text(x + across, y + 30, "next root", font_size=11, fill=BLUE))
    for slot, (label, _, _) in enumerate(TREE):
        parts += node(*at[slot], label, str(slot), slot in ACCEPTED)
    parts.append(text(left, 282, "3. Accept and commit", font_weight=600))
    parts.append(
        text(left, 302, "The longest path the backbone agrees with becomes text: 5 tokens, 1 pass.")
    )
    parts.append(
        text(left, 322, "Its keys and values join the cache. The other nodes leave no trace.")
    )
    grid_x, grid_y, cell = 690, 88, 22
    parts.append(text(600, 32, "2. Verify: one pass under this mask", font_weight=600))
    parts.append(text(600, 52, "each token sees the text, itself, its ancestors", fill=GRAY))
    for query, (label, _, _) in enumerate(TREE):
        y = grid_y + query * cell
        parts.append(text(grid_x - 10, y + 16, f"{query} {label}", text_anchor="end", font_size=12))
        middle = grid_x + query * cell + cell / 2
        parts.append(
            text(middle, grid_y - 6, str(query), text_anchor="middle", font_size=11, fill=GRAY)
        )
        for key in range(len(TREE)):
            fill = "#ffffff"
            if sees(query, key):
                fill = "#4ac26b" if query in ACCEPTED else "#afb8c1"
            parts.append(box(grid_x + key * cell, y, cell - 2, cell - 2, fill))
    return svg(900, 344, parts)


def boxes(y: float, steps: Sequence[Sequence[str]]) -> tuple[list[str], float]:
    """Tokens in lines, a box for each step; returns the parts and the y below them."""
    parts: list[str] = []
    x, left, right, char = 24.0, 24.0, 870.0, 8.0
    for number, step in enumerate(steps):
        width = sum(len(token.strip()) * char + 10 for token in step) + 4
        if x + width > right:
            x, y = left, y + 36
        parts.append(box(x, y, width, 26, TINTS[number % 2]))
        for index, token in enumerate(step):
            weight = 600 if index == 0 else 400
            parts.append(
                text(x + 7, y + 18, token.strip(), font_family="monospace", font_weight=weight)
            )
            x += len(token.strip()) * char + 10
        x += 8
    return parts, y + 26


def token_stream() -> str:
    """The same text token by token, and step by step."""
    steps = [step.split("|") for step in STEPS]
    tokens = [[token] for step in steps for token in step]
    title = f"Plain decoding: {len(tokens)} tokens, {len(tokens)} passes over the weights"
    parts = [text(24, 30, title, font_weight=600)]
    plain, y = boxes(44, tokens)
    title = f"Medusa: the same {len(tokens)} tokens, {len(steps)} passes; a box is a step"
    parts += [*plain, text(24, y + 38, title, font_weight=600)]
    medusa, y = boxes(y + 52, steps)
    return svg(900, y + 20, [*parts, *medusa])


def svg(width: float, height: float, parts: list[str]) -> str:
    """A document on white, so that it reads on a dark page too."""
    return "\n".join(
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height:.0f}" '
            'font-family="Helvetica, Arial, sans-serif">',
            '<rect width="100%" height="100%" rx="8" fill="#ffffff"/>',
            *parts,
            "</svg>\n",
        )
    )


if __name__ == "__main__":
    (ASSETS / "tree_step.svg").write_text(tree_step())
    (ASSETS / "token_stream.svg").write_text(token_stream())
