"""`headrace status`: ModelDeployments, their pods, and a bar for each GPU that loads."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import click
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from headrace_cli.errors import Unavailable
from headrace_cli.kube import Kube, Target, run, target_options
from headrace_cli.output import JSON, Number, bytes_text, console, output_option, show
from headrace_cli.status import status_document

_BAR_WIDTH = 28
_STYLES = {"True": "green", "False": "yellow", "Unknown": "dim"}
_SIGNS = {"True": "✔", "False": "✘", "Unknown": "?"}
# These two are True when something is going on, or wrong.
_ABNORMAL = {"Reconciling": ("…", "dim"), "Stalled": ("✘", "red")}
_MAX_FAILURES = 5

Object = dict[str, Any]


@click.command(short_help="What runs, how far it is and why it waits.")
@click.argument("names", nargs=-1)
@click.option("-w", "--watch", is_flag=True, help="Keep looking until interrupted.")
@click.option("--interval", type=Number(3600), default=1.0, show_default=True, help="Seconds.")
@target_options
@output_option
def command(
    names: tuple[str, ...], watch: bool, interval: float, output: str, **target: str | bool | None
) -> None:
    """Show ModelDeployments: all of the namespace, or those NAMED.

    Progress comes from the loaders, through the API server: it needs the right to get
    pods/proxy or to create pods/portforward.
    """
    chosen = Target.of(target)
    if not watch:
        document = run(chosen, lambda kube: status_document(kube, names))
        show(document, output, lambda to: to.print(render(document)))
        return
    run(chosen, lambda kube: _watch(kube, names, interval, output))


async def _watch(kube: Kube, names: tuple[str, ...], interval: float, output: str) -> None:
    """Draw again and again; in JSON, or where there is no terminal, print each change."""
    documents, screen = _documents(kube, names, interval), console()
    if output == JSON or not screen.is_terminal:
        last = None
        async for document in documents:
            if document != last:
                if output == JSON:
                    click.echo(json.dumps(document))
                else:
                    screen.print(render(document))
            last = document
        return
    with Live(console=screen, auto_refresh=False) as live:
        async for document in documents:
            live.update(render(document), refresh=True)


async def _documents(kube: Kube, names: tuple[str, ...], interval: float) -> AsyncIterator[Object]:
    """Yield documents; a few failures in a row are a network that comes back."""
    failures = 0
    while True:
        try:
            document = await status_document(kube, names)
            failures = 0
            yield document
        except Unavailable:
            failures += 1
            if failures >= _MAX_FAILURES:
                raise
        await asyncio.sleep(interval)


def render(document: Object) -> RenderableType:
    """Draw a status document."""
    models = document["modelDeployments"]
    if not models:
        return Text("no ModelDeployments here; see headrace status -A")
    return Group(*(part for model in models for part in _model(model)))


def _model(model: Object) -> list[RenderableType]:
    style = "green" if model["ready"] else "yellow"
    head = Text.assemble(
        (f"{model['namespace']}/{model['name']}", "bold"),
        f"  {model['readyReplicas']} of {model['replicas']} ready  ",
        (model["reason"], style),
        "" if model["ready"] else f": {model['message']}",
    )
    signs = Text("  ")
    for condition in model["conditions"]:
        status = condition["status"]
        if condition["type"] in _ABNORMAL:
            if status == "True":
                sign, style = _ABNORMAL[condition["type"]]
                signs.append(f"{sign} {condition['type']}  ", style)
            continue
        signs.append(f"{_SIGNS.get(status, '?')} {condition['type']}", _STYLES.get(status, ""))
        signs.append("  " if status == "True" else f" ({condition['reason']})  ", "dim")
    parts: list[RenderableType] = [head, signs]
    for pod in model["pods"]:
        parts += _pod(pod)
    return [*parts, Text("")]


def _pod(pod: Object) -> list[RenderableType]:
    line = Text.assemble(f"  {pod['component']:5} {pod['name']}  ", (pod["stage"], "cyan"))
    if pod["node"]:
        line.append(f"  on {pod['node']}", "dim")
    for problem in (pod["problem"], pod["loaderProblem"]):
        if problem:
            line.append(f"\n        {problem}", "yellow")
    if pod["sharding"]:
        return [line, _shard_bar(pod["sharding"])]
    loader = pod["loader"]
    if not loader:
        return [line]
    direct: bool | None = (loader.get("directPath") or {}).get("active")
    path = "path not decided" if direct is None else "GPUDirect" if direct else "no GPUDirect"
    line.append(f"  {loader.get('phase', '?')}, {path}", "dim")
    return [line, _bars(loader)]


def _grid(columns: int) -> Table:
    """Return a table in which only the bar, the second column, gives way on a narrow terminal."""
    table = Table.grid(padding=(0, 1))
    for number in range(columns):
        table.add_column(no_wrap=number != 1)
    return table


def _shard_bar(sharding: Object) -> RenderableType:
    total, done = sharding["totalBytes"], sharding["bytes"] or 0
    rate = sharding["mibPerSecond"]
    table = _grid(5)
    table.add_row(
        "       shards",
        ProgressBar(total=total, completed=done, width=_BAR_WIDTH),
        f"{100 * done / total:3.0f} %",
        f"{bytes_text(done)} of {bytes_text(total)}",
        "" if rate is None else f"{bytes_text(rate * (1 << 20))}/s",
    )
    return table


def _bars(loader: Object) -> RenderableType:
    table = _grid(7)
    for rank in loader.get("ranks") or ():
        total, read = rank.get("totalBytes") or 0, rank.get("readBytes") or 0
        rate = rank.get("bytesPerSecond")
        table.add_row(
            f"       rank {rank.get('rank')}",
            ProgressBar(total=max(total, 1), completed=read, width=_BAR_WIDTH),
            f"{100 * read / total if total else 0:3.0f} %",
            f"{bytes_text(read)} of {bytes_text(total)}",
            "" if rate is None else f"{bytes_text(rate)}/s",
            # Of a GPU's UUID the beginning is enough, and leaves room.
            Text(f"{rank.get('path') or ''} {(rank.get('device') or '')[:12]}".strip(), "dim"),
            Text("resident", "green") if rank.get("resident") else "",
        )
    return table
