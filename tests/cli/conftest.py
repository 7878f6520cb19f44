"""Runs the command line in this process, as its script would."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from headrace_cli.__main__ import main


@dataclass(frozen=True)
class Ran:
    """What a command ended with."""

    code: int
    out: str
    err: str


@pytest.fixture
def headrace(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Run `headrace` with arguments."""

    def run(*arguments: object) -> Ran:
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return Ran(code, captured.out, captured.err)

    return run
