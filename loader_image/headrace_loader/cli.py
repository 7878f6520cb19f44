"""What `headrace-loader` is told, and how it ends."""

import argparse
import logging
import re
import traceback
from collections.abc import Sequence
from pathlib import Path

from headrace_checkpoint.report import ArgumentParser, log, report_termination, whole_number
from headrace_loader.backends import BACKENDS, PathPolicy
from headrace_loader.engine_cache import EngineCacheOptions
from headrace_loader.errors import InternalError, LoaderError
from headrace_loader.supervisor import Options, Supervisor

_MAX_READ_THREADS = 256
_MAX_RANKS = 1024


class _JsonLines(logging.Handler):
    """Passes library log records on as JSON lines."""

    def emit(self, record: logging.LogRecord) -> None:
        fields = {"logger": record.name, "message": record.getMessage()}
        if record.exc_info:
            fields["trace"] = "".join(traceback.format_exception(*record.exc_info))
        log("log", record.levelname.lower(), **fields)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the loader until it is told to stop; returns the exit code."""
    options = _options(_parsed(arguments))
    logging.basicConfig(level=logging.INFO, handlers=[_JsonLines()])
    try:
        Supervisor(options).run()
    except LoaderError as error:
        return _failed(error)
    except Exception as error:  # noqa: BLE001 - the last resort still has to report
        log("defect", "error", trace=traceback.format_exc())
        return _failed(InternalError(f"{type(error).__name__}: {error}"))
    log("stopped")
    return 0


def _failed(error: LoaderError) -> int:
    log("failed", "error", reason=error.reason, message=str(error))
    report_termination(error.reason, str(error))
    return error.exit_code


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    parsed = parser.parse_args(arguments)
    size, nodes, node = parsed.tensor_parallel_size, parsed.nodes, parsed.node_rank
    if size % nodes:
        parser.error(f"--nodes: {nodes}: must divide --tensor-parallel-size {size}; change one")
    if not 0 <= node < nodes:
        parser.error(f"--node-rank: {node}: must be from 0 to {nodes - 1}, as there are {nodes}")
    return parsed


def _options(parsed: argparse.Namespace) -> Options:
    return Options(
        checkpoint=parsed.checkpoint,
        tensor_parallel_size=parsed.tensor_parallel_size,
        backend=parsed.backend,
        policy=PathPolicy(parsed.path),
        runtime_directory=parsed.runtime_dir,
        host=parsed.host,
        port=parsed.port,
        plugin_directory=parsed.plugin_dir,
        read_threads=parsed.read_threads,
        nodes=parsed.nodes,
        node_rank=parsed.node_rank,
        engine_cache=_engine_cache(parsed),
    )


def _engine_cache(parsed: argparse.Namespace) -> EngineCacheOptions | None:
    if parsed.engine_cache_store is None:
        return None
    return EngineCacheOptions(
        local=parsed.engine_cache_dir,
        store=parsed.engine_cache_store,
        key=parsed.engine_cache_key,
        engine_port=parsed.engine_port,
    )


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="headrace-loader",
        description="Load a checkpoint's weights, keep them resident, hand them to engines.",
    )
    port = whole_number(1, 65535)
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="directory of the checkpoint")
    add("--tensor-parallel-size", type=whole_number(1, _MAX_RANKS), default=1, help="ranks to load")
    add("--nodes", type=whole_number(1, _MAX_RANKS), default=1, help="nodes that share the ranks")
    add("--node-rank", type=int, default=0, help="this node, from 0: holds its part of the ranks")
    add("--backend", choices=BACKENDS, required=True, help="memory that holds the weights")
    policies = [str(policy) for policy in PathPolicy]
    add("--path", choices=policies, default="Prefer", help="policy for GPUDirect Storage")
    add("--runtime-dir", type=Path, default=Path("/run/headrace"), help="for socket and lease")
    add("--host", default="0.0.0.0", help="address of the status server")  # noqa: S104
    add("--port", type=port, default=9400, help="port of the status server")
    add("--plugin-dir", type=Path, help="directory to copy the engine side to")
    threads = whole_number(1, _MAX_READ_THREADS)
    add("--read-threads", type=threads, default=16, help="reading threads per rank")
    cache = parser.add_argument_group(
        "compiled code", "keep what the engine compiles for later pods (with --engine-cache-store)"
    )
    add = cache.add_argument
    add("--engine-cache-store", type=Path, help="directory on the volume")
    add("--engine-cache-dir", type=Path, default=Path("/headrace/cache"), help="engine's directory")
    add("--engine-cache-key", type=_file_name, default="engine", help="name of model and engine")
    add("--engine-port", type=port, default=8000, help="port of the engine's /health")
    return parser


def _file_name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", text):
        raise argparse.ArgumentTypeError(f'{text}: use up to 100 letters, digits, ".", "_", "-"')
    return text
