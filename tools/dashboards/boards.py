"""What the dashboards show: three boards of panels with their queries, as plain data."""

from __future__ import annotations

from dataclasses import dataclass

ONE = 'namespace=~"$namespace",name=~"$name"'
RATE = "[$__rate_interval]"
States = tuple[tuple[int, str, str], ...]


def _truth(true: str, false: str) -> States:
    return (1, "True", true), (0, "False", false), (-1, "Unknown", "text")


TRUTH = _truth("green", "red")
EXCEPTIONS = (
    ("DirectPath", _truth("green", "orange")),
    ("Reconciling", _truth("blue", "green")),
    ("Stalled", _truth("red", "green")),
)
PROVISIONED = (("provisioned", "red"), ("provisioned, a GPU's share", "red"))
GPUS = (("serving", "green"), ("idle", "orange"))
PHASES = (
    (1, "Starting", "purple"),
    (2, "Loading", "blue"),
    (3, "Ready", "green"),
    (4, "Orphaned", "orange"),
    (5, "Failed", "red"),
)


@dataclass(frozen=True)
class Query:
    """A PromQL expression and the legend of its series; `dashed` is what the others are held to."""

    expression: str
    legend: str = ""
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    """One panel: `kind` is Grafana's name of its type, `unit` Grafana's name of its unit.

    A panel of the unit `none` counts things. `states` are the values of a state timeline, each with
    its text and color, `exceptions` those of single rows; `columns` are the values of the label
    (the first of them) that become columns of a table; `color` is that of bars and of a stat that
    is not zero, `colors` those of series by name.
    """

    title: str
    kind: str
    queries: tuple[Query, ...]
    description: str
    unit: str = "short"
    width: int = 12
    height: int = 8
    states: States = TRUTH
    exceptions: tuple[tuple[str, States], ...] = ()
    columns: tuple[str, ...] = ()
    color: str = "blue"
    colors: tuple[tuple[str, str], ...] = ()
    stacked: bool = False

    @property
    def is_instant(self) -> bool:
        """Whether it shows values of one time only."""
        return self.kind in ("stat", "bargauge", "table")


@dataclass(frozen=True)
class Board:
    """A dashboard. `limit` adds the text box for the provisioned throughput."""

    uid: str
    title: str
    description: str
    panels: tuple[Panel, ...]
    limit: bool = False


def _stat(title: str, expression: str, description: str, color: str, unit: str = "short") -> Panel:
    query = (Query(expression),)
    return Panel(title, "stat", query, description, unit, width=4, height=4, color=color)


FLEET = Board(
    "headrace-fleet",
    "Headrace / Fleet",
    "All models: who serves, who waits, what the GPUs do, and how the operator is.",
    (
        _stat(
            "Models",
            f"count(headrace_modeldeployment_replicas{{{ONE}}})",
            "ModelDeployments.",
            "blue",
        ),
        _stat(
            "Ready",
            f'sum(headrace_modeldeployment_condition{{{ONE},type="Ready"}} == bool 1)',
            "ModelDeployments that are as specified.",
            "green",
        ),
        _stat(
            "GPUs serving",
            f'sum(headrace_gpus{{{ONE},state="serving"}})',
            "GPUs of pods that answer requests.",
            "green",
        ),
        _stat(
            "GPUs idle",
            f'sum(headrace_gpus{{{ONE},state="idle"}})',
            "GPUs held by pods that are pulled, loading, compiling or crashing.",
            "orange",
        ),
        _stat(
            "Idle GPU time",
            f'sum(increase(headrace_gpu_seconds_total{{{ONE},state="idle"}}[$__range]))',
            "GPU seconds paid for without serving, within the time shown.",
            "orange",
            "s",
        ),
        _stat(
            "Failed shard Jobs",
            f'sum(increase(headrace_checkpoint_jobs_total{{{ONE},result="failed"}}[$__range]))',
            "Shard Jobs that failed for good, within the time shown.",
            "red",
        ),
        Panel(
            "Replicas",
            "timeseries",
            (
                Query(
                    f"headrace_modeldeployment_ready_replicas{{{ONE}}}",
                    "{{namespace}}/{{name}} ready",
                ),
                Query(
                    f"headrace_modeldeployment_replicas{{{ONE}}}",
                    "{{namespace}}/{{name}} asked for",
                    dashed=True,
                ),
            ),
            "Replicas that answer, and that are asked for.",
            "none",
        ),
        Panel(
            "Ready",
            "state-timeline",
            (
                Query(
                    f'headrace_modeldeployment_condition{{{ONE},type="Ready"}}',
                    "{{namespace}}/{{name}}",
                ),
            ),
            "The condition Ready over time.",
        ),
        Panel(
            "Cold start, 90th percentile by phase",
            "timeseries",
            (
                Query(
                    "histogram_quantile(0.9, sum by (phase, le) (rate("
                    'headrace_operator_cold_start_phase_duration_seconds_bucket{phase!="total"}'
                    "[1h])))",
                    "{{phase}}",
                ),
            ),
            "schedule, prepare (volumes, images), load (weights), engine.",
            "s",
        ),
        Panel(
            "GPUs by state",
            "timeseries",
            (Query(f"sum by (state) (headrace_gpus{{{ONE}}})", "{{state}}"),),
            "Idle: bound to a node and not Ready.",
            "none",
            colors=GPUS,
            stacked=True,
        ),
        Panel(
            "Shard Jobs",
            "timeseries",
            (
                Query(
                    "round(sum by (result) "
                    f"(increase(headrace_checkpoint_jobs_total{{{ONE}}}[1h])))",
                    "{{result}} in the last hour",
                ),
                Query(f"sum(headrace_checkpoint_jobs_active{{{ONE}}})", "running"),
            ),
            "Jobs that make checkpoints.",
            "none",
        ),
        Panel(
            "Shard Job, mean duration",
            "timeseries",
            (
                Query(
                    f"headrace_checkpoint_job_duration_seconds_sum{{{ONE}}}"
                    f" / headrace_checkpoint_job_duration_seconds_count{{{ONE}}}",
                    "{{namespace}}/{{name}}",
                ),
            ),
            "Complete Jobs since the operator's start.",
            "s",
        ),
        Panel(
            "Reconciliation",
            "timeseries",
            tuple(
                Query(
                    f"histogram_quantile({quantile}, sum by (le) (rate("
                    f"headrace_operator_reconcile_duration_seconds_bucket{RATE})))",
                    legend,
                )
                for quantile, legend in ((0.5, "median"), (0.99, "99th percentile"))
            ),
            "Duration of one reconciliation of one ModelDeployment.",
            "s",
        ),
        Panel(
            "Operator: errors, queue, API server",
            "timeseries",
            (
                Query(
                    f"sum by (reason) (rate(headrace_operator_reconcile_errors_total{RATE}))",
                    "errors/s {{reason}}",
                ),
                Query("headrace_operator_queue_depth", "queue"),
                Query("max(headrace_operator_watch_behind)", "watches behind"),
                Query(
                    f"sum by (status) (rate(headrace_operator_api_requests_total{RATE}))",
                    "requests/s {{status}}",
                ),
            ),
            "Errors are tried again with growing pauses.",
        ),
    ),
)

_PHASE = " or ".join(
    f'{value} * headrace_loader_phase{{{ONE},phase="{phase}"}}' for value, phase, _ in PHASES
)
COLD_START = Board(
    "headrace-cold-start",
    "Headrace / Cold start",
    "One deployment's start: which phase takes how long, and what it waits for now.",
    (
        Panel(
            "Conditions",
            "state-timeline",
            (Query(f"headrace_modeldeployment_condition{{{ONE}}}", "{{type}}"),),
            "VolumeReady, CheckpointReady, WeightsResident, Available, Ready, over time.",
            width=24,
            exceptions=EXCEPTIONS,
        ),
        Panel(
            "Loaders",
            "state-timeline",
            (Query(f"max by (pod) ({_PHASE})", "{{pod}}"),),
            "The phase each loader is in.",
            width=24,
            height=6,
            states=PHASES,
        ),
        Panel(
            "Phases of each pod's start",
            "table",
            (
                Query(
                    "max by (pod, phase) ("
                    f"headrace_pod_cold_start_phase_duration_seconds{{{ONE}}})",
                ),
            ),
            "Pods that are ready now, by the times in their status (resolution one second).",
            "s",
            width=24,
            height=6,
            columns=("phase", "schedule", "prepare", "load", "engine", "total"),
        ),
        Panel(
            "Steps of the load",
            "table",
            (
                Query(
                    f"max by (pod, step) (headrace_loader_step_duration_seconds{{{ONE}}}"
                    f" or headrace_loader_rank_step_duration_seconds{{{ONE}}})",
                ),
            ),
            "As the loader measures them; worker, read and verify are parts of load: the slowest "
            "rank's.",
            "s",
            width=24,
            height=6,
            columns=("step", "start", "prepare", "load", "worker", "read", "verify"),
        ),
        Panel(
            "Weights read and verified",
            "timeseries",
            tuple(
                Query(
                    f"sum by (pod) (headrace_loader_{done}_bytes_total{{{ONE}}})"
                    f" / sum by (pod) (headrace_loader_rank_size_bytes{{{ONE}}})",
                    f"{{{{pod}}}} {done}",
                )
                for done in ("read", "verified")
            ),
            "A load is done when all of its bytes are verified.",
            "percentunit",
        ),
        Panel(
            "GPU time since the operator's start",
            "timeseries",
            (Query(f"sum by (state) (headrace_gpu_seconds_total{{{ONE}}})", "{{state}}"),),
            "What waiting has cost: idle is held without serving.",
            "s",
            colors=GPUS,
        ),
    ),
)

LOADER = Board(
    "headrace-loader",
    "Headrace / Loader",
    "How fast each GPU's weights come, by which path, against the provisioned throughput.",
    (
        Panel(
            "Rate of each load, by pod",
            "timeseries",
            (
                Query(
                    f"sum by (pod) (headrace_loader_read_bytes_per_second{{{ONE}}})",
                    "{{pod}}",
                ),
                Query("vector($provisioned * 1024 * 1024 * 1024) > 0", "provisioned", dashed=True),
            ),
            "Bytes over the time of reading, all ranks. The loader computes it: a load is shorter "
            "than two scrapes.",
            "binBps",
            colors=PROVISIONED,
        ),
        Panel(
            "Rate of each GPU",
            "bargauge",
            (
                Query(
                    f"headrace_loader_read_bytes_per_second{{{ONE}}}",
                    "{{pod}} rank {{rank}} {{device}} {{path}}",
                ),
                Query(
                    "vector($provisioned * 1024 * 1024 * 1024) / "
                    f"max(count by (pod) (headrace_loader_rank_size_bytes{{{ONE}}})) > 0",
                    "provisioned, a GPU's share",
                ),
            ),
            "A rank far below its sisters has a slow path, NIC or NUMA node.",
            "binBps",
            colors=PROVISIONED,
        ),
        Panel(
            "Bytes arriving, by path",
            "timeseries",
            (
                Query(
                    f"sum by (path) (rate(headrace_loader_read_bytes_total{{{ONE}}}{RATE}))",
                    "{{path}}",
                ),
            ),
            "Over all pods; loads of less than two scrapes do not show here.",
            "binBps",
            width=8,
        ),
        Panel(
            "Ranks by path",
            "timeseries",
            (
                Query(
                    f"count by (path, reason) (headrace_loader_path_info{{{ONE}}})",
                    "{{path}}: {{reason}}",
                ),
                Query(
                    f"sum by (reason) (headrace_loader_direct_path_fallbacks_total{{{ONE}}})",
                    "fallen back from GPUDirect: {{reason}}",
                    dashed=True,
                ),
            ),
            "The reason says why no better path is taken. Fallbacks are those of present loaders; "
            "none where spec.loading.path is Off.",
            "none",
            width=8,
        ),
        Panel(
            "Handovers",
            "timeseries",
            (
                Query(f"sum(headrace_loader_attached_engines{{{ONE}}})", "attached"),
                Query(f"sum(headrace_loader_attachments_total{{{ONE}}})", "in all", dashed=True),
                Query(
                    f"sum by (reason) (headrace_loader_refused_connections_total{{{ONE}}})",
                    "refused: {{reason}}",
                ),
            ),
            "Engine workers that hold the weights; more in all than attached: restarted engines.",
            "none",
            width=8,
        ),
    ),
    limit=True,
)

BOARDS = {"fleet": FLEET, "cold-start": COLD_START, "loader": LOADER}
