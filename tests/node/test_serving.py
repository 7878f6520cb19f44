"""A model served on a real node: the answer, the confinement, the death of its engine."""

import json
import re
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from demo.coldstart import attached_lines, loader_status
from demo.completion import complete
from demo.observe import wait_for
from demo.reference import PlainAnswer

PROMPT = "the river flows into"
TOKENS = 16
# An engine starts in one minute on two idle cores, in two beside the rest of the suite.
READY_SECONDS = 300

pytestmark = pytest.mark.timeout(3 * READY_SECONDS)


@pytest.fixture(scope="module")
def expected_tokens(site):
    """What plain vLLM answers from the unsharded model; computed while the pod starts."""
    source = site.make_model("served")
    with PlainAnswer(source, PROMPT, tokens=TOKENS, tensor_parallel_size=1) as plain:
        yield plain


@pytest.fixture(scope="module")
def model(site, expected_tokens, real_engine):
    """A release of charts/headrace-model."""
    model = site.install("served", engine=real_engine)
    model.wait_true("Ready", timeout=READY_SECONDS)
    yield model
    site.helm("uninstall", "served")


def serving_pod(model):
    (pod,) = model.children("pods", "serve")
    return pod


def ask(model):
    service = model.get("service", model.name)["spec"]
    url = f"http://{service['clusterIP']}:{service['ports'][0]['port']}"
    return complete(url, model.name, PROMPT, TOKENS)


def metric(pod, name):
    url = f"http://{pod['status']['podIP']}:9400/metrics"
    with urllib.request.urlopen(url, timeout=10) as response:
        text = response.read().decode()
    return float(re.search(rf"^{name} (\S+)$", text, re.MULTILINE)[1])


def test_answer_equals_that_of_plain_vllm(model, expected_tokens):
    assert ask(model).token_ids == expected_tokens.token_ids()


def test_helm_test_of_the_models_chart_gets_an_answer(site, model):
    output = site.helm("test", model.name, "--logs")
    (answer,) = (json.loads(line) for line in output.splitlines() if line.startswith("{"))
    assert answer["model"] == model.name
    assert answer["usage"]["completion_tokens"] == 1


def test_every_condition_holds_but_the_direct_path(model):
    conditions = model.conditions()
    states = {kind: condition["status"] for kind, condition in conditions.items()}
    direct = states.pop("DirectPath")
    assert direct == "False"
    assert (states.pop("Reconciling"), states.pop("Stalled")) == ("False", "False")
    assert states == dict.fromkeys(
        ["VolumeReady", "CheckpointReady", "WeightsResident", "Available", "Ready"], "True"
    )


def test_engine_started_only_after_the_weights_were_resident(model):
    pod = serving_pod(model)
    (engine,) = pod["status"]["containerStatuses"]
    resident = loader_status(pod)["timeline"]["resident"]
    log = model.cluster.kubectl("logs", pod["metadata"]["name"], "-c", "engine", "--timestamps")
    ((attached, _, size, _),) = attached_lines(log)
    assert resident < attached
    assert size == loader_status(pod)["totalBytes"]
    assert engine["restartCount"] == 0


def headrace(model, *arguments, kubeconfig=None):
    """What the command line prints as JSON."""
    target = ("-n", model.namespace, f"--kubeconfig={kubeconfig or model.cluster.kubeconfig}")
    command = [sys.executable, "-m", "headrace_cli", *arguments, *target, "--output=json"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stderr or ran.stdout
    return json.loads(ran.stdout)


def test_command_line_shows_the_cold_start_of_a_real_pod(model):
    (shown,) = headrace(model, "status", model.name)["modelDeployments"]
    pod = next(pod for pod in shown["pods"] if pod["component"] == "serve")
    assert (shown["ready"], pod["stage"], pod["loader"]["phase"]) == (True, "ready", "Ready")
    spans = headrace(model, "timeline", model.name)["spans"]
    lanes = {span["lane"] for span in spans}
    assert {"sharding", "pod", "loader", "rank 0 on host", "engine"} <= lanes
    engine = [span["name"] for span in spans if span["lane"] == "engine"]
    assert engine[:2] == ["start process", "attach weights"]
    assert {"initialize engine", "serving"} <= set(engine)
    findings = headrace(model, "doctor")["findings"]
    assert {f["check"]: f["grade"] for f in findings}["operator"] == "ok"


def test_command_line_asks_the_loader_by_port_forward_where_the_proxy_is_not_allowed(model):
    reads = {"apiGroups": ["headrace.dev"], "resources": ["modeldeployments"], "verbs": ["list"]}
    pods = {"apiGroups": [""], "resources": ["pods"], "verbs": ["list"]}
    # Websockets ask for get, and from Kubernetes 1.35 on for create as well.
    forward = {"apiGroups": [""], "resources": ["pods/portforward"], "verbs": ["get", "create"]}
    meta = {"name": "forwarder", "namespace": model.namespace}
    role = {"kind": "Role", "metadata": meta, "rules": [reads, pods, forward]}
    reference = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "forwarder"}
    subjects = [{"kind": "User", "name": "forwarder", "apiGroup": "rbac.authorization.k8s.io"}]
    binding = {"kind": "RoleBinding", "metadata": meta, "roleRef": reference, "subjects": subjects}
    for body in (role, binding):
        versioned = {"apiVersion": "rbac.authorization.k8s.io/v1", **body}
        model.cluster.kubectl("apply", "-f", "-", stdin=json.dumps(versioned))
    kubeconfig = model.cluster.kubeconfig_for("forwarder")
    listed = headrace(model, "status", kubeconfig=kubeconfig)["modelDeployments"]
    (shown,) = [one for one in listed if one["name"] == model.name]
    pod = next(pod for pod in shown["pods"] if pod["component"] == "serve")
    assert pod["loaderProblem"] is None
    assert pod["loader"]["totalBytes"] == loader_status(serving_pod(model))["totalBytes"]


def test_what_the_engine_compiled_is_on_the_volume(site, model):
    def cache():
        return loader_status(serving_pod(model))["engineCache"]

    wait_for("publication", lambda: cache()["state"] == "Published", timeout=30)
    assert cache()["bytes"] > 0
    (stored,) = site.volume.glob("headrace/*/compiled/*.zip")
    assert stored.name == Path(cache()["message"]).name


def test_pods_run_without_rights(model):
    pod = serving_pod(model)["metadata"]["name"]
    for container in ("loader", "engine"):
        run = ("exec", pod, "-c", container, "--", "python3", "-c")
        status = model.cluster.kubectl(*run, "print(open('/proc/self/status').read())")
        fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        assert fields["Uid"].split() == ["1000"] * 4
        assert int(fields["CapEff"], 16) == 0
        assert fields["NoNewPrivs"] == "1"
        assert fields["Seccomp"] == "2"
        write = (
            "import errno\ntry: open('/x', 'w')\nexcept OSError as e: print(e.errno == errno.EROFS)"
        )
        assert model.cluster.kubectl(*run, write).strip() == "True"


def test_loader_image_carries_cufile_and_its_bindings(model):
    pod = serving_pod(model)["metadata"]["name"]
    code = "import kvikio; print('libcufile.so' in open('/proc/self/maps').read())"
    found = model.cluster.kubectl("exec", pod, "-c", "loader", "--", "python3", "-c", code)
    assert found.strip() == "True"


def test_killed_engine_attaches_again_and_nothing_is_loaded_again(site, model, expected_tokens):
    before = serving_pod(model)
    site.kill(before, "engine")

    def restarted():
        (engine,) = serving_pod(model)["status"]["containerStatuses"]
        return engine["restartCount"] == 1 and engine["ready"]

    wait_for("a second engine", restarted, timeout=READY_SECONDS)
    after = serving_pod(model)
    assert after["metadata"]["uid"] == before["metadata"]["uid"]
    (loader,) = after["status"]["initContainerStatuses"]
    assert loader["restartCount"] == 0
    assert metric(after, "headrace_loader_loads_total") == 1
    assert metric(after, "headrace_loader_attachments_total") == 2
    assert ask(model).token_ids == expected_tokens.token_ids()
