"""The generated cufile.json, read by cuFile itself, with a stand-in for /proc/modules.

cuFile reads its configuration before it looks for a GPU, and refuses one that it cannot use with
-22 (EINVAL). It also wants /proc/modules, without which it never returns; where there is none, a
library loaded before it gives it an empty one.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from headrace_node import cufile
from headrace_node.facts import gather
from headrace_node.steps import all_steps, apply

_REFUSED = -22
_STAND_IN = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>
static const char *seen(const char *path)
{ return path && !strcmp(path, "/proc/modules") ? "/dev/null" : path; }
#define OPENS(name) FILE *name(const char *path, const char *mode) \
{ FILE *(*next)(const char *, const char *) = dlsym(RTLD_NEXT, #name); \
  return next(seen(path), mode); }
OPENS(fopen)
OPENS(fopen64)
"""
_OPEN = """
import ctypes, sys
class Error(ctypes.Structure):
    _fields_ = [("err", ctypes.c_int), ("cuda", ctypes.c_int)]
library = ctypes.CDLL(sys.argv[1])
library.cuFileDriverOpen.restype = Error
print("status", library.cuFileDriverOpen().err)
"""


def _library():
    found = importlib.util.find_spec("nvidia.cu13")
    for place in (found.submodule_search_locations or ()) if found else ():
        path = Path(place) / "lib" / "libcufile.so.0"
        if path.exists():
            return path
    return None


LIBRARY = _library()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="needs nvidia-cufile")


@pytest.fixture
def configuration(recorded_node):
    node = recorded_node()
    apply(node.host(), all_steps(0))
    return json.loads(cufile.configuration(gather(node.host())))


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    if Path("/proc/modules").exists():
        return ""
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler, as there is no /proc/modules")
    path = tmp_path_factory.mktemp("stand-in")
    (path / "modules.c").write_text(_STAND_IN)
    command = ["cc", "-shared", "-fPIC", "-o", path / "modules.so", path / "modules.c", "-ldl"]
    subprocess.run(command, check=True, timeout=60)
    return str(path / "modules.so")


@pytest.fixture
def status_of(stand_in, tmp_path):
    """What cuFile says to a configuration."""

    def run(document):
        path = tmp_path / "cufile.json"
        path.write_text(json.dumps(document))
        environment = {
            **os.environ,
            "LD_PRELOAD": stand_in,
            "CUFILE_ENV_PATH_JSON": str(path),
            "CUFILE_LOGFILE_PATH": str(tmp_path / "cufile.log"),
        }
        ran = subprocess.run(
            [sys.executable, "-IS", "-c", _OPEN, LIBRARY],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return int(ran.stdout.split("status")[1])

    return run


def test_cufile_takes_it(status_of, configuration):
    assert status_of(configuration) != _REFUSED


def test_cufile_would_refuse_a_wrong_one(status_of, configuration):
    configuration["properties"]["io_batchsize"] = "many"
    assert status_of(configuration) == _REFUSED


def test_every_key_is_one_that_cufile_knows(configuration):
    known = LIBRARY.read_bytes()
    keys = [
        f"{section}.{name}"
        for section, values in configuration.items()
        for name, value in values.items()
        if not isinstance(value, dict)
    ]
    keys += [
        f"fs.{system}.{name}" for system, values in configuration["fs"].items() for name in values
    ]
    assert [key for key in keys if key.encode() + b"\0" not in known] == []
