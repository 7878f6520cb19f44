"""Requests to the API server with the rights of whoever runs the command.

Plain JSON in and out. Each request has a timeout and is made once: a person is waiting, and
can repeat the command.
"""

import asyncio
import json
import logging
import os
import re
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import click
from kubernetes.aio.client import ApiClient, Configuration
from kubernetes.aio.config import ConfigException, load_incluster_config, load_kube_config
from kubernetes.aio.config.kube_config import list_kube_config_contexts
from yaml import YAMLError

from headrace_cli.errors import CommandFailed, KindMissing, NoPermission, NotFound, Unavailable
from headrace_operator.cluster.kinds import Kind
from headrace_operator.plan.objects import text

REQUEST_SECONDS = 10.0
CREDENTIAL_SECONDS = 30.0
"""A credential plugin such as `aws eks get-token` asks the network, too."""
PAGE_SIZE = 500
_MAX_BYTES = 8 << 20
_MALFORMED = (ValueError, LookupError, TypeError, AttributeError)
_FORWARDING = "v4.channel.k8s.io"
_DATA = 0
_IN_CLUSTER = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")

Object = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Target:
    """Which cluster and namespace; None is what the kubeconfig says."""

    kubeconfig: str | None = None
    context: str | None = None
    namespace: str | None = None
    all_namespaces: bool = False

    @classmethod
    def of(cls, options: Mapping[str, str | bool | None]) -> "Target":
        """Return the target that the options of `target_options` name."""
        given = {key: text(options, key) or None for key in ("kubeconfig", "context", "namespace")}
        return cls(**given, all_namespaces=options.get("all_namespaces") is True)


def target_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that name cluster and namespace, as kubectl has them."""
    for option in (
        click.option("-A", "--all-namespaces", is_flag=True, help="Look at all namespaces."),
        click.option("-n", "--namespace", help="Namespace (the context's)."),
        click.option("--context", help="Context of the kubeconfig (the current one)."),
        click.option("--kubeconfig", help="Path of the kubeconfig.", envvar="KUBECONFIG"),
    ):
        function = option(function)
    return function


class Kube:
    """The API server. All methods raise CommandFailed and nothing else."""

    def __init__(self, client: ApiClient, namespace: str, target: Target) -> None:
        self._client = client
        self.namespace = namespace
        self.target = target

    async def get(self, path: str, query: Mapping[str, str] | None = None) -> Object:
        """Return the object at a URL path."""
        content = await self.read(path, query)
        try:
            answer: Object = json.loads(content)
        except ValueError:
            raise Unavailable(
                f"GET {path}: the answer is no JSON; is this an API server?"
            ) from None
        return answer

    async def list(
        self, kind: Kind, namespace: str | None = None, selector: str = ""
    ) -> list[Object]:
        """Return all objects of a kind, a page at a time."""
        found: list[Object] = []
        query = {"limit": str(PAGE_SIZE), "labelSelector": selector}
        while True:
            page = await self.get(kind.path(namespace), query)
            found += page.get("items") or []
            query["continue"] = text(page, "metadata", "continue")
            if not query["continue"]:
                return found

    async def find(self, kind: Kind, name: str, namespace: str | None = None) -> Object | None:
        """Return an object; None where there is none."""
        try:
            return await self.get(kind.path(namespace, name))
        except NotFound:
            return None

    async def can_i(self, verb: str, group: str, resource: str, namespace: str | None) -> bool:
        """Ask whether whoever runs this may do something (SelfSubjectAccessReview)."""
        resource, _, subresource = resource.partition("/")
        attributes = {"verb": verb, "group": group, "resource": resource}
        if subresource:
            attributes["subresource"] = subresource
        if namespace is not None:
            attributes["namespace"] = namespace
        body = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "spec": {"resourceAttributes": attributes},
        }
        path = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
        answer = json.loads(await self._request("POST", path, None, body))
        return bool((answer.get("status") or {}).get("allowed"))

    async def read(self, path: str, query: Mapping[str, str] | None = None) -> bytes:
        """Return what lies at a URL path, at most some megabytes of it."""
        return await self._request("GET", path, query, None)

    async def forward(self, path: str, port: int, request: bytes) -> bytes:
        """Send bytes to a pod's port by its `portforward` subresource; return all that comes back.

        Protocol: a websocket with the subprotocol v4.channel.k8s.io. Messages start with a
        channel: 0 carries data, 1 errors; the first of each is the port and carries nothing.
        """
        prepared = await self._client.param_serialize(
            "GET", path, query_params=[("ports", str(port))], auth_settings=["BearerToken"]
        )
        url, headers = str(prepared[1]), dict(prepared[2])
        session = self._client.rest_client.pool_manager
        if session is None:  # made by the first request
            raise Unavailable(f"{path}: not connected")
        received, began = bytearray(), set[int]()
        try:
            async with (
                asyncio.timeout(REQUEST_SECONDS),
                session.ws_connect(
                    url.replace("http", "ws", 1), headers=headers, protocols=[_FORWARDING]
                ) as socket,
            ):
                await socket.send_bytes(b"\0" + request)
                async for message in socket:
                    if message.type is not aiohttp.WSMsgType.BINARY or not message.data:
                        break
                    channel, content = message.data[0], message.data[1:]
                    if channel not in began:
                        began.add(channel)
                    elif channel == _DATA:
                        received += content
                    else:
                        raise Unavailable(content.decode(errors="replace"))
                    if len(received) > _MAX_BYTES:
                        break
        except aiohttp.WSServerHandshakeError as error:
            raise _refusal(f"GET {path}", error.status, b"") from None
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise Unavailable(self._unreachable(error)) from error
        return bytes(received)

    async def _request(
        self, method: str, path: str, query: Mapping[str, str] | None, body: Object | None
    ) -> bytes:
        request = await self._client.param_serialize(
            method,
            path,
            query_params=[(k, v) for k, v in (query or {}).items() if v],
            header_params={"Accept": "application/json, */*", "Content-Type": "application/json"},
            body=body,
            auth_settings=["BearerToken"],
        )
        timeout = aiohttp.ClientTimeout(REQUEST_SECONDS)
        try:
            response = await self._client.call_api(*request[:4], _request_timeout=timeout)
            content: bytes = (await response.read())[:_MAX_BYTES]  # type: ignore[no-untyped-call]
        except (aiohttp.ClientError, TimeoutError, OSError, ssl.SSLError) as error:
            raise Unavailable(self._unreachable(error)) from error
        if response.status < 300:
            return content
        raise _refusal(f"{method} {path}", response.status, content)

    def _unreachable(self, error: Exception) -> str:
        why = str(error) or type(error).__name__
        if isinstance(error, aiohttp.InvalidURL):  # whose text is the URL alone
            why = "that is no URL"
        server = self._client.configuration.host
        return (
            f"the cluster at {server} cannot be reached: {why}; check the context and the network"
        )


@asynccontextmanager
async def connect(target: Target) -> AsyncIterator[Kube]:
    """Open the connection that a kubeconfig, or this pod's service account, describes.

    Raises:
        CommandFailed: in one sentence.
    """
    configuration = Configuration()
    try:
        namespace = await asyncio.wait_for(_configure(configuration, target), CREDENTIAL_SECONDS)
    except TimeoutError:
        raise Unavailable(
            f"credentials: the kubeconfig's credential plugin gave none within "
            f"{CREDENTIAL_SECONDS:g} s; run it by hand to see why"
        ) from None
    except (ConfigException, OSError, YAMLError, *_MALFORMED) as error:
        raise _credentials_fault(target, error) from error
    async with ApiClient(configuration) as client:
        client.user_agent = "headrace-cli"
        yield Kube(client, target.namespace or namespace or "default", target)


def run(target: Target, work: Callable[[Kube], Awaitable[T]]) -> T:
    """Connect, do the work, and return its result."""

    async def connected() -> T:
        async with connect(target) as kube:
            return await work(kube)

    return asyncio.run(connected())


def _own_namespace() -> str | None:
    """Return the namespace of the pod that this runs in; None outside of a cluster."""
    try:
        return _IN_CLUSTER.with_name("namespace").read_text().strip()
    except OSError:
        return None


@contextmanager
def _complaints() -> Iterator[list[str]]:
    """Collect what the client logs: it goes on without credentials where a plugin fails."""
    found: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("kubernetes.aio.config.kube_config")
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield found
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate


def _check_kubeconfig(paths: str | None) -> None:
    """Raise FileNotFoundError where none of the files is there; their reader would only log it."""
    files = (paths or "~/.kube/config").split(os.pathsep)
    if not any(Path(file).expanduser().is_file() for file in filter(None, files)):
        raise FileNotFoundError("there is no such file")


async def _configure(configuration: Configuration, target: Target) -> str | None:
    if target.kubeconfig is None and target.context is None and _own_namespace() is not None:
        load_incluster_config(client_configuration=configuration)  # type: ignore[no-untyped-call]
        return _own_namespace()
    _check_kubeconfig(target.kubeconfig)
    with _complaints() as complaints:
        await load_kube_config(  # type: ignore[no-untyped-call]
            config_file=target.kubeconfig,
            context=target.context,
            client_configuration=configuration,
        )
    if complaints:
        # The client shows the plugin's standard error as Python writes bytes.
        why = re.sub(r"\bb(['\"])(.*)\1", r"\2", complaints[-1])
        raise NoPermission(
            f"credentials: the kubeconfig's credential plugin failed: {why}; log in "
            "again (on AWS: aws sso login, or renew the keys)"
        )
    contexts, current = list_kube_config_contexts(  # type: ignore[no-untyped-call]
        config_file=target.kubeconfig
    )
    named = next((c for c in contexts if c["name"] == target.context), current)
    return text(named, "context", "namespace") or None


def _credentials_fault(target: Target, error: Exception) -> CommandFailed:
    where = f"kubeconfig {target.kubeconfig or '~/.kube/config'}"
    # The reader of kubeconfigs lets whatever malformed ones cause pass through.
    malformed = isinstance(error, (YAMLError, *_MALFORMED)) or not str(error)
    reason = "is malformed" if malformed else str(error).rstrip(".")
    return Unavailable(f"{where}: {reason}; set KUBECONFIG or --context to a cluster you can reach")


def _refusal(what: str, status: int, content: bytes) -> CommandFailed:
    try:
        answer = json.loads(content)
    except ValueError:
        answer = None
    message = text(answer, "message")
    explanation = message or content[:200].decode(errors="replace").strip() or f"status {status}"
    if status == 401:
        return NoPermission(
            "the cluster does not accept the credentials (401): they have expired or are of "
            "another cluster; log in again (on EKS: aws eks update-kubeconfig)"
        )
    if status == 403:
        return NoPermission(f"no permission: {explanation}; ask for a role that allows it")
    if status == 404 and text(answer, "kind") != "Status":
        # An unknown kind is answered by the mux, without a Status object.
        return KindMissing(f"{what}: the cluster does not know this kind")
    if status == 404:
        return NotFound(explanation)
    return Unavailable(f"{what}: {status}: {explanation}")
