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
    table,
    timeseries,
)
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import (
    BarGaugeDisplayMode,
    BarGaugeValueMode,
    BigValueGraphMode,
    LegendDisplayMode,
    LegendPlacement,
    LineInterpolation,
    StackingMode,
    TableBarGaugeCellOptions,
    VisibilityMode,
    VizOrientation,
)
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DataSourceRef,
    DataTransformerConfig,
    DynamicConfigValue,
    FieldColorModeId,
    Threshold,
    ThresholdsMode,
    ValueMap,
    ValueMappingResult,
    VariableHide,
    VariableRefresh,
)
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

if TYPE_CHECKING:
    from collections.abc import Callable

    from .boards import Board, Panel, States

SOURCE = DataSourceRef("prometheus", "$datasource")
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
    made = _KINDS[panel.kind](panel)
    made = (
        made.title(panel.title)
        .description(panel.description)
        .datasource(SOURCE)
        .span(panel.width)
        .height(panel.height)
        .unit(panel.unit)
    )
    for number, query in enumerate(panel.queries):
        name = chr(ord("A") + number)
        target = prometheus.Dataquery().expr(query.expression).ref_id(name)
        target = target.legend_format(query.legend) if query.legend else target
        target = target.format(PromQueryFormat.TABLE) if panel.columns else target
        made = made.with_target(target.instant() if panel.is_instant else target.range())
        if query.dashed:
            made = made.override_by_query(name, _DASHED)
    for name, color in panel.colors:
        fixed = {"mode": FieldColorModeId.FIXED, "fixedColor": color}
        made = made.override_by_name(name, [DynamicConfigValue("color", fixed)])
    return made


def _lines(panel: Panel) -> timeseries.Panel:
    made = timeseries.Panel().min(0).legend(_legend(shown=True))
    made = (
        made.line_width(2).fill_opacity(10).show_points(VisibilityMode.NEVER).color_scheme(_PALETTE)
    )
    if panel.unit == "none":
        made = made.decimals(0).line_interpolation(LineInterpolation.STEP_AFTER).axis_soft_max(1)
    made = made.max(1) if panel.unit == "percentunit" else made
    return made.stacking(_STACKED) if panel.stacked else made


def _stat(panel: Panel) -> stat.Panel:
    """A number, grey where it is zero; what `increase` extrapolates is rounded."""
    made = stat.Panel().reduce_options(_last()).thresholds(_steps("text", (0.5, panel.color)))
    return made.graph_mode(BigValueGraphMode.NONE).decimals(0)


def _states(panel: Panel) -> statetimeline.Panel:
    """Bars with their texts; a legend only where a text has one color in all rows."""
    made = statetimeline.Panel().mappings([_mapping(panel.states)])
    made = made.legend(_legend(shown=not panel.exceptions))
    for name, states in panel.exceptions:
        made = made.override_by_name(name, [DynamicConfigValue("mappings", [_mapping(states)])])
    return made.fill_opacity(70).show_value(VisibilityMode.AUTO)


def _mapping(states: States) -> ValueMap:
    return ValueMap(
        options={
            str(value): ValueMappingResult(text=text, color=color, index=index)
            for index, (value, text, color) in enumerate(states)
        }
    )


def _table(panel: Panel) -> table.Panel:
    """A row for each pod, a column for each value of a label, the numbers as bars."""
    label, *columns = panel.columns
    matrix = {"rowField": "pod", "columnField": label, "valueField": "Value", "emptyValue": "null"}
    first = f"pod\\{label}"
    order = {"indexByName": {name: at for at, name in enumerate((first, *columns))}}
    bars = TableBarGaugeCellOptions(BarGaugeDisplayMode.BASIC, BarGaugeValueMode.TEXT)
    made = table.Panel().min(0).thresholds(_steps(panel.color)).cell_options(bars).min_width(70)
    made = made.override_by_name("pod", _NAME)
    for name, options in (
        ("groupingToMatrix", matrix),
        ("organize", {**order, "renameByName": {first: "pod"}}),
    ):
        made = made.with_transformation(DataTransformerConfig(name, options=options))
    return made


def _bars(panel: Panel) -> bargauge.Panel:
    bars = bargauge.Panel().orientation(VizOrientation.HORIZONTAL).min(0)
    bars = bars.display_mode(BarGaugeDisplayMode.BASIC).reduce_options(_last())
    return bars.thresholds(_steps(panel.color))


def _legend(*, shown: bool) -> common.VizLegendOptions:
    made = common.VizLegendOptions().show_legend(shown).placement(LegendPlacement.BOTTOM)
    return made.display_mode(LegendDisplayMode.LIST)


def _last() -> common.ReduceDataOptions:
    return common.ReduceDataOptions().calcs(["lastNotNull"])


def _steps(base: str, *more: tuple[float, str]) -> dashboard.ThresholdsConfig:
    """Colors by value. Without them Grafana takes its own, which are red from 80 on."""
    steps = [Threshold(None, base), *(Threshold(value, color) for value, color in more)]
    return dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps)


_DASHED = [
    DynamicConfigValue("custom.lineStyle", {"fill": "dash", "dash": [10, 10]}),
    DynamicConfigValue("custom.fillOpacity", 0),
]
_NAME = [
    DynamicConfigValue("custom.cellOptions", {"type": "auto"}),
    DynamicConfigValue("custom.width", 260),
]
_PALETTE = dashboard.FieldColor().mode(FieldColorModeId.PALETTE_CLASSIC)
_STACKED = common.StackingConfig().mode(StackingMode.NORMAL)
_KINDS: dict[str, Callable[[Panel], Any]] = {
    "bargauge": _bars,
    "stat": _stat,
    "state-timeline": _states,
    "table": _table,
    "timeseries": _lines,
}
