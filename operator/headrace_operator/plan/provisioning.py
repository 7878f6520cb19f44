"""What the events of a claim that is not bound say: wait, or someone has to do something.

The provisioner itself tries again for as long as the claim is there, each time for the same
volume name, so it finds the file system that an earlier attempt began. Deleting the claim and
making it again would begin a second one, so that is never done here.
"""

import re

from headrace_operator.plan.conditions import Draft, problem, waiting
from headrace_operator.plan.objects import Object, one_line, text

_CODE = re.compile(r"code = ([A-Z][A-Za-z]+)")

# gRPC codes after which the CSI specification has the caller try the same call again. The
# driver's own wait of ten minutes ends as Internal, told from other errors by its words
# (aws-fsx-csi-driver, pkg/driver/controller.go); making a file system takes longer with EFA.
_PASSING_CODES = frozenset({"DeadlineExceeded", "Aborted", "Unavailable", "Canceled"})
_PASSING_WORDS = (
    "Filesystem is not ready: timed out",
    "Filesystem is not ready: context",
    "Throttl",
    "Rate exceeded",
    "is already in progress",
)


def of_warning(claim: str, warning: Object) -> Draft:
    """Return the draft for a pending claim, given its latest warning event; {} is none."""
    reason, message = text(warning, "reason"), one_line(text(warning, "message"))
    if reason == "ProvisioningFailed" and _passes(message):
        return waiting(
            "Provisioning",
            f"claim {claim} is being provisioned, which can take half an hour; the last attempt: "
            f"{message}",
        )
    if reason == "ProvisioningFailed":
        fix = "correct the cause; the provisioner goes on trying. Do not delete the claim before "
        fix += "you know that no file system was begun for it"
        return problem("ProvisioningFailed", f"claim {claim}: {fix}: {message}")
    if reason == "VolumeMismatch":
        return problem("VolumeMismatch", f"claim {claim} cannot bind: {message}")
    if reason:
        return problem("ClaimStuck", f"claim {claim}: {reason}: {message}")
    return waiting("ClaimPending", f"claim {claim} is not bound yet")


def _passes(message: str) -> bool:
    code = _CODE.search(message)
    is_passing = code is not None and code[1] in _PASSING_CODES
    return is_passing or any(word in message for word in _PASSING_WORDS)
