"""Draws docs/overview.svg: heads that share keys and values, and the way from a checkpoint to a verdict.

    python scripts/picture.py
"""

from __future__ import annotations

from pathlib import Path

OUTPUT = Path(__file__).resolve().parent.parent / "docs" / "overview.svg"
WIDTH, HEIGHT = 960, 420
INK, PALE, LINE = "#1f2933", "#f4f6f8", "#9aa5b1"
COLOURS = ("#2f6f9f", "#b5651d", "#4d7c3a")
QUERY_HEADS = 9


def text(x: float, y: float, words: str, size: int = 13, anchor: str = "middle", colour: str = INK,
         weight: str = "normal") -> str:
    """A line of text; x, y is its anchor on the baseline."""
    return (f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" fill="{colour}" '
            f'font-weight="{weight}">{words}</text>')


def box(x: float, y: float, width: float, height: float, lines: tuple[str, ...], fill: str = PALE) -> list[str]:
    """A rectangle with a bold first line."""
    parts = [f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6" fill="{fill}" stroke="{LINE}"/>']
    top = y + height / 2 - (len(lines) - 1) * 8 + 4
    for number, words in enumerate(lines):
        parts.append(text(x + width / 2, top + 16 * number, words, 13 if number == 0 else 11,
                          weight="bold" if number == 0 else "normal"))
    return parts


def arrow(*points: tuple[float, float]) -> str:
    """A line through the points with a head at the end."""
    path = " L ".join(f"{x:g} {y:g}" for x, y in points)
    return f'<path d="M {path}" fill="none" stroke="{INK}" stroke-width="1.4" marker-end="url(#head)"/>'


def heads(x: float, title: str, kv_heads: int) -> list[str]:
    """Query heads above, the key/value heads that they share below."""
    step, size = 26, 18
    centre = x + (QUERY_HEADS - 1) * step / 2 + size / 2
    parts = [text(centre, 40, title, 14, weight="bold")]
    group = QUERY_HEADS // kv_heads
    for kv in range(kv_heads):
        colour = COLOURS[kv % len(COLOURS)]
        middle = x + (kv * group + (group - 1) / 2) * step + size / 2
        for member in range(group):
            left = x + (kv * group + member) * step
            parts.append(f'<path d="M {left + size / 2:g} 74 L {middle:g} 112" stroke="{colour}" stroke-width="1.2"/>')
            parts.append(f'<rect x="{left:g}" y="56" width="{size}" height="{size}" rx="3" fill="white" '
                         f'stroke="{colour}" stroke-width="1.6"/>')
        parts.append(f'<rect x="{middle - size / 2:g}" y="112" width="{size}" height="{size}" rx="3" fill="{colour}"/>')
    parts.append(text(centre, 154, f"{kv_heads} of {QUERY_HEADS} keys and values kept in the cache", 11))
    return parts


def picture() -> str:
    """The whole SVG."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="Helvetica, Arial, sans-serif">',
        "<title>Query heads that share keys and values; and the way from a checkpoint to a verdict</title>",
        f'<defs><marker id="head" markerWidth="9" markerHeight="8" refX="8" refY="4" orient="auto">'
        f'<path d="M 0 0 L 9 4 L 0 8 z" fill="{INK}"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        *heads(50, "multi-head", 9), *heads(367, "grouped-query", 3), *heads(684, "multi-query", 1),
        f'<path d="M 30 182 L 930 182" stroke="{LINE}" stroke-dasharray="3 4"/>',
        *box(30, 206, 150, 60, ("checkpoint", "folder, hub id or GGUF")),
        *box(224, 206, 176, 60, ("traced graph", "via the attention interface")),
        *box(444, 206, 190, 60, ("canonical ONNX", "gqa::GroupedQueryAttention")),
        *box(678, 206, 252, 60, ("a target's dialect", "ort &#183; onnx &#183; portable &#183; trt-*")),
        arrow((180, 236), (224, 236)), arrow((400, 236), (444, 236)), arrow((634, 236), (678, 236)),
        *box(30, 330, 150, 60, ("PyTorch", "fp64 reference")),
        *box(362, 330, 240, 60, ("compare, step by step", "logits, every new key and value"), "#fff8e6"),
        *box(678, 330, 252, 60, ("session", "ONNX Runtime or TensorRT")),
        arrow((105, 266), (105, 330)), arrow((804, 266), (804, 330)),
        arrow((180, 360), (362, 360)), arrow((678, 360), (602, 360)),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    OUTPUT.write_text(picture(), encoding="utf-8")
