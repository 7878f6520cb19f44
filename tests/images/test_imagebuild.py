"""An archive is built when something that goes into it changed, and only then."""

import pytest

from imagebuild import images, store
from workspace.errors import ToolError


@pytest.fixture
def repository(tmp_path, monkeypatch):
    for name in ("Dockerfile", ".dockerignore", "code/module.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(images, "ROOT", tmp_path)
    monkeypatch.setenv("HEADRACE_CACHE", str(tmp_path / "cache"))
    return tmp_path


class CountingBuilder:
    """Writes a file in place of an image, and counts."""

    base = "base:1"

    def __init__(self):
        self.built = 0

    def build(self, image, archive):
        self.built += 1
        archive.write_text(f"build {self.built}")


@pytest.fixture
def builder(monkeypatch):
    builder = CountingBuilder()
    monkeypatch.setattr(store, "choose", lambda: builder)
    return builder


@pytest.fixture
def image(repository, monkeypatch):
    image = images.Image(name="thing", dockerfile="Dockerfile", inputs=("code",))
    monkeypatch.setitem(store.IMAGES, "thing", image)
    return image


def ensure():
    return store.ensure(["thing"], report=lambda _: None)["thing"]


def test_unchanged_inputs_build_nothing(image, builder):
    assert ensure() == ensure()
    assert builder.built == 1


@pytest.mark.parametrize("name", ["Dockerfile", ".dockerignore", "code/module.py", "code/new.py"])
def test_changed_input_builds_again_and_drops_the_old_archive(image, builder, repository, name):
    old = ensure()
    (repository / name).write_text("changed")
    new = ensure()
    assert new != old
    assert not old.exists()
    assert new.read_text() == "build 2"


def test_other_base_builds_again(image, builder):
    ensure()
    builder.base = "base:2"
    ensure()
    assert builder.built == 2


def test_bytecode_is_no_input(image, builder, repository):
    ensure()
    (repository / "code/__pycache__").mkdir()
    (repository / "code/__pycache__/module.pyc").write_text("")
    ensure()
    assert builder.built == 1


def test_failed_build_leaves_no_archive(image, builder, repository):
    def fail(image, archive):
        archive.write_text("half")
        raise ToolError("no")

    builder.build = fail
    with pytest.raises(ToolError):
        ensure()
    assert not list((repository / "cache/images").glob("thing*"))


def test_unknown_image_is_named():
    with pytest.raises(ToolError, match="nothing-like-it: unknown; there are headrace-operator"):
        store.ensure(["nothing-like-it"])
