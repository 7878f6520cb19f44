"""Boards as Grafana's JSON, made with grafana-foundation-sdk, whose types are Grafana's schema."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from grafana_foundation_sdk.builders import (
    bargauge,
    common,
    dashboard,
    prometheus,
    stat,
    statetimeline,
    timeseries,
)
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import BarGaugeDisplayMode, VizOrientation
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DataSourceRef,
    ValueMap,
    ValueMappingResult,
    VariableHide,
    VariableRefresh,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from .boards import Board, Panel

SOURCE = DataSourceRef("prometheus", "$datasource")
_STATES = {"1": ("True", "green"), "0": ("False", "red"), "-1": ("Unknown", "text")}
_NAMES = "headrace_modeldeployment_replicas"


def as_json(board: Board) -> str:
    """Return the dashboard's JSON text."""
    made = (
        dashboard.Dashboard(board.title)
        .uid(board.uid)
        .description(board.description)
        .tags(["headrace"])
        .readonly()
        .refresh("10s")
        .time("now-1h", "now")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .with_variable(
            dashboard.DatasourceVariable("datasource").label("Source").type("prometheus")
        )
        .with_variable(_choice("namespace", "Namespace", f"label_values({_NAMES}, namespace)"))
        .with_variable(
            _choice("name", "Model", f'label_values({_NAMES}{{namespace=~"$namespace"}}, name)')
        )
    )
    if board.limit:
        limit = dashboard.TextBoxVariable("provisioned").label("Provisioned GiB/s")
        made = made.with_variable(limit.default_value("0").hide(VariableHide.DONT_HIDE))
    for panel in board.panels:
        made = made.with_panel(_panel(panel))
    return JSONEncoder(sort_keys=True, indent=1).encode(made.build()) + "\n"


def _choice(name: str, label: str, query: str) -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable(name)
        .label(label)
        .datasource(SOURCE)
        .query(query)
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .multi(multi=True)
        .include_all(include_all=True)
        .all_value(".*")
    )


def _panel(panel: Panel) -> Any:  # noqa: ANN401  # the builders share no base
    made = _KINDS[panel.kind]()
    made = (
        made.title(panel.title)
        .description(panel.description)
        .datasource(SOURCE)
        .span(panel.width)
        .height(panel.height)
        .unit(panel.unit)
    )
    for number, query in enumerate(panel.queries):
        target = prometheus.Dataquery().expr(query.expression).ref_id(chr(ord("A") + number))
        target = target.legend_format(query.legend) if query.legend else target
        now = panel.kind in ("stat", "bargauge")
        made = made.with_target(target.instant() if now else target.range())
    return made


def _state_timeline() -> statetimeline.Panel:
    results = {
        value: ValueMappingResult(text=text, color=color, index=index)
        for index, (value, (text, color)) in enumerate(_STATES.items())
    }
    return statetimeline.Panel().mappings([ValueMap(options=results)])


def _bars() -> bargauge.Panel:
    bars = bargauge.Panel().orientation(VizOrientation.HORIZONTAL)
    last = common.ReduceDataOptions().calcs(["lastNotNull"])
    return bars.display_mode(BarGaugeDisplayMode.BASIC).min(0).reduce_options(last)


_KINDS: dict[str, Callable[[], Any]] = {
    "bargauge": _bars,
    "stat": stat.Panel,
    "state-timeline": _state_timeline,
    "timeseries": lambda: timeseries.Panel().min(0),
}
