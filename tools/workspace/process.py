"""Runs other programs: argument lists, a time limit, errors that show the program's own words."""

from __future__ import annotations

import os
import shlex
import subprocess
from typing import TYPE_CHECKING

from .errors import CommandError, MissingToolError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

TAIL_LINES = 25


def run(
    argv: Sequence[str | Path],
    *,
    timeout: float,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    stdin: str | None = None,
    show: bool = False,
) -> str:
    """Run a program and return its output (both streams together).

    `env` adds to this process's environment. With `show` the program writes to the terminal
    and nothing is returned. Raises CommandError when it fails or takes more than `timeout`
    seconds, MissingToolError when there is no such program.
    """
    words = [os.fspath(word) for word in argv]
    try:
        result = subprocess.run(
            words,
            cwd=cwd,
            env={**os.environ, **(env or {})},
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            stdout=None if show else subprocess.PIPE,
            stderr=None if show else subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )
    except FileNotFoundError as error:
        raise MissingToolError(f"{words[0]}: not installed") from error
    except subprocess.TimeoutExpired as error:
        output = error.stdout.decode(errors="replace") if error.stdout else ""
        raise CommandError(
            f"{shlex.join(words)}: no end after {timeout:g} s\n{tail(output)}"
        ) from error
    output = result.stdout or ""
    if result.returncode:
        raise CommandError(f"{shlex.join(words)}: exit {result.returncode}\n{tail(output)}")
    return output


def tail(text: str, lines: int = TAIL_LINES) -> str:
    """Return the last lines of a text."""
    return "\n".join(text.rstrip().splitlines()[-lines:])
