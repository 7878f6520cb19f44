"""`headrace timeline`: one cold start, as cluster, loader and engine recorded it."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click

from headrace_cli.errors import CommandFailed, InputInvalid, NotFound, UsageWrong
from headrace_cli.kube import Kube, Object, Target, run, target_options
from headrace_cli.loaders import ask_loader
from headrace_cli.output import output_option
from headrace_cli.status import model_deployments
from headrace_cli.timeline import draw
from headrace_cli.timeline.spans import (
    Span,
    created_at,
    engine_spans,
    pod_spans,
    shard_spans,
    trace_spans,
)
from headrace_operator.cluster.kinds import POD
from headrace_operator.plan.names import COMPONENT_LABEL, OWNER_LABEL, SERVE, SHARD
from headrace_operator.plan.objects import name_of, text
from headrace_operator.plan.serving_pod import ENGINE

_FORMATS = ("text", "svg", "html", "trace")


@click.command(short_help="A cold start as a picture or a trace.")
@click.argument("name")
@click.option("--pod", help="Serving pod (the newest).")
@click.option(
    "--format",
    "form",
    type=click.Choice(_FORMATS),
    default="text",
    show_default=True,
    help="trace is Chrome's: open it in ui.perfetto.dev.",
)
@click.option(
    "-f", "--file", type=click.Path(path_type=Path), help="Write there (standard output)."
)
@target_options
@output_option
def command(
    name: str,
    pod: str | None,
    form: str,
    file: Path | None,
    output: str,
    **target: str | bool | None,
) -> None:
    """Show the cold start of a serving pod of the ModelDeployment NAME.

    Without the right to ask its loader or to read its log, their lanes are left out, and a
    line on standard error says so. --output json prints the spans themselves.
    """
    chosen = Target.of(target)
    if chosen.all_namespaces:
        raise UsageWrong("--all-namespaces: a timeline is of one pod; give --namespace")
    title, spans, missing = run(chosen, lambda kube: collect(kube, name, pod))
    for reason in missing:
        click.echo(f"left out: {reason}", err=True)
    if not spans:
        raise InputInvalid(f"{title}: nothing has begun yet; see headrace status {name}")
    _write(file, _drawn(title, spans, "json" if output == "json" else form))


async def collect(
    kube: Kube, model: str, pod_name: str | None
) -> tuple[str, list[Span], list[str]]:
    """Return a title, the spans in order of lanes, and why lanes are missing."""
    await model_deployments(kube, [model])
    pods = await kube.list(POD, kube.namespace, f"{OWNER_LABEL}={model}")
    pod = _chosen(pods, model, pod_name)
    missing: list[str] = []
    sharding = [p for p in pods if text(p, "metadata", "labels", COMPONENT_LABEL) == SHARD]
    spans = [*shard_spans(sharding, created_at(pod)), *pod_spans(pod)]
    try:
        spans += trace_spans(await ask_loader(kube, pod, "/v1/trace"))
    except CommandFailed as error:
        missing.append(f"loader: {error}")
    try:
        spans += engine_spans(pod, await _log(kube, pod))
    except CommandFailed as error:
        missing.append(f"engine: {error}")
    return f"{kube.namespace}/{model}, pod {name_of(pod)}", spans, missing


def _chosen(pods: Sequence[Object], model: str, name: str | None) -> Object:
    serving = [p for p in pods if text(p, "metadata", "labels", COMPONENT_LABEL) == SERVE]
    if name is not None:
        serving = [pod for pod in serving if name_of(pod) == name]
    if not serving:
        what = f"no pod {name}" if name is not None else "no serving pod"
        raise NotFound(f"ModelDeployment {model} has {what}; see headrace status {model}")
    return max(serving, key=lambda pod: text(pod, "metadata", "creationTimestamp"))


async def _log(kube: Kube, pod: Object) -> str:
    path = f"{POD.path(kube.namespace, name_of(pod))}/log"
    query = {"container": ENGINE, "timestamps": "true"}
    return (await kube.read(path, query)).decode(errors="replace")


def _drawn(title: str, spans: Sequence[Span], form: str) -> str:
    match form:
        case "json":
            return (
                json.dumps({"title": title, "spans": [asdict(s) for s in spans]}, indent=2) + "\n"
            )
        case "svg":
            return draw.svg(title, spans)
        case "html":
            return draw.html(title, spans)
        case "trace":
            return json.dumps(draw.chrome_trace(spans)) + "\n"
        case _:
            return f"{title}\n{draw.lines(spans)}\n"


def _write(file: Path | None, content: str) -> None:
    if file is None:
        click.echo(content, nl=False)
        return
    try:
        file.write_text(content, encoding="utf-8")
    except OSError as error:
        raise UsageWrong(f"--file {file}: {error.strerror}; choose another path") from None
