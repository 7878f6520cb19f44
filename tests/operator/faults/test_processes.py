"""The operator as a process, with kopf: SIGKILL at each stage, API server and etcd killed.

One life; at each of its stages something dies and comes back. It has to end as a life that
nothing happened to does.
"""

import asyncio
import gc
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from faults.life import Kube, Life
from stage.operator import Operator, token_kubeconfig

pytestmark = [
    pytest.mark.cluster,
    # asyncio leaves transports behind whose TLS handshake was cut off by the server's death. The
    # garbage collector finds transport and socket in any order; the one found first warns.
    pytest.mark.filterwarnings("ignore:unclosed transport:ResourceWarning"),
    pytest.mark.filterwarnings(
        r"ignore:unclosed <socket\.socket fd=\d+, family=2,:ResourceWarning"
    ),
]
BACK_SECONDS = 2.0


class Stages(Life):
    """A life that calls `before` as each stage begins."""

    before: Callable[[str], Any]

    async def ready(self, generation: int) -> None:
        await self.before(f"generation {generation}")
        await super().ready(generation)

    async def gone(self) -> None:
        await self.before("deletion")
        await super().gone()


@pytest.fixture
def process(cluster: Any, tmp_path: Path) -> Any:
    kubeconfig = token_kubeconfig(cluster, tmp_path / "kubeconfig")
    operator = Operator(kubeconfig, tmp_path / "operator.log")
    operator.start()
    yield operator
    if operator.process is not None:
        operator.stop()


@pytest.fixture
async def kube(cluster: Any) -> AsyncIterator[Kube]:
    async with Kube(cluster) as client:
        yield client
    gc.collect()  # what was left behind is noticed here, and not in another test


async def test_a_life_in_which_everything_dies_once(process: Any, kube: Kube) -> None:
    quiet = Stages(kube, "quiet")
    quiet.before = _nothing
    await quiet.prepare()
    await quiet.run()

    async def kill(stage: str) -> None:
        victim = {
            "generation 1": "operator",
            "generation 2": "kube-apiserver",
            "generation 3": "etcd",
            "deletion": "operator",
        }[stage]
        await asyncio.to_thread(_kill_and_bring_back, victim, process, kube)

    disturbed = Stages(kube, "disturbed")
    disturbed.before = kill
    await disturbed.prepare()
    await disturbed.run()
    assert disturbed.snapshot == quiet.snapshot
    assert disturbed.made == quiet.made
    assert process.process.poll() is None
    # kopf tells of an API server that is gone as an error of its own, and tries again.
    ours = [e for e in process.entries() if e["logger"].startswith("headrace_operator")]
    errors = [e for e in ours if e["level"] == "error"]
    assert not errors, errors[:3]


async def _nothing(_: str) -> None:
    return


def _kill_and_bring_back(victim: str, process: Any, kube: Kube) -> None:
    if victim == "operator":
        process.stop(signal.SIGKILL)
        process.start()
        return
    # kwok does not try again what was refused meanwhile (0.8); a kubelet does.
    for component in (victim, "kwok"):
        kube.cluster.start(component, kube.cluster.kill(component))
