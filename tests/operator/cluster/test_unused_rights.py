"""The chart's rules are those that the operator uses, as the API server's audit log has it.

Comes last by its name: the log is of all tests that ran on this cluster before.
"""

import json
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
import yaml

from localkube import Cluster

pytestmark = pytest.mark.cluster

CHART = Path(__file__).parents[3] / "charts/headrace"
Right = tuple[str, str, str]  # API group, resource or resource/subresource, verb

ROLES = ("Role", "ClusterRole")
AUTHORIZATION = "authorization.k8s.io"
# Never a request: admission asks for it where OwnerReferencesPermissionEnforcement is on.
ASKED_BY_ADMISSION = {("headrace.dev", "modeldeployments/finalizers", "update")}


def granted(cluster: Cluster, *options: str, kinds: tuple[str, ...] = ROLES) -> set[Right]:
    """What the chart grants in its roles of some kinds."""
    rendered = cluster.run(
        [
            *(cluster.bin("helm"), "template", "headrace", CHART, *options),
            *('--set-json=staticVolumes={"*": ["*"]}', "--show-only=templates/rbac.yaml"),
        ]
    )
    return {
        (group, resource, verb)
        for role in yaml.safe_load_all(rendered)
        if role["kind"] in kinds
        for rule in role.get("rules", ())
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def rights(event: dict[str, Any]) -> Iterator[Right]:
    reference = event["objectRef"]
    parts = filter(None, (reference["resource"], reference.get("subresource")))
    group, resource = reference.get("apiGroup", ""), "/".join(parts)
    yield group, resource, event["verb"]
    if event["verb"] == "patch" and event["responseStatus"]["code"] == HTTPStatus.CREATED:
        yield group, resource, "create"  # what server-side apply needs where there is nothing yet


def requests(
    audit_log: Path, decision: str, by: str = "", *, namespaced: bool = False
) -> set[Right]:
    """Rights that requests about resources needed, by how they were decided and by which rule.

    With `namespaced`, of requests about one namespace alone.
    """
    events = map(json.loads, audit_log.read_text().splitlines())
    return {
        right
        for event in events
        if event.get("annotations", {}).get(f"{AUTHORIZATION}/decision") == decision
        and by in event["annotations"].get(f"{AUTHORIZATION}/reason", "")
        and "resource" in (reference := event.get("objectRef", {}))
        and ("namespace" in reference or not namespaced)
        for right in rights(event)
    }


@pytest.fixture
def whole_suite(request: pytest.FixtureRequest) -> None:
    """Skip where only some of this directory's tests run: the others use rights, too."""
    here = Path(__file__).parent
    modules = {item.path for item in request.session.items if item.path.parent == here}
    missing = sorted(path.name for path in set(here.glob("test_*.py")) - modules)
    if missing or request.config.getoption("keyword"):
        pytest.skip(
            f"needs the requests of all tests of this directory; left out: {missing or 'by -k'}"
        )


def test_every_right_is_used(whole_suite: None, cluster: Cluster, audit_log: Path) -> None:
    unused = granted(cluster) - ASKED_BY_ADMISSION - requests(audit_log, "allow")
    assert unused == set()


def test_every_right_of_a_namespaces_role_is_used_there(
    whole_suite: None, cluster: Cluster, audit_log: Path
) -> None:
    """With watchNamespaces: lists and watches by an operator that had no more than these roles."""
    given = granted(cluster, "--set=watchNamespaces={a}", kinds=("Role",))
    by_role = requests(audit_log, "allow", 'of Role "headrace"')
    looked = {right for right in given if right[2] in ("list", "watch")}
    # Events and earlier templates are listed when something is wrong, always of one namespace.
    resources = ("events", "replicasets", "controllerrevisions")
    seldom = {right for right in looked if right[1] in resources}
    assert looked - seldom - by_role == set()
    in_a_namespace = requests(audit_log, "allow", namespaced=True)
    assert given - looked - ASKED_BY_ADMISSION - in_a_namespace == set()
    assert seldom - in_a_namespace == set()


def test_a_namespaces_role_and_the_cluster_wide_one_grant_the_same(cluster: Cluster) -> None:
    namespaced = granted(cluster, "--set=watchNamespaces={a}")
    assert namespaced == granted(cluster)


def test_nothing_was_asked_for_that_no_rule_grants(cluster: Cluster, audit_log: Path) -> None:
    # Tests with fewer rights see refusals of rights that the chart grants.
    assert requests(audit_log, "forbid") - granted(cluster) == set()
