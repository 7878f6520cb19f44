"""`headrace doctor`: what is wrong with a cluster or a node, and the fix."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click
from rich.console import Console
from rich.text import Text

from headrace_cli.doctor.cluster import check_cluster
from headrace_cli.doctor.finding import Finding, Grade
from headrace_cli.doctor.node import check_node
from headrace_cli.errors import EXIT_FOUND
from headrace_cli.kube import Target, run, target_options
from headrace_cli.output import output_option, show

_SIGNS = {
    Grade.OK: ("✔", "green"),
    Grade.WARNING: ("!", "yellow"),
    Grade.PROBLEM: ("✘", "red"),
    Grade.UNKNOWN: ("?", "dim"),
}


@click.command(short_help="What is wrong with cluster or node, and the fix.")
@click.option("--node", is_flag=True, help="Check this machine as a GPU node, not the cluster.")
@click.option(
    "--root",
    type=click.Path(path_type=Path),
    default=Path("/"),
    show_default=True,
    help="Root of the node's files, with --node.",
)
@target_options
@output_option
def command(node: bool, root: Path, output: str, **target: str | bool | None) -> int:
    """Check the cluster, or with --node the machine this runs on.

    Ends with 1 where something is wrong that keeps models from being served; warnings, such as
    a missing GPUDirect path, do not.
    """
    findings = check_node(root) if node else run(Target.of(target), check_cluster)
    document = {"findings": [asdict(finding) for finding in findings]}
    show(document, output, lambda console: _draw(console, findings))
    return EXIT_FOUND if any(f.grade is Grade.PROBLEM for f in findings) else 0


def _draw(console: Console, findings: Sequence[Finding]) -> None:
    for finding in findings:
        sign, style = _SIGNS[finding.grade]
        line = Text.assemble((sign, style), f" {finding.check}: {finding.message}")
        console.print(line, soft_wrap=True)
        if finding.fix:
            console.print(Text(f"    fix: {finding.fix}", "bold"), soft_wrap=True)
    problems = sum(finding.grade is Grade.PROBLEM for finding in findings)
    warnings = sum(finding.grade is Grade.WARNING for finding in findings)
    counted = ((problems, "problem"), (warnings, "warning"), (len(findings), "check"))
    console.print(", ".join(f"{n} {what}{'s' * (n != 1)}" for n, what in counted))
