"""The report of `gqa-export long`, of which `validate` has a part: tables, HTML without scripts, JUnit XML.

Text from outside is escaped.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from html import escape
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from ..compare.long_quality import FewerLayers, LengthQuality, LongQuality
from .svg import Frame, element, points, text

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

WIDEST = 200
LENGTH_COLUMNS = ("tokens", "perplexity", "exact", "nats lost", "KL", "top-1", "copy score", "seconds", "exact seconds")
LAYER_COLUMNS = ("layer", "error (median)", "error (p99)", "mass read", "alpha", "column", "alpha of the rest",
                 "log kappa", "seconds", "exact seconds")
FEWER_COLUMNS = ("layers", "nats lost", "copy score")
SHORT_LENGTH = ("tokens", "ppl", "exact", "nats", "KL", "top-1", "copy score", "s", "exact s")
SHORT_LAYER = ("layer", "error", "p99", "mass", "alpha", "column", "rest", "log k", "s", "exact s")
"""the same for a terminal, which 80 characters have room for"""
STYLE = ("body{font:14px sans-serif;max-width:64em;margin:2em auto;padding:0 1em}table{border-collapse:collapse}"
         "td,th{border:1px solid #bbb;padding:.2em .6em;text-align:right}.bad{color:#b00020;font-weight:bold}")
PLOT_STYLE = ("svg.long polyline{fill:none;stroke:#2166ac;stroke-width:2}svg.long polyline.exact{stroke:#888}"
              "svg.long text{font-size:11px;fill:currentColor}svg.long line{stroke:#ccc}svg.long circle{fill:#2166ac}"
              "svg.long circle.exact{fill:#888}svg.long line.bound{stroke:#b3261e;stroke-dasharray:5 4}")
"""of the plots, on whichever page"""
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd]")


def length_row(each: LengthQuality) -> tuple[str, ...]:
    """The cells of a length."""
    score = each.copy_score
    return (str(each.tokens), f"{each.perplexity:.3f}", f"{each.exact_perplexity:.3f}", f"{each.loss:+.4f}",
            f"{each.kl:.4f}", f"{each.top1:.4f}", "not judged" if score is None else f"{score:.3f}",
            f"{each.seconds:.2f}", f"{each.exact_seconds:.2f}")


def layer_rows(each: LengthQuality) -> list[tuple[str, ...]]:
    """The cells of every layer of a length."""
    return [(str(layer.layer), f"{layer.error:.4f}", f"{layer.error_p99:.4f}", f"{layer.mass:.3f}",
             f"{layer.alpha:.3g}", str(layer.alpha_column), f"{layer.alpha_rest:.3g}", f"{layer.log_kappa:.1f}",
             f"{layer.seconds:.3f}", f"{layer.exact_seconds:.3f}") for layer in each.layers]


def fewer_row(each: FewerLayers) -> tuple[str, ...]:
    """The cells of a number of layers."""
    score = each.copy_score
    return str(each.layers), f"{each.loss:+.4f}", "not judged" if score is None else f"{score:.3f}"


def tables(quality: LongQuality) -> list[RenderableType]:
    """What the console shows."""
    from rich.table import Table

    def table(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> Table:
        made = Table(title=title, box=None, padding=(0, 2, 0, 0), pad_edge=False, title_justify="left")
        for column in columns:
            made.add_column(column, justify="right", no_wrap=True)
        for row in rows:
            made.add_row(*row)
        return made

    shown: list[RenderableType] = [table(title(quality), SHORT_LENGTH,
                                           [length_row(each) for each in quality.lengths])]
    shown += [table(f"same best token, by eighths of the positions, {each.tokens} tokens",
                    tuple(map(str, range(1, len(each.top1_by_position) + 1))),
                    [tuple(f"{share:.3f}" for share in each.top1_by_position)]) for each in quality.lengths]
    if len(quality.fewer) > 1:
        shown.append(table(f"with the last layers only, {min(each.tokens for each in quality.lengths)} tokens",
                           FEWER_COLUMNS, [fewer_row(each) for each in quality.fewer]))
    return [*shown, *(table(f"layers, each alone, {each.tokens} tokens: error (median, p99), mass read, alpha, its "
                             "column, of the rest, log kappa", SHORT_LAYER, layer_rows(each))
                      for each in quality.lengths if each.layers)]


def show(quality: LongQuality, console: Console) -> None:
    """Print the tables; where a terminal is too narrow its lines go on in the next, and no number is cut off."""
    for each in tables(quality):
        console.print(each, width=max(console.width, WIDEST), crop=False)


def title(quality: LongQuality) -> str:
    """One line on what was measured."""
    setting = ", ".join(f"{name} {value}" for name, value in quality.setting.items() if name != "method")
    return f"{quality.checkpoint}: method {quality.method} ({setting}) in layers {list(quality.replaced)}"


def html(quality: LongQuality) -> str:
    """The page."""
    bounds = ", ".join(f"{value:g} {words}" for value, words in ((quality.max_loss, "nats lost at the most"),
                                                                  (quality.min_copy, "copy score at the least"))
                       if value is not None) or "none"
    parts = [f"<h1>{escape(title(quality))}</h1>", f"<p>Text: {escape(quality.text)}. Natural-exponent perplexity, "
             f"behind the first leaf. Bounds: {bounds}.</p>"]
    parts += [f'<p class="bad">{escape(failure)}</p>' for failure in quality.failures]
    parts += [] if quality.failures else ["<p>Every bound is kept.</p>"]
    return (f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title(quality))}</title>'
            f"<style>{STYLE}{PLOT_STYLE}</style>{''.join(parts)}{sections(quality)}</html>\n")


def sections(quality: LongQuality) -> str:
    """Tables, plots and notes, for a page of whatever style that holds `PLOT_STYLE`."""
    parts = [_table(LENGTH_COLUMNS, [length_row(each) for each in quality.lengths])]
    if len(quality.lengths) > 1:
        parts.append("<h3>Seconds over length, of the whole model; exact attention grey</h3>" + _plot(
            [(each.tokens, each.seconds) for each in quality.lengths],
            [(each.tokens, each.exact_seconds) for each in quality.lengths]))
    if len(quality.fewer) > 1:
        shortest = min(each.tokens for each in quality.lengths)
        parts.append(f"<h3>Nats lost over the number of layers, the last ones of them, {shortest} tokens</h3>" + _plot(
            [(0.0, 0.0), *((float(each.layers), each.loss) for each in quality.fewer)], [], quality.max_loss))
        parts.append(_table(FEWER_COLUMNS, [fewer_row(each) for each in quality.fewer]))
    for each in quality.lengths:
        parts.append(f"<h3>{each.tokens} tokens</h3>")
        parts.append("<p>Same best token, by eighths of the positions: "
                     + ", ".join(f"{share:.3f}" for share in each.top1_by_position) + "</p>")
        if each.layers:
            parts.append("<h3>Error of the output over layers, each alone</h3>" + _plot(
                [(layer.layer, layer.error) for layer in each.layers], []))
            parts.append(_table(LAYER_COLUMNS, layer_rows(each)))
    parts += [f"<p>{escape(note)}</p>" for note in quality.notes]
    return "".join(parts)


def tests(quality: LongQuality) -> Iterator[tuple[str, str, LengthQuality, str]]:
    """Test cases: the class of each, its name, its length, and the failure ("": none). What could not be judged and
    was not asked for is not among them: it would be read as green."""
    for each in quality.lengths:
        for name in ("loss", "copy"):
            failure = quality.failure_of(each, name)
            if name == "loss" or failure or (each.copy_score is not None and quality.min_copy is not None):
                yield f"long.{each.tokens}", name, each, failure


def junit(quality: LongQuality) -> str:
    """A test case per length and bound."""
    suite = ElementTree.Element("testsuite", name="gqa-export long", errors="0", skipped="0")
    found = list(tests(quality))
    for kind, name, each, failure in found:
        test = ElementTree.SubElement(suite, "testcase", classname=f"gqa_export.{kind}", name=name,
                                      time=f"{each.seconds:.3f}")
        if failure:
            ElementTree.SubElement(test, "failure", message=_NOT_XML.sub("\ufffd", failure))
    suite.set("tests", str(len(found)))
    suite.set("failures", str(sum(bool(failure) for *_, failure in found)))
    ElementTree.SubElement(suite, "system-out").text = _NOT_XML.sub("\ufffd", "\n".join(quality.notes))
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def _table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _plot(ours: list[tuple[float, float]], exact: list[tuple[float, float]], bound: float | None = None) -> str:
    """Two curves, the exact one grey, from 0 upwards or from the lowest value; a dashed line at a bound in sight."""
    both = [(x, y) for x, y in (*ours, *exact) if math.isfinite(y)]
    if not both:
        return "<p>No value is finite.</p>"
    right, high, low = max(x for x, _ in both), max(y for _, y in both), min(0.0, *(y for _, y in both))
    high = high if high > low else low + 1.0
    left = min(x for x, _ in both)
    frame = Frame(560, 220, 54, 10, 12, 30, (left, right if right > left else left + 1), (low, high))
    drawn = [element("line", x1=frame.across(left), y1=frame.down(y), x2=550.0, y2=frame.down(y))
             + text(f"{y:.3g}", x=4, y=frame.down(y) + 4) for y in (low, (low + high) / 2, high)]
    if bound is not None and low <= bound <= high:
        drawn.append(element("line", class_="bound", x1=frame.across(left), y1=frame.down(bound), x2=550.0,
                             y2=frame.down(bound)))
    drawn += [text(f"{x:g}", x=frame.across(x) - 8, y=214) for x in sorted({left, right})]
    for curve, kind in ((exact, "exact"), (ours, "ours")):
        places = [frame.place(x, y) for x, y in curve if math.isfinite(y)]
        if places:
            drawn.append(element("polyline", points=points(places), class_=kind))
            drawn += [element("circle", cx=x, cy=y, r=3, class_=kind) for x, y in places]
    return element("svg", "".join(drawn), class_="long", width=560, height=220, viewBox="0 0 560 220")
