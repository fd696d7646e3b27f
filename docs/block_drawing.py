"""Draw the block of a CR-Net, figure 1 of the paper in a drawing of our own, into block.svg.

    python docs/block_drawing.py

On the left two successive blocks and what crosses from one to the other; on the right one of the
seven maps. Only the standard library is used. Colours follow the reader's: light or dark.
"""

from __future__ import annotations

from pathlib import Path

WIDTH, HEIGHT = 860, 500
STYLE = """
  .paper { fill: #ffffff; }
  .box { fill: #f3f4f6; stroke: #9ca3af; }
  .block { fill: none; stroke: #9ca3af; stroke-dasharray: 4 3; }
  .low { fill: #dbeafe; stroke: #3b82f6; }
  .sum { fill: #ffffff; stroke: #374151; }
  .line { stroke: #374151; fill: none; }
  .stream { stroke: #374151; stroke-width: 3; fill: none; }
  .carry { stroke: #d97706; stroke-width: 1.8; fill: none; }
  .tip { fill: #374151; }
  .carrytip { fill: #d97706; }
  text { font: 14px system-ui, sans-serif; fill: #111827; text-anchor: middle; }
  .small { font-size: 12px; fill: #4b5563; }
  .halo { stroke: #ffffff; stroke-width: 5; paint-order: stroke; }
  .warm { fill: #b45309; }
  .title { font-size: 15px; font-weight: 600; }
  .left { text-anchor: start; }
  .sub { font-size: 11px; }
  @media (prefers-color-scheme: dark) {
    .paper { fill: #0d1117; }
    .box { fill: #1f2733; stroke: #6b7280; }
    .block { stroke: #6b7280; }
    .low { fill: #14305c; stroke: #60a5fa; }
    .sum { fill: #0d1117; stroke: #d1d5db; }
    .line, .stream { stroke: #d1d5db; }
    .carry { stroke: #fbbf24; }
    .tip { fill: #d1d5db; }
    .carrytip { fill: #fbbf24; }
    text { fill: #f3f4f6; }
    .small { fill: #b6bdc9; }
    .halo { stroke: #0d1117; }
    .warm { fill: #fbbf24; }
  }
"""
POSITIONS = ("q", "k", "v", "o", "gate", "up", "down")
LEFT, STEP = 142, 50  # middle of the first map, and from one map to the next


def text(x: float, y: float, words: str, kind: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{kind}">{words}</text>'


def box(x: float, y: float, width: float, height: float, kind: str = "box") -> str:
    """A rectangle around the middle x, from y downwards."""
    return (
        f'<rect x="{x - width / 2:g}" y="{y:g}" width="{width:g}" height="{height:g}" '
        f'rx="5" class="{kind}"/>'
    )


def path(points: str, kind: str = "line") -> str:
    """A line through points with a tip at its end."""
    tip = "carrytip" if kind == "carry" else "tip"
    return f'<path d="{points}" class="{kind}" marker-end="url(#{tip})"/>'


def marker(name: str, size: float) -> str:
    return (
        f'<marker id="{name}" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="{size:g}" '
        f'markerHeight="{size:g}" orient="auto" markerUnits="userSpaceOnUse">'
        f'<path d="M0 0 L10 5 L0 10 z" class="{name}"/></marker>'
    )


def block(top: float, name: str, notes: tuple[str, ...], kind: str) -> list[str]:
    """A block's frame, its name and its seven maps."""
    parts = [
        f'<rect x="20" y="{top:g}" width="470" height="120" rx="8" class="block"/>',
        text(30, top + 21, name, "title left"),
        *(text(30, top + 44 + 16 * at, line, "small left") for at, line in enumerate(notes)),
    ]
    for idx, position in enumerate(POSITIONS):
        x = LEFT + STEP * idx
        parts += [box(x, top + 38, 42, 36, kind), text(x, top + 61, position)]
    return parts


def sublayers(top: float) -> list[str]:
    """Under a block's maps, the sublayer that each belongs to."""
    parts = []
    for first, last, name in ((0, 3, "attention"), (4, 6, "feed-forward")):
        left, right = LEFT + STEP * first - 21, LEFT + STEP * last + 21
        parts += [
            f'<path d="M{left} {top + 86} v6 H{right} v-6" class="line"/>',
            text((left + right) / 2, top + 111, name, "small halo"),
        ]
    return parts


def two_blocks() -> list[str]:
    """Block 1, dense, and a block above it; seven carries and the stream between them."""
    lower, upper = 326, 110
    parts = [
        *block(lower, "block 1", ("full rank:", "Y = X W"), "box"),
        *block(upper, "block l", ("low rank,", "l = 2 to L"), "low"),
    ]
    for idx in range(len(POSITIONS)):
        x = LEFT + STEP * idx
        parts += [
            path(f"M{x} {lower + 38} V{upper + 77}", "carry"),
            path(f"M{x} {upper + 38} V72", "carry"),
        ]
    return [
        *parts,
        *sublayers(lower),
        *sublayers(upper),
        path(f"M50 480 V{lower + 123}", "stream"),
        path(f"M50 {lower} V{upper + 123}", "stream"),
        path(f"M50 {upper} V60", "stream"),
        text(64, 470, "stream X: from the embedding", "small left"),
        text(64, 62, "to the head", "small left"),
        text(500, 270, "carries: the", "small warm left"),
        text(500, 286, "outputs Y of", "small warm left"),
        text(500, 302, "all seven maps", "small warm left"),
        text(LEFT + 3 * STEP, 60, "to the next block", "small warm"),
    ]


def one_map() -> list[str]:
    """gain * Y_below + (X A) B, from the bottom up."""
    x, carry = 690, 805
    return [
        text(x + 30, 36, "one map of block l", "title"),
        text(x + 30, 64, "Y = gain * Y<tspan class='sub'> l-1</tspan> + (X A) B"),
        text(x, 462, "X"),
        text(x, 478, "rows, h", "small"),
        path(f"M{x} 444 V404"),
        f'<path d="M{x - 60} 400 H{x + 60} L{x + 22} 350 H{x - 22} z" class="low"/>',
        text(x, 381, "A"),
        path(f"M{x} 350 V316"),
        text(x + 12, 337, "rows, r", "small left"),
        f'<path d="M{x - 22} 312 H{x + 22} L{x + 60} 262 H{x - 60} z" class="low"/>',
        text(x, 293, "B"),
        path(f"M{x} 262 V217"),
        f'<circle cx="{x}" cy="200" r="14" class="sum"/>',
        text(x, 205, "+"),
        path(f"M{carry} 444 V222 Q{carry} 200 {carry - 22} 200 H{x + 18}", "carry"),
        box(carry, 320, 62, 28),
        text(carry, 339, "gain *"),
        text(carry, 462, "Y<tspan class='sub'> l-1</tspan>", "warm"),
        text(carry, 478, "rows, out", "small"),
        path(f"M{x} 186 V120"),
        text(x, 108, "within the block", "small"),
        text(x, 93, "Y"),
        path(f"M{x} 155 H{carry - 22} Q{carry} 155 {carry} 133 V118", "carry"),
        text(carry, 93, "Y", "warm"),
        text(carry, 108, "to block l + 1", "small warm"),
    ]


def drawing() -> str:
    """The whole file."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}" role="img" aria-labelledby="title description">',
        '<title id="title">The block of a CR-Net</title>',
        '<desc id="description">Above a first block of full rank, every linear map is the output '
        "of the same map one block below, times a learned gain, plus a low-rank increment.</desc>",
        f"<style>{STYLE}</style>",
        f"<defs>{marker('tip', 10)}{marker('carrytip', 9)}</defs>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="10" class="paper"/>',
        *two_blocks(),
        *one_map(),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def main() -> None:
    (Path(__file__).parent / "block.svg").write_text(drawing(), encoding="utf-8")


if __name__ == "__main__":
    main()
