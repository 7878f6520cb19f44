"""Releases by real helm on a real API server, under the restricted Pod Security profile.

kwok plays the kubelet, so pods turn Ready without running anything; on a real node the operator
itself runs in tests/node/test_chart.py. The CRDs of the Prometheus operator and KEDA are
theirs; nothing of them runs here.
"""

import copy
import json
import shutil
import time
from pathlib import Path

import pytest
import yaml

from headrace_operator.api.spec import ModelDeploymentSpec
from headrace_operator.plan.serving_pod import serving_pod_template
from headrace_operator.plan.shard_job import shard_job
from headrace_operator.plan.world import Settings
from localkube import Cluster, LocalkubeError

pytestmark = pytest.mark.cluster

REPOSITORY = Path(__file__).parents[2]
CHART = REPOSITORY / "charts/headrace"
MODEL = REPOSITORY / "charts/headrace-model"
CRDS = Path(__file__).parent / "crds"
CRD = "modeldeployments.headrace.dev"
SYSTEM = "headrace-system"
MONITORS = "servicemonitors,podmonitors,prometheusrules"
SPEC = yaml.safe_load((MODEL / "ci/tiny-values.yaml").read_text())["spec"]


class Site:
    """The cluster, and helm in the operator's namespace."""

    def __init__(self, cluster):
        self.cluster = cluster
        self.kubectl = cluster.kubectl

    def helm(self, *arguments, namespace=SYSTEM):
        return self.cluster.run([self.cluster.bin("helm"), *arguments, "--namespace", namespace])

    def get(self, *what):
        return json.loads(self.kubectl("get", *what, "-o", "json"))

    def columns(self):
        (version,) = self.get("crd", CRD)["spec"]["versions"]
        return [column["name"] for column in version["additionalPrinterColumns"]]

    def make_namespace(self, name, profile="restricted"):
        self.kubectl("create", "namespace", name)
        self.kubectl("label", "namespace", name, f"pod-security.kubernetes.io/enforce={profile}")

    def apply_crds(self, *names):
        for name in names:
            self.kubectl("apply", "--server-side", "-f", CRDS / f"{name}.yaml")
        self.kubectl("wait", "--for=condition=Established", "crd", "--all", "--timeout=20s")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    with Cluster(tmp_path_factory.mktemp("release")).up(kwok=1) as cluster:
        site = Site(cluster)
        site.make_namespace(SYSTEM)
        site.make_namespace("models")
        yield site


@pytest.fixture(scope="module")
def installed(site):
    """The output of the first installation, without any monitoring in the cluster."""
    options = ("networkPolicy.enabled=true", "podDisruptionBudget.enabled=true")
    sets = [word for option in options for word in ("--set", option)]
    return site.helm("install", "headrace", CHART, *sets, "--wait", "--timeout", "60s")


@pytest.fixture(scope="module")
def newer(tmp_path_factory):
    """The chart with another column in its CRD, as a later version may have it."""
    chart = shutil.copytree(CHART, tmp_path_factory.mktemp("newer") / "headrace")
    path = chart / f"files/crds/{CRD}.yaml"
    crd = yaml.safe_load(path.read_text())
    column = {"name": "New", "type": "string", "jsonPath": ".metadata.name"}
    crd["spec"]["versions"][0]["additionalPrinterColumns"].append(column)
    path.write_text(yaml.safe_dump(crd))
    return chart


def test_installation_without_the_prometheus_operator_says_so(site, installed):
    for api in ("monitoring.coreos.com/v1", "leaderworkerset.x-k8s.io/v1"):
        assert f"serves no {api}" in installed
    (pod,) = site.get("pods", "-n", SYSTEM)["items"]  # it passed the restricted profile
    assert pod["spec"]["serviceAccountName"] == "headrace"
    for kind in ("networkpolicy", "poddisruptionbudget", "service/headrace-metrics"):
        site.get(*kind.split("/"), "-n", SYSTEM)


def test_monitors_come_with_the_upgrade_after_their_api(site, installed):
    site.apply_crds("servicemonitors", "podmonitors", "prometheusrules")
    notes = site.helm("upgrade", "headrace", CHART, "--reuse-values", "--wait")
    assert "monitoring.coreos.com/v1" not in notes
    kinds = sorted(item["kind"] for item in site.get(MONITORS, "-n", SYSTEM)["items"])
    assert kinds == ["PodMonitor", "PrometheusRule", "ServiceMonitor"]


def test_upgrade_and_rollback_change_the_crd_and_no_model(site, installed, newer):
    manifest = {
        "apiVersion": "headrace.dev/v1alpha1",
        "kind": "ModelDeployment",
        "metadata": {"name": "kept", "namespace": "models"},
        "spec": SPEC,
    }
    site.kubectl("apply", "-f", "-", stdin=json.dumps(manifest))
    uid = site.get("mdl", "kept", "-n", "models")["metadata"]["uid"]
    revision = json.loads(site.helm("history", "headrace", "-o", "json"))[-1]["revision"]
    assert "New" not in site.columns()
    site.helm("upgrade", "headrace", newer, "--reuse-values", "--wait")
    assert "New" in site.columns()
    site.helm("rollback", "headrace", str(revision), "--wait")
    assert "New" not in site.columns()
    assert site.get("mdl", "kept", "-n", "models")["metadata"]["uid"] == uid


def test_uninstalling_leaves_models_and_their_crd_for_the_next_release(site, installed):
    site.helm("uninstall", "headrace", "--wait")
    everything = "deployment,service,serviceaccount,networkpolicy,pdb,configmap"
    left = [item["metadata"]["name"] for item in site.get(everything, "-n", SYSTEM)["items"]]
    assert sorted(left) == ["default", "kube-root-ca.crt"]
    roles = site.kubectl("get", "clusterrole,clusterrolebinding", "-o", "name")
    assert "/headrace" not in roles
    assert site.get("mdl", "kept", "-n", "models")
    site.helm("install", "headrace", CHART)
    assert site.get("mdl", "kept", "-n", "models")
    site.helm("uninstall", "headrace")
    with pytest.raises(LocalkubeError, match="invalid ownership metadata"):
        site.helm("install", "other", CHART)
    site.helm("uninstall", "other", "--ignore-not-found")
    options = ("--set", "watchNamespaces={models}", "--set", "rbac.clusterResources=false")
    site.helm("install", "other", CHART, "--take-ownership", *options)
    assert site.get("role", "other-headrace", "-n", "models")


def test_a_model_is_a_release_whose_replicas_belong_to_the_autoscaler(site, installed):
    site.apply_crds("scaledobjects")
    values = ("-f", MODEL / "ci/tiny-values.yaml")
    site.helm("install", "tiny", MODEL, *values, namespace="models")
    assert site.get("scaledobject", "tiny", "-n", "models")["spec"]["maxReplicaCount"] == 2
    site.kubectl("scale", "mdl", "tiny", "-n", "models", "--replicas=2")
    site.helm("upgrade", "tiny", MODEL, *values, "--set", "labels.a=b", namespace="models")
    model = site.get("mdl", "tiny", "-n", "models")
    assert (model["spec"]["replicas"], model["metadata"]["labels"]["a"]) == (2, "b")
    broken = ("--set", "spec.model.source=ftp://x/y")
    with pytest.raises(LocalkubeError, match="must start with pvc://, s3:// or hf://"):
        site.helm("install", "broken", MODEL, *values, *broken, namespace="models")


def test_editors_of_a_namespace_may_serve_models_there_and_viewers_look(site, installed):
    for role in ("edit", "view"):
        name, account = f"--clusterrole={role}", f"--serviceaccount=models:{role}"
        site.kubectl("create", "rolebinding", role, "-n", "models", name, account)

    def may(role, verb):
        account = f"--as=system:serviceaccount:models:{role}"
        try:
            return site.kubectl("auth", "can-i", verb, "mdl", "-n", "models", account).strip()
        except LocalkubeError:  # kubectl fails where the answer is no
            return "no"

    deadline = time.monotonic() + 20
    while may("view", "get") == "no" and time.monotonic() < deadline:
        time.sleep(0.5)  # the aggregation controller needs a moment after the release
    answers = {(r, verb): may(r, verb) for r in ("edit", "view") for verb in ("create", "get")}
    assert answers == {
        ("edit", "create"): "yes",
        ("edit", "get"): "yes",
        ("view", "create"): "no",
        ("view", "get"): "yes",
    }


def planned_pods():
    """The pods that the operator makes, by the way GPUs are shared."""
    owner = {"metadata": {"name": "m", "namespace": "models", "uid": "u"}}
    settings = Settings("loader:1")
    for sharing in ("None", "WholeNode", "ResourceClaim"):
        path = {"path": "Off" if sharing == "None" else "Prefer"}
        spec = ModelDeploymentSpec.model_validate(
            copy.deepcopy(SPEC) | {"gpu": {"sharing": sharing}, "loading": path}
        )
        claim = "gpus" if sharing == "ResourceClaim" else None
        template = serving_pod_template(
            owner,
            spec,
            claim="models",
            loader_image="loader:1",
            claim_template=claim,
            template_hash="x",
        )
        yield f"serving-{sharing}", template["spec"]
    yield "shard", shard_job(owner, spec, "models", settings)["spec"]["template"]["spec"]


@pytest.mark.parametrize(
    ("name", "spec"), list(planned_pods()), ids=lambda part: part if isinstance(part, str) else ""
)
def test_pods_pass_the_restricted_profile_and_get_no_token(site, name, spec):
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name.lower(), "namespace": "models"},
        "spec": spec,
    }
    create = ("create", "--dry-run=server", "-o", "json", "-f", "-")
    admitted = json.loads(site.kubectl(*create, stdin=json.dumps(pod)))["spec"]
    assert not any("projected" in volume for volume in admitted["volumes"])
    assert not any("hostPath" in volume for volume in admitted["volumes"])
    pod["spec"] = copy.deepcopy(spec)
    pod["spec"]["containers"][0]["securityContext"]["capabilities"]["add"] = ["IPC_LOCK"]
    with pytest.raises(LocalkubeError, match="violates PodSecurity"):
        site.kubectl(*create, stdin=json.dumps(pod))
