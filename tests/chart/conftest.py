"""The real helm, and the charts rendered by it."""

import subprocess
from pathlib import Path

import pytest
import yaml

from localkube import binaries

CHARTS = Path(__file__).parents[2] / "charts"
CHART = CHARTS / "headrace"


@pytest.fixture(scope="session")
def helm():
    """Run helm; returns the finished process."""
    program = binaries.ensure(["helm"])["helm"]

    def run(*arguments):
        command = [program, *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    return run


def objects_of(text):
    """The objects of a rendered chart by (kind, name), and by namespace where that is given."""
    found = {}
    for body in filter(None, yaml.safe_load_all(text)):
        metadata = body["metadata"]
        key = (body["kind"], metadata["name"], *filter(None, [metadata.get("namespace")]))
        assert key not in found
        found[key] = body
    return found


@pytest.fixture
def render(helm):
    """Render a chart; returns its objects."""

    def run(*options, release="headrace", namespace="headrace-system", chart=CHART):
        result = helm("template", release, chart, "--namespace", namespace, *options)
        assert result.returncode == 0, result.stderr
        return objects_of(result.stdout)

    return run
