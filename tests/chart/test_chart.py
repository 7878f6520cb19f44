"""The charts as real helm renders them: a hardened operator with no more rights than it needs."""

import itertools
import json
import re
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).parents[2]
CHART = REPOSITORY / "charts" / "headrace"
MODEL = REPOSITORY / "charts" / "headrace-model"
TINY = ("-f", MODEL / "ci/tiny-values.yaml")
MONITORED = ("--api-versions", "monitoring.coreos.com/v1")
DIGEST = "sha256:" + "0" * 64


def sets(*values):
    return [word for value in values for word in ("--set", value)]


def operator_pod(objects):
    return objects["Deployment", "headrace"]["spec"]["template"]["spec"]


def environment(objects):
    (container,) = operator_pod(objects)["containers"]
    return {variable["name"]: variable.get("value") for variable in container["env"]}


def test_lint_finds_nothing(helm):
    for options in ([CHART], [MODEL, *TINY]):
        result = helm("lint", "--strict", *options)
        assert result.returncode == 0, result.stdout + result.stderr


MATRIX = list(
    itertools.product(
        ([], ["watchNamespaces={a,b}"], ["watchNamespaces={a}", "rbac.clusterResources=false"]),
        ([], ["networkPolicy.enabled=true", "podDisruptionBudget.enabled=true"]),
        ([], ["crds.install=false", "dashboards.enabled=false", "rbac.aggregate=false"]),
        ([], [f"image.digest={DIGEST}", f"loaderImage.digest={DIGEST}", "global.imageRegistry=r"]),
        ([], ["commonLabels.team=x", "commonAnnotations.note=y", "serviceAccount.create=false"]),
    )
)


@pytest.mark.parametrize(
    "parts", MATRIX[::5] + MATRIX[-1:], ids=lambda parts: "-".join(map(str, map(len, parts)))
)
def test_values_in_any_mixture_make_objects_with_all_labels(render, parts):
    monitored = len(parts[1]) == 0
    values = [value for part in parts for value in part]
    objects = render(*sets(*values), *(MONITORED if monitored else ()))
    for body in objects.values():
        metadata = body["metadata"]
        assert metadata["labels"]["app.kubernetes.io/instance"] == "headrace"
        assert ("commonLabels.team=x" in values) == (metadata["labels"].get("team") == "x")
        noted = metadata.get("annotations", {}).get("note") == "y"
        assert ("commonAnnotations.note=y" in values) == noted
    monitors = {kind for kind, *_ in objects} & {"ServiceMonitor", "PodMonitor", "PrometheusRule"}
    assert len(monitors) == 3 * monitored
    assert (("ServiceAccount", "headrace") in objects) == (
        "serviceAccount.create=false" not in values
    )
    assert any(kind == "CustomResourceDefinition" for kind, *_ in objects) == (
        "crds.install=false" not in values
    )


def test_crd_is_the_generated_one():
    name = "modeldeployments.headrace.dev.yaml"
    generated = (REPOSITORY / "crds" / name).read_text()
    assert (CHART / "files/crds" / name).read_text() == generated


def test_crd_comes_with_the_release_and_outlives_it(render):
    name = "modeldeployments.headrace.dev"
    generated = yaml.safe_load((REPOSITORY / f"crds/{name}.yaml").read_text())
    kept = render()["CustomResourceDefinition", name]
    assert kept["spec"] == generated["spec"]
    assert kept["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
    thrown = render("--set", "crds.keep=false")["CustomResourceDefinition", name]
    assert "annotations" not in thrown["metadata"]


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
    options += ("metrics.port=9999", "watchNamespaces={team,other}")
    objects = render(*(word for option in options for word in ("--set", option)))
    assert environment(objects) == {
        "POD_ID": None,
        "HEADRACE_LOADER_IMAGE": "registry.test/loader:v7",
        "HEADRACE_WATCH_NAMESPACES": "team,other",
        "HEADRACE_METRICS_PORT": "9999",
        "HEADRACE_LIVENESS_PORT": "8080",
    }


def test_a_namespace_of_digits_stays_a_string(render):
    objects = render("--set-string", "watchNamespaces={1234}")
    assert environment(objects)["HEADRACE_WATCH_NAMESPACES"] == "1234"


def test_images_default_to_the_version_of_the_chart(render):
    version = yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"]
    objects = render()
    (container,) = operator_pod(objects)["containers"]
    assert container["image"] == f"headrace-operator:{version}"
    assert environment(objects)["HEADRACE_LOADER_IMAGE"] == f"headrace-loader:{version}"
    assert "HEADRACE_WATCH_NAMESPACES" not in environment(objects)


def test_images_come_from_a_mirror_by_digest_with_pull_secrets(render):
    values = ("global.imageRegistry=mirror.test:5000/hub", "loaderImage.registry=other.test")
    values += (f"image.digest={DIGEST}", f"loaderImage.digest={DIGEST}", "loaderImage.tag=v1")
    values += ("global.imagePullSecrets[0].name=all", "imagePullSecrets[0].name=own")
    objects = render(*sets(*values))
    pod = operator_pod(objects)
    image = f"mirror.test:5000/hub/headrace-operator@{DIGEST}"
    assert pod["containers"][0]["image"] == image
    assert (
        environment(objects)["HEADRACE_LOADER_IMAGE"] == f"other.test/headrace-loader:v1@{DIGEST}"
    )
    assert pod["imagePullSecrets"] == [{"name": "all"}, {"name": "own"}]
    test = objects["Pod", "headrace-test"]["spec"]
    assert test["imagePullSecrets"] == pod["imagePullSecrets"]
    assert test["containers"][0]["image"] == image


def test_only_the_operator_gets_a_token(render):
    objects = render()
    assert objects["ServiceAccount", "headrace"]["automountServiceAccountToken"] is False
    assert operator_pod(objects)["automountServiceAccountToken"] is True
    assert objects["Pod", "headrace-test"]["spec"]["automountServiceAccountToken"] is False


def test_scheduling_reaches_the_operator(render):
    values = ("priorityClassName=high", "nodeSelector.pool=system", "podLabels.a=b")
    values += ("topologySpreadConstraints[0].maxSkew=1", "tolerations[0].key=x")
    objects = render(*sets(*values))
    pod = operator_pod(objects)
    assert pod["priorityClassName"] == "high"
    assert pod["nodeSelector"] == {"pool": "system"}
    assert pod["topologySpreadConstraints"] == [{"maxSkew": 1}]
    assert pod["tolerations"] == [{"key": "x"}]
    assert objects["Deployment", "headrace"]["spec"]["template"]["metadata"]["labels"]["a"] == "b"


def test_monitors_name_ports_that_are_there(render):
    objects = render(*MONITORED, "--set", "watchNamespaces={a}")
    service = objects["Service", "headrace-metrics"]
    (endpoint,) = objects["ServiceMonitor", "headrace"]["spec"]["endpoints"]
    assert endpoint["port"] == service["spec"]["ports"][0]["name"]
    assert endpoint["honorLabels"] is True
    labels = objects["Deployment", "headrace"]["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
    selected = objects["ServiceMonitor", "headrace"]["spec"]["selector"]["matchLabels"]
    assert selected.items() <= service["metadata"]["labels"].items()
    pods = objects["PodMonitor", "headrace-models"]["spec"]
    assert pods["namespaceSelector"] == {"matchNames": ["a"]}
    assert [end["port"] for end in pods["podMetricsEndpoints"]] == ["loader", "http"]


def test_alerts_can_be_left_out_and_link_to_their_runbooks(render):
    values = ("metrics.prometheusRule.disabled={HeadraceGpusIdle}",)
    values += ("metrics.prometheusRule.runbookUrl=https://docs.test/alerts/",)
    groups = render(*MONITORED, *sets(*values))["PrometheusRule", "headrace"]["spec"]["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    file = yaml.safe_load((CHART / "files/alerts.yaml").read_text())
    everything = {rule["alert"] for group in file["groups"] for rule in group["rules"]}
    assert {rule["alert"] for rule in rules} == everything - {"HeadraceGpusIdle"}
    url = rules[0]["annotations"]["runbook_url"]
    assert url == "https://docs.test/alerts/#" + rules[0]["alert"].lower()
    assert "{{ $labels.reason }}" in rules[1]["annotations"]["summary"]


def test_dashboards_are_found_by_the_sidecar(render):
    objects = render("--set", "dashboards.annotations.grafana_folder=Models")
    for name in ("fleet", "cold-start", "loader"):
        found = objects["ConfigMap", f"headrace-dashboard-{name}"]
        assert found["metadata"]["labels"]["grafana_dashboard"] == "1"
        assert found["metadata"]["annotations"] == {"grafana_folder": "Models"}
        (text,) = found["data"].values()
        assert json.loads(text)["uid"] == f"headrace-{name}"


def test_notes_say_the_next_step_and_what_is_missing(helm):
    def notes(*options):
        command = ("install", "headrace", CHART, "--dry-run=client", "--namespace", "system")
        result = helm(*command, *options)
        assert result.returncode == 0, result.stderr
        return result.stdout.partition("NOTES:")[2]

    plain = notes()
    assert "helm test headrace -n system" in plain
    assert "kubectl apply -f model.yaml" in plain
    assert "monitoring.coreos.com/v1" in plain
    assert "were left out" in plain
    assert "leaderworkerset.x-k8s.io/v1 (LeaderWorkerSet)" in plain
    assert "It is not there yet" in notes("--set", "crds.install=false")
    assert "DELETES" in notes("--set", "crds.keep=false")
    assert "1 namespace(s): team" in notes("--set", "watchNamespaces={team}")
    assert plain.count("names no registry") == len(("operator", "loader"))
    assert "names no registry" not in notes("--set", "global.imageRegistry=mirror.test")


def test_every_rule_belongs_to_the_operators_account(render):
    objects = render("--set", "serviceAccount.name=other")
    assert ("ServiceAccount", "other") in objects
    assert operator_pod(objects)["serviceAccountName"] == "other"
    bindings = [found for (kind, *_), found in objects.items() if kind.endswith("Binding")]
    assert bindings
    for binding in bindings:
        subject = {"kind": "ServiceAccount", "name": "other", "namespace": "headrace-system"}
        assert binding["subjects"] == [subject]
        assert (binding["roleRef"]["kind"], binding["roleRef"]["name"]) in objects


def test_no_rule_has_a_wildcard_or_reads_secrets(render):
    roles = [found for (kind, *_), found in render().items() if kind in {"Role", "ClusterRole"}]
    rules = [rule for role in roles for rule in role["rules"]]
    assert rules
    for rule in rules:
        assert "*" not in rule["apiGroups"] + rule["resources"] + rule["verbs"]
        assert "secrets" not in rule["resources"]


def documented_rights():
    """Verbs by resource, as the table in docs/security.md has them."""
    text = (REPOSITORY / "docs/security.md").read_text()
    table = text.partition("| resource | verbs | why |")[2].partition("\n\n")[0]
    found = {}
    for row in table.splitlines()[2:]:
        resources, verbs, _ = row.strip("| ").split(" | ", 2)
        words = set(re.findall(r"\b(?:get|list|watch|create|update|patch|delete)\b", verbs))
        found |= dict.fromkeys(re.findall(r"`([a-z/]+)`", resources), words)
    return found


def test_the_documented_rights_are_those_of_the_operators_roles(render):
    objects = render("--set-json", 'staticVolumes={"*": ["*"]}')
    granted = {}
    for role in ("headrace", "headrace-cluster"):
        for rule in objects["ClusterRole", role]["rules"]:
            for resource in rule["resources"]:
                granted.setdefault(resource, set()).update(rule["verbs"])
    assert documented_rights() == granted


def cluster_wide(objects):
    return {
        resource
        for (kind, *_), found in objects.items()
        if kind == "ClusterRole" and "-edit" not in found["metadata"]["name"]
        for rule in found["rules"]
        for resource in rule["resources"]
        if not resource.startswith("modeldeployments")
    }


def test_each_namespace_gets_a_role_and_the_cluster_no_rights_on_pods(render):
    objects = render("--set", "watchNamespaces={team,other}")
    for namespace in ("team", "other"):
        binding = objects["RoleBinding", "headrace", namespace]
        assert binding["roleRef"]["kind"] == "Role"
        assert objects["Role", "headrace", namespace]["rules"]
    assert cluster_wide(objects) == {
        "persistentvolumes",
        "storageclasses",
        "nodes",
        "deviceclasses",
    }
    without = sets("watchNamespaces={team,other}", "rbac.clusterResources=false")
    assert cluster_wide(render(*without)) == set()


def rights(objects, resource):
    rules = objects["ClusterRole", "headrace-cluster"]["rules"]
    return {verb for rule in rules if resource in rule["resources"] for verb in rule["verbs"]}


def test_volumes_are_made_only_where_static_ones_are_allowed(render):
    objects = render()
    assert rights(objects, "persistentvolumes") == {"list"}
    assert rights(objects, "storageclasses") == {"get"}
    assert "HEADRACE_STATIC_VOLUMES" not in environment(objects)
    allowed = {"team-a": ["fs-0123456789abcdef0/team-a"], "*": ["fs-01234567"]}
    objects = render("--set-json", f"staticVolumes={json.dumps(allowed)}")
    verbs = {"list", "get", "create", "patch", "delete"}
    assert rights(objects, "persistentvolumes") == verbs
    assert json.loads(environment(objects)["HEADRACE_STATIC_VOLUMES"]) == allowed


@pytest.mark.parametrize("entry", ["vol-1", "fs-0123456/../x", "fs-01234567/.."])
def test_a_static_volume_that_is_no_file_system_is_refused(helm, entry):
    value = json.dumps({"team-a": [entry]})
    result = helm("template", "headrace", CHART, "--set-json", f"staticVolumes={value}")
    assert result.returncode != 0
    assert "staticVolumes" in result.stderr


@pytest.mark.parametrize(
    ("option", "path"),
    [
        ("image.pullPolicy=Sometimes", "/image/pullPolicy"),
        ("image.digest=sha256:abc", "/image/digest"),
        ("metrics.port=80", "/metrics/port"),
        ("metrics.serviceMonitor.enabled=maybe", "/metrics/serviceMonitor/enabled"),
        ("metrics.podMonitor.interval=soon", "/metrics/podMonitor/interval"),
        ("watchNamespaces={ok,Not_A_Name}", "/watchNamespaces/1"),
        ("loaderImage.repository=", "/loaderImage/repository"),
        ("global.imageRegistry=https://x", "/global/imageRegistry"),
        ("commonLabels.a.b=c", "/commonLabels/a"),
        ("podDisruptionBudget.maxUnavailable=2", "/podDisruptionBudget/maxUnavailable"),
        ("replicas=2", "'replicas' not allowed"),
        ("rbac.clusterResources=false", "rbac.clusterResources: false: needs watchNamespaces"),
    ],
)
def test_wrong_values_are_refused_with_their_path(helm, option, path):
    result = helm("template", "headrace", CHART, "--set", option)
    assert result.returncode != 0
    assert path in result.stderr


def described(schema, path="values"):
    """Paths of properties that are not described."""
    for name, part in schema.get("properties", {}).items():
        if "$ref" not in part and not part.get("description"):
            yield f"{path}.{name}"
        yield from described(part, f"{path}.{name}")


@pytest.mark.parametrize("chart", [CHART, MODEL], ids=lambda chart: chart.name)
def test_every_value_is_described_and_every_default_known(chart):
    schema = json.loads((chart / "values.schema.json").read_text())
    schema["properties"].pop("env", None)  # Kubernetes' own
    assert list(described(schema)) == []
    values = yaml.safe_load((chart / "values.yaml").read_text())
    assert values.keys() <= schema["properties"].keys() | {"env"}
    assert schema["additionalProperties"] is False


def test_a_model_is_scaled_by_keda_which_owns_the_replicas(render):
    objects = render(*TINY, "--set", "spec.replicas=3", release="tiny", chart=MODEL)
    model = objects["ModelDeployment", "tiny"]
    assert "replicas" not in model["spec"]
    target = objects["ScaledObject", "tiny"]["spec"]["scaleTargetRef"]
    assert target == {k: model[k] for k in ("apiVersion", "kind")} | {"name": "tiny"}
    # Nothing that the operator makes by the same name, such as a PodDisruptionBudget.
    assert {kind for kind, _ in objects} == {
        "ModelDeployment",
        "NetworkPolicy",
        "Pod",
        "ScaledObject",
    }
    without = render(*TINY, *sets("spec.replicas=3", "keda.enabled=false"), chart=MODEL)
    assert without["ModelDeployment", "headrace"]["spec"]["replicas"] == 3


def policies(render, *options):
    objects = render(*TINY, *sets("networkPolicy.enabled=true", *options), chart=MODEL)
    return {name: found["spec"] for (kind, name), found in objects.items() if "Policy" in kind}


DNS = {"ports": [{"port": 53, "protocol": "UDP"}, {"port": 53, "protocol": "TCP"}]}


def test_a_models_policy_limits_the_ways_out_only_if_it_is_asked_to(render):
    (policy,) = policies(render).values()
    assert policy["policyTypes"] == ["Ingress"]
    assert "egress" not in policy
    assert len(policy["ingress"]) == 2


@pytest.mark.parametrize(("scheme", "asked"), [("pvc", 0), ("s3", 2), ("hf", 2)])
def test_pods_of_a_model_reach_dns_and_the_source(render, scheme, asked):
    source = f"spec.model.source={scheme}://a/b"
    found = policies(render, "networkPolicy.egress.enabled=true", source)
    serving, sharding = found["headrace"], found["headrace-shard"]
    assert (serving["policyTypes"], serving["egress"]) == (["Ingress", "Egress"], [DNS])
    assert sharding["podSelector"]["matchLabels"] == {
        "headrace.dev/model-deployment": "headrace",
        "app.kubernetes.io/component": "shard",
    }
    assert sharding["policyTypes"] == ["Ingress", "Egress"]
    assert sharding["egress"][0] == DNS
    assert sharding["egress"][1:2] == [{"ports": [{"port": 443}]}][:asked]
    assert len(sharding["egress"]) == 1 + asked


def test_pods_of_a_group_of_nodes_reach_each_other(render):
    options = ("networkPolicy.egress.enabled=true", "spec.parallelism.nodes=2")
    policy = policies(render, *options)["headrace"]
    group = [{"podSelector": policy["podSelector"]}]
    assert (policy["ingress"][-1], policy["egress"]) == ({"from": group}, [DNS, {"to": group}])


def test_notes_of_a_model_tell_who_sets_the_replicas(helm):
    def notes(*options):
        result = helm("install", "tiny", MODEL, *TINY, "--dry-run=client", *options)
        assert result.returncode == 0, result.stderr
        return result.stdout.partition("NOTES:")[2]

    assert "KEDA sets the replicas, 1 to 2:" in notes()
    assert "KEDA" not in notes("--set", "keda.enabled=false")


def test_the_test_of_a_model_is_pulled_with_the_models_secrets(render):
    pods = render(*TINY, "--set", "spec.pod.imagePullSecrets[0].name=mine", chart=MODEL)
    assert pods["Pod", "headrace-test"]["spec"]["imagePullSecrets"] == [{"name": "mine"}]


@pytest.mark.parametrize(
    ("option", "path"),
    [
        ("spec.engine.port=x", "/spec/engine/port"),
        ("spec.replica=1", "/spec'"),
        ("spec.model.source=null", "/spec/model"),
        ("keda.maxReplicas=0", "/keda/maxReplicas"),
        ("keda.minReplicas=0", "keda.minReplicas: 0"),
    ],
)
def test_wrong_values_of_a_model_are_refused_with_their_path(helm, option, path):
    result = helm("template", "tiny", MODEL, *TINY, "--set", option)
    assert result.returncode != 0
    assert path in result.stderr
