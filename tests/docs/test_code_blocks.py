"""What the documentation tells people to type or apply is what the repository has."""

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import click
import pytest
import yaml
from pydantic import ValidationError

from headrace_cli.app import cli
from headrace_operator.api.spec import ModelDeploymentSpec

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
FENCED = re.compile(r"^( *)```(\w+)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:^(?: {4}.*)\n)+", re.MULTILINE)


class Block(NamedTuple):
    page: str
    language: str
    text: str


def blocks() -> Iterator[Block]:
    for path in PAGES:
        page, text = str(path.relative_to(ROOT)), path.read_text()
        for match in FENCED.finditer(text):
            yield Block(page, match[2], match[3])
        for match in INDENTED.finditer(FENCED.sub("", text)):
            yield Block(page, "console", match[0])


def of(*languages: str) -> list[Block]:
    return [block for block in blocks() if block.language in languages]


def commands(word: str) -> list[tuple[str, str]]:
    """Every command line that starts with `word`, continued lines joined."""
    found = []
    for block in of("console", "bash", "sh"):
        for line in block.text.replace("\\\n", " ").splitlines():
            stripped = line.strip().removeprefix("$ ").split(" #")[0].strip()
            if stripped.startswith(f"{word} "):
                found.append((block.page, stripped))
    return found


def test_python_blocks_compile() -> None:
    found = of("python")
    assert found
    for block in found:
        ast.parse(block.text, filename=block.page)


def test_manifests_are_valid() -> None:
    found = [
        (block.page, document)
        for block in of("yaml")
        for document in yaml.safe_load_all(block.text)
        if isinstance(document, dict) and document.get("kind") == "ModelDeployment"
    ]
    assert found
    for page, document in found:
        try:
            ModelDeploymentSpec.model_validate(document["spec"])
        except ValidationError as error:
            pytest.fail(f"{page}: {error}")


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    found = commands("make")
    assert len(found) > 5
    for page, line in found:
        words = re.findall(r"(?:^|&& )make ([a-z-]+)", line)
        assert set(words) <= targets, f"{page}: {line}"


def test_chart_values_exist() -> None:
    found = [(page, line) for page, line in commands("helm") if "charts/headrace" in line.split()]
    assert found
    values = yaml.safe_load((ROOT / "charts/headrace/values.yaml").read_text())
    for page, line in found:
        for key in re.findall(r"--set(?:-string)? ([\w.]+)=", line):
            node = values
            for part in key.split("."):
                assert isinstance(node, dict), f"{page}: {key} is no value of the chart"
                assert part in node, f"{page}: {key} is no value of the chart"
                node = node[part]


def test_files_named_in_commands_exist() -> None:
    named = re.compile(r"(?<![\w./-])((?:charts|examples|bench|tests|infra|crds)/[\w./-]+)")
    for page, line in [*commands("kubectl"), *commands("helm"), *commands("python3")]:
        for path in named.findall(line):
            assert (ROOT / path).exists(), f"{page}: {path} does not exist"


def test_fields_of_models_exist() -> None:
    """Every `spec.a.b` and `status.a.b` of the prose is in the generated reference."""
    reference = (ROOT / "docs/reference/modeldeployment.md").read_text()
    known = set(re.findall(r"^\| `([\w.]+)(?:\[\])?[\w.]*` \|", reference, re.MULTILINE))
    assert len(known) > 100
    others = {"spec.claimRef"}  # of a PersistentVolume
    for path in PAGES:
        if path.name in ("decisions.md", "CHANGELOG.md"):  # what was, too
            continue
        for code in re.findall(r"`([^`\n]+)`", path.read_text()):
            for field in re.findall(r"(?<![\w.-])((?:spec|status)(?:\.[a-z]\w*)+)", code):
                assert field in known | others, f"{path.name}: {field} is no field"


def test_values_of_the_charts_in_the_prose_exist() -> None:
    charts = [
        yaml.safe_load((ROOT / f"charts/{name}/values.yaml").read_text())
        for name in ("headrace", "headrace-model")
    ]
    found = 0
    for path in PAGES:
        for code in re.findall(
            r"`'?([a-z]\w*(?:\.\w+)+)(?:\[0\][\w.]*)?(?:=[^`]*)?`", path.read_text()
        ):
            keys = code.split(".")
            tops = [values for values in charts if isinstance(values.get(keys[0]), dict)]
            if not tops or keys[-1] in ("md", "yaml", "json", "labels"):
                continue
            found += 1
            assert any(has(values, keys) for values in tops), f"{path.name}: {code} is no value"
    assert found > 20


def has(values: object, keys: list[str]) -> bool:
    for key in keys:
        if not isinstance(values, dict) or key not in values:
            return False
        values = values[key]
    return True


def test_commands_of_headrace_parse() -> None:
    lines = [
        (page, line.partition("headrace ")[2])
        for word in ("headrace", "kubectl headrace", ".venv/bin/headrace")
        for page, line in commands(word)
    ]
    assert len(lines) > 5
    for page, line in lines:
        name, *arguments = shlex.split(line.partition(" |")[0])
        command = cli.get_command(click.Context(cli), name)
        assert command is not None, f"{page}: headrace {line}"
        try:
            command.make_context(name, arguments)
        except click.UsageError as error:
            pytest.fail(f"{page}: headrace {line}: {error.format_message()}")


def test_the_operators_rights_are_those_of_the_chart() -> None:
    verbs = "get|list|watch|create|update|patch|delete"
    table: dict[str, set[str]] = {}
    for row in (ROOT / "docs/security.md").read_text().splitlines():
        if found := re.match(
            rf"\| ((?:`[a-z/]+`(?:, )?)+)(?:cluster-wide)? \| ((?:{verbs}).*?) \|", row
        ):
            for resource in re.findall(r"`([a-z/]+)`", found[1]):
                table.setdefault(resource, set()).update(re.findall(rf"\b(?:{verbs})\b", found[2]))
    chart: dict[str, set[str]] = {}
    rules = (ROOT / "charts/headrace/templates/rbac.yaml").read_text()
    for resources, used in re.findall(r"resources: \[(.+)\]\n\s+verbs: \[(.+)\]", rules):
        for resource in resources.split(", "):
            chart.setdefault(resource, set()).update(used.split(", "))
    assert table == chart


def test_the_example_has_the_claim_that_it_names() -> None:
    volume, claim = yaml.safe_load_all((ROOT / "examples/models-volume.yaml").read_text())
    model = yaml.safe_load((ROOT / "examples/tiny-llama.yaml").read_text())["spec"]
    name = model["volume"]["existingClaim"]["name"]
    assert claim["metadata"]["name"] == volume["spec"]["claimRef"]["name"] == name
    assert claim["spec"]["volumeName"] == volume["metadata"]["name"]
    assert model["model"]["source"].startswith(f"pvc://{name}/")
