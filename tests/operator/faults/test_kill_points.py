"""The operator is killed after every single write of a whole life, and starts again."""

import asyncio
import os
from typing import Any

import pytest
from faultproxy import Harm

pytestmark = pytest.mark.cluster
TOGETHER = int(os.environ.get("HEADRACE_FAULTS_TOGETHER", "12"))


async def test_killed_after_every_write(disturbance: Any) -> None:
    import time
    t = time.monotonic()
    life, (operator,) = await disturbance.live("undisturbed")
    print("undisturbed", time.monotonic() - t, len(operator.proxy.requests))
    print([(r.method, r.path) for r in operator.proxy.requests if r.write is not None])
    writes = sum(r.write is not None for r in operator.proxy.requests)
    gate = asyncio.Semaphore(TOGETHER)
    assert writes > 10

    async def disturbed(number: int) -> None:
        def harm(operator: Any, request: Any) -> Harm | None:
            if request.write == number and operator.starts == 1:
                return Harm(pass_on=True, then=operator.die)
            return None

        async with gate:
            t = time.monotonic()
            found, (operator,) = await disturbance.live(f"kill-{number}", harm)
            print(number, time.monotonic() - t, operator.starts, len(operator.proxy.requests))
        assert found.snapshot == life.snapshot
        assert found.made == life.made

    await asyncio.gather(*(disturbed(number) for number in range(writes)))
