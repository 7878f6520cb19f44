"""The `headrace-node` command: prepares the node it runs on, and says what is there."""

import argparse
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from headrace_checkpoint.report import ArgumentParser, log, printing
from headrace_node.errors import NodeError
from headrace_node.facts import gather
from headrace_node.host import Host
from headrace_node.publish import Cluster, labels, publish
from headrace_node.steps import EFA_HUGE_PAGES, Report, all_steps, apply, check, revert

_PENDING = 1
_MAX_SECONDS = 86400.0
_WORK: dict[str, Callable[..., list[Report]]] = {"check": check, "apply": apply, "revert": revert}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code (0, 1, 64, 69, 70, 75, 77 or 78)."""
    with printing():
        return _run(list(sys.argv[1:] if arguments is None else arguments))


def _run(given: Sequence[str]) -> int:
    # As a command of `headrace` the first argument is its name.
    options = _parser().parse_args(given[1:] if given[:1] == ["node"] else given)
    stop = threading.Event()
    if options.every:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
    while True:
        code = _once(options)
        if not options.every or stop.wait(options.every):
            return 0 if options.every else code


def _once(options: argparse.Namespace) -> int:
    host = Host(options.root, dry_run=options.dry_run)
    try:
        reports, failure = _work(options, host), None
    except NodeError as error:
        reports, failure = [], error
    except Exception as error:  # noqa: BLE001 - the last resort still has to report
        log("defect", "error", trace=traceback.format_exc())
        return _failed(type(error).__name__, str(error), os.EX_SOFTWARE)
    document: dict[str, Any] = {"steps": [asdict(report) for report in reports]}
    try:
        facts = gather(host)
        document["labels"] = labels(facts)
        if options.publish and not options.dry_run:
            publish(Cluster.of_pod(), options.node_name, facts)
    except NodeError as error:
        failure = failure or error
    _show(options, document)
    if failure is not None:
        return _failed(type(failure).__name__, str(failure), failure.exit_code)
    if any(report.outcome == "failed" for report in reports):
        return os.EX_TEMPFAIL
    return _PENDING if any(report.outcome == "pending" for report in reports) else 0


def _work(options: argparse.Namespace, host: Host) -> list[Report]:
    return _WORK[options.command](host, all_steps(options.huge_pages))


def _show(options: argparse.Namespace, document: dict[str, Any]) -> None:
    if options.output == "json":
        sys.stdout.write(json.dumps(document) + "\n")
    else:
        for step in document["steps"]:
            sys.stdout.write(
                f"{step['outcome']:12} {step['step']:14} {step['message']}".rstrip() + "\n"
            )
        for name, value in document["labels"].items():
            sys.stdout.write(f"{name}={value}\n")
    sys.stdout.flush()


def _failed(reason: str, message: str, code: int) -> int:
    sys.stderr.write(f"headrace-node: {reason}: {' '.join(message.split())}\n")
    return code


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="headrace-node", description=__doc__)
    add = parser.add_argument
    add("command", choices=tuple(_WORK), help="look, do what is missing, or undo it")
    add("--root", type=_directory, default=Path("/"), help="the node's root directory (/)")
    add("--dry-run", action="store_true", help="say what would be changed, and change nothing")
    add("--huge-pages", type=_whole, default=EFA_HUGE_PAGES, help="pages of 2 MiB (%(default)s)")
    add("--publish", action="store_true", help="label the Node, and apply a NodeFeature")
    add(
        "--node-name", default=os.environ.get("NODE_NAME", ""), help="name of the Node ($NODE_NAME)"
    )
    add("--every", type=_seconds, default=0.0, help="do it again every so many seconds")
    add("--output", "-o", choices=("text", "json"), default="text")
    return parser


def _directory(text: str) -> Path:
    path = Path(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: is no directory")
    return path


def _whole(text: str) -> int:
    value = int(text)
    if not 0 <= value <= 1 << 20:
        raise argparse.ArgumentTypeError(f"{text}: must be from 0 to {1 << 20}")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 1 <= value <= _MAX_SECONDS:
        raise argparse.ArgumentTypeError(f"{text}: must be from 1 to {_MAX_SECONDS:g}")
    return value


if __name__ == "__main__":
    sys.exit(main())
