"""The report of `gqa-export long`: tables, one HTML page without scripts, JUnit XML. Outside text is escaped."""

from __future__ import annotations

import re
from html import escape
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from ..compare.long_quality import LengthQuality, LongQuality
from .svg import Frame, element, points, text

if TYPE_CHECKING:
    from rich.console import RenderableType

LENGTH_COLUMNS = ("tokens", "perplexity", "exact", "nats lost", "KL", "top-1", "copy score", "seconds", "exact seconds")
LAYER_COLUMNS = ("layer", "error (median)", "error (p99)", "mass read", "alpha", "column", "alpha of the rest",
                 "log kappa", "seconds", "exact seconds")
STYLE = ("body{font:14px sans-serif;max-width:64em;margin:2em auto;padding:0 1em}table{border-collapse:collapse}"
         "td,th{border:1px solid #bbb;padding:.2em .6em;text-align:right}.bad{color:#b00020;font-weight:bold}"
         "polyline{fill:none;stroke:#2166ac;stroke-width:2}.exact{stroke:#888}svg text{font-size:11px}"
         "line{stroke:#ccc}circle{fill:#2166ac}.exact circle,circle.exact{fill:#888}")
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


def tables(quality: LongQuality) -> list[RenderableType]:
    """What the console shows."""
    from rich.table import Table

    def table(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> Table:
        made = Table(title=title)
        for column in columns:
            made.add_column(column, justify="right")
        for row in rows:
            made.add_row(*row)
        return made

    shown: list[RenderableType] = [table(title(quality), LENGTH_COLUMNS, [length_row(each)
                                                                         for each in quality.lengths])]
    return [*shown, *(table(f"layers, alone, {each.tokens} tokens", LAYER_COLUMNS, layer_rows(each))
                      for each in quality.lengths if each.layers)]


def title(quality: LongQuality) -> str:
    """One line on what was measured."""
    setting = ", ".join(f"{name} {value}" for name, value in quality.setting.items() if name != "method")
    return f"{quality.checkpoint}: method {quality.method} ({setting}) in layers {list(quality.replaced)}"


def html(quality: LongQuality) -> str:
    """The page."""
    parts = [f"<h1>{escape(title(quality))}</h1>", f"<p>Text: {escape(quality.text)}. Natural-exponent perplexity, "
             f"behind the first leaf. Bounds: {quality.max_loss:g} nats lost, copy score {quality.min_copy:g}.</p>"]
    parts += [f'<p class="bad">{escape(failure)}</p>' for failure in quality.failures]
    parts += [] if quality.failures else ["<p>Every bound is kept.</p>"]
    parts.append(_table(LENGTH_COLUMNS, [length_row(each) for each in quality.lengths]))
    if len(quality.lengths) > 1:
        parts.append("<h2>Seconds over length</h2>" + _plot(
            [(each.tokens, each.seconds) for each in quality.lengths],
            [(each.tokens, each.exact_seconds) for each in quality.lengths]))
    for each in quality.lengths:
        parts.append(f"<h2>{each.tokens} tokens</h2>")
        parts.append("<p>Same best token, by eighths of the positions: "
                     + ", ".join(f"{share:.3f}" for share in each.top1_by_position) + "</p>")
        if each.layers:
            parts.append("<h3>Error of the output over layers</h3>" + _plot(
                [(layer.layer, layer.error) for layer in each.layers], []))
            parts.append(_table(LAYER_COLUMNS, layer_rows(each)))
    parts += [f"<p>{escape(note)}</p>" for note in quality.notes]
    return (f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title(quality))}</title>'
            f"<style>{STYLE}</style>{''.join(parts)}</html>\n")


def junit(quality: LongQuality) -> str:
    """A test case per length and bound."""
    suite = ElementTree.Element("testsuite", name="gqa-export long", errors="0", skipped="0")
    failed = 0
    for each in quality.lengths:
        mine = [failure for failure in quality.failures if failure.startswith(f"{each.tokens} tokens:")]
        for name, word in (("loss", "--max-loss"), ("copy", "--min-copy")):
            test = ElementTree.SubElement(suite, "testcase", classname=f"gqa_export.long.{each.tokens}", name=name,
                                          time=f"{each.seconds:.3f}")
            for failure in mine:
                if word in failure:
                    ElementTree.SubElement(test, "failure", message=_NOT_XML.sub("\ufffd", failure))
                    failed += 1
    suite.set("tests", str(2 * len(quality.lengths)))
    suite.set("failures", str(failed))
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def _table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _plot(ours: list[tuple[float, float]], exact: list[tuple[float, float]]) -> str:
    """Two curves from 0 upwards, the exact one grey."""
    both = [*ours, *exact]
    right, high = max(x for x, _ in both), max(y for _, y in both) or 1.0
    left = min(x for x, _ in both)
    frame = Frame(560, 220, 54, 10, 12, 30, (left, right if right > left else left + 1), (0.0, high))
    drawn = [element("line", x1=frame.across(left), y1=frame.down(part * high), x2=550.0, y2=frame.down(part * high))
             + text(f"{part * high:.3g}", x=4, y=frame.down(part * high) + 4) for part in (0.0, 0.5, 1.0)]
    drawn += [text(f"{x:g}", x=frame.across(x) - 8, y=214) for x in sorted({left, right})]
    for curve, kind in ((exact, "exact"), (ours, "ours")):
        if curve:
            places = [frame.place(x, y) for x, y in curve]
            drawn.append(element("polyline", points=points(places), class_=kind))
            drawn += [element("circle", cx=x, cy=y, r=3, class_=kind) for x, y in places]
    return element("svg", "".join(drawn), width=560, height=220, viewBox="0 0 560 220")
