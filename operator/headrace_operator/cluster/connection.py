"""The connection to the API server: as the pod's service account, or as KUBECONFIG says."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from kubernetes.aio.client import ApiClient, Configuration
from kubernetes.aio.config import ConfigException, load_incluster_config, load_kube_config

from headrace_operator.cluster.api import Api
from headrace_operator.errors import ConnectionInvalid

_USER_AGENT = "headrace-operator"
_MAX_CONNECTIONS = 32


@dataclass(frozen=True, slots=True, repr=False)
class Credentials:
    """Address of the API server and what to show there. Never logged."""

    server: str
    ca_path: str | None
    insecure: bool
    token: str | None
    certificate_path: str | None
    private_key_path: str | None


class Connection:
    """An API and the credentials it uses, for those who talk to the API server themselves."""

    def __init__(self, configuration: Configuration, api: Api) -> None:
        self._configuration = configuration
        self.api = api

    async def credentials(self) -> Credentials:
        """Return the current credentials; the token of a service account changes over time."""
        configuration = self._configuration
        header = await configuration.get_api_key_with_prefix("BearerToken")
        return Credentials(
            server=configuration.host,
            ca_path=configuration.ssl_ca_cert,
            insecure=not configuration.verify_ssl,
            token=header.split()[-1] if header else None,
            certificate_path=configuration.cert_file,
            private_key_path=configuration.key_file,
        )


@asynccontextmanager
async def connect() -> AsyncIterator[Connection]:
    """Open the connection.

    Raises:
        ConnectionInvalid: there is neither a service account nor a usable kubeconfig.
    """
    configuration = await _load_configuration()
    async with ApiClient(configuration) as client:
        client.user_agent = _USER_AGENT
        yield Connection(configuration, Api(client))


async def _load_configuration() -> Configuration:
    configuration = Configuration()
    configuration.connection_pool_maxsize = _MAX_CONNECTIONS
    kubeconfig = os.environ.get("KUBECONFIG")
    try:
        if not kubeconfig:
            load_incluster_config(  # type: ignore[no-untyped-call]
                client_configuration=configuration
            )
        else:
            await load_kube_config(  # type: ignore[no-untyped-call]
                config_file=kubeconfig, client_configuration=configuration
            )
    except (ConfigException, OSError) as error:
        raise ConnectionInvalid(
            f"credentials: {error}; run in a pod with a service account or set KUBECONFIG"
        ) from error
    return configuration
