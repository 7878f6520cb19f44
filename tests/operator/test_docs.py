"""docs/reference/conditions.md knows every condition and reason, docs/troubleshooting.md a fix."""

import re
from pathlib import Path

import headrace_operator.plan
from headrace_operator.api.status import ConditionType
from headrace_operator.plan.presets import PRESETS

ROOT = Path(__file__).parents[2]
PLAN = Path(headrace_operator.plan.__file__).parent
# reasons are the first argument of the functions that make drafts, and fallbacks of camel_case
MADE = re.compile(
    r'\b(?:holds|waiting|problem|Draft)\(\s*(?:"\w+",\s*|FALSE,\s*|UNKNOWN,\s*)?"([A-Z]\w+)"'
)
FALLBACK = re.compile(r'camel_case\([^\n]*"([A-Z]\w+)"\)')
# the last argument of a refusal by FSx's rules, and the default of it
REFUSED = re.compile(r'^\s+"([A-Z][a-z]\w+|S3\w+)",?\n\s+\)|reason: str = "(\w+)"', re.MULTILINE)
VOLUME_MODULES = ("volume", "fsx", "provisioning")
REJECTIONS = {"Invalid", "NameConflict", "Forbidden", "KindNotServed"}


def reasons(*modules: str) -> set[str]:
    """Reasons that the modules of the plan make; all of them without a name."""
    paths = [PLAN / f"{module}.py" for module in modules] or PLAN.glob("*.py")
    text = "\n".join(path.read_text() for path in paths)
    refused = {word for words in REFUSED.findall(text) for word in words if word}
    return {*MADE.findall(text), *FALLBACK.findall(text), *refused} - {"True", "False", "Unknown"}


def section(page: str, heading: str) -> str:
    text = (ROOT / "docs" / page).read_text()
    level = heading.split(maxsplit=1)[0]
    return re.split(rf"^{level} ", text.split(f"\n{heading}\n", 1)[1], flags=re.MULTILINE)[0]


def test_every_reason_and_condition_is_documented() -> None:
    text = (ROOT / "docs/reference/conditions.md").read_text()
    known = set(re.findall(r"`([A-Za-z0-9]+)…?`", text))
    assert len(reasons()) > 35
    assert reasons() - known == set()
    assert {str(kind) for kind in ConditionType} <= known


def test_the_reasons_of_volume_ready_are_a_closed_list() -> None:
    made = reasons(*VOLUME_MODULES)
    assert len(made) > 20
    table = section("reference/conditions.md", "### VolumeReady")
    cells = "".join(row.split("|")[1] for row in table.splitlines() if row.startswith("| `"))
    assert set(re.findall(r"`(\w+)`", cells)) == made
    headings = re.findall(r"^### (\w+)$", section("troubleshooting.md", "## VolumeReady"), re.M)
    assert set(headings) == made
    assert len(headings) == len(made)


def test_every_reason_of_sharder_and_loader_is_documented() -> None:
    """They are the names of the classes of their errors, and become conditions' reasons."""
    abstract = {"CheckpointError", "LoaderError", "InputError", "TransientError"}
    made = set()
    for package in ("headrace_checkpoint", "headrace_loader"):
        text = (ROOT / f"loader_image/{package}/errors.py").read_text()
        made |= set(re.findall(r"^class (\w+)\(", text, re.MULTILINE))
    assert len(made) > 20
    headings = (ROOT / "docs/troubleshooting.md").read_text()
    assert made - abstract - set(re.findall(r"^### (\w+)$", headings, re.M)) == set()


def test_every_reason_in_the_tables_has_something_to_do() -> None:
    known = (ROOT / "docs/reference/conditions.md").read_text().partition("\n## Reasons\n")[2]
    rows = re.findall(r"^\| ((?:loader's own: )?`.*?) \|", known.split("\n### Any pod")[0], re.M)
    named = {reason for row in rows for reason in re.findall(r"`([A-Z]\w+)`", row)}
    text = (ROOT / "docs/troubleshooting.md").read_text()
    answered = set(re.findall(r"^### (\w+)$", text, re.M)) | set(re.findall(r"`([A-Z]\w+)`", text))
    assert len(named) > 80
    assert named - answered == set()


def test_the_presets_are_those_of_the_table() -> None:
    row = re.compile(r"^\| `([\w-]+)` \| ([\w.-]+)(?: \(arm64\))? \| (\d+) \| (\d+) \|$", re.M)
    table = {name: fields for name, *fields in row.findall(section("gpus.md", "## Presets"))}
    assert table == {
        name: [preset.instance_types[0], str(preset.gpus), str(preset.efa_interfaces)]
        for name, preset in PRESETS.items()
    }


def test_each_section_of_the_troubleshooting_says_something() -> None:
    text = (ROOT / "docs/troubleshooting.md").read_text()
    parts = re.split(r"^### (\w+)\n", text, flags=re.MULTILINE)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert sections.keys() >= REJECTIONS
    assert [name for name, body in sections.items() if len(body.strip()) < 14] == []
