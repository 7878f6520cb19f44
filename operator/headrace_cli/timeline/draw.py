"""Spans as an SVG picture, an HTML page, a Chrome trace or lines of text.

Picture and page are self-contained: no script, no font, nothing to fetch.
"""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from headrace_cli.timeline.spans import Span

_COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5")
_LANE = 24
_LABELS = 210
_WIDTH = 1100
_NOTES = 260
_NOTE_CHARACTERS = 30
_TOP = 46
_TICKS = 8
_TEXT_COLUMNS = 48
_MIN_LENGTH = 1e-3


def lanes_of(spans: Sequence[Span]) -> list[str]:
    """Return the lanes in the order of their first spans."""
    return list(dict.fromkeys(span.lane for span in spans))


def svg(title: str, spans: Sequence[Span]) -> str:
    """Draw one row for each span, grouped by lane, on one axis of seconds."""
    begin, length = _extent(spans)
    height = _TOP + _LANE * len(spans) + 12
    scale = (_WIDTH - _LABELS - _NOTES) / length
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img"',
        f'font-family="system-ui, sans-serif" font-size="12"><title>{escape(title)}</title>',
        f'<rect width="{_WIDTH}" height="{height}" fill="#fff"/>',
        f'<text x="8" y="18" font-size="14" font-weight="600">{escape(title)}</text>',
        *_axis(length, scale, height),
    ]
    lanes = lanes_of(spans)
    for row, span in enumerate(spans):
        top = _TOP + row * _LANE
        colour = _COLOURS[lanes.index(span.lane) % len(_COLOURS)]
        x, width = _LABELS + (span.begin - begin) * scale, max(2.0, span.seconds * scale)
        label = f"{_seconds(span.seconds)} {span.note[:_NOTE_CHARACTERS]}".strip()
        hint = f"{_name(span)}: {_seconds(span.seconds)} {span.note}".strip()
        parts += [
            f'<text x="8" y="{top + 15}" fill="#333">',
            f"{escape(_name(span)[:_NOTE_CHARACTERS])}</text>",
            f'<rect x="{x:.1f}" y="{top + 3}" width="{width:.1f}" height="{_LANE - 8}" rx="2"',
            f'fill="{colour}"><title>{escape(hint)}</title></rect>',
            f'<text x="{x + width + 5:.1f}" y="{top + 15}" fill="#555">{escape(label)}</text>',
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def html(title: str, spans: Sequence[Span]) -> str:
    """Return a page with the picture and a table of the same numbers."""
    begin, length = _extent(spans)
    rows = "\n".join(
        f"<tr><td>{escape(s.lane)}</td><td>{escape(s.name)}</td><td>{s.begin - begin:.3f}</td>"
        f"<td>{s.seconds:.3f}</td><td>{escape(s.note)}</td></tr>"
        for s in spans
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(title)}</title>"
        "<style>body{font:14px system-ui,sans-serif;margin:2rem;max-width:1100px}"
        "td,th{padding:2px 12px 2px 0;text-align:left;font-variant-numeric:tabular-nums}</style>"
        f"</head><body>\n{svg(title, spans)}\n<p>{_seconds(length)} in all. Times that Kubernetes "
        "recorded (lane pod) have a resolution of one second.</p>\n<table><tr><th>lane</th>"
        f"<th>phase</th><th>from, s</th><th>seconds</th><th></th></tr>\n{rows}\n</table>\n"
        "</body></html>\n"
    )


def chrome_trace(spans: Sequence[Span]) -> Mapping[str, Any]:
    """Return the spans in the Trace Event Format, for ui.perfetto.dev and chrome://tracing."""
    rows = {lane: number for number, lane in enumerate(lanes_of(spans))}
    events: list[dict[str, Any]] = [
        {"name": "thread_name", "ph": "M", "pid": 0, "tid": row, "args": {"name": lane}}
        for lane, row in rows.items()
    ]
    events += [
        {
            "name": span.name,
            "ph": "X",
            "pid": 0,
            "tid": rows[span.lane],
            "ts": span.begin * 1e6,
            "dur": span.seconds * 1e6,
            "args": {"note": span.note},
        }
        for span in spans
    ]
    return {"displayTimeUnit": "ms", "traceEvents": events}


def lines(spans: Sequence[Span]) -> str:
    """Draw the spans as bars of text on one scale, at least one column each."""
    begin, length = _extent(spans)
    label = max(len(_name(span)) for span in spans)
    drawn = []
    for span in spans:
        left = min(int((span.begin - begin) / length * _TEXT_COLUMNS), _TEXT_COLUMNS - 1)
        width = min(max(1, round(span.seconds / length * _TEXT_COLUMNS)), _TEXT_COLUMNS - left)
        bar = f"{' ' * left}{'█' * width}".ljust(_TEXT_COLUMNS)
        name = _name(span).ljust(label)
        drawn.append(f"{name} |{bar}| {_seconds(span.seconds):>9} {span.note}".rstrip())
    return "\n".join(drawn)


def _name(span: Span) -> str:
    return f"{span.lane}: {span.name}"


def _extent(spans: Sequence[Span]) -> tuple[float, float]:
    begin = min(span.begin for span in spans)
    return begin, max(max(span.end for span in spans) - begin, _MIN_LENGTH)


def _axis(length: float, scale: float, height: int) -> list[str]:
    parts = []
    for tick in range(_TICKS + 1):
        seconds = length * tick / _TICKS
        x = _LABELS + seconds * scale
        parts += [
            f'<line x1="{x:.1f}" y1="{_TOP - 8}" x2="{x:.1f}" y2="{height - 6}" stroke="#ddd"/>',
            f'<text x="{x:.1f}" y="{_TOP - 12}" fill="#777" text-anchor="middle">',
            f"{_seconds(seconds)}</text>",
        ]
    return parts


def _seconds(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if 0 < seconds < 1 else f"{seconds:.1f} s"
