"""Planning, pure: plan(resource, observed, settings, now) -> Plan.

No input or output, no clock but the argument, and no exception whatever the API server
sends. Everything the operator decides is decided here.
"""

from headrace_operator.plan.planner import needs, path_in_use, plan, wants_history
from headrace_operator.plan.world import (
    Deletion,
    Desired,
    Needs,
    Observed,
    Plan,
    Rejection,
    Scale,
    Settings,
    Transition,
)

__all__ = [
    "Deletion",
    "Desired",
    "Needs",
    "Observed",
    "Plan",
    "Rejection",
    "Scale",
    "Settings",
    "Transition",
    "needs",
    "path_in_use",
    "plan",
    "wants_history",
]
