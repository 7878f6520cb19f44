"""The real node: pods run, are confined, find each other; images arrive; clusters coexist."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest

from localkube import Cluster, LocalkubeError, archives, realnode

pytestmark = pytest.mark.node


def web_server(pods) -> dict[str, object]:
    probe = {"httpGet": {"port": 8000}, "periodSeconds": 1}
    serve = "exec python3 -m http.server --directory /tmp 8000"
    return pods.container("main", serve, readinessProbe=probe)


def fetch(address: str, path: str = "/") -> int:
    with urllib.request.urlopen(f"http://{address}{path}", timeout=10) as answer:
        return answer.status


def test_the_node_is_ready_in_seconds(node_cluster):
    # 5 to 8 s on a quiet machine; the bound leaves room for one that is busy with other tests.
    assert node_cluster.timings["node"] < 40


def test_a_native_sidecar_holds_the_main_container_back(node_cluster, pods):
    probe = {"exec": {"command": ["test", "-e", "/tmp/ready"]}, "periodSeconds": 1}
    sidecar = pods.container(
        "sidecar",
        "sleep 2; touch /tmp/ready; exec sleep infinity",
        restartPolicy="Always",
        startupProbe={**probe, "failureThreshold": 30},
    )
    main = pods.container("main", "test -e /tmp/ready && id -u && exec sleep infinity")
    pods.apply(node_cluster, pods.pod("gated", main, sidecar))
    node_cluster.kubectl("wait", "pod/gated", "--for=condition=Ready", "--timeout=40s")
    assert node_cluster.kubectl("logs", "gated", "-c", "main") == "1000\n"
    status = json.loads(node_cluster.kubectl("get", "pod", "gated", "-o", "json"))["status"]
    started = [
        status[key][0]["state"]["running"]["startedAt"]
        for key in ("initContainerStatuses", "containerStatuses")
    ]
    assert started[0] < started[1]


def test_confinement_is_enforced(node_cluster, pods):
    # Root file system read-only, a seccomp filter in force, no way to new privileges.
    output = pods.run_to_end(
        node_cluster,
        "confined",
        "touch /x 2>&1; grep -E 'Seccomp:|NoNewPrivs:|CapEff:' /proc/self/status",
    )
    assert "Read-only file system" in output
    facts = dict(line.split(":\t") for line in output.splitlines() if ":\t" in line)
    assert facts == {"CapEff": "0000000000000000", "NoNewPrivs": "1", "Seccomp": "2"}


def test_pods_services_and_machine_reach_each_other(node_cluster, pods, wait_until):
    pods.apply(node_cluster, pods.pod("web", web_server(pods)))
    node_cluster.kubectl("expose", "pod", "web", "--port=80", "--target-port=8000")
    node_cluster.kubectl("wait", "pod/web", "--for=condition=Ready", "--timeout=40s")
    where = "jsonpath={.status.podIP} {.metadata.uid}"
    pod_address = node_cluster.kubectl("get", "pod", "web", "-o", where).split()[0]
    service = node_cluster.kubectl("get", "service", "web", "-o", "jsonpath={.spec.clusterIP}")
    wait_until(lambda: _answers(pod_address + ":8000"))
    wait_until(lambda: _answers(service))
    other = (
        f"python3 -c \"import urllib.request as u; print(u.urlopen('http://{service}').status)\""
    )
    assert pods.run_to_end(node_cluster, "client", other) == "200\n"
    itself = node_cluster.kubectl("exec", "web", "--", "sh", "-c", other)
    assert itself == "200\n"


def _answers(address: str) -> bool:
    try:
        return fetch(address) == 200
    except OSError:
        return False


def test_a_pod_reaches_the_api_server_with_its_service_account(node_cluster, pods):
    program = """
import os, ssl, urllib.error, urllib.request
from pathlib import Path

account = Path("/var/run/secrets/kubernetes.io/serviceaccount")
trust = ssl.create_default_context(cafile=str(account / "ca.crt"))
request = urllib.request.Request(
    f"https://{os.environ['KUBERNETES_SERVICE_HOST']}/api/v1/namespaces/default/pods",
    headers={"Authorization": "Bearer " + (account / "token").read_text()},
)
try:
    urllib.request.urlopen(request, context=trust, timeout=10)
except urllib.error.HTTPError as error:
    print(error.code, error.read().decode())
"""
    output = pods.run_to_end(node_cluster, "api-client", f"exec python3 -c {shlex.quote(program)}")
    assert output.startswith("403 ")
    assert "system:serviceaccount:default:default" in output


def test_port_forward_reaches_a_pod(node_cluster, pods, wait_until):
    pods.apply(node_cluster, pods.pod("forwarded", web_server(pods)))
    node_cluster.kubectl("wait", "pod/forwarded", "--for=condition=Ready", "--timeout=40s")
    with subprocess.Popen(
        [node_cluster.bin("kubectl"), "port-forward", "pod/forwarded", ":8000"],
        env=node_cluster.environment,
        stdout=subprocess.PIPE,
        text=True,
    ) as forward:
        try:
            line = forward.stdout.readline()  # Forwarding from 127.0.0.1:PORT -> 8000
            address = line.split()[2]
            wait_until(lambda: _answers(address))
        finally:
            forward.kill()


def test_a_mount_made_in_the_node_is_seen_by_pods_but_not_by_the_machine(
    node_cluster, pods, tmp_path
):
    volume = tmp_path / "volume"
    volume.mkdir()
    node_cluster.run_in_node("mount", "-t", "tmpfs", "-o", "size=64k,mode=1777", "tmpfs", volume)
    assert str(volume) not in Path("/proc/self/mountinfo").read_text()
    pod = pods.pod("full", pods.container("main", "head -c 1M /dev/zero 2>&1 > /volume/file; true"))
    pod["spec"]["volumes"].append({"name": "volume", "hostPath": {"path": str(volume)}})
    pod["spec"]["containers"][0]["volumeMounts"].append({"name": "volume", "mountPath": "/volume"})
    pod["spec"]["restartPolicy"] = "Never"
    pods.apply(node_cluster, pod)
    node_cluster.kubectl(
        "wait", "pod/full", "--for=jsonpath={.status.phase}=Succeeded", "--timeout=30s"
    )
    assert "No space left on device" in node_cluster.kubectl("logs", "full")
    assert not (volume / "file").exists()


def image(tmp_path: Path, name: str, content: bytes) -> Path:
    program, archive = tmp_path / "program", tmp_path / "image.tar"
    program.write_bytes(content)
    archives.single_program_image(program, name, archive)
    return archive


def test_an_image_is_imported_once_and_again_when_it_changed(node_cluster, tmp_path):
    archive = image(tmp_path, "localhost/test:1", b"one")
    assert node_cluster.import_image(archive) == ["localhost/test:1"]
    first = node_cluster.ctr("images", "list", "name==localhost/test:1")
    assert node_cluster.import_image(archive) == ["localhost/test:1"]
    assert node_cluster.ctr("images", "list", "name==localhost/test:1") == first
    image(tmp_path, "localhost/test:1", b"two and more")
    assert node_cluster.import_image(archive) == ["localhost/test:1"]
    assert node_cluster.ctr("images", "list", "name==localhost/test:1") != first


def test_an_image_that_was_replaced_is_imported_again(node_cluster, tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    contents = [b"a", b"b"]
    for folder in folders:
        folder.mkdir()
    first, second = (
        image(folder, "localhost/moving:1", content)
        for folder, content in zip(folders, contents, strict=True)
    )
    listing = []
    for archive in (first, second, first):
        node_cluster.import_image(archive)
        listing.append(node_cluster.ctr("images", "list", "name==localhost/moving:1"))
    assert listing[0] != listing[1]
    assert listing[0] == listing[2]


def test_a_replaced_image_does_not_stay_on_the_disk(node_cluster, tmp_path):
    def digests():
        rows = [line.split() for line in node_cluster.ctr("images", "list").splitlines()[1:]]
        return {row[0]: row[2] for row in rows}

    archive = image(tmp_path, "localhost/replaced:1", b"old")
    node_cluster.import_image(archive)
    old = digests()["localhost/replaced:1"]
    deadline = time.monotonic() + 20
    while list(digests().values()).count(old) < 2:  # the name, and the CRI plugin's own
        assert time.monotonic() < deadline
        time.sleep(0.1)
    image(tmp_path, "localhost/replaced:1", b"new, and longer")
    node_cluster.import_image(archive)
    assert old not in digests().values()
    assert old not in node_cluster.ctr("content", "list", "--quiet").split()


def test_a_file_that_is_no_image_is_refused(node_cluster, tmp_path):
    text = tmp_path / "notes.tar"
    text.write_text("no archive")
    with pytest.raises(LocalkubeError, match="notes"):
        node_cluster.import_image(text)


def test_a_second_cluster_runs_beside(node_cluster, pods, tmp_path):
    with Cluster(tmp_path).up(node=True) as beside:
        assert beside.server != node_cluster.server
        for cluster, word in ((node_cluster, "here"), (beside, "there")):
            assert pods.run_to_end(cluster, "side", f"echo {word}") == f"{word}\n"
    assert "localkube" in node_cluster.kubectl("get", "nodes", "-o", "name")


def test_images_outlive_the_cluster_that_imported_them(can_run_node, tmp_path, caplog):
    archive = image(tmp_path, "localhost/kept:1", b"kept")
    store = tmp_path / "images"
    with Cluster(tmp_path / "first").up(node=True, images=store) as first:
        assert first.import_image(archive) == ["localhost/kept:1"]
    with Cluster(tmp_path / "second").up(node=True, images=store) as second:
        assert "localhost/kept:1" in second.ctr("images", "list", "-q")
        # A third cluster would do without: the node's init has the lock.
        instead, lock = realnode.open_store(store, tmp_path / "private")
        os.close(lock)
    assert instead.root == tmp_path / "private"
    assert f"{store} is in use by another cluster: starting without its images" in caplog.text


def test_a_node_cluster_below_run_is_refused(can_run_node):
    with pytest.raises(LocalkubeError, match="choose a directory that is not below /run"):
        Cluster("/run/localkube-test").up(node=True)
