"""Nothing of a cluster is left after teardown, whatever happened to it before."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from localkube import Cluster, LocalkubeError, network, processes
from localkube.layout import Layout
from localkube.namespaces import Namespaces

NODE = pytest.param(True, marks=pytest.mark.node, id="node")
CONTROL_PLANE = pytest.param(False, marks=pytest.mark.cluster, id="control plane")


class Traces:
    """What a cluster leaves on the machine, from the time it is up."""

    def __init__(self, cluster: Cluster, *, node: bool) -> None:
        self.layout = Layout.of(cluster.directory)
        self.namespaces: set[str] = set()
        if node:
            pid = Namespaces.find(cluster.directory).pid
            self.namespaces = {
                str(Path(f"/proc/{pid}/ns/{kind}").readlink()) for kind in ("net", "pid", "mnt")
            }
            assert len(self.left()) >= 4

    def left(self) -> list[str]:
        """Processes, interface, control groups, mounts and namespaces that are still there."""
        # Not glob(), which fails where a group of any test goes while it looks.
        groups = (
            Path(parent, self.layout.group)
            for parent, names, _ in os.walk("/sys/fs/cgroup")
            if self.layout.group in names
        )
        interface = Path("/sys/class/net", network.interface_name(self.layout.identity))
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
        return [
            *(f"process {process}" for process in processes.find(self.layout.root)),
            *(f"group {group}" for group in groups),
            *(["interface"] if interface.exists() else []),
            *(f"mount {line}" for line in mounts if f"{self.layout.root}/" in line),
            *(f"namespace {name}" for name in self.namespaces & self._namespaces_in_use()),
        ]

    def _namespaces_in_use(self) -> set[str]:
        """Namespaces of all processes but those of other clusters.

        The kernel gives a namespace the number of one that is gone, and clusters that other
        tests start meanwhile make many.
        """
        found = set()
        for process in Path("/proc").glob("[0-9]*"):
            try:
                groups = (process / "cgroup").read_text()
                if "/localkube-" in groups.replace(f"/{self.layout.group}", ""):
                    continue
                found |= {str(link.readlink()) for link in (process / "ns").iterdir()}
            except OSError:
                continue
        return found


def files_left(cluster: Cluster) -> set[str]:
    return {path.name for path in cluster.directory.iterdir()}


def run_python(code: str, *arguments: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)])


@pytest.fixture
def need(request):
    """Return a function that skips, saying why, where a node is wanted and cannot run."""
    return lambda node: request.getfixturevalue("can_run_node") if node else None


def up_in_another_process(directory: Path, *options: str) -> Cluster:
    command = [sys.executable, "-m", "localkube", "up", "--dir", directory, *options]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert printed == f"export KUBECONFIG={directory}/kubeconfig\n"
    return Cluster(directory)


@pytest.mark.node
def test_down_in_another_process_leaves_only_logs(can_run_node, tmp_path, pods):
    cluster = up_in_another_process(tmp_path, "--node")
    traces = Traces(cluster, node=True)
    assert pods.run_to_end(cluster, "once", "echo ran") == "ran\n"
    cluster.down()
    assert traces.left() == []
    assert files_left(cluster) == {".lock", "logs"}


@pytest.mark.cluster
def test_down_without_a_record_kills_everything_that_is_the_clusters_and_nothing_else(tmp_path):
    cluster = up_in_another_process(tmp_path)
    listing = [sys.executable, "-m", "localkube", "list"]
    running = subprocess.run(listing, check=True, capture_output=True, text=True).stdout
    assert str(tmp_path) in running.splitlines()
    (tmp_path / "cluster.json").unlink()
    stranger = subprocess.Popen(["sleep", "600"], env={processes.OWNER: f"{tmp_path}-other"})
    try:
        cluster.down()
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()
    assert Traces(cluster, node=False).left() == []
    assert files_left(cluster) == {".lock", "logs"}


@pytest.mark.parametrize("node", [CONTROL_PLANE, NODE])
def test_killing_the_python_process_takes_the_cluster_down(need, node, tmp_path, wait_until):
    need(node)
    user = run_python(
        "import sys, time; from localkube import Cluster\n"
        "with Cluster(sys.argv[1]).up(node=sys.argv[2] == 'True') as cluster:\n"
        "    (cluster.directory / 'inside').touch(); time.sleep(600)",
        tmp_path,
        node,
    )
    wait_until((tmp_path / "inside").exists, 90)
    cluster = Cluster(tmp_path)
    traces = Traces(cluster, node=node)
    assert traces.left()
    user.kill()
    user.wait()
    wait_until(lambda: not traces.left() and "kubeconfig" not in files_left(cluster), 30)


@pytest.mark.node
@pytest.mark.parametrize("component", ["node-init", "kube-apiserver"])
def test_down_after_killing_python_in_mid_start(can_run_node, component, tmp_path, wait_until):
    user = run_python(
        "import sys; from localkube import Cluster; Cluster(sys.argv[1]).up(node=True)", tmp_path
    )
    cluster = Cluster(tmp_path)
    wait_until(lambda: component in cluster.status(), 60)
    user.kill()
    user.wait()
    traces = Traces(cluster, node=False)
    assert traces.left()
    cluster.down()
    assert traces.left() == []


@pytest.mark.node
def test_down_after_killing_containerd_under_a_running_pod(can_run_node, tmp_path, pods):
    cluster = Cluster(tmp_path).up(node=True)
    traces = Traces(cluster, node=True)
    pods.apply(cluster, pods.pod("busy", pods.container("main", "exec sleep infinity")))
    cluster.kubectl("wait", "pod/busy", "--for=condition=Ready", "--timeout=40s")
    for process in processes.find(cluster.directory):
        if process.component == "containerd":
            os.kill(process.pid, signal.SIGKILL)
    cluster.down()
    assert traces.left() == []


@pytest.mark.cluster
def test_a_component_that_dies_is_named_with_its_log_and_nothing_is_left(tmp_path, monkeypatch):
    assets = tmp_path / "assets"
    assets.mkdir()
    broken = assets / "kube-scheduler"
    broken.write_text("#!/bin/sh\necho the disk ate my schedule >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("KUBEBUILDER_ASSETS", str(assets))
    cluster = Cluster(tmp_path / "cluster")
    with pytest.raises(LocalkubeError, match=r"(?s)kube-scheduler: exited .*the disk ate my"):
        cluster.up()
    assert Traces(cluster, node=False).left() == []
    assert files_left(cluster) == {".lock", "logs"}


@pytest.mark.cluster
def test_what_is_mounted_in_the_directory_is_not_deleted(can_run_node, tmp_path):
    cluster = Cluster(tmp_path)
    inside = tmp_path / "etcd" / "somebody's disk"
    inside.mkdir(parents=True)
    (tmp_path / "etcd" / "file").touch()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", inside], check=True)
    try:
        (inside / "precious").touch()
        with pytest.raises(LocalkubeError, match="somebody's disk; unmount, then repeat"):
            cluster.down()
        assert (inside / "precious").exists()
    finally:
        subprocess.run(["umount", inside], check=True)
    cluster.down()
    assert not (tmp_path / "etcd").exists()
