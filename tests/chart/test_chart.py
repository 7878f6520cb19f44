"""The chart as real helm renders it: a hardened operator with no more rights than it needs."""

from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).parents[2]
CHART = REPOSITORY / "charts" / "headrace"


def operator_pod(objects):
    return objects["Deployment", "headrace"]["spec"]["template"]["spec"]


def environment(objects):
    (container,) = operator_pod(objects)["containers"]
    return {variable["name"]: variable.get("value") for variable in container["env"]}


def test_lint_finds_nothing(helm):
    result = helm("lint", "--strict", CHART)
    assert result.returncode == 0, result.stdout + result.stderr


def test_crd_is_the_generated_one():
    name = "modeldeployments.headrace.dev.yaml"
    generated = (REPOSITORY / "crds" / name).read_text()
    assert (CHART / "crds" / name).read_text() == generated


def test_operator_is_hardened(render):
    pod = operator_pod(render())
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == 1000
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    (container,) = pod["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def test_one_operator_at_a_time(render):
    spec = render()["Deployment", "headrace"]["spec"]
    assert (spec["replicas"], spec["strategy"]) == (1, {"type": "Recreate"})


def test_probes_ask_the_liveness_port(render):
    (container,) = operator_pod(render("--set", "liveness.port=8181"))["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"metrics": 9402, "liveness": 8181}
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container[probe]["httpGet"] == {"path": "/healthz", "port": "liveness"}


def test_settings_reach_the_operator(render):
    options = ("loaderImage.repository=registry.test/loader", "loaderImage.tag=v7")
    options += ("metrics.port=9999", "watchNamespace=team")
    objects = render(*(word for option in options for word in ("--set", option)))
    assert environment(objects) == {
        "POD_ID": None,
        "HEADRACE_LOADER_IMAGE": "registry.test/loader:v7",
        "HEADRACE_WATCH_NAMESPACE": "team",
        "HEADRACE_METRICS_PORT": "9999",
        "HEADRACE_LIVENESS_PORT": "8080",
    }


def test_images_default_to_the_version_of_the_chart(render):
    version = yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"]
    objects = render()
    (container,) = operator_pod(objects)["containers"]
    assert container["image"] == f"headrace-operator:{version}"
    assert environment(objects)["HEADRACE_LOADER_IMAGE"] == f"headrace-loader:{version}"
    assert "HEADRACE_WATCH_NAMESPACE" not in environment(objects)


def test_every_rule_belongs_to_the_operators_account(render):
    objects = render("--set", "serviceAccount.name=other")
    assert ("ServiceAccount", "other") in objects
    assert operator_pod(objects)["serviceAccountName"] == "other"
    bindings = [found for (kind, _), found in objects.items() if kind.endswith("Binding")]
    assert bindings
    for binding in bindings:
        subject = {"kind": "ServiceAccount", "name": "other", "namespace": "headrace-system"}
        assert binding["subjects"] == [subject]
        assert (binding["roleRef"]["kind"], binding["roleRef"]["name"]) in objects


def test_no_rule_has_a_wildcard_or_reads_secrets(render):
    roles = [found for (kind, _), found in render().items() if kind in {"Role", "ClusterRole"}]
    rules = [rule for role in roles for rule in role["rules"]]
    assert rules
    for rule in rules:
        assert "*" not in rule["apiGroups"] + rule["resources"] + rule["verbs"]
        assert "secrets" not in rule["resources"]


def test_one_namespace_needs_no_cluster_wide_rights_on_pods(render):
    objects = render("--set", "watchNamespace=team")
    role = objects["Role", "headrace"]
    assert role["metadata"]["namespace"] == "team"
    cluster_wide = {
        resource
        for (kind, _), found in objects.items()
        if kind == "ClusterRole"
        for rule in found["rules"]
        for resource in rule["resources"]
    }
    assert cluster_wide == {"persistentvolumes", "nodes"}


@pytest.mark.parametrize(
    ("option", "field"),
    [
        ("image.pullPolicy=Sometimes", "pullPolicy"),
        ("metrics.port=80", "port"),
        ("watchNamespace=Not_A_Name", "watchNamespace"),
        ("loaderImage.repository=", "repository"),
        ("replicas=2", "replicas"),
    ],
)
def test_wrong_values_are_refused_by_name(helm, option, field):
    result = helm("template", "headrace", CHART, "--set", option)
    assert result.returncode != 0
    assert field in result.stderr
