"""The control plane is a real one: versions, authorization, admission, controllers."""

from __future__ import annotations

import json
import re
import socket
import ssl
import stat
import urllib.error
import urllib.request

import pytest

from localkube import Cluster, LocalkubeError, controlplane
from localkube.modules import module_of

pytestmark = pytest.mark.cluster


def as_user(cluster: Cluster, kubeconfig, *arguments: str, check: bool = True) -> str:
    return cluster.kubectl("--kubeconfig", str(kubeconfig), *arguments, check=check)


def test_the_version_is_the_pinned_one(control_plane):
    pinned = re.search(
        r"k8s.io/kubernetes (v\S+)", (module_of("kubectl").directory / "go.mod").read_text()
    ).group(1)
    versions = json.loads(control_plane.kubectl("version", "-o", "json"))
    assert versions["serverVersion"]["gitVersion"] == pinned
    assert versions["clientVersion"]["gitVersion"] == pinned


def test_the_api_server_is_ready_in_seconds(control_plane):
    # 5 s on a quiet machine; the bound leaves room for one that is busy with other tests.
    assert control_plane.timings["API server"] < 20


def test_rbac_refuses_whom_it_does_not_know_and_admits_whom_it_does(control_plane):
    alice = control_plane.kubeconfig_for("alice", groups=["developers"])
    with pytest.raises(LocalkubeError, match='User "alice" cannot list resource "pods"'):
        as_user(control_plane, alice, "get", "pods")
    control_plane.kubectl(
        "create", "rolebinding", "dev", "--clusterrole=view", "--group=developers"
    )
    assert as_user(control_plane, alice, "get", "pods", "-o", "name") == ""
    with pytest.raises(LocalkubeError, match="cannot delete resource"):
        as_user(control_plane, alice, "delete", "serviceaccount", "default")


def test_a_node_may_not_touch_another_node(control_plane):
    node = control_plane.kubeconfig_for("system:node:kwok-0", groups=["system:nodes"])
    as_user(control_plane, node, "label", "node", "kwok-0", "mine=yes")
    with pytest.raises(LocalkubeError, match="only its own Node object"):
        as_user(control_plane, node, "label", "node", "kwok-1", "mine=yes")


def test_an_unauthenticated_request_is_refused(control_plane):
    trust = ssl.create_default_context(cafile=str(control_plane.authority))
    with pytest.raises(urllib.error.HTTPError) as refusal:
        urllib.request.urlopen(f"{control_plane.server}/api/v1/pods", context=trust, timeout=10)
    refusal.value.close()
    assert refusal.value.code == 403


def test_a_pod_with_an_unknown_service_account_is_refused(control_plane, pods):
    pod = pods.pod("orphan", pods.container("main", "true"))
    pod["spec"]["serviceAccountName"] = "nobody"
    with pytest.raises(LocalkubeError, match='serviceaccount "nobody" not found'):
        pods.apply(control_plane, pod)


def test_simulated_nodes_run_deployments_and_finish_jobs(control_plane):
    control_plane.kubectl("create", "deployment", "web", "--image=any", "--replicas=3")
    control_plane.kubectl("rollout", "status", "deployment/web", "--timeout=30s")
    control_plane.kubectl("create", "job", "once", "--image=any")
    control_plane.kubectl("wait", "job/once", "--for=condition=Complete", "--timeout=30s")
    nodes = control_plane.kubectl(
        "get", "pods", "-l", "app=web", "-o", "jsonpath={.items[*].spec.nodeName}"
    )
    assert set(nodes.split()) <= {"kwok-0", "kwok-1"}


def test_helm_installs_a_chart(control_plane, tmp_path):
    (tmp_path / "Chart.yaml").write_text("apiVersion: v2\nname: tiny\nversion: 0.1.0\n")
    templates = tmp_path / "templates"
    templates.mkdir()
    (templates / "map.yaml").write_text(
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: from-helm}\n"
        "data: {kubernetes: {{ .Capabilities.KubeVersion.Version | quote }}}\n"
    )
    control_plane.run([control_plane.bin("helm"), "install", "tiny", str(tmp_path)])
    version = control_plane.kubectl("get", "cm", "from-helm", "-o", "jsonpath={.data.kubernetes}")
    assert version.startswith("v1.36.")


def test_up_keeps_a_cluster_that_is_up_and_refuses_other_options(control_plane):
    running = control_plane.status()
    again = Cluster(control_plane.directory).up(kwok=2)
    assert again.server == control_plane.server
    assert control_plane.status() == running
    with pytest.raises(LocalkubeError, match="kwok=2, asked for node=False kwok=0; tear it down"):
        Cluster(control_plane.directory).up()


def test_nobody_else_can_read_the_keys(control_plane):
    assert stat.S_IMODE(control_plane.directory.stat().st_mode) == 0o700
    keys = [control_plane.kubeconfig, *control_plane.directory.glob("pki/*.key")]
    assert len(keys) > 3
    assert {stat.S_IMODE(path.stat().st_mode) for path in keys} == {0o600}


def test_a_port_taken_meanwhile_is_replaced(tmp_path, monkeypatch):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        taken = listener.getsockname()[1]
        choose = controlplane.free_port
        ports = iter([taken])
        monkeypatch.setattr(
            controlplane, "free_port", lambda address: next(ports, None) or choose(address)
        )
        with Cluster(tmp_path).up() as cluster:
            assert not cluster.server.endswith(f":{taken}")
            assert cluster.kubectl("get", "namespaces", "-o", "name")


def test_commands_on_a_cluster_that_is_down_say_so(tmp_path):
    cluster = Cluster(tmp_path / "none")
    assert cluster.status() == {}
    cluster.down()
    with pytest.raises(LocalkubeError, match="is not up; bring it up first"):
        cluster.kubeconfig_for("alice")
    with pytest.raises(LocalkubeError, match="has no running node"):
        cluster.run_in_node("true")


def test_a_file_is_no_cluster_directory(tmp_path):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(LocalkubeError, match="is not a directory; name another one"):
        Cluster(file)
