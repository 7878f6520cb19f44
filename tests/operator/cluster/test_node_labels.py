"""headrace-node labels its own node, and the chart's policy lets it change nothing else."""

import itertools
import json
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from headrace_node.errors import PublishFailed
from headrace_node.facts import gather
from headrace_node.host import Host, Outcome
from headrace_node.publish import Cluster, labels, publish
from headrace_operator.cluster.kinds import NODE, POD, Kind

CHART = Path(__file__).parents[3] / "charts/headrace"


@pytest.fixture(scope="module")
def installed(cluster: Any) -> None:
    """The chart's node preparation, without its DaemonSet: there is no kubelet."""
    manifest = cluster.run(
        [
            *(cluster.bin("helm"), "template", "headrace", CHART, "-n", "headrace-system"),
            "--set=nodePreparation.enabled=true",
            "--show-only=templates/node-preparation.yaml",
        ]
    )
    objects = [o for o in yaml.safe_load_all(manifest) if o["kind"] != "DaemonSet"]
    cluster.kubectl("apply", "-n", "headrace-system", "-f", "-", stdin=yaml.safe_dump_all(objects))


@pytest.fixture
def node(kube: Any) -> str:
    """A node of the cluster."""
    return str(kube.list(NODE)[0]["metadata"]["name"])


@pytest.fixture
def account(installed: None, cluster: Any, kube: Any, node: str) -> Any:
    """What a pod of the DaemonSet on that node shows the API server."""
    body = {
        "metadata": {"name": "headrace-node-x", "namespace": "headrace-system"},
        "spec": {
            "nodeName": node,
            "serviceAccountName": "headrace-node",
            "containers": [{"name": "node", "image": "x"}],
        },
    }
    kube.create(POD, body)
    bound = ("--bound-object-kind=Pod", "--bound-object-name=headrace-node-x")
    token = cluster.kubectl("create", "token", "headrace-node", "-n", "headrace-system", *bound)
    yield Cluster(cluster.server, token.strip(), str(cluster.authority), "headrace-system")
    kube.delete(POD, "headrace-node-x", "headrace-system")


def change(account: Cluster, node: str, body: dict[str, Any]) -> int:
    """Patch a node with the account; returns the status."""
    request = urllib.request.Request(
        f"{account.server}/api/v1/nodes/{node}",
        data=json.dumps(body).encode(),
        method="PATCH",
        headers={
            "Authorization": f"Bearer {account.token}",
            "Content-Type": "application/merge-patch+json",
        },
    )
    context = ssl.create_default_context(cafile=account.authority)
    try:
        with urllib.request.urlopen(request, timeout=10, context=context) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


FEATURES = Kind("NodeFeature", "nfd.k8s-sigs.io", "v1alpha1", "nodefeatures")


@pytest.fixture
def features(cluster: Any, eventually: Callable[..., Any], kube: Any) -> Iterator[None]:
    """The kind NodeFeature, as node-feature-discovery would bring it."""
    schema = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    version = {"name": "v1alpha1", "served": True, "storage": True}
    crd = {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {
            "name": "nodefeatures.nfd.k8s-sigs.io",
            "annotations": {"api-approved.kubernetes.io": "unapproved, for a test"},
        },
        "spec": {
            "group": "nfd.k8s-sigs.io",
            "scope": "Namespaced",
            "names": {"kind": "NodeFeature", "plural": "nodefeatures"},
            "versions": [{**version, "schema": {"openAPIV3Schema": schema}}],
        },
    }
    cluster.kubectl("apply", "-f", "-", stdin=yaml.safe_dump(crd))
    cluster.kubectl("wait", "--for=condition=Established", "crd/nodefeatures.nfd.k8s-sigs.io")
    yield
    cluster.kubectl("delete", "crd", "nodefeatures.nfd.k8s-sigs.io")


def test_a_node_feature_is_applied_where_there_are_any(
    account: Cluster,
    kube: Any,
    node: str,
    tmp_path: Path,
    features: None,
    eventually: Callable[..., Any],
) -> None:
    facts = gather(Host(tmp_path, lambda _: Outcome(127, "")))

    def is_applied() -> Any:
        publish(account, node, facts)  # the kind is served a moment after it is established
        return kube.get(FEATURES, f"headrace-{node}", "headrace-system")

    feature = eventually(is_applied, "the NodeFeature")
    assert feature["spec"]["labels"] == labels(facts)
    assert feature["metadata"]["labels"] == {"nfd.node.kubernetes.io/node-name": node}


def test_the_policy_and_the_labels(
    account: Cluster, kube: Any, node: str, tmp_path: Path, eventually: Callable[..., Any]
) -> None:
    facts = gather(Host(tmp_path, lambda _: Outcome(127, "")))
    found = labels(facts)

    # A policy is enforced a moment after it is made. A change made before is no change when it
    # is asked for again, and allowed: each attempt asks for another one.
    attempts = itertools.count()

    def is_enforced() -> bool:
        wanted = {"team": f"x{next(attempts)}"}
        return change(account, node, {"metadata": {"labels": wanted}}) == 422

    eventually(is_enforced, "the policy to be enforced")
    kube.patch(NODE, node, None, {"metadata": {"labels": {"team": None}}})
    publish(account, node, facts)
    shown = kube.get(NODE, node)["metadata"]["labels"]
    assert {name: shown[name] for name in found} == found
    assert found["headrace.dev/gds"] == "unsupported"
    assert change(account, node, {"metadata": {"labels": {"team": "x"}}}) == 422
    assert change(account, node, {"spec": {"unschedulable": True}}) == 422
    assert change(account, node, {"metadata": {"annotations": {"a": "b"}}}) == 422
    assert change(account, node, {"metadata": {"labels": {"kubernetes.io/hostname": None}}}) == 422

    kube.create(NODE, {"metadata": {"name": "another"}})
    try:
        with pytest.raises(PublishFailed, match="may change the node that it runs on"):
            publish(account, "another", facts)
    finally:
        kube.delete(NODE, "another")
