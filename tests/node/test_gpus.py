"""GPUs of ResourceClaims on a real node: published, allocated, prepared and taken back.

Scheduler, kubelet, containerd and the driver's library are real. The GPUs are not: their driver
is modules/dra of tools/kube, and what it mounts in place of CUDA makes the loader use host memory.
"""

import json

import pytest

import imagebuild
from demo.observe import wait_for
from localkube.node import NODE_NAME

LOADER = imagebuild.IMAGES["headrace-loader"].reference
DRIVER = "gpu.example.com"
COMPONENT = "fake-gpu-driver"
SPECIFICATIONS = "/var/run/cdi"
SECONDS = 120

PROGRAM = "/opt/headrace/bin/headrace-loader"
WITHOUT_CUDA = """#!/opt/headrace/bin/python
import sys
from headrace_loader.__main__ import main
sys.exit(main(["host" if word == "cuda" else word for word in sys.argv[1:]]))
"""
ANSWERING = """
from http.server import BaseHTTPRequestHandler, HTTPServer
class Health(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
HTTPServer(("", 8000), Health).serve_forever()
"""
SEEN = """
import glob, json, os
paths = sorted(glob.glob("/dev/fake-gpu-*"))
uuids = sorted(value for name, value in os.environ.items() if name.startswith("FAKE_GPU_"))
print(json.dumps([paths, [open(path).read() for path in paths], uuids]))
"""


@pytest.fixture(scope="module")
def four_fake_gpus(site):
    """Four devices that a driver publishes and prepares on the real node, and their class."""
    cluster = site.cluster
    if COMPONENT not in cluster.status():
        program = site.volume.parent / "headrace-loader"
        program.write_text(WITHOUT_CUDA)
        program.chmod(0o755)
        options = {"kubeconfig": cluster.kubeconfig, "node": NODE_NAME, "gpus": 4}
        flags = [f"-{name}={value}" for name, value in options.items()]
        command = [cluster.bin(COMPONENT), *flags, f"-mount={program}:{PROGRAM}"]
        cluster.start_in_node(COMPONENT, command)
    selectors = [{"cel": {"expression": f"device.driver == '{DRIVER}'"}}]
    body = {"apiVersion": "resource.k8s.io/v1", "kind": "DeviceClass"}
    site.apply({**body, "metadata": {"name": DRIVER}, "spec": {"selectors": selectors}})


@pytest.fixture
def model(site, four_fake_gpus):
    """Three replicas of two GPUs each."""
    site.make_model("gpus")
    yield site.deploy(
        "gpus",
        tensor_parallel_size=2,
        replicas=3,
        gpu={"sharing": "ResourceClaim", "deviceClassName": DRIVER},
        engine={"image": LOADER, "command": ["python3", "-c", ANSWERING]},
        pod={"terminationGracePeriodSeconds": 1},
        sharding={"parallelism": 1},
    )
    site.delete("gpus")


def gpus_of(model, pod):
    """Return the GPUs that loader and engine of a pod both see and can open."""
    command = ("--", "python3", "-c", SEEN)
    loader, engine = (
        json.loads(model.cluster.kubectl("exec", name_of(pod), "-c", container, *command))
        for container in ("loader", "engine")
    )
    assert loader == engine
    paths, contents, uuids = loader
    assert contents == ["", ""]
    assert [path[-1] for path in paths] == [uuid[-1] for uuid in uuids]
    return frozenset(uuids)


def name_of(pod):
    return pod["metadata"]["name"]


def answering(model, restarts=0):
    """Return the pods whose engine answers, after as many restarts, by name."""
    found = {}
    for pod in model.children("pods", "serve"):
        for engine in pod["status"].get("containerStatuses", ()):
            if engine["ready"] and engine["restartCount"] == restarts:
                found[name_of(pod)] = pod
    return found


def prepared(model):
    """Return the specifications of prepared claims on the node."""
    return model.cluster.run_in_node("ls", SPECIFICATIONS).split()


def claims(model):
    return json.loads(model.cluster.kubectl("get", "resourceclaims", "-o", "json"))["items"]


def test_fake_gpus_are_shared_within_pods_and_never_between_them(site, model):
    wait_for("two pods that answer", lambda: len(answering(model)) == 2, timeout=SECONDS)
    pods = answering(model)
    held = {name: gpus_of(model, pod) for name, pod in pods.items()}
    assert len(frozenset.union(*held.values())) == 4
    users = [user["name"] for c in claims(model) for user in c["status"].get("reservedFor", ())]
    assert sorted(users) == sorted(held)
    assert len(prepared(model)) == 2

    def explained(conditions):
        return conditions["WeightsResident"]["reason"] == "Unschedulable"

    conditions = model.wait("the third pod's lack", explained, timeout=SECONDS)
    assert "cannot allocate all claims" in conditions["WeightsResident"]["message"]
    assert conditions["Available"]["message"] == "2 of 3 replicas answer requests"

    deleted, killed = pods
    model.cluster.kubectl("delete", "pod", deleted, "--wait=false")
    site.kill(pods[killed], "engine")

    def went_on():
        return answering(model, restarts=1).keys() | answering(model).keys() - pods.keys()

    wait_for("the killed engine and a third pod", lambda: len(went_on()) == 2, timeout=SECONDS)
    assert gpus_of(model, pods[killed]) == held[killed]
    (third,) = answering(model).values()
    assert gpus_of(model, third) == held[deleted]

    site.delete("gpus")
    wait_for("GPUs taken back", lambda: prepared(model) == [], timeout=SECONDS)
    wait_for("no claims", lambda: claims(model) == [], timeout=SECONDS)
