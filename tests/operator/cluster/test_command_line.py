"""status, timeline and doctor against a real API server, with a real loader behind a pod.

The API server carries what the command asks a loader, so a pod's address is one of this machine
that is not its loopback, which API servers refuse to proxy to.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from headrace_cli.__main__ import main
from headrace_cli.errors import KindMissing
from headrace_cli.kube import Target, run
from headrace_operator.cluster.kinds import DEPLOYMENT, POD, Kind

LABELS = {
    "headrace.dev/model-deployment": "tiny",
    "app.kubernetes.io/component": "serve",
}


class Ran:
    """What a command ended with."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err
        assert "Traceback" not in err

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def admin(cluster: Any, tmp_path: Path) -> Path:
    """The administrator's kubeconfig."""
    return Path(cluster.kubeconfig)


@pytest.fixture
def headrace(admin: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    def command(*arguments: object, kubeconfig: Path = admin) -> Ran:
        code = main([*map(str, arguments), f"--kubeconfig={kubeconfig}"])
        return Ran(code, *capsys.readouterr())

    return command


def own_address() -> str:
    """An address of this machine that others could reach; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))
        return str(probe.getsockname()[0])


def user(world: Any, cluster: Any, path: Path, rules: list[dict[str, Any]]) -> Path:
    """Make an account with rights in the namespace, and return its kubeconfig."""
    namespace = world.namespace
    cluster.kubectl("create", "serviceaccount", "someone", "-n", namespace)
    manifest = {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "Role",
        "metadata": {"name": "someone", "namespace": namespace},
        "rules": rules,
    }
    cluster.kubectl("apply", "-f", "-", stdin=yaml.safe_dump(manifest))
    subject = f"--serviceaccount={namespace}:someone"
    cluster.kubectl("create", "rolebinding", "x", "--role=someone", subject, "-n", namespace)
    token = cluster.kubectl("create", "token", "someone", "-n", namespace).strip()
    return with_token(cluster, path, token)


def with_token(cluster: Any, path: Path, token: str, server: str | None = None) -> Path:
    config = yaml.safe_load(Path(cluster.kubeconfig).read_text())
    config["users"] = [{"name": "it", "user": {"token": token}}]
    config["contexts"][0]["context"]["user"] = "it"
    if server is not None:
        config["clusters"][0]["cluster"]["server"] = server
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture
def loading(support: Any, world: Any, kubelet: Any, operator: Any, tmp_path: Path) -> Any:
    """A ModelDeployment whose serving pod has a real loader with two ranks."""
    support.make_checkpoint(tmp_path / "checkpoint", ranks=2)
    loader = support.LoaderProcess(
        tmp_path / "loader", tmp_path / "checkpoint", "--tensor-parallel-size=2"
    )
    loader.until_phase("Ready")
    world.create()
    metadata = {"name": "tiny-0", "namespace": world.namespace, "labels": LABELS}
    port = {"containerPort": loader.port}
    containers = {
        "initContainers": [
            {"name": "loader", "image": "x", "restartPolicy": "Always", "ports": [port]}
        ],
        "containers": [{"name": "engine", "image": "x"}],
    }
    pod = world.kube.create(POD, {"metadata": metadata, "spec": containers})
    kubelet.loading(pod)
    address = {"podIP": own_address(), "podIPs": [{"ip": own_address()}]}
    world.kube.patch(POD, "tiny-0", world.namespace, {"status": address}, "status")
    yield loader
    loader.close()


def test_status_has_conditions_and_a_bar_for_each_rank(
    loading: Any, world: Any, headrace: Callable[..., Ran]
) -> None:
    world.wait_condition("VolumeReady", "False", "ClaimNotFound")
    ran = headrace("status", "-n", world.namespace)
    assert ran.code == 0, ran.err
    for words in ("tiny", "ClaimNotFound", "tiny-0", "rank 0", "rank 1", "100 %", "resident"):
        assert words in ran.out
    (model,) = headrace("status", "tiny", "-n", world.namespace, "-o", "json").json[
        "modelDeployments"
    ]
    assert model["reason"] == "ClaimNotFound"
    assert "create it or correct the name" in model["message"]
    (pod,) = model["pods"]
    assert (pod["stage"], pod["loader"]["phase"]) in (("load", "Ready"), ("schedule", "Ready"))
    assert [rank["readBytes"] for rank in pod["loader"]["ranks"]] == [
        rank["totalBytes"] for rank in loading.status()["ranks"]
    ]


def test_status_without_the_right_to_ask_loaders(
    loading: Any, world: Any, cluster: Any, headrace: Callable[..., Ran], tmp_path: Path
) -> None:
    rules = [
        {"apiGroups": ["headrace.dev"], "resources": ["modeldeployments"], "verbs": ["list"]},
        {"apiGroups": [""], "resources": ["pods"], "verbs": ["list"]},
    ]
    someone = user(world, cluster, tmp_path / "someone", rules)
    ran = headrace("status", "-n", world.namespace, "-o", "json", kubeconfig=someone)
    assert ran.code == 0, ran.err
    (pod,) = ran.json["modelDeployments"][0]["pods"]
    assert pod["loader"] is None
    assert "pods/proxy" in pod["loaderProblem"]
    assert "port-forward" in pod["loaderProblem"]
    doctor = headrace("doctor", "-n", world.namespace, "-o", "json", kubeconfig=someone)
    found = {f["message"] for f in doctor.json["findings"] if f["check"] == "permissions"}
    assert any("no load progress" in message for message in found)
    assert any("may not create modeldeployments" in message for message in found)


def test_watching_prints_a_line_for_each_change_until_interrupted(
    loading: Any, world: Any, admin: Path, eventually: Any
) -> None:
    command = ["status", "--watch", "--interval=0.2", "-o", "json", "-n", world.namespace]
    process = subprocess.Popen(
        [sys.executable, "-m", "headrace_cli", *command, f"--kubeconfig={admin}"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        assert json.loads(process.stdout.readline())["modelDeployments"]
        world.kube.delete(POD, "tiny-0", world.namespace)
        changed = json.loads(process.stdout.readline())
        assert changed["modelDeployments"]
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_timelines_of_a_real_load(
    loading: Any, world: Any, headrace: Callable[..., Ran], tmp_path: Path
) -> None:
    drawn = {}
    for form in ("text", "svg", "html", "trace"):
        file = tmp_path / form
        options = ("-n", world.namespace, "--format", form, "--file", file)
        ran = headrace("timeline", "tiny", *options)
        assert ran.code == 0, ran.err
        assert "left out: engine" in ran.err  # there is no kubelet to ask for its log
        drawn[form] = file.read_text()
    assert all("rank 1 on host" in content for content in drawn.values())
    picture = ET.fromstring(drawn["svg"])
    assert picture.tag == "{http://www.w3.org/2000/svg}svg"
    assert "://" not in drawn["html"].replace("http://www.w3.org/2000/svg", "")
    spans = {e["name"]: e for e in json.loads(drawn["trace"])["traceEvents"] if e["ph"] == "X"}
    resident = loading.status()["timeline"]["resident"] * 1e6
    assert spans["load"]["ts"] + spans["load"]["dur"] == pytest.approx(resident)


def test_kubectl_finds_it_as_a_plugin_and_completes_it(
    world: Any, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripts = Path(sys.executable).parent
    monkeypatch.setenv("PATH", f"{scripts}{os.pathsep}{os.environ['PATH']}")
    world.create()
    listed = cluster.kubectl("headrace", "status", "-n", world.namespace, "-o", "json")
    assert [model["name"] for model in json.loads(listed)["modelDeployments"]] == ["tiny"]
    assert cluster.kubectl("__complete", "headrace", "doc").startswith("doctor\t")


def test_what_is_not_there_is_named(world: Any, headrace: Callable[..., Ran]) -> None:
    ran = headrace("status", "nothing", "-n", world.namespace)
    assert (ran.code, ran.out) == (os.EX_NOINPUT, "")
    assert "there is no ModelDeployment nothing" in ran.err
    world.create()
    ran = headrace("timeline", "tiny", "-n", world.namespace)
    assert ran.code == os.EX_NOINPUT
    assert "has no serving pod" in ran.err
    empty = headrace("status", "-n", "default")
    assert "no ModelDeployments here" in empty.out


@pytest.mark.parametrize("command", [["status"], ["doctor"], ["timeline", "tiny"]])
def test_refusals_are_one_sentence_and_an_exit_code(
    world: Any, cluster: Any, headrace: Callable[..., Ran], tmp_path: Path, command: list[str]
) -> None:
    command = [*command, "-n", world.namespace]
    expired = with_token(cluster, tmp_path / "expired", "no.such.token")
    ran = headrace(*command, kubeconfig=expired)
    assert ran.code == os.EX_NOPERM
    assert "have expired" in ran.err
    assert ran.err.count("\n") == 1
    gone = with_token(cluster, tmp_path / "gone", "x", "https://127.0.0.1:9")
    ran = headrace(*command, kubeconfig=gone)
    assert ran.code == os.EX_UNAVAILABLE
    assert "cannot be reached" in ran.err
    assert ran.err.count("\n") == 1
    if command[0] != "doctor":
        ran = headrace(*command, kubeconfig=user(world, cluster, tmp_path / "someone", []))
        assert ran.code == os.EX_NOPERM
        assert "no permission: modeldeployments.headrace.dev is forbidden" in ran.err


def test_a_kind_that_is_not_served_is_told_from_an_object_that_is_missing(admin: Path) -> None:
    unknown = Kind("Unknown", "unknown.headrace.dev", "v1", "unknowns")
    with pytest.raises(KindMissing):
        run(Target(str(admin)), lambda kube: kube.list(unknown))


def test_doctor_finds_what_is_missing_and_says_the_fix(
    world: Any, kube: Any, operator: Any, headrace: Callable[..., Ran]
) -> None:
    world.create()
    world.wait_condition("VolumeReady", "False", "ClaimNotFound")
    ran = headrace("doctor", "-n", world.namespace, "-o", "json")
    found = {f["check"]: f for f in ran.json["findings"]}
    assert ran.code == 1
    assert found["CRD"]["grade"] == "ok"
    assert found["operator"]["grade"] == "problem"  # it runs as a process, not as a Deployment
    assert "helm install" in found["operator"]["fix"]
    assert found["claim weights"]["message"] == "does not exist"
    assert "ClaimNotFound" in found["model tiny"]["message"]
    assert found["GPU nodes"]["grade"] == "warning"
    assert found["storage"]["fix"].startswith("install the aws-fsx-csi-driver")
    assert all(f["fix"] for f in found.values() if f["grade"] in ("problem", "warning"))


def test_doctor_says_why_an_operator_is_not_ready_and_when_it_is(
    world: Any, kube: Any, kubelet: Any, headrace: Callable[..., Ran], eventually: Any
) -> None:
    labels = {"app.kubernetes.io/name": "headrace-operator"}
    template = {
        "metadata": {"labels": labels},
        "spec": {"containers": [{"name": "operator", "image": "x"}]},
    }
    spec = {"replicas": 1, "selector": {"matchLabels": labels}, "template": template}
    name = {"name": "headrace", "namespace": world.namespace, "labels": labels}
    kube.create(DEPLOYMENT, {"metadata": name, "spec": spec})
    (pod,) = eventually(lambda: kube.list(POD, world.namespace), "the operator's pod")
    waiting = {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}
    status = {"name": "operator", "image": "x", "imageID": "", "ready": False, "restartCount": 0}
    kubelet.write(pod, {"phase": "Pending", "containerStatuses": [status | {"state": waiting}]})
    ran = headrace("doctor", "-n", world.namespace)
    assert "is not ready: ImagePullBackOff: pod headrace" in ran.out
    ready = {"type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"}
    kubelet.write(pod, {"phase": "Running", "conditions": [ready]})

    def is_ready() -> bool:
        found = world.kube.get(DEPLOYMENT, "headrace", world.namespace)
        return bool(found["status"].get("readyReplicas"))

    eventually(is_ready, "the operator to be ready")
    ran = headrace("doctor", "-n", world.namespace)
    assert f"✔ operator: {world.namespace}/headrace is ready" in ran.out
