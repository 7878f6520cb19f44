"""Draws the answers to a board's queries as one SVG: what the panels would show."""

from __future__ import annotations

import itertools
import math
import re
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dashboards.boards import Board, Panel

    from .prometheus import Result

COLUMN, ROW, GAP, HEAD, TOP = 40, 30, 8, 24, 44
COLORS = ("#3274d9", "#e0702f", "#4f9a44", "#a352cc", "#c4162a", "#8ab8ff", "#806eb7", "#b0913a")
STATES = {1.0: "#56a64b", 0.0: "#e02f44", -1.0: "#9aa0a6"}
UNITS = {"bytes": ("B", 1024), "binBps": ("B/s", 1024), "s": (" s", 0), "short": ("", 1000)}
_SHOWN = 8

Series = tuple[str, list[tuple[float, float]]]


def board(shown: Board, answers: dict[str, list[Series]], note: str) -> str:
    """Return the picture of a board; `answers` has the series of each panel by its title."""
    parts, x, y, lowest = [], 0, TOP, 0
    for panel in shown.panels:
        if x + panel.width > 24:
            x, y, lowest = 0, y + lowest + GAP, 0
        box = (x * COLUMN + GAP, y, panel.width * COLUMN - GAP, panel.height * ROW)
        parts.append(_panel(panel, answers[panel.title], box))
        x, lowest = x + panel.width, max(lowest, panel.height * ROW)
    width, height = 24 * COLUMN + GAP, y + lowest + GAP
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="11"><rect width="100%" height="100%" fill="#f4f5f5"/>'
        f'<text x="{GAP}" y="18" font-size="15" font-weight="bold">{escape(shown.title)}</text>'
        f'<text x="{GAP}" y="35" fill="#555">{escape(note)}</text>{"".join(parts)}</svg>\n'
    )


def legend(template: str, labels: dict[str, str]) -> str:
    """Return a series' name: {{label}} of the template replaced."""
    return re.sub(r"\{\{(\w+)\}\}", lambda found: labels.get(found[1], ""), template).strip()


def series(result: Result, template: str) -> list[Series]:
    """Return the named points of a range query's result; what is no number is left out."""
    named = []
    for one in result:
        points = [(float(at), float(value)) for at, value in one["values"]]
        points = [(at, value) for at, value in points if math.isfinite(value)]
        if points:
            named.append((legend(template, one["metric"]), points))
    return named


def _panel(panel: Panel, found: list[Series], box: tuple[int, int, int, int]) -> str:
    x, y, width, height = box
    draw: Any = {"stat": _number, "bargauge": _bars, "state-timeline": _states}
    inner = _text(8, 14, "no data")
    if found:
        inner = draw.get(panel.kind, _lines)(panel, found, width, height - HEAD)
    return (
        f'<g transform="translate({x},{y})"><rect width="{width}" height="{height}" fill="white" '
        f'stroke="#d8d9da"/><text x="8" y="16" font-weight="bold">{escape(panel.title)}</text>'
        f'<g transform="translate(0,{HEAD})">{inner}</g></g>'
    )


def _text(x: float, y: float, text: str, more: str = "") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" {more}>{escape(text)}</text>'


def _short(name: str, length: int) -> str:
    return name if len(name) <= length else "…" + name[1 - length :]


def _value(value: float, unit: str) -> str:
    suffix, base = UNITS[unit]
    prefixes = ("", "Ki", "Mi", "Gi", "Ti") if base == 1024 else ("", "k", "M", "G", "T")
    power = 0
    while base and abs(value) >= base and power < 4:
        value, power = value / base, power + 1
    return f"{value:.3g} {prefixes[power]}{suffix}".strip()


def _number(panel: Panel, found: list[Series], width: int, height: int) -> str:
    value = _value(found[0][1][-1][1], panel.unit)
    return _text(width / 2, height / 2 + 8, value, 'text-anchor="middle" font-size="26"')


def _bars(panel: Panel, found: list[Series], width: int, height: int) -> str:
    highest = max(points[-1][1] for _, points in found) or 1.0
    row, left = min(24.0, height / len(found)), width * 0.5
    marks = []
    for number, (name, points) in enumerate(found):
        y, value = number * row, points[-1][1]
        size = (width - left - 70) * value / highest
        marks.append(_text(left - 6, y + row * 0.7, _short(name, 36), 'text-anchor="end"'))
        marks.append(
            f'<rect x="{left}" y="{y + 2:.0f}" width="{size:.1f}" height="{row - 4:.0f}" '
            f'fill="{COLORS[number % len(COLORS)]}"/>'
        )
        marks.append(_text(left + size + 5, y + row * 0.7, _value(value, panel.unit)))
    return "".join(marks)


def _scale(found: list[Series]) -> tuple[float, float]:
    times = [at for _, points in found for at, _ in points]
    return min(times), max(max(times) - min(times), 1.0)


def _states(_: Panel, found: list[Series], width: int, height: int) -> str:
    begin, span = _scale(found)
    row, left = min(28.0, (height - 16) / len(found)), width * 0.2
    marks = []
    for number, (name, points) in enumerate(sorted(found)):
        y = number * row
        marks.append(_text(left - 6, y + row * 0.6, _short(name, width // 36), 'text-anchor="end"'))
        step = min((b[0] - a[0] for a, b in itertools.pairwise(points)), default=1.0)
        scale = (width - left - 12) / (span + step)
        marks.extend(
            f'<rect x="{left + (at - begin) * scale:.1f}" y="{y + 2:.0f}" '
            f'width="{step * scale + 0.6:.1f}" height="{row - 4:.0f}" '
            f'fill="{STATES.get(value, COLORS[0])}"/>'
            for at, value in points
        )
    return "".join(marks) + _text(left, height - 4, "0 s") + _end(span, width, height)


def _end(span: float, width: int, height: int) -> str:
    return _text(width - 12, height - 4, f"{span:.0f} s", 'text-anchor="end"')


def _lines(panel: Panel, found: list[Series], width: int, height: int) -> str:
    begin, span = _scale(found)
    highest = max(value for _, points in found for _, value in points) or 1.0
    left, low, wide = 64, height - 18 * (1 + (min(len(found), _SHOWN) + 1) // 2), width - 76
    marks = [
        f'<path d="M{left} 4V{low}H{width - 12}" fill="none" stroke="#aaa"/>',
        _text(left - 5, 12, _value(highest, panel.unit), 'text-anchor="end"'),
        _text(left - 5, low, "0", 'text-anchor="end"'),
        _text(left, low + 13, "0 s")
        + _text(width - 12, low + 13, f"{span:.0f} s", 'text-anchor="end"'),
    ]
    for number, (name, points) in enumerate(found):
        color = COLORS[number % len(COLORS)]
        path = " ".join(
            f"{left + (at - begin) / span * wide:.1f},{low - value / highest * (low - 6):.1f}"
            for at, value in points
        )
        marks.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.5"/>')
        if number < _SHOWN:
            x, y = left + number % 2 * wide / 2, low + 28 + number // 2 * 16
            marks.append(_text(x, y, _short(name, 30), f'fill="{color}"'))
    return "".join(marks)
