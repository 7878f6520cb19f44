"""One cluster for all faults, with the product's CRD and RBAC rules, on simulated nodes."""

from collections.abc import Iterator

import pytest

from localkube import Cluster
from stage.operator import CRD, SYSTEM, install_rbac


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    # A claim that conflicts with its volume's first state waits for the next pass, 15 s by default.
    flags = {"pvclaimbinder-sync-period": "2s"}
    made = Cluster(tmp_path_factory.mktemp("faults")).up(kwok=2, controller_manager=flags)
    with made as cluster:
        cluster.kubectl("create", "namespace", SYSTEM)
        install_rbac(cluster)
        cluster.kubectl("apply", "--server-side", "-f", str(CRD))
        condition = "--for=condition=Established"
        cluster.kubectl("wait", condition, "crd/modeldeployments.headrace.dev", "--timeout=20s")
        yield cluster


@pytest.fixture(scope="session")
def token(cluster: Cluster) -> str:
    """A token of the operator's ServiceAccount."""
    return cluster.kubectl("create", "token", "headrace", "-n", SYSTEM).strip()
