"""The sharder's commands: `shard` makes a checkpoint, `verify` checks, `delete` deletes one."""

import argparse
import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn, TypeAlias

from headrace_checkpoint import signals
from headrace_checkpoint.config import DTYPES
from headrace_checkpoint.errors import (
    CheckpointError,
    Interrupted,
    ManifestInvalid,
)
from headrace_checkpoint.layouts import LAYOUTS
from headrace_checkpoint.manifest import FORMAT_VERSION
from headrace_checkpoint.plan import DEFAULT_PART_BYTES
from headrace_checkpoint.publish import delete
from headrace_checkpoint.report import (
    ArgumentParser,
    add_form,
    is_output_lost,
    log,
    report_termination,
    talk_to,
    whole_number,
)
from headrace_checkpoint.sharder import ShardRequest, shard
from headrace_checkpoint.storage import make_directories
from headrace_checkpoint.verifier import compare_source, verify

_DIRECTORY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_MAX_TENSOR_PARALLEL = 1024


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code (0, 64, 65, 70, 74 or 75)."""
    return run(parser()[0].parse_args(arguments))


def run(options: argparse.Namespace) -> int:
    """Run the command that was parsed; returns the exit code. Reports whatever ends it."""
    talk_to(people=sys.stderr.isatty() and options.form == "text")
    command: Callable[[argparse.Namespace], None] = options.command
    try:
        with _interruptible():
            command(options)
    except CheckpointError as error:
        return _failed(error.reason, str(error), error.exit_code)
    except ModuleNotFoundError as error:
        message = f"{error.name} is missing; install headrace-loader[loader,sources]"
        return _failed("InternalError", message, os.EX_UNAVAILABLE)
    except Exception as error:  # noqa: BLE001 - the last resort still has to report
        log("defect", "error", trace=traceback.format_exc())
        return _failed("InternalError", f"{type(error).__name__}: {error}", os.EX_SOFTWARE)
    return os.EX_IOERR if is_output_lost() else 0


def _shard(options: argparse.Namespace) -> None:
    if not 0 <= options.worker < options.workers:
        parser()[0].error(f"--worker {options.worker}: must be from 0 to {options.workers - 1}")
    request = ShardRequest(
        source=options.source,
        output=options.output,
        tensor_parallel_size=options.tensor_parallel_size,
        identity=options.identity if options.identity is not None else _identity(options),
        dtype=options.dtype,
        layout=options.layout,
        revision=options.revision,
        part_bytes=options.part_bytes,
        workers=options.workers,
        worker=options.worker,
        pipeline_parallel_size=options.pipeline_parallel_size,
        expert_parallel_size=options.expert_parallel_size,
        quantization=options.quantization,
    )
    started = time.monotonic()
    if options.engine_cache_store is not None:
        make_directories(options.engine_cache_store)
    result = shard(request)
    seconds = round(time.monotonic() - started, 3)
    total = result.total_bytes
    log(result.reason, output=str(options.output), totalBytes=total, seconds=seconds)
    message = f"{options.output}: {total} bytes"
    report_termination(result.reason, message, totalBytes=total, seconds=seconds)


def _failed(reason: str, message: str, exit_code: int) -> int:
    log("failed", "error", reason=reason, message=message)
    report_termination(reason, message)
    return exit_code


def _verify(options: argparse.Namespace) -> None:
    try:
        manifest = verify(options.directory)
    except FileNotFoundError as error:
        raise ManifestInvalid(str(error)) from None
    if options.source is not None:
        compare_source(manifest, options.source, options.revision, str(options.directory))
    log("verified", directory=str(options.directory), totalBytes=manifest.total_bytes)


def _delete(options: argparse.Namespace) -> None:
    for directory in options.directories:
        deleted = delete(directory)
        log("Deleted" if deleted else "AlreadyDeleted", directory=str(directory))
    message = ", ".join(map(str, options.directories))
    report_termination("Deleted", message)


class _Stop(BaseException):
    """A signal arrived, with its number. No Exception: it may be raised anywhere, and what goes
    on after failures, such as threading when a thread does not start, must not go on after it."""


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let SIGTERM and SIGINT end the work through the same clean-up as any failure."""

    def interrupt(number: int, _frame: FrameType | None) -> NoReturn:
        # A second signal must not cut the clean-up short. SIG_IGN would not do: Python warns
        # where it is set between a signal's arrival and its handling.
        for other in previous:
            signal.signal(other, lambda *_: None)
        raise _Stop(number)

    previous = {number: signal.signal(number, interrupt) for number in signals.STOPPING}
    try:
        signals.release()
        yield
    except _Stop as stop:
        name = signal.Signals(stop.args[0]).name
        raise Interrupted(f"stopped by {name}; run it again") from None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _identity(options: argparse.Namespace) -> dict[str, object]:
    """The identity of a checkpoint made by hand."""
    return {
        "source": options.source
        if "://" in options.source
        else str(Path(options.source).resolve()),
        "revision": options.revision,
        "dtype": options.dtype,
        "quantization": options.quantization,
        "tensor": options.tensor_parallel_size,
        "pipeline": options.pipeline_parallel_size,
        "expert": options.expert_parallel_size,
        "layout": options.layout,
        "formatVersion": FORMAT_VERSION,
    }


Commands: TypeAlias = "argparse._SubParsersAction[ArgumentParser]"


def parser() -> tuple[ArgumentParser, Commands]:
    """Return the parser, and what further commands can be added to."""
    parser = ArgumentParser(prog="headrace", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    sharding = commands.add_parser("shard", help="make a pre-sharded checkpoint of a model")
    sharding.set_defaults(command=_shard)
    sharding.add_argument(
        "--source",
        required=True,
        help="the model: a directory, s3://BUCKET/PREFIX or hf://OWNER/NAME",
    )
    sharding.add_argument(
        "--revision", default="main", help="branch, tag or commit of an hf:// source"
    )
    sharding.add_argument(
        "--output", type=_output, required=True, help="directory to publish the checkpoint at"
    )
    size = whole_number(1, _MAX_TENSOR_PARALLEL)
    sharding.add_argument("--tensor-parallel-size", type=size, default=1)
    sharding.add_argument("--pipeline-parallel-size", type=size, default=1)
    sharding.add_argument(
        "--expert-parallel-size",
        type=size,
        default=1,
        help="1, or the tensor parallel size: each rank has whole experts",
    )
    sharding.add_argument(
        "--quantization",
        choices=("none", "fp8"),
        default="none",
        help="fp8: make FP8 of an unquantized model, per output channel (none)",
    )
    sharding.add_argument("--dtype", choices=("auto", *DTYPES), default="auto")
    sharding.add_argument("--layout", choices=tuple(LAYOUTS), default="vllm")
    sharding.add_argument(
        "--identity", type=_json_object, help="JSON object kept in the manifest (default: made up)"
    )
    sharding.add_argument(
        "--part-bytes",
        type=whole_number(1),
        help=f"size at which a rank's data goes on in another file (at most {DEFAULT_PART_BYTES}, "
        "less where the workers would have none)",
    )
    sharding.add_argument(
        "--workers", type=whole_number(1), default=1, help="processes that share the work"
    )
    sharding.add_argument(
        "--worker",
        type=int,
        default=os.environ.get("JOB_COMPLETION_INDEX", "0"),
        help="which of them this is, from 0 (default: the index in a Job)",
    )
    sharding.add_argument(
        "--engine-cache-store",
        type=Path,
        help="directory to create for what engines of this model compile",
    )
    verifying = commands.add_parser("verify", help="check every byte of a checkpoint")
    verifying.set_defaults(command=_verify)
    verifying.add_argument("directory", type=Path)
    verifying.add_argument("--source", help="also check that it was made of this model")
    verifying.add_argument("--revision", default="main", help="of an hf:// source")
    deleting = commands.add_parser("delete", help="delete checkpoints that nobody uses")
    deleting.set_defaults(command=_delete)
    deleting.add_argument("directories", nargs="+", type=_output, metavar="DIRECTORY")
    add_form(sharding)  # its --output is the checkpoint's directory
    add_form(verifying, "--output")
    add_form(deleting, "--output")
    return parser, commands


def _output(text: str) -> Path:
    path = Path(text).absolute()
    if not _DIRECTORY_NAME.fullmatch(path.name):
        raise argparse.ArgumentTypeError(
            f"{text}: the last component must be letters, digits, '.', '_' or '-', at most 200"
        )
    return path


def _json_object(text: str) -> dict[str, object]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"no JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("must be a JSON object")
    return value


if __name__ == "__main__":
    sys.exit(main())
