"""A prefix of an S3 bucket, read by ranges.

Region, endpoint and credentials come from the environment and the pod, as AWS' tools take them:
AWS_REGION, AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a web identity token,
or EKS Pod Identity. No credential is ever part of a source's name, of a message or of a log.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from http import HTTPStatus
from typing import TYPE_CHECKING

import obstore
from obstore import exceptions
from obstore.store import S3Store

from headrace_checkpoint.errors import (
    CheckpointError,
    SourceForbidden,
    SourceNotFound,
    StorageError,
)
from headrace_checkpoint.places import RemoteFile

if TYPE_CHECKING:
    from obstore import ObjectMeta

_REQUEST_SECONDS = 60
_RETRY_SECONDS = 180
_RETRIES = 8
_STATUS = re.compile(r"status code: (\d{3})")


class Bucket:
    """The objects directly below a prefix; `path` is BUCKET/PREFIX."""

    def __init__(self, path: str) -> None:
        bucket, _, prefix = path.partition("/")
        self._name = f"s3://{bucket}/{prefix.strip('/')}".rstrip("/")
        self._prefix = f"{prefix.strip('/')}/".lstrip("/")
        with _named(self._name):
            self._store = S3Store(
                bucket,
                client_options={
                    "timeout": timedelta(seconds=_REQUEST_SECONDS),
                    # For an endpoint that is one in the cluster; AWS' own are https.
                    "allow_http": True,
                },
                retry_config={
                    "max_retries": _RETRIES,
                    "retry_timeout": timedelta(seconds=_RETRY_SECONDS),
                },
            )

    def __str__(self) -> str:
        return self._name

    def names(self) -> list[str]:
        """Names of the objects directly below the prefix."""
        with _named(self._name):
            found = obstore.list_with_delimiter(self._store, self._prefix)["objects"]
        names = sorted(meta["path"].removeprefix(self._prefix) for meta in found)
        if not names:
            raise SourceNotFound(f"{self._name}: no object has this prefix; correct the source")
        return names

    def open(self, name: str) -> "_Object":
        """Open an object."""
        key = self._prefix + name
        with _named(f"{self._name}/{name}"):
            return _Object(self._store, obstore.head(self._store, key), f"{self._name}/{name}")


class _Object(RemoteFile):
    """An object as it was when it was opened, told by its ETag."""

    def __init__(self, store: S3Store, meta: "ObjectMeta", name: str) -> None:
        super().__init__(name, meta["size"], meta["e_tag"] or "")
        self._store = store
        self._key = meta["path"]
        self._etag = meta["e_tag"]

    def fetch(self, offset: int, length: int) -> memoryview:
        """Fetch a range of the object that has the ETag."""
        with _named(self._name):
            answer = obstore.get(
                self._store,
                self._key,
                options={"range": (offset, offset + length), "if_match": self._etag},
            )
            return memoryview(answer.bytes())

    def check_unchanged(self) -> None:
        """Compare the ETag."""
        with _named(self._name):
            if obstore.head(self._store, self._key)["e_tag"] != self._etag:
                raise _changed(self._name)


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Translate the client's errors."""
    try:
        yield
    except exceptions.PreconditionError:
        raise _changed(name) from None
    except (exceptions.BaseError, OSError, ValueError) as error:
        raise _error(name, error) from None


def _error(name: str, error: Exception) -> CheckpointError:
    # The client's messages go on with a dump of the answer.
    text = str(error).strip().partition("\n")[0]
    # Listings have no exceptions of their own for these.
    status = _STATUS.search(text)
    code = int(status[1]) if status else 0
    if code == HTTPStatus.NOT_FOUND or isinstance(error, FileNotFoundError):
        return SourceNotFound(f"{name}: there is no such bucket or object; correct the source")
    forbidden = (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError)
    if code in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN) or isinstance(error, forbidden):
        return SourceForbidden(
            f"{name}: access denied: {text}; check spec.sharding.env or the ServiceAccount's role"
        )
    return StorageError(f"{name}: {text}")


def _changed(name: str) -> StorageError:
    return StorageError(f"{name}: changed while it was read; keep the source unchanged")
