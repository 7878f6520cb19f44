"""Conditions: drafts of the current state, merged with what the status said before."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from headrace_operator.api.status import ConditionType
from headrace_operator.plan.failures import Failure
from headrace_operator.plan.names import digest
from headrace_operator.plan.objects import Object, format_time, items, one_line, text, uid_of
from headrace_operator.plan.world import Rejection, Transition

TRUE, FALSE, UNKNOWN = "True", "False", "Unknown"
_SUMMARIES = (ConditionType.READY, ConditionType.STALLED)


@dataclass(frozen=True, slots=True)
class Draft:
    """The state of one aspect. A `problem` needs someone; the rest is waiting or done."""

    status: str
    reason: str
    message: str
    problem: bool = False

    def __post_init__(self) -> None:
        # Messages quote what users and other programs wrote.
        object.__setattr__(self, "message", one_line(self.message))

    @property
    def holds(self) -> bool:
        """Whether the status is True."""
        return self.status == TRUE


def holds(reason: str, message: str) -> Draft:
    """Return the draft of an aspect that holds."""
    return Draft(TRUE, reason, message)


def waiting(reason: str, message: str) -> Draft:
    """Return the draft of an aspect that will come to hold without anyone's help."""
    return Draft(FALSE, reason, message)


def problem(reason: str, message: str) -> Draft:
    """Return the draft of an aspect that does not hold for a cause worth a warning."""
    return Draft(FALSE, reason, message, problem=True)


def of_failure(failure: Failure) -> Draft:
    """Return the draft of an aspect that a pod's failure keeps from holding."""
    return problem(failure.reason, failure.message)


def of_rejection(rejection: Rejection) -> Draft:
    """Return the draft of an aspect whose child could not be applied."""
    message = f"{rejection.kind} {rejection.name}: {rejection.message}"
    return problem(f"{rejection.kind}{rejection.reason}", message)


def merge(
    owner: Object, drafts: Mapping[ConditionType, Draft], generation: int, now: datetime
) -> list[dict[str, Any]]:
    """Return the conditions of the status; a transition time changes only with the status."""
    previous = {text(c, "type"): c for c in items(owner, "status", "conditions")}
    return [
        {
            "type": str(kind),
            "status": draft.status,
            "reason": draft.reason,
            "message": draft.message,
            "observedGeneration": generation,
            "lastTransitionTime": _transition_time(previous.get(kind, {}), draft, now),
        }
        for kind, draft in drafts.items()
    ]


def _transition_time(previous: Object, draft: Draft, now: datetime) -> str:
    kept = text(previous, "lastTransitionTime")
    return kept if kept and text(previous, "status") == draft.status else format_time(now)


def transitions(owner: Object, drafts: Mapping[ConditionType, Draft]) -> tuple[Transition, ...]:
    """Return the changes since the status was last written, to be reported as events.

    Ready repeats the others and Stalled repeats Ready, so only their change of status counts;
    Reconciling is the opposite of Ready. The first visit reports no waiting.
    """
    previous = {text(c, "type"): c for c in items(owner, "status", "conditions")}
    return tuple(
        _transition(owner, kind, previous.get(kind, {}), draft)
        for kind, draft in drafts.items()
        if _is_news(kind, previous.get(kind, {}), draft)
    )


def _is_news(kind: ConditionType, previous: Object, draft: Draft) -> bool:
    if kind == ConditionType.RECONCILING:
        return False
    if not previous:
        return (draft.holds or draft.problem) and kind != ConditionType.READY
    flipped = text(previous, "status") != draft.status
    return flipped or (text(previous, "reason") != draft.reason and kind not in _SUMMARIES)


def _transition(owner: Object, kind: ConditionType, previous: Object, draft: Draft) -> Transition:
    # The old transition time is stored with the object, so the same change planned again
    # after a crash has the same key, and the next change of the same kind has another one.
    change: Sequence[str] = [
        uid_of(owner),
        kind,
        text(previous, "lastTransitionTime"),
        text(previous, "reason"),
        draft.status,
        draft.reason,
    ]
    return Transition(digest(change, 16), kind, draft.reason, draft.message, draft.problem)
