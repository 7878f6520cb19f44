"""The real helm, and the chart rendered by it."""

import subprocess
from pathlib import Path

import pytest
import yaml

from localkube import binaries

CHART = Path(__file__).parents[2] / "charts" / "headrace"


@pytest.fixture(scope="session")
def helm():
    """Run helm; returns the finished process."""
    program = binaries.ensure(["helm"])["helm"]

    def run(*arguments):
        command = [program, *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    return run


@pytest.fixture
def render(helm):
    """Render the chart; returns its objects by (kind, name)."""

    def run(*options, release="headrace", namespace="headrace-system"):
        result = helm("template", release, CHART, "--namespace", namespace, *options)
        assert result.returncode == 0, result.stderr
        objects = [found for found in yaml.safe_load_all(result.stdout) if found]
        return {(found["kind"], found["metadata"]["name"]): found for found in objects}

    return run
