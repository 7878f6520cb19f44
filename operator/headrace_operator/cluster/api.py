"""Requests to the API server: plain JSON objects in and out, errors mapped at one place.

The typed models of the `kubernetes` package are left aside: server-side apply sends exactly
the fields it owns, which a typed object cannot say.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import aiohttp
from kubernetes.aio.client import ApiClient
from pydantic_core import from_json, to_json

from headrace_operator import errors
from headrace_operator.cluster.kinds import Kind, kind_named
from headrace_operator.metrics import API_REQUESTS
from headrace_operator.plan.objects import integer, items, text

Object: TypeAlias = dict[str, Any]

FIELD_MANAGER = "headrace-operator"
REQUEST_TIMEOUT_SECONDS = 30.0
PAGE_SIZE = 250  # a page of pods takes 60 kB for each while it is unpacked
# A busy watch has bookmarks every minute; a silent one is quiet or dead, so it starts again.
WATCH_SILENCE_SECONDS = 90.0
_WATCH_SECONDS = 600
_ATTEMPTS = 3
_FIRST_DELAY_SECONDS = 0.2
_MAX_RETRY_AFTER_SECONDS = 5.0
_NETWORK_ERRORS = (aiohttp.ClientError, TimeoutError, OSError)

_APPLY = "application/apply-patch+yaml"
_JSON = "application/json"
_MERGE = "application/merge-patch+json"


@dataclass(frozen=True, slots=True)
class Listing:
    """Objects of one kind, or a page of them, and the resource version they were listed at."""

    objects: list[Object]
    resource_version: int

    @property
    def newest(self) -> int:
        """The version of the object that changed last, 0 without objects."""
        versions = (text(body, "metadata", "resourceVersion") for body in self.objects)
        return max((int(v) for v in versions if v.isdigit()), default=0)


@dataclass(frozen=True, slots=True)
class Change:
    """One event of a watch: the new state of an object, or only the version reached."""

    version: str
    body: Object | None = None
    gone: bool = False


class Api:
    """Reads and writes of API objects.

    All methods raise ApiError and nothing else; each request ends within
    REQUEST_TIMEOUT_SECONDS and is tried at most three times. Only requests that may be
    repeated are made: creating an object that exists raises Conflict.
    """

    def __init__(self, client: ApiClient) -> None:
        self._client = client

    async def get(self, kind: Kind, name: str, namespace: str | None = None) -> Object:
        """Return an object."""
        return await self._request("GET", kind.path(namespace, name))

    async def list(
        self,
        kind: Kind,
        namespace: str | None = None,
        *,
        label_selector: str = "",
        field_selector: str = "",
        limit: int | None = None,
    ) -> Listing:
        """Return all objects of a kind, or at most `limit` of them."""
        objects, version = [], 0
        async for page in self.pages(
            kind,
            namespace,
            label_selector=label_selector,
            field_selector=field_selector,
            size=limit or PAGE_SIZE,
        ):
            objects += page.objects
            version = page.resource_version
            if limit is not None:
                break
        return Listing(objects, version)

    async def pages(
        self,
        kind: Kind,
        namespace: str | None = None,
        *,
        label_selector: str = "",
        field_selector: str = "",
        size: int = PAGE_SIZE,
    ) -> AsyncIterator[Listing]:
        """Yield all objects of a kind page by page, so that never all are unpacked at once."""
        query = {
            "limit": str(size),
            "labelSelector": label_selector,
            "fieldSelector": field_selector,
        }
        while True:
            page = await self._request("GET", kind.path(namespace), query)
            metadata = page.get("metadata") or {}
            # The items of a list do not say what they are, as single objects do.
            known = {"apiVersion": kind.api_version, "kind": kind.name}
            objects = [{**known, **body} for body in page.get("items") or []]
            yield Listing(objects, int(metadata.get("resourceVersion") or 0))
            query["continue"] = metadata.get("continue") or ""
            if not query["continue"]:
                return

    async def watch(
        self, kind: Kind, namespace: str | None, version: str, *, label_selector: str = ""
    ) -> AsyncIterator[Change]:
        """Yield the changes after a version until the API server ends the watch, or is silent.

        Raises:
            Expired: the version is too old; list again.
            ApiError: the watch was refused or broke off.
        """
        path = kind.path(namespace)
        query = {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": version,
            "labelSelector": label_selector,
            "timeoutSeconds": str(_WATCH_SECONDS),
        }
        timeout = aiohttp.ClientTimeout(
            sock_connect=REQUEST_TIMEOUT_SECONDS, sock_read=WATCH_SILENCE_SECONDS
        )
        what = f"WATCH {path}"
        try:
            response = await self._send("GET", path, query, None, _JSON, timeout)
        except _NETWORK_ERRORS as error:
            raise errors.Unavailable(f"{what}: {type(error).__name__}: {error}") from error
        try:
            API_REQUESTS.labels("WATCH", str(response.status)).inc()
            if response.status >= 300:
                raise _error(what, response.status, await response.read(), "")
            rest = b""
            async for chunk in response.content.iter_any():
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    yield _change(what, line)
        except aiohttp.SocketTimeoutError:
            return
        except _NETWORK_ERRORS as error:
            raise errors.Unavailable(f"{what}: {type(error).__name__}: {error}") from error
        finally:
            response.close()

    async def apply(self, body: Mapping[str, Any], *, subresource: str | None = None) -> Object:
        """Apply the fields of an object by server-side apply, taking them over by force."""
        kind = kind_named(body["kind"])
        metadata = body["metadata"]
        path = kind.path(metadata.get("namespace"), metadata["name"], subresource)
        query = {"fieldManager": FIELD_MANAGER, "force": "true", "fieldValidation": "Strict"}
        return await self._request("PATCH", path, query, dict(body), _APPLY)

    async def merge(self, kind: Kind, name: str, namespace: str, changes: Object) -> None:
        """Change a few fields of an object and leave all others as they are."""
        path = kind.path(namespace, name)
        await self._request("PATCH", path, {"fieldManager": FIELD_MANAGER}, changes, _MERGE)

    async def set_finalizers(self, kind: Kind, body: Object, finalizers: Sequence[str]) -> Object:
        """Set the finalizers of an object unless it has changed; raises Conflict if it has."""
        metadata = body["metadata"]
        path = kind.path(metadata.get("namespace"), metadata["name"])
        version = {"resourceVersion": metadata["resourceVersion"]}
        change = {"metadata": {"finalizers": list(finalizers), **version}}
        return await self._request("PATCH", path, {"fieldManager": FIELD_MANAGER}, change, _MERGE)

    async def create(self, body: Mapping[str, Any]) -> Object:
        """Create an object."""
        kind = kind_named(body["kind"])
        path = kind.path(body["metadata"].get("namespace"))
        return await self._request("POST", path, {"fieldManager": FIELD_MANAGER}, dict(body))

    async def delete(self, kind: Kind, name: str, namespace: str | None, uid: str) -> None:
        """Delete an object if it has that UID; its dependents follow in the background."""
        options = {"preconditions": {"uid": uid}, "propagationPolicy": "Background"}
        await self._request("DELETE", kind.path(namespace, name), None, options)

    async def serves(self, kind: Kind) -> bool:
        """Whether the API server knows the kind."""
        path = kind.path().rpartition("/")[0]
        try:
            found = await self._request("GET", path)
        except errors.KindNotServed:
            return False
        return any(r.get("name") == kind.plural for r in found.get("resources") or [])

    async def _request(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: Object | None = None,
        content_type: str = _JSON,
    ) -> Object:
        delay = _FIRST_DELAY_SECONDS
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return await self._attempt(method, path, query, body, content_type)
            except errors.Unavailable as error:
                if attempt == _ATTEMPTS:
                    raise
                wait = min(error.retry_after, _MAX_RETRY_AFTER_SECONDS)
            await asyncio.sleep(max(wait, delay))
            delay *= 4
        raise AssertionError("unreachable")

    async def _attempt(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None,
        body: Object | None,
        content_type: str,
    ) -> Object:
        what = f"{method} {path}"
        timeout = aiohttp.ClientTimeout(REQUEST_TIMEOUT_SECONDS)
        try:
            response = await self._send(method, path, query, body, content_type, timeout)
            content = await response.read()
        except _NETWORK_ERRORS as error:
            API_REQUESTS.labels(method, "none").inc()
            raise errors.Unavailable(f"{what}: {type(error).__name__}: {error}") from error
        API_REQUESTS.labels(method, str(response.status)).inc()
        if response.status < 300:
            return _decode(what, content)
        retry_after = response.headers.get("Retry-After", "")
        raise _error(what, response.status, content, retry_after)

    async def _send(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None,
        body: Object | None,
        content_type: str,
        limits: aiohttp.ClientTimeout,
    ) -> aiohttp.ClientResponse:
        request = await self._client.param_serialize(
            method,
            path,
            query_params=[(k, v) for k, v in (query or {}).items() if v],
            header_params={"Accept": _JSON, "Content-Type": content_type},
            body=body,
            auth_settings=["BearerToken"],
        )
        answer = await self._client.call_api(*request[:4], _request_timeout=limits)
        response: aiohttp.ClientResponse = answer.response
        return response


def _decode(what: str, content: bytes) -> Object:
    try:
        decoded: Object = from_json(content)
    except ValueError as error:
        raise errors.Unavailable(f"{what}: the answer is no JSON: {error}") from error
    return decoded


def _change(what: str, line: bytes) -> Change:
    event = _decode(what, line)
    kind, body = text(event, "type"), event.get("object") or {}
    if kind == "ERROR":
        raise _error(what, integer(body, "code"), to_json(body), "")
    version = text(body, "metadata", "resourceVersion")
    return Change(version, None if kind == "BOOKMARK" else body, gone=kind == "DELETED")


def _error(what: str, status: int, content: bytes, retry_after: str) -> errors.ApiError:
    """Map an answer of the API server to an error; its message is for users, so it is kept."""
    try:
        body = from_json(content)
    except ValueError:
        body = None
    is_status = isinstance(body, dict) and body.get("kind") == "Status"
    message = body.get("message") if is_status else content[:200].decode(errors="replace")
    explanation = str(message or f"status {status}").strip()
    if status == 404 and text(body, "details", "kind") == "namespaces":
        return errors.NamespaceTerminating(explanation)  # gone already, by force
    if status == 404:
        # An unknown kind is answered by the mux, without a Status object.
        return errors.NotFound(explanation) if is_status else errors.KindNotServed(what)
    if status == 429 or status >= 500:
        return _transient(explanation, retry_after)
    if is_status and _has_cause(body, "NamespaceTerminating"):
        return errors.NamespaceTerminating(explanation)
    known: dict[int, type[errors.ApiError]] = {
        401: errors.Unavailable,  # an expired token is read again
        403: errors.Forbidden,
        409: errors.Conflict,
        410: errors.Expired,
    }
    return known.get(status, errors.Invalid)(explanation)


def _has_cause(status: Object, reason: str) -> bool:
    return any(text(cause, "reason") == reason for cause in items(status, "details", "causes"))


def _transient(explanation: str, retry_after: str) -> errors.ApiError:
    # Server-side apply reports an unknown field as an internal error, but it is for good.
    if "field not declared in schema" in explanation:
        return errors.Invalid(explanation)
    return errors.Unavailable(explanation, float(retry_after) if retry_after.isdigit() else 0.0)
