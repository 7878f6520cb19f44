"""The generated files are up to date and the schema is complete."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from headrace_operator.api.crd import definition, main, outputs

ROOT = Path(__file__).parents[2]


def properties(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    for name, value in schema.get("properties", {}).items():
        yield f"{path}.{name}", value
        yield from properties(value, f"{path}.{name}")
    if "items" in schema:
        yield from properties(schema["items"], f"{path}[]")


def schema() -> dict[str, Any]:
    return definition()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]


def test_the_generated_files_are_those_of_the_models() -> None:
    assert main(["--check"]) == 0


def test_a_difference_fails_the_check_and_names_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in outputs():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / path)
    changed = next(iter(outputs()))
    (tmp_path / changed).write_text("stale")
    assert main(["--check", "--root", str(tmp_path)]) == 1
    assert str(changed) in capsys.readouterr().out
    assert (tmp_path / changed).read_text() == "stale"
    assert main(["--root", str(tmp_path)]) == 0
    assert main(["--check", "--root", str(tmp_path)]) == 0


@pytest.mark.parametrize("part", ["spec", "status"])
def test_every_field_has_a_description_and_a_type(part: str) -> None:
    fields = dict(properties(schema()["properties"][part], part))
    assert len(fields) > 10
    assert [path for path, value in fields.items() if not value.get("description")] == []
    untyped = [path for path, value in fields.items() if not {"type", "anyOf"} & value.keys()]
    assert untyped == []


def test_every_rule_says_what_to_do_about_it() -> None:
    def messages(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            for validation in node.get("x-kubernetes-validations", []):
                yield validation["messageExpression"]
            for value in node.values():
                yield from messages(value)

    found = list(messages(schema()))
    assert len(found) > 30
    assert [m for m in found if "; " not in m or not m.startswith("'")] == []
