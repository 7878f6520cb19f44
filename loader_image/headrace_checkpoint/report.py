"""What a command tells the outside: JSON log lines, the termination message, wrong usage."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

_TERMINATION_LOG = "/dev/termination-log"
_MAX_TERMINATION_BYTES = 3072


class _HelpFormatter(argparse.HelpFormatter):
    """Adds defaults, where there are any and the text has no own word for them."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        told = not action.help or action.help.endswith(")")
        if told or action.default in (None, False, argparse.SUPPRESS):
            return action.help
        return f"{action.help} (%(default)s)"


class ArgumentParser(argparse.ArgumentParser):
    """Exits with EX_USAGE; argparse's own 2 says nothing to whoever reads exit codes."""

    def __init__(self, **options: Any) -> None:  # noqa: ANN401 - argparse's own
        super().__init__(formatter_class=_HelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        """Print what is wrong in one sentence, and exit."""
        self.exit(os.EX_USAGE, f"{self.prog}: {message}; see {self.prog} --help\n")


def whole_number(least: int, most: int | None = None) -> Callable[[str], int]:
    """Return the type of an option that takes a whole number from `least` to `most`."""
    rule = f"must be a whole number from {least}" + ("" if most is None else f" to {most}")

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least or (most is not None and value > most):
            raise argparse.ArgumentTypeError(f"{text}: {rule}")
        return value

    return parse


def add_form(parser: argparse.ArgumentParser, *names: str) -> None:
    """Add the options `-o json`, also under the long `names`, and `--json`, both to `form`."""
    parser.add_argument(
        *("-o", *names),
        dest="form",
        choices=("text", "json"),
        default="text",
        help="json: JSON lines on a terminal, too, and no bar (text)",
    )
    alias = "the same as -o json"
    parser.add_argument("--json", dest="form", action="store_const", const="json", help=alias)


_for_people = False


def is_for_people() -> bool:
    """Whether the command talks to somebody at a terminal."""
    return _for_people


def talk_to(*, people: bool) -> None:
    """Print for people from now on, or JSON for programs."""
    global _for_people  # noqa: PLW0603 - there is one standard output
    _for_people = people


def log(event: str, level: str = "info", /, **fields: object) -> None:
    """Print one JSON line: level, time, event and the fields; for people, as words on stderr."""
    if _for_people:
        from tqdm import tqdm

        words = " ".join(f"{name}={value}" for name, value in fields.items())
        mark = "" if level == "info" else f"{level}: "
        tqdm.write(f"{mark}{event}: {words}", file=sys.stderr)
        return
    time = datetime.now(UTC).isoformat(timespec="milliseconds")
    line = {"level": level, "time": time, "event": event, **fields}
    try:
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()
    except OSError as error:  # weights are not to go with whoever read it, or with a full disk
        _lose_output(error)


_output_lost = False


def is_output_lost() -> bool:
    """Whether something could not be printed, though there was somebody to read it."""
    return _output_lost


def _lose_output(error: OSError) -> None:
    """Print nothing from now on, and say so once."""
    global _output_lost  # noqa: PLW0603 - there is one standard output
    with open(os.devnull, "w") as nothing:  # noqa: PTH123 - no Path
        os.dup2(nothing.fileno(), sys.stdout.fileno())
    if isinstance(error, BrokenPipeError):
        return
    _output_lost = True
    with suppress(OSError):
        sys.stderr.write(
            f"headrace: standard output cannot be written: {error.strerror}; free space, or "
            "write elsewhere\n"
        )


@contextmanager
def printing() -> Iterator[None]:
    """Exit in one sentence where what is printed cannot be written."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except OSError as error:
        _lose_output(error)
        raise SystemExit(os.EX_IOERR if _output_lost else 0) from None


def report_termination(reason: str, message: str, **fields: object) -> None:
    """Write the message that the kubelet puts into the container's status.

    The file is named by HEADRACE_TERMINATION_LOG; nothing happens where it cannot be
    written, as outside a container. Long messages are cut to fit the kubelet's limit.
    """
    path = Path(os.environ.get("HEADRACE_TERMINATION_LOG", _TERMINATION_LOG))
    if not path.parent.is_dir() or (str(path) == _TERMINATION_LOG and not path.exists()):
        return
    content = json.dumps({"reason": reason, "message": message, **fields})
    if len(content) > _MAX_TERMINATION_BYTES:
        keep = _MAX_TERMINATION_BYTES - (len(content) - len(json.dumps(message))) - 16
        message = _cut(message, keep)
        content = json.dumps({"reason": reason, "message": message, **fields})
    try:
        path.write_text(content)
    except OSError as error:
        log("termination-log-failed", "warning", path=str(path), error=str(error))


def _cut(message: str, json_bytes: int) -> str:
    """Shorten until the JSON form fits; escapes make characters of different length."""
    while len(json.dumps(message)) > json_bytes:
        message = message[: len(message) * 3 // 4]
    return message + "..."
