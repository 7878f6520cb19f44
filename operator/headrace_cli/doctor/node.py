"""Checks of a GPU node: those of headrace-node, whose package may be missing here."""

from pathlib import Path

from headrace_cli.doctor.finding import Finding, Grade
from headrace_cli.errors import NotFound, Unavailable


def check_node(root: Path) -> list[Finding]:
    """Check the node whose files are below `root`.

    Raises:
        NotFound: there is no such directory.
        Unavailable: headrace-node is not installed here.
    """
    if not root.is_dir():
        raise NotFound(f"--root {root}: is no directory")
    try:
        from headrace_node.checks import check
        from headrace_node.host import Host
    except ImportError:
        raise Unavailable(
            "doctor --node: headrace-node is not installed here; install headrace-loader, or run "
            "it in the loader's image"
        ) from None
    return [
        Finding(found.check, Grade(found.grade), found.message, found.fix)
        for found in check(Host(root))
    ]
