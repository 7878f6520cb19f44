"""Asks an engine for a completion, streamed, so that the time of the first token is known."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from workspace.errors import ToolError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

SECONDS = 60.0
DONE = "[DONE]"


@dataclass(frozen=True)
class Completion:
    """An answer; times are Unix times in seconds."""

    text: str
    token_ids: tuple[int, ...]
    asked: float
    first_token: float


def complete(url: str, model: str, prompt: str, tokens: int) -> Completion:
    """Ask for `tokens` tokens at temperature 0. Raises ToolError with what the engine said."""
    question = {
        "model": model,
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "return_token_ids": True,
    }
    request = urllib.request.Request(  # noqa: S310 - the URL is made here, of a Service's address
        f"{url}/v1/completions",
        data=json.dumps(question).encode(),
        headers={"Content-Type": "application/json"},
    )
    asked = time.time()
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as response:  # noqa: S310
            return _collect(response, asked)
    except urllib.error.HTTPError as error:
        reason = error.read().decode(errors="replace")
        raise ToolError(f"{url}: status {error.code}: {reason}") from error
    except OSError as error:
        raise ToolError(f"{url}: {error}") from error


def _collect(lines: Iterable[bytes], asked: float) -> Completion:
    text, token_ids, first = "", [], 0.0
    for event in _events(lines):
        choice = event["choices"][0]
        if choice.get("token_ids"):
            first = first or time.time()
            token_ids += choice["token_ids"]
        text += choice["text"]
    if not token_ids:
        raise ToolError("the engine answered without a token")
    return Completion(text, tuple(token_ids), asked, first)


def _events(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    for line in lines:
        data = line.decode().strip().removeprefix("data: ")
        if data and data != DONE:
            event = json.loads(data)
            if "error" in event:
                raise ToolError(f"the engine failed: {event['error']}")
            if event.get("choices"):
                yield event
