"""Programs run by the tools: their words are shown, their time is bounded."""

import sys

import pytest

from workspace.errors import CommandError, MissingToolError
from workspace.process import run


def python(code):
    return [sys.executable, "-c", code]


def test_output_of_both_streams():
    code = "import sys; print('out', flush=True); print('err', file=sys.stderr)"
    assert run(python(code), timeout=20) == "out\nerr\n"


def test_failure_shows_the_end_of_the_output():
    with pytest.raises(CommandError, match=r"exit 3\n(.*\n)*line 99$"):
        run(python("for n in range(100): print('line', n)\nraise SystemExit(3)"), timeout=20)


def test_time_is_bounded():
    with pytest.raises(CommandError, match=r"no end after 0\.5 s"):
        run(python("import time; time.sleep(60)"), timeout=0.5)


def test_missing_program():
    with pytest.raises(MissingToolError, match="no-such-program: not installed"):
        run(["no-such-program"], timeout=5)


def test_environment_and_input():
    code = "import os, sys; print(os.environ['WORD'] + sys.stdin.read())"
    assert run(python(code), timeout=20, env={"WORD": "head"}, stdin="race") == "headrace\n"
