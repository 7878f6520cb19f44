"""What goes wrong on a real node ends in a condition that names the cause, and serves nothing."""

import json
import os
import shutil

import pytest

from demo.observe import wait_for

FAILURE_SECONDS = 120
# Enough to start a Python at all, little enough to catch it at work.
SLOW = {"resources": {"limits": {"cpu": "100m"}}}
VERY_SLOW = {"resources": {"limits": {"cpu": "40m"}}}
LARGE = ("--hidden-size", "1024", "--intermediate-size", "4096", "--layers", "8")


def config(model, **changes):
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def truncate(model):
    weights = model / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 4096)


def lie_about_offsets(model):
    weights = model / "model.safetensors"
    content = weights.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    name = next(name for name in header if name != "__metadata__")
    begin, end = header[name]["data_offsets"]
    header[name]["data_offsets"] = [begin + 2, end + 2]
    weights.write_bytes(content[:8] + json.dumps(header).encode().ljust(size) + content[8 + size :])


SOURCES = {
    "missing": (shutil.rmtree, 1, "SourceNotFound", "missing"),
    "no-architectures": (
        lambda m: config(m, architectures=[]),
        1,
        "ConfigInvalid",
        "architectures",
    ),
    "unknown-architecture": (
        lambda m: config(m, architectures=["NoSuchModel"]),
        1,
        "ArchitectureUnsupported",
        "NoSuchModel",
    ),
    "uneven-heads": (lambda m: None, 3, "ParallelismInvalid", "3"),
    "truncated": (truncate, 1, "SourceCorrupt", "model.safetensors"),
    "lying-header": (lie_about_offsets, 1, "SourceCorrupt", "model.safetensors"),
}


@pytest.fixture(scope="module")
def broken(site):
    """All broken sources deployed at once."""
    models = {}
    for name, (damage, ranks, _, _) in SOURCES.items():
        damage(site.make_model(name))
        models[name] = site.deploy(name, tensor_parallel_size=ranks)
    yield models
    for name in SOURCES:
        site.delete(name)


def published(site):
    return sorted(site.volume.glob("headrace/*/*/manifest.json"))


@pytest.mark.parametrize("name", SOURCES)
def test_bad_source_is_refused_with_its_cause(site, broken, name):
    _, _, reason, word = SOURCES[name]
    model = broken[name]

    def refused(conditions):
        return conditions.get("CheckpointReady", {}).get("reason") == reason

    conditions = model.wait(reason, refused, timeout=FAILURE_SECONDS)
    assert conditions["CheckpointReady"]["status"] == "False"
    assert word in conditions["CheckpointReady"]["message"]
    assert "Traceback" not in conditions["CheckpointReady"]["message"]
    assert conditions["Ready"]["reason"] == reason
    assert model.children("pods", "serve") == []
    assert not [path for path in published(site) if name in path.parts]


def test_no_space_on_the_volume(site):
    small = site.volume.parent / "small"
    site.cluster.run_in_node("mkdir", "-p", small)
    site.cluster.run_in_node("mount", "-t", "tmpfs", "-o", "size=64k,mode=1777", "tmpfs", small)
    site.make_model("crowded")
    site.expose(small, "small")
    model = site.deploy("crowded", claim="small")

    def refused(conditions):
        return conditions.get("CheckpointReady", {}).get("reason") == "NoSpaceOnVolume"

    model.wait("NoSpaceOnVolume", refused, timeout=FAILURE_SECONDS)
    assert model.children("pods", "serve") == []
    site.delete("crowded")


def test_missing_image_is_named(site):
    site.make_model("imageless")
    model = site.deploy("imageless", engine={"image": "localhost/nowhere:1"})

    def named(conditions):
        return "localhost/nowhere:1" in conditions.get("Ready", {}).get("message", "")

    conditions = model.wait("the image's name", named, timeout=FAILURE_SECONDS)
    assert conditions["WeightsResident"]["status"] == "True"
    assert conditions["Ready"]["status"] == "False"
    assert conditions["Ready"]["reason"] in {"ErrImagePull", "ImagePullBackOff"}
    assert "engine" in conditions["Ready"]["message"]
    site.delete("imageless")


def test_loader_killed_while_loading_loads_again_before_the_engine_starts(site):
    site.make_model("killed", *LARGE)
    model = site.deploy("killed", loading=SLOW)

    def loader():
        for pod in model.children("pods", "serve"):
            for status in pod["status"].get("initContainerStatuses", ()):
                return pod, status
        return None, {"state": {}}

    wait_for("a loader at work", lambda: "running" in loader()[1]["state"], timeout=FAILURE_SECONDS)
    pod, status = loader()
    assert not status["started"]
    site.kill(pod, "loader")
    wait_for("a second loader", lambda: loader()[1]["restartCount"] >= 1, timeout=FAILURE_SECONDS)
    pod, _ = loader()
    (engine,) = pod["status"]["containerStatuses"]
    assert "waiting" in engine["state"]
    model.wait_true("WeightsResident", timeout=FAILURE_SECONDS)
    wait_for("the engine", lambda: running_engine(model), timeout=FAILURE_SECONDS)
    site.delete("killed")


def running_engine(model):
    (pod,) = model.children("pods", "serve")
    (engine,) = pod["status"]["containerStatuses"]
    return "running" in engine["state"]


def test_deleted_while_sharding_leaves_nothing_that_could_be_served(site):
    site.make_model("deleted", *LARGE)
    model = site.deploy("deleted", sharding=VERY_SLOW)
    folder = site.volume / "headrace" / "deleted"
    wait_for(
        "a sharder that writes",
        lambda: any(folder.glob(".*.work/writing/*")),
        timeout=FAILURE_SECONDS,
    )
    site.delete("deleted")
    nothing = {"jobs": [], "pods": [], "deployments": []}
    wait_for(
        "no children",
        lambda: {kind: model.children(kind) for kind in nothing} == nothing,
        timeout=FAILURE_SECONDS,
    )
    assert not list(folder.rglob("manifest.json"))
