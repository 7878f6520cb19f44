"""The release on a real node, in namespaces that enforce the restricted Pod Security profile."""

import json

from demo import setup

RELEASE = (setup.RELEASE, "-n", setup.NAMESPACE)


def operator_pod(site):
    label = "app.kubernetes.io/name=headrace-operator"
    listing = site.cluster.kubectl("get", "pods", "-n", setup.NAMESPACE, "-l", label, "-o", "json")
    (pod,) = json.loads(listing)["items"]
    return pod


def test_helm_test_asks_the_operator_that_runs(site):
    output = site.helm("test", *RELEASE, "--logs")
    assert "the operator answers" in output
    status = operator_pod(site)["status"]["containerStatuses"][0]
    assert (status["ready"], status["restartCount"]) == (True, 0)


def test_upgrade_and_rollback_replace_the_operator_and_no_model(site):
    chart = setup.ROOT / "charts/headrace"
    uid = operator_pod(site)["metadata"]["uid"]
    change = ("--reuse-values", "--set", "podAnnotations.upgraded=yes", "--wait")
    revision = json.loads(site.helm("history", *RELEASE, "-o", "json"))[-1]["revision"]
    site.helm("upgrade", setup.RELEASE, chart, *RELEASE[1:], *change)
    upgraded = operator_pod(site)
    assert upgraded["metadata"]["annotations"]["upgraded"] == "yes"
    assert upgraded["metadata"]["uid"] != uid
    site.helm("rollback", *RELEASE[:1], str(revision), *RELEASE[1:], "--wait")
    assert "upgraded" not in operator_pod(site)["metadata"].get("annotations", {})
    assert operator_pod(site)["status"]["containerStatuses"][0]["ready"]
