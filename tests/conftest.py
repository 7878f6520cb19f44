"""Order of the suite, and which tests share a worker process.

In one process what is quick comes first, so that a failure shows early. Spread over
workers the longest comes first, so that none is left for the end.
"""

import importlib.util
import sys
from pathlib import Path, PurePosixPath

import pytest
from xdist.scheduler import LoadScopeScheduling

MARKERS = ("cluster", "engine", "node")  # from quick to slow
# Their tests share a cluster, an engine or a GPU; elsewhere the tests of one file stay together.
SHARING = {
    *("tests/engine", "tests/gpu", "tests/images", "tests/kube", "tests/node"),
    "tests/operator/cluster",
    "tests/operator/faults",
}


class Scheduling(LoadScopeScheduling):
    """Gives tests that share expensive fixtures to one worker."""

    def _split_scope(self, nodeid):
        path = PurePosixPath(nodeid.split("::")[0])
        return str(path.parent if str(path.parent) in SHARING else path)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    return Scheduling(config, log)


@pytest.fixture(scope="session")
def support():
    """The module loader_process of the loader's tests, which those of others use too."""
    path = Path(__file__).parent / "loader/loader_process.py"
    spec = importlib.util.spec_from_file_location("loader_process", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def cost(item):
    """Rank of a test: 0 without a marker, else that of its slowest one."""
    return max(
        (MARKERS.index(m.name) + 1 for m in item.iter_markers() if m.name in MARKERS), default=0
    )


def pytest_collection_modifyitems(config, items):
    items.sort(key=cost, reverse=hasattr(config, "workerinput"))
