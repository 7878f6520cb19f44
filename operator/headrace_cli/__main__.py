"""Runs a command and turns whatever happens into one sentence and an exit code."""

import errno
import os
import sys
import traceback
from collections.abc import Sequence

import click

from headrace_cli.app import cli
from headrace_cli.errors import EXIT_INTERRUPTED, CommandFailed

_TRACE = "HEADRACE_TRACE"
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `headrace`; returns the exit code."""
    return _run("headrace", arguments)


def kubectl_main() -> int:
    """Run `kubectl headrace`; returns the exit code."""
    return _run("kubectl headrace", None)


def complete_kubectl() -> int:
    """Complete `kubectl headrace`: kubectl runs kubectl_complete-headrace with the words so far.

    Protocol: one completion a line, then ":4", cobra's directive not to offer files.
    """
    from click.shell_completion import ShellComplete

    *words, incomplete = sys.argv[1:] or [""]
    completer = ShellComplete(cli, {}, "headrace", "_HEADRACE_COMPLETE")
    for item in completer.get_completions(words, incomplete):
        click.echo(f"{item.value}\t{item.help}" if item.help else item.value)
    click.echo(":4")
    return 0


def _run(name: str, arguments: Sequence[str] | None) -> int:
    output = sys.stdout
    try:
        result = cli.main(
            list(sys.argv[1:] if arguments is None else arguments),
            prog_name=name,
            complete_var="_HEADRACE_COMPLETE",
            standalone_mode=False,
        )
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return os.EX_USAGE
    except click.UsageError as error:
        context = error.ctx
        hint = f"; see {context.command_path} --help" if context is not None else ""
        return _failed(f"{error.format_message().rstrip('.')}{hint}", os.EX_USAGE)
    except click.ClickException as error:
        return _failed(error.format_message(), os.EX_DATAERR)
    except CommandFailed as error:
        return _failed(str(error), error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    except SystemExit as error:
        # Where the reader, such as head, has seen enough, rich exits with 1, and so does click,
        # which wraps the output before.
        if sys.stdout is not output or isinstance(error.__context__, BrokenPipeError):
            return 0
        raise
    except Exception as error:  # noqa: BLE001 - a user can do nothing with a traceback
        return _unexpected(error)
    return result if isinstance(result, int) else 0


def _unexpected(error: Exception) -> int:
    code = error.errno if isinstance(error, OSError) else None
    if code in _UNWRITABLE:
        # What is still in the buffer must not fail once more at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        text = f"output cannot be written: {os.strerror(code)}; free space, or write elsewhere"
        return _failed(text, os.EX_IOERR)
    if os.environ.get(_TRACE):
        traceback.print_exc()
    kind = type(error).__name__
    return _failed(
        f"defect: {kind}: {error}; set {_TRACE}=1 for the trace and report it", os.EX_SOFTWARE
    )


def _failed(message: str, code: int) -> int:
    click.echo(f"headrace: {' '.join(message.split())}", err=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
