"""The loader's state as Prometheus metrics, made at each scrape."""

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
            yield from (*_whole(self._state), *_ranks(self._state.ranks))


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
    yield _fallbacks(state)


def _fallbacks(state: LoaderState) -> Metric:
    family = GaugeMetricFamily(
        "headrace_loader_direct_path_fallback",
        "1 for each rank that does not use GPUDirect though the policy prefers it.",
        labels=["rank", "reason"],
    )
    if state.settings.policy is PathPolicy.PREFER:
        for rank in state.ranks:
            if rank.path is not None and not rank.path.direct:
                family.add_metric([str(rank.rank), rank.path.direct_reason], 1)
    return family


def _ranks(ranks: list[RankState]) -> Iterator[Metric]:
    total = _per_rank("total_bytes", "Bytes of weights of the rank.")
    read = _per_rank("read_bytes", "Bytes that arrived in memory.")
    verified = _per_rank("verified_bytes", "Bytes whose digest was right.")
    rate = _per_rank("read_bytes_per_second", "Rate of the load, to its latest byte.")
    resident = _per_rank("resident", "1 once the rank's weights are resident and verified.")
    path = GaugeMetricFamily(
        "headrace_loader_rank_path",
        "1 for the way the bytes take; reason says why no better one.",
        labels=["rank", "device", "path", "reason"],
    )
    for rank in ranks:
        label = [str(rank.rank)]
        total.add_metric(label, rank.total_bytes)
        read.add_metric(label, rank.read_bytes)
        verified.add_metric(label, rank.progress.verified if rank.progress else 0)
        resident.add_metric(label, float(rank.offer is not None))
        if rank.bytes_per_second is not None:
            rate.add_metric(label, rank.bytes_per_second)
        if rank.path is not None:
            path.add_metric([*label, rank.device or "", rank.path.path, rank.path.reason], 1)
    yield from (total, read, verified, rate, resident, path)


def _per_rank(name: str, documentation: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"headrace_loader_rank_{name}", documentation, labels=["rank"])
