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

# Never a request: admission asks for it where OwnerReferencesPermissionEnforcement is on.
ASKED_BY_ADMISSION = {("headrace.dev", "modeldeployments/finalizers", "update")}


def granted(cluster: Cluster) -> set[Right]:
    """What the chart grants, in all its roles."""
    rendered = cluster.run(
        [
            *(cluster.bin("helm"), "template", "headrace", CHART),
            *('--set-json=staticVolumes={"*": ["*"]}', "--show-only=templates/rbac.yaml"),
        ]
    )
    return {
        (group, resource, verb)
        for role in yaml.safe_load_all(rendered)
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


def requests(audit_log: Path, decision: str) -> set[Right]:
    """Rights that requests about resources needed, by how they were decided."""
    events = map(json.loads, audit_log.read_text().splitlines())
    return {
        right
        for event in events
        if event.get("annotations", {}).get("authorization.k8s.io/decision") == decision
        and "resource" in event.get("objectRef", {})
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


def test_nothing_was_asked_for_that_no_rule_grants(cluster: Cluster, audit_log: Path) -> None:
    # Tests with fewer rights see refusals of rights that the chart grants.
    assert requests(audit_log, "forbid") - granted(cluster) == set()
