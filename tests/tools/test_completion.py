"""The stream of an engine's answer, from a server of our own on the loopback."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from demo.completion import complete
from workspace.errors import ToolError


@pytest.fixture
def engine():
    """Serve one canned answer; returns (set_answer, url, questions)."""
    answer, questions = {}, []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            length = int(self.headers["Content-Length"])
            questions.append((self.path, json.loads(self.rfile.read(length))))
            self.send_response(answer["status"])
            self.end_headers()
            self.wfile.write(answer["body"].encode())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield (lambda status, body: answer.update(status=status, body=body)), server, questions
    server.shutdown()
    server.server_close()
    thread.join(5)


def url(server):
    return f"http://127.0.0.1:{server.server_port}"


def test_chunks_are_joined(engine):
    set_answer, server, questions = engine
    chunks = [{"text": " a", "token_ids": [5]}, {"text": " b c", "token_ids": [6, 7]}]
    lines = [f"data: {json.dumps({'choices': [chunk]})}\n\n" for chunk in chunks]
    set_answer(200, "".join([*lines, "data: [DONE]\n\n"]))
    answer = complete(url(server), "tiny", "water", 3)
    assert (answer.text, answer.token_ids) == (" a b c", (5, 6, 7))
    assert answer.asked <= answer.first_token
    ((path, question),) = questions
    assert path == "/v1/completions"
    assert (question["temperature"], question["max_tokens"], question["prompt"]) == (0, 3, "water")


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (404, '{"message": "no model other"}', "status 404.*no model other"),
        (200, 'data: {"error": {"message": "engine died"}}\n', "engine died"),
        (200, "data: [DONE]\n", "without a token"),
    ],
)
def test_failures_say_what_the_engine_said(engine, status, body, message):
    set_answer, server, _ = engine
    set_answer(status, body)
    with pytest.raises(ToolError, match=message):
        complete(url(server), "tiny", "water", 3)


def test_nobody_there():
    with pytest.raises(ToolError, match=r"127\.0\.0\.1:9.*refused"):
        complete("http://127.0.0.1:9", "tiny", "water", 3)
