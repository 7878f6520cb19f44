"""docs/conditions.md knows every condition and every reason."""

import re
from pathlib import Path

import headrace_operator.plan
from headrace_operator.api.status import ConditionType

ROOT = Path(__file__).parents[2]
PLAN = Path(headrace_operator.plan.__file__).parent
# reasons are the first argument of the functions that make drafts, and fallbacks of camel_case
MADE = re.compile(
    r'\b(?:holds|waiting|problem|Draft)\(\s*(?:"\w+",\s*|FALSE,\s*|UNKNOWN,\s*)?"([A-Z]\w+)"'
)
FALLBACK = re.compile(r'camel_case\([^\n]*"([A-Z]\w+)"\)')


def reasons() -> set[str]:
    text = "\n".join(path.read_text() for path in PLAN.glob("*.py"))
    return {*MADE.findall(text), *FALLBACK.findall(text)} - {"True", "False", "Unknown"}


def test_every_reason_and_condition_is_documented() -> None:
    text = (ROOT / "docs/conditions.md").read_text()
    known = set(re.findall(r"`([A-Za-z]+)…?`", text))
    assert len(reasons()) > 35
    assert reasons() - known == set()
    assert {str(kind) for kind in ConditionType} <= known
