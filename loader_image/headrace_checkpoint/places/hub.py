"""A model repository of the Hugging Face Hub, pinned to one commit and read by ranges.

HF_TOKEN and HF_ENDPOINT count as they do for the Hub's own tools.
"""

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from http import HTTPStatus

from httpx2 import HTTPError, Response
from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    build_hf_headers,
    hf_raise_for_status,
    http_stream_backoff,
)

from headrace_checkpoint.errors import SourceForbidden, SourceNotFound, StorageError
from headrace_checkpoint.places import RemoteFile

_REQUEST_SECONDS = 60.0
_RETRIES = 5
_MAX_WAIT_SECONDS = 300
"""The window of the Hub's own rate limits."""
_AGAIN = (429, 500, 502, 503, 504)
_FORBIDDEN = (401, 403)
_RESET = re.compile(r"\br\s*=\s*0\s*;\s*t\s*=\s*(\d+)")
_QUERY = re.compile(r"\?[^\s'\")]+")


class Repository:
    """The files at the top of a repository, at the commit that a revision names now."""

    def __init__(self, name: str, revision: str) -> None:
        self._repository = name.strip("/")
        self._name = f"hf://{self._repository}@{revision}"
        with _named(self._name):
            info = HfApi().model_info(
                self._repository, revision=revision, files_metadata=True, timeout=_REQUEST_SECONDS
            )
        self.commit = info.sha or revision
        files = [
            file
            for file in info.siblings or ()
            if "/" not in file.rfilename and file.size is not None
        ]
        self._sizes = {file.rfilename: file.size or 0 for file in files}
        # A commit that changes other files is no other model.
        self._versions = {file.rfilename: file.blob_id or self.commit for file in files}

    def __str__(self) -> str:
        return self._name

    def names(self) -> list[str]:
        """Names of the files that are in no folder."""
        return sorted(self._sizes)

    def open(self, name: str) -> "_File":
        """Open a file at the commit."""
        if name not in self._sizes:
            raise SourceNotFound(f"{self._name}/{name}: the repository has no such file")
        url = hf_hub_url(self._repository, name, revision=self.commit)
        return _File(f"{self._name}/{name}", self._sizes[name], self._versions[name], url)


class _File(RemoteFile):
    """A file of a commit, which never changes."""

    def __init__(self, name: str, size: int, version: str, url: str) -> None:
        super().__init__(name, size, version)
        self._url = url

    def fetch(self, offset: int, length: int) -> bytes:
        """Fetch a range."""
        for number in range(_RETRIES):
            with _named(self._name), self._request(offset, length) as answer:
                if answer.status_code in _AGAIN and number < _RETRIES - 1:
                    answer.close()
                    self._wait(answer.headers, 2.0**number)
                    continue
                hf_raise_for_status(answer)
                if answer.status_code != HTTPStatus.PARTIAL_CONTENT and length < self.size:
                    # Before it is read: it would be the whole file.
                    raise StorageError(f"{self._name}: the server ignores ranges; use another one")
                with suppress(HTTPError):
                    return answer.read()
        raise StorageError(f"{self._name}: {_RETRIES} answers broke off; try again")

    def _request(self, offset: int, length: int) -> AbstractContextManager[Response]:
        # Of the file as it is: sizes and ranges are not those of a compressed one.
        headers = build_hf_headers() | {"Accept-Encoding": "identity"}
        headers["Range"] = f"bytes={offset}-{offset + length - 1}"
        return http_stream_backoff(
            "GET",
            self._url,
            headers=headers,
            max_retries=_RETRIES,
            retry_on_status_codes=(),  # it would wait for as long as the answer says
            timeout=_REQUEST_SECONDS,
            follow_redirects=True,
        )

    def _wait(self, headers: Mapping[str, str], otherwise: float) -> None:
        """Wait for as long as an answer asks, if that is not too long."""
        reset = _RESET.search(headers.get("ratelimit", ""))
        asked = reset[1] if reset else headers.get("retry-after", "")
        seconds = float(asked) if asked.isdecimal() else otherwise
        if seconds > _MAX_WAIT_SECONDS:
            raise StorageError(
                f"{self._name}: the Hub asks to wait for {seconds:.9g} s, at most "
                f"{_MAX_WAIT_SECONDS} are waited for; give HF_TOKEN in spec.sharding.env, which "
                "has limits of its own, or try again then"
            )
        time.sleep(seconds)


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Translate the client's errors; a repository that one may not see is one that is missing."""
    try:
        yield
    except (GatedRepoError, RepositoryNotFoundError) as error:
        raise SourceForbidden(
            f"{name}: no such repository, or no access to it: {_first_line(error)}; correct the "
            "source, or give HF_TOKEN in spec.sharding.env"
        ) from None
    except (RevisionNotFoundError, HFValidationError) as error:
        raise SourceNotFound(f"{name}: {_first_line(error)}; correct source or revision") from None
    except HfHubHTTPError as error:
        if error.response.status_code in _FORBIDDEN:
            raise SourceForbidden(
                f"{name}: access denied; give HF_TOKEN in spec.sharding.env"
            ) from None
        raise StorageError(f"{name}: {_first_line(error)}") from None
    except (HTTPError, OSError, ValueError) as error:  # a ValueError: no JSON
        raise StorageError(f"{name}: {_first_line(error) or type(error).__name__}") from None


def _first_line(error: Exception) -> str:
    """Return it without the queries of addresses: signed ones are as good as a password."""
    return _QUERY.sub("?...", str(error).strip().partition("\n")[0])
