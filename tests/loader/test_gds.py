"""Guards against cuFile's traps. nvidia-fs cannot be had here: kvikio is a stand-in throughout."""

import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from headrace_loader.cuda import gds
from headrace_loader.errors import BackendUnavailable, DirectPathUnavailable, StorageError
from headrace_loader.topology import see_only


class FakeKvikio(ModuleType):
    """As much of kvikio as is used; its file fails as kvikio does, with RuntimeError."""

    def __init__(self, available: bool) -> None:
        super().__init__("kvikio")
        self.imported_with = dict(os.environ)
        self.settings: dict[str, Any] = {}
        self.CompatMode = SimpleNamespace(OFF="off")
        self.defaults = SimpleNamespace(set=self.settings.update)
        self.cufile_driver = SimpleNamespace(get={"is_gds_available": available}.__getitem__)
        self.refuses, self.count = False, 0

    def CuFile(self, path: Path, flags: str) -> Any:  # noqa: N802 - kvikio's name
        if self.refuses:
            raise RuntimeError("cuFile error: 5030")
        return SimpleNamespace(raw_read=self._read)

    def _read(self, buffer: Any, size: int, offset: int) -> int:
        if self.count < 0:
            raise RuntimeError("cuFile error: input/output")
        return self.count


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A node that has all that GPUDirect needs, as files of a directory."""
    for name in ("_MODULES", "_NVIDIA_FS", "_UDEV"):
        (tmp_path / name).touch()
        monkeypatch.setattr(gds, name, tmp_path / name)
    monkeypatch.delenv("CUFILE_LOGFILE_PATH", raising=False)
    monkeypatch.setenv("CUFILE_ALLOW_COMPAT_MODE", "true")
    monkeypatch.setenv("CUFILE_FORCE_COMPAT_MODE", "true")
    monkeypatch.setenv("CUFILE_ENV_PATH_JSON", str(tmp_path / "none.json"))
    return tmp_path


@pytest.fixture
def kvikio(monkeypatch: pytest.MonkeyPatch) -> FakeKvikio:
    fake = FakeKvikio(available=True)
    monkeypatch.setitem(sys.modules, "kvikio", fake)
    monkeypatch.setitem(sys.modules, "kvikio.cufile_driver", ModuleType("cufile_driver"))
    return fake


@pytest.mark.parametrize(
    ("missing", "reason"),
    [
        ("_MODULES", "ModulesUnreadable"),  # without it cuFile's initialization never returns
        ("_NVIDIA_FS", "NvidiaFsMissing"),
        ("_UDEV", "UdevUnreadable"),
    ],
)
def test_kvikio_is_not_even_imported_where_something_is_missing(
    node: Path, monkeypatch: pytest.MonkeyPatch, missing: str, reason: str
) -> None:
    (node / missing).unlink()
    monkeypatch.setitem(sys.modules, "kvikio", None)  # importing it would be KvikioMissing
    probe = gds.probe(wanted=True)
    assert (probe.available, probe.reason) == (False, reason)
    assert str(node / missing) in probe.message


def test_off_looks_at_nothing(node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kvikio", None)
    assert gds.probe(wanted=False).reason == "PolicyOff"


def test_cufile_writes_no_log_into_the_working_directory(node: Path, kvikio: FakeKvikio) -> None:
    assert gds.probe(wanted=True).available
    assert os.environ["CUFILE_LOGFILE_PATH"] == "/dev/null"
    assert kvikio.settings["compat_mode"] == "off"  # never through host memory in silence
    # Nor in cuFile's own mode, which is another.
    for mode in ("ALLOW", "FORCE"):
        assert os.environ[f"CUFILE_{mode}_COMPAT_MODE"] == "false"


@pytest.mark.parametrize(("number", "available"), [(0, True), (16, False)])
def test_a_setting_by_which_cufile_copies_all_the_same(
    node: Path,
    kvikio: FakeKvikio,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    available: bool,
) -> None:
    path = node / "cufile.json"
    path.write_text(
        f'{{"fs": {{\n // "posix_gds_min_kb": 4\n "lustre": {{"posix_gds_min_kb" : {number}}}}}}}'
    )
    monkeypatch.setenv("CUFILE_ENV_PATH_JSON", str(path))
    probe = gds.probe(wanted=True)
    assert probe.available == available
    assert (f"{path}: posix_gds_min_kb: {number}: must be 0" in probe.message) != available


def test_cufile_has_the_last_word(node: Path, kvikio: FakeKvikio) -> None:
    kvikio.cufile_driver = SimpleNamespace(get={"is_gds_available": False}.__getitem__)
    assert gds.probe(wanted=True).reason == "CuFileUnavailable"


def test_a_driver_that_cannot_be_opened_is_told(node: Path, kvikio: FakeKvikio) -> None:
    def get(_name: str) -> bool:
        raise RuntimeError("cuFile error: 5001")

    kvikio.cufile_driver = SimpleNamespace(get=get)
    probe = gds.probe(wanted=True)
    assert (probe.available, probe.reason) == (False, "CuFileUnavailable")
    assert "5001" in probe.message


def test_runtime_errors_of_kvikio_get_the_loaders_names(kvikio: FakeKvikio) -> None:
    kvikio.refuses = True
    with pytest.raises(DirectPathUnavailable, match=r"/part: cuFile refuses the file: .* 5030"):
        gds.DirectFile(Path("/part"))
    kvikio.refuses = False
    file = gds.DirectFile(Path("/part"))
    kvikio.count = -1
    with pytest.raises(StorageError, match=r"/part: cuFile read at 4096: .*input/output"):
        file.read(1 << 40, 4096, 8192)
    kvikio.count = 100
    with pytest.raises(StorageError, match="cuFile read 100 of 8192 bytes at 4096"):
        file.read(1 << 40, 4096, 8192)


@pytest.mark.parametrize(
    ("visible", "rank", "left"), [(None, 2, "2"), ("4,5", 1, "5"), ("GPU-a,GPU-b", 0, "GPU-a")]
)
def test_a_worker_sees_its_own_gpu_alone(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, rank: int, left: str
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    see_only(rank)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == left


@pytest.mark.parametrize(("visible", "count"), [("0,1", 2), ("", 0)])
def test_a_rank_without_a_gpu_is_refused(
    monkeypatch: pytest.MonkeyPatch, visible: str, count: int
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    wrong = f"rank 2 needs GPU 2, CUDA_VISIBLE_DEVICES has {count}"
    with pytest.raises(BackendUnavailable, match=wrong):
        see_only(2)
