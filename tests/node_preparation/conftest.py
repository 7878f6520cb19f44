"""Makes recorded nodes."""

import importlib.util
import sys
from pathlib import Path

import pytest

_PATH = Path(__file__).with_name("recorded.py")


@pytest.fixture(scope="session")
def recorded():
    """The module recorded."""
    spec = importlib.util.spec_from_file_location("recorded", _PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def recorded_node(recorded, tmp_path):
    """Make a recorded node."""
    return lambda **options: recorded.RecordedNode(tmp_path, **options)
