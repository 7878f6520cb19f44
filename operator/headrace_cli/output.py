"""Where output goes: documents as JSON on standard output, or drawn for a terminal."""

import json
import math
import sys
from collections.abc import Callable

import click
from rich.console import Console

TEXT = "text"
JSON = "json"
_PIPE_WIDTH = 200

output_option = click.option(
    "-o",
    "--output",
    type=click.Choice([TEXT, JSON]),
    default=TEXT,
    show_default=True,
    help="Form of the result on standard output.",
)


class Number(click.FloatRange):
    """A finite number above 0, at most `largest`; click's own ranges let NaN pass."""

    name = "number"

    def __init__(self, largest: float) -> None:
        super().__init__(min=0, max=largest, min_open=True)

    def convert(
        self, value: str | float, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Return the number."""
        number = float(super().convert(value, param, ctx))  # type: ignore[arg-type]
        if not math.isfinite(number):
            self.fail(f"{value} is not a number", param, ctx)
        return number


def console() -> Console:
    """Return the console of standard output; where it is no terminal, plain and wide."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH)


def show(document: object, form: str, draw: Callable[[Console], None]) -> None:
    """Print a result as JSON, or let `draw` print it."""
    if form == JSON:
        click.echo(json.dumps(document, indent=2, sort_keys=False))
    else:
        draw(console())


def bytes_text(count: float) -> str:
    """Return a number of bytes in decimal units, as storage is sold."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"


def seconds_text(seconds: float) -> str:
    """Return a duration with a precision that suits its size."""
    if seconds < 10:
        return f"{seconds:.2f} s"
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"
