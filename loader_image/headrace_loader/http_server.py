"""Probes, status and metrics over HTTP; bounded threads, bounded time per request."""

import contextlib
import json
import logging
import socket
import socketserver
import sys
import threading
from collections import deque
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from headrace_loader.errors import RuntimeDirectoryUnusable
from headrace_loader.state import LoaderState
from headrace_loader.status import status
from headrace_loader.trace import chrome_trace

REQUEST_SECONDS = 5.0
MAX_REQUESTS = 16
"""Requests served at a time; a probe and a scraper need two."""

_POLL_SECONDS = 0.1
_YIELD_SECONDS = 1.0
_PATHS = "GET /healthz, /readyz, /v1/status, /v1/trace or /metrics"
_LOG = logging.getLogger(__name__)

_Request = socket.socket | tuple[bytes, socket.socket]


class StatusServer(ThreadingHTTPServer):
    """GET /healthz, /readyz, /v1/status, /v1/trace, /metrics."""

    daemon_threads = True
    request_queue_size = 32

    def __init__(self, host: str, port: int, state: LoaderState) -> None:
        self.state = state
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._slots = threading.BoundedSemaphore(MAX_REQUESTS)
        self._served: deque[_Request] = deque()
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            raise RuntimeDirectoryUnusable(
                f"--host {host} --port {port}: {error.strerror}; choose an address of this host "
                "and a free port"
            ) from None

    def server_bind(self) -> None:
        """Bind without HTTPServer's look-up of the host's name, which can block on DNS."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def start(self) -> None:
        """Serve in a thread."""
        threading.Thread(
            target=self.serve_forever, args=(_POLL_SECONDS,), name="http", daemon=True
        ).start()

    def close(self) -> None:
        """Stop serving."""
        self.shutdown()
        self.server_close()

    def process_request(self, request: _Request, client_address: object) -> None:
        """Serve in a thread; where too many are being served, hang up on the oldest for it."""
        if not self._slots.acquire(blocking=False):
            with contextlib.suppress(IndexError):  # all have ended
                _hang_up(self._served.popleft())
            if not self._slots.acquire(timeout=_YIELD_SECONDS):
                self.shutdown_request(request)
                return
        self._served.append(request)
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # no thread could be started
            self._forget(request)
            self.shutdown_request(request)

    def process_request_thread(self, request: _Request, client_address: object) -> None:
        """Serve one request and free its slot, also where the client dribbles."""
        watchdog = threading.Timer(REQUEST_SECONDS, _hang_up, [request])
        watchdog.daemon = True
        try:
            watchdog.start()
            super().process_request_thread(request, client_address)
        except RuntimeError:  # the watchdog could not be started
            self.shutdown_request(request)
        finally:
            watchdog.cancel()
            self._forget(request)

    def _forget(self, request: _Request) -> None:
        with contextlib.suppress(ValueError):  # hung up on
            self._served.remove(request)
        self._slots.release()

    def handle_error(self, request: _Request, client_address: object) -> None:  # noqa: ARG002
        """Log defects; peers that go away in the middle are no news."""
        if not isinstance(sys.exception(), OSError):
            _LOG.exception("answering a request failed")


def _hang_up(request: _Request) -> None:
    sock = request if isinstance(request, socket.socket) else request[1]
    with contextlib.suppress(OSError):  # closed already
        sock.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    server: StatusServer
    server_version = "headrace-loader"
    sys_version = ""
    timeout = REQUEST_SECONDS

    def do_GET(self) -> None:
        """Answer a request."""
        path = self.path.partition("?")[0]
        if path == "/healthz":
            self._text(HTTPStatus.OK, "ok")
        elif path == "/readyz":
            self._ready()
        elif path == "/v1/status":
            self._json(status(self.server.state))
        elif path == "/v1/trace":
            self._json(chrome_trace(status(self.server.state)))
        elif path == "/metrics":
            # Not needed before the weights are there, and its import would delay them.
            from headrace_loader import metrics

            self._send(HTTPStatus.OK, metrics.CONTENT_TYPE, metrics.render(self.server.state))
        else:
            self._text(HTTPStatus.NOT_FOUND, _PATHS)

    def _ready(self) -> None:
        state = self.server.state
        with state.reading():
            code = HTTPStatus.OK if state.serving else HTTPStatus.SERVICE_UNAVAILABLE
            line = f"{state.phase}: {state.message}"
            if state.total_bytes and not state.serving:
                line += f" ({state.read_bytes} of {state.total_bytes} bytes)"
        self._text(code, line)

    def _json(self, document: dict[str, object]) -> None:
        self._send(HTTPStatus.OK, "application/json", json.dumps(document).encode())

    def _text(self, code: HTTPStatus, line: str) -> None:
        self._send(code, "text/plain; charset=utf-8", line.encode() + b"\n")

    def _send(self, code: HTTPStatus, kind: str, content: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Probes every second are not worth a line."""
