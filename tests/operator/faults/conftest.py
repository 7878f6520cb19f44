"""One cluster for all faults, with the product's CRD and RBAC rules, on simulated nodes."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from localkube import Cluster


def _cluster_tests() -> Any:
    """The module of the fixtures beside this directory."""
    path = Path(__file__).parents[1] / "cluster/conftest.py"
    spec = importlib.util.spec_from_file_location("operator_cluster_conftest", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


beside = _cluster_tests()


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    # A claim that conflicts with its volume's first state waits for the next pass, 15 s by default.
    flags = {"pvclaimbinder-sync-period": "2s"}
    made = Cluster(tmp_path_factory.mktemp("faults")).up(kwok=2, controller_manager=flags)
    with made as cluster:
        cluster.kubectl("create", "namespace", beside.SYSTEM)
        beside.install_rbac(cluster)
        cluster.kubectl("apply", "--server-side", "-f", str(beside.CRD))
        condition = "--for=condition=Established"
        cluster.kubectl("wait", condition, "crd/modeldeployments.headrace.dev", "--timeout=20s")
        yield cluster


@pytest.fixture(scope="session")
def token(cluster: Cluster) -> str:
    """A token of the operator's ServiceAccount."""
    return cluster.kubectl("create", "token", "headrace", "-n", beside.SYSTEM).strip()


@pytest.fixture(scope="session")
def conftest_of_cluster() -> Any:
    """The module of the fixtures beside this directory."""
    return beside
