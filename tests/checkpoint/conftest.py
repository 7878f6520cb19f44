"""Helpers of the checkpoint tests: tiny models, and the sharder called in this process."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from hypothesis import settings

from headrace_checkpoint import cli
from headrace_checkpoint.manifest import TensorEntry
from headrace_checkpoint.safetensors_format import build_header, read_header

# A busy machine takes long over an example now and then; pytest's timeout still holds.
settings.register_profile("headrace", deadline=None)
settings.load_profile("headrace")

REPOSITORY = Path(__file__).parents[2]


def _load_example(name: str):
    path = REPOSITORY / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


tiny_llama = _load_example("tiny_llama")


@pytest.fixture
def make_model(tmp_path):
    """Make a tiny Llama; keyword arguments are the fields of tiny_llama.Size."""

    def make(name="source", seed=0, **size):
        return tiny_llama.make_tiny_llama(tmp_path / name, tiny_llama.Size(**size), seed)

    return make


@pytest.fixture
def model(make_model):
    return make_model()


class Outcome:
    """How a command ended: exit code, log events, termination message."""

    def __init__(self, code, output, termination):
        self.code = code
        self.events = [json.loads(line) for line in output.splitlines()]
        self.termination = json.loads(termination.read_text()) if termination.exists() else None

    @property
    def reason(self):
        return self.termination["reason"]

    @property
    def message(self):
        return self.termination["message"]


@pytest.fixture
def headrace(tmp_path, monkeypatch, capsys):
    """Run the command in this process."""
    termination = tmp_path / "termination-log"
    monkeypatch.setenv("HEADRACE_TERMINATION_LOG", str(termination))

    def run(*arguments):
        termination.unlink(missing_ok=True)
        capsys.readouterr()
        code = cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert not captured.err
        return Outcome(code, captured.out, termination)

    return run


@pytest.fixture
def shard(headrace, tmp_path):
    """Run `headrace shard SOURCE` into `tmp_path/volume/checkpoint`."""

    def run(source, tp=1, *options, output=None):
        output = output or tmp_path / "volume" / "checkpoint"
        return headrace(
            "shard", "--source", source, "--output", output, "--tensor-parallel-size", tp, *options
        )

    return run


@pytest.fixture
def volume(tmp_path):
    return tmp_path / "volume"


def read_tensors(path):
    """Tensors of a safetensors file by name, as (dtype, shape, bytes)."""
    content = path.read_bytes()
    header = read_header(lambda offset, n: content[offset : offset + n], len(content))
    return {
        tensor.name: (
            tensor.dtype,
            tensor.shape,
            content[header.data_offset + tensor.offset :][: tensor.nbytes],
        )
        for tensor in header.tensors
    }


def write_tensors(path, tensors):
    """The inverse of read_tensors."""
    entries, offset = [], 0
    for name, (dtype, shape, data) in tensors.items():
        entries.append(TensorEntry(name, dtype, shape, offset, len(data)))
        offset += len(data)
    data = b"".join(data for _, _, data in tensors.values())
    path.write_bytes(build_header(entries, alignment=8, metadata={"format": "pt"}) + data)
