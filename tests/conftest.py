"""Order of the suite, which tests share a worker process, and what several directories start.

In one process what is quick comes first, so that a failure shows early. Spread over
workers the longest comes first, so that none is left for the end.
"""

import importlib.util
import shutil
import sys
from pathlib import Path, PurePosixPath

import pytest
from xdist.scheduler import LoadScopeScheduling

HERE = Path(__file__).parent
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
def load_module():
    """Import a file that is in no package, by its name."""

    def load(path):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def support(load_module):
    """The module loader_process of the loader's tests, which those of others use too."""
    return load_module(HERE / "loader/loader_process.py")


@pytest.fixture(scope="session")
def start_loader(support, tmp_path_factory):
    """Start loaders; all end with the session."""
    started = []

    def start(checkpoint, *arguments, **environment):
        root = tmp_path_factory.mktemp("loader")
        started.append(support.LoaderProcess(root, checkpoint, *arguments, **environment))
        return started[-1]

    yield start
    for loader in started:
        loader.close()


@pytest.fixture(scope="session")
def make_model(load_module, tmp_path_factory):
    """Make a tiny Llama; keyword arguments are those of tiny_llama.Size."""
    tiny_llama = load_module(HERE.parent / "examples/tiny_llama.py")

    def make(**size):
        return tiny_llama.make_tiny_llama(tmp_path_factory.mktemp("model"), tiny_llama.Size(**size))

    return make


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory):
    """Shard a model; returns the checkpoint's directory."""
    from headrace_checkpoint.sharder import ShardRequest, shard

    def make(model, dtype="auto", ranks=1, quantization="none"):
        output = tmp_path_factory.mktemp("checkpoints") / "made"
        shard(
            ShardRequest(
                source=model,
                output=output,
                tensor_parallel_size=ranks,
                identity={},
                dtype=dtype,
                quantization=quantization,
            )
        )
        return output

    return make


@pytest.fixture(scope="session")
def make_quantized(tmp_path_factory):
    """Quantize a model, as `form` of quantized_models.CONFIGS says; returns its directory."""
    from .checkpoint.quantized_models import quantize

    def make(model, form):
        directory = tmp_path_factory.mktemp("quantized") / form
        quantize(model, directory, form)
        for file in model.iterdir():  # its tokenizer
            if not (directory / file.name).exists():
                shutil.copy(file, directory)
        return directory

    return make


def cost(item):
    """Rank of a test: 0 without a marker, else that of its slowest one."""
    return max(
        (MARKERS.index(m.name) + 1 for m in item.iter_markers() if m.name in MARKERS), default=0
    )


def pytest_collection_modifyitems(config, items):
    items.sort(key=cost, reverse=hasattr(config, "workerinput"))
