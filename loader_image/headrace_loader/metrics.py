"""The loader's state as Prometheus metrics, made at each scrape; docs/metrics.md explains them."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from headrace_loader.backends import PathPolicy
from headrace_loader.state import LoaderState, Phase, RankState

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def render(state: LoaderState) -> bytes:
    """Return the metrics in the text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_StateCollector(state))
    return generate_latest(registry)


class _StateCollector(Collector):
    def __init__(self, state: LoaderState) -> None:
        self._state = state

    def collect(self) -> Iterator[Metric]:
        with self._state.reading():
            yield from (*_whole(self._state), *_steps(self._state), *_ranks(self._state.ranks))


def _whole(state: LoaderState) -> Iterator[Metric]:
    phase = GaugeMetricFamily(
        "headrace_loader_phase", "1 for the phase the loader is in.", labels=["phase"]
    )
    for one in Phase:
        phase.add_metric([one], float(one is state.phase))
    yield phase
    yield GaugeMetricFamily(
        "headrace_loader_start_time_seconds",
        "Unix time of the loader's start.",
        value=state.process_started,
    )
    yield GaugeMetricFamily(
        "headrace_loader_attached_engines",
        "Engine workers holding weights.",
        value=len(state.attached),
    )
    yield CounterMetricFamily(
        "headrace_loader_attachments", "Handovers to engine workers.", value=state.attachments
    )
    yield CounterMetricFamily(
        "headrace_loader_loads", "Loads begun by this process.", value=state.loads
    )
    refused = CounterMetricFamily(
        "headrace_loader_refused_connections", "Handovers refused.", labels=["reason"]
    )
    for reason, count in state.refusals.items():
        refused.add_metric([reason], count)
    yield refused
    cache = GaugeMetricFamily(
        "headrace_loader_engine_cache_bytes",
        "Size of the engine's compiled code by what became of it; 0 where unknown.",
        labels=["phase"],
    )
    cache.add_metric([state.engine_cache.phase], state.engine_cache.nbytes)
    yield cache
    yield _fallbacks(state)


def _fallbacks(state: LoaderState) -> Metric:
    family = CounterMetricFamily(
        "headrace_loader_direct_path_fallbacks",
        "Loads of a rank without GPUDirect though the policy prefers it.",
        labels=["rank", "device", "reason"],
    )
    if state.settings.policy is PathPolicy.PREFER:
        for rank in state.ranks:
            if rank.path is not None and not rank.path.direct:
                labels = [str(rank.rank), rank.device or "", rank.path.direct_reason]
                family.add_metric(labels, 1)
    return family


def _steps(state: LoaderState) -> Iterator[Metric]:
    """Durations of what has ended; one load a process, so gauges and no histograms."""
    whole = GaugeMetricFamily(
        "headrace_loader_step_duration_seconds",
        "Duration of a step of the load that has ended: start, prepare, load.",
        labels=["step"],
    )
    times = {"processStarted": state.process_started, **state.timeline}
    marks = ("processStarted", "manifestRead", "loadBegan", "resident")
    for step, begin, end in zip(("start", "prepare", "load"), marks, marks[1:], strict=False):
        if begin in times and end in times:
            whole.add_metric([step], times[end] - times[begin])
    yield whole
    each = GaugeMetricFamily(
        "headrace_loader_rank_step_duration_seconds",
        "Duration of a step of a rank's load that has ended: worker, read, verify.",
        labels=["rank", "step"],
    )
    for rank in state.ranks:
        began, last = None, None
        if rank.progress is not None:
            began, last = rank.progress.began, rank.progress.last_byte
        moments = (rank.worker_started, began, last, rank.verified_at)
        for step, start, stop in zip(
            ("worker", "read", "verify"), moments, moments[1:], strict=False
        ):
            if start is not None and stop is not None and rank.verified_at is not None:
                each.add_metric([str(rank.rank), step], stop - start)
    yield each


def _ranks(ranks: list[RankState]) -> Iterator[Metric]:
    way = ["rank", "device", "path"]
    size = _per_rank("rank_size_bytes", "Bytes of weights of the rank.")
    resident = _per_rank("rank_resident", "1 once the rank's weights are resident and verified.")
    verified = CounterMetricFamily(
        "headrace_loader_verified_bytes", "Bytes whose digest was right.", labels=["rank"]
    )
    read = CounterMetricFamily(
        "headrace_loader_read_bytes", "Bytes that arrived in memory.", labels=way
    )
    rate = GaugeMetricFamily(
        "headrace_loader_read_bytes_per_second",
        "Rate of the load, from its begin to its last byte, or until now.",
        labels=way,
    )
    left = _per_rank("eta_seconds", "Seconds until the last byte of the rank, at its rate so far.")
    path = GaugeMetricFamily(
        "headrace_loader_path_info",
        "1 for the way the bytes take; reason says why no better one.",
        labels=[*way, "reason"],
    )
    for rank in ranks:
        label = [str(rank.rank)]
        size.add_metric(label, rank.total_bytes)
        verified.add_metric(label, rank.progress.verified if rank.progress else 0)
        resident.add_metric(label, float(rank.offer is not None))
        if rank.path is None:
            continue
        taken = [*label, rank.device or "", rank.path.path]
        path.add_metric([*taken, rank.path.reason], 1)
        read.add_metric(taken, rank.read_bytes)
        if rank.bytes_per_second is not None:
            rate.add_metric(taken, rank.bytes_per_second)
        if rank.eta_seconds is not None:
            left.add_metric(label, rank.eta_seconds)
    yield from (size, read, verified, rate, left, resident, path)


def _per_rank(name: str, documentation: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"headrace_loader_{name}", documentation, labels=["rank"])
