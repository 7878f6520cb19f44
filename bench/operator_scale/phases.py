"""What happens to an operator, phase by phase, and what is measured of each."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .cluster import CONCURRENCY, Kube, Seen, manifest, until
from .counts import Audit, cpu_of_all, cpu_seconds, reads, writes, written
from .operators import MIB

if TYPE_CHECKING:
    import argparse
    from collections import Counter

    from localkube import Cluster
    from workspace.steps import Steps

    from .operators import Operator

RESTART_CHANGES = 10
FILL_SECONDS = 3600
RESTART_SECONDS = 1800
_QUIET_SECONDS = 5.0


@dataclass
class Bench:
    """One operator in one cluster."""

    options: argparse.Namespace
    cluster: Cluster
    kube: Kube
    seen: Seen
    operator: Operator
    audit: Audit
    steps: Steps

    async def run(self) -> dict[str, Any]:
        count, replicas = self.options.deployments, self.options.replicas
        first = count - self.options.samples
        samples = range(first, count)
        self.operator.start()
        await asyncio.sleep(0.5)
        with self.steps.step(f"fill: {first} ModelDeployments of {replicas} replicas"):
            filled = await self._fill(first)
        with self.steps.step(f"{len(samples)} applied, {self.options.rate:g} per second"):
            applied = await self._paced(samples, replicas)
            audited = self.audit.counts()
            self.steps.say(f"apply to pods: {quantiles(applied)}")
            self.steps.say(f"requests: {dict(audited.most_common())}")
        with self.steps.step("the same ones scaled"):
            scaled = await self._paced(samples, replicas + 1)
            self.steps.say(f"scale to pods: {quantiles(scaled)}")
        with self.steps.step(f"idle for {self.options.idle_seconds:g} s"):
            idle = await self._idle()
            self.steps.say(json.dumps(idle))
        with self.steps.step("restart"):
            restart = await self._restart()
            self.steps.say(json.dumps(restart))
        peak = max(self.operator.rss_mib("VmHWM"), idle["peak_rss_mib"])
        return {
            "deployments": count,
            "pods": sum(map(len, self.seen.pods.values())),
            **rounded("apply_to_pods", applied),
            **rounded("scale_to_pods", scaled),
            **filled,
            "writes_per_deployment": round(writes(audited) / count, 2),
            "reads_per_deployment": round(reads(audited) / count, 2),
            **idle,
            **restart,
            "rss_mib": round(peak),
        }

    async def _fill(self, count: int) -> dict[str, Any]:
        begun, before = time.monotonic(), self._cpu()
        numbers = iter(range(count))

        async def create() -> None:
            for number in numbers:
                await self._apply(number, self.options.replicas)

        await asyncio.gather(*(create() for _ in range(CONCURRENCY)))
        await self._until_ready(count, FILL_SECONDS)
        seconds, used = time.monotonic() - begun, self._cpu() - before
        self.steps.say(f"all ready after {seconds:.1f} s; CPU seconds: {_whole(used)}")
        return {
            "fill_seconds": round(seconds, 1),
            "fill_cpu_seconds": _whole(used),
            "cpu_ms_per_deployment": round(1000 * used["operator"] / count, 1),
        }

    async def _paced(self, numbers: range, replicas: int) -> list[float]:
        """Apply at a steady rate, whatever comes of it; return the seconds to the last pod."""
        begun, pending = time.monotonic(), []
        for index, number in enumerate(numbers):
            await asyncio.sleep(begun + index / self.options.rate - time.monotonic())
            pending.append(asyncio.create_task(self._apply(number, replicas)))
        sent = await asyncio.gather(*pending)
        await until(lambda: all(key in self.seen.complete_at for key, _ in sent), 600)
        await self._until_ready(self.options.deployments, 600)
        return [self.seen.complete_at[key] - at for key, at in sent]

    async def _idle(self) -> dict[str, Any]:
        """Wait until the last writes are done, then measure."""
        before = -1
        while before != (now := writes(self.audit.counts())):
            before = now
            await asyncio.sleep(_QUIET_SECONDS)
        audited, cpu, begun = self.audit.counts(), cpu_seconds(self.operator.pid), time.monotonic()
        visited = await self.operator.visited()
        await asyncio.sleep(self.options.idle_seconds)
        cpu, seconds = cpu_seconds(self.operator.pid) - cpu, time.monotonic() - begun
        audited = self.audit.counts() - audited
        peak = self.operator.rss_mib("VmHWM")
        begun = time.monotonic()
        scraped = await self.operator.metrics()
        return {
            "scrape_seconds": round(time.monotonic() - begun, 2),
            "scrape_mib": round(len(scraped) / MIB, 2),
            "idle_seconds": round(seconds),
            "idle_writes": writes(audited),
            "idle_reads": reads(audited),
            "idle_visits": await self.operator.visited() - visited,
            "idle_core_percent": round(100 * cpu / seconds, 2),
            "idle_rss_mib": round(self.operator.rss_mib()),
            "peak_rss_mib": round(peak),
        }

    async def _restart(self) -> dict[str, Any]:
        """Kill it and scale some; wait until all were visited and these have their pods."""
        self.operator.kill()
        count, replicas = self.options.deployments, self.options.replicas + 2
        audited = self.audit.counts()
        last = range(count - RESTART_CHANGES, count)
        keys = [(await self._apply(number, replicas))[0] for number in last]
        begun = self.operator.start()
        while await self.operator.visited() < count or any(
            key not in self.seen.complete_at for key in keys
        ):
            await asyncio.sleep(0.1)
            if time.monotonic() - begun > RESTART_SECONDS:
                raise SystemExit(f"restart: not converged after {RESTART_SECONDS} s")
        seconds, cpu = time.monotonic() - begun, cpu_seconds(self.operator.pid)
        await self._until_ready(count, 600)
        audited = self.audit.counts() - audited
        return {
            "restart_converge_s": round(seconds, 1),
            "restart_cpu_seconds": round(cpu, 1),
            "restart_writes": writes(audited),
            "restart_written": written(audited),
            "restart_rss_mib": round(self.operator.rss_mib("VmHWM")),
        }

    async def _apply(self, number: int, replicas: int) -> tuple[str, float]:
        """Apply one; return its key and when it was sent."""
        body = manifest(number, replicas)
        key = f"{body['metadata']['namespace']}/{body['metadata']['name']}"
        self.seen.ready.discard(key)
        self.seen.expect(key, replicas)
        sent = time.monotonic()
        await self.kube.apply(body)
        return key, sent

    async def _until_ready(self, count: int, seconds: float) -> None:
        def are_ready() -> bool:
            if not self.operator.is_running:
                raise SystemExit("the operator has ended")
            return len(self.seen.ready) == count

        await until(are_ready, seconds, lambda: f"{len(self.seen.ready)} of {count} ready")

    def _cpu(self) -> Counter[str]:
        return cpu_of_all(self.cluster, self.operator.pid)


def _whole(seconds: Counter[str]) -> dict[str, int]:
    return {name: round(value) for name, value in seconds.most_common() if round(value)}


def quantiles(values: list[float]) -> str:
    p50, p99 = (_quantile(values, q) for q in (50, 99))
    return f"min {min(values):.3f} s, p50 {p50:.3f} s, p99 {p99:.3f} s, max {max(values):.3f} s"


def _quantile(values: list[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def rounded(name: str, values: list[float]) -> dict[str, float]:
    return {f"{name}_p{q}_s": round(_quantile(values, q), 3) for q in (50, 99)}
