"""How soon, how cheaply and how quietly does the operator serve thousands of ModelDeployments?

    make bench-operator ARGS="--deployments 1000 --operators headrace go"
    make bench-operator ARGS="--deployments 5000"                          # 20,000 pods

A real etcd, API server, controller-manager and scheduler; the nodes are kwok's, which calls
every pod ready at once. Two things are stood in for, so that the operator is measured and not
Kubernetes' Job controller, which waits a second on purpose: that controller does not run,
and this program marks each shard Job complete when it sees it. The claims exist and are bound
by hand. Only the controllers that take part run (CONTROLLERS), and etcd does not wait for the
disk (--unsafe-no-fsync): on two cores Kubernetes itself takes most of the time. The operator is a
process of its own, as in its container, with its own RBAC rules. 100 ModelDeployments share a
namespace.

1. `fill`: all ModelDeployments but the samples, as fast as they can be created.
2. `samples`: with those standing, one is applied every 1/RATE seconds. Its time runs from
   sending the apply until a watch has told of the last of its serving pods, so it includes the
   shard Job, the Deployment and Kubernetes' own Deployment and ReplicaSet controllers.
   `scale_to_pods` is the same for a change of spec.replicas.
3. `idle`: nothing changes; CPU time, writes and reads of the operator. Then all of its metrics
   are asked for once: `scrape_seconds`, `scrape_mib`.
4. `restart`: SIGKILL; meanwhile ten ModelDeployments are scaled. Until the new process has
   visited every ModelDeployment and the ten have their pods. Its writes are those until the ten
   are ready.

`--operators headrace go` measures a peer beside it, in the same run, each in a cluster of its
own: an operator on controller-runtime that makes the same children, conditions and events
(tools/kube/modules/peer). Its numbers begin with `go_`; `ratio_` is Headrace's by the peer's.

The last line is JSON. Requests are counted by the API server's audit log.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from localkube import Cluster
from workspace.steps import Steps

from .cluster import ROOT, Kube, Seen, followed, prepare
from .counts import Audit
from .operators import OPERATORS
from .phases import RESTART_CHANGES, Bench

RATIOS = (
    "apply_to_pods_p50_s",
    "apply_to_pods_p99_s",
    "scale_to_pods_p50_s",
    "scale_to_pods_p99_s",
    "fill_seconds",
    "cpu_ms_per_deployment",
    "writes_per_deployment",
    "restart_converge_s",
    "rss_mib",
)
STEPS_OF_ONE = 6
# Those that take part. Of the others the garbage collector alone watches every object once more.
CONTROLLERS = (
    "deployment-controller",
    "replicaset-controller",
    "disruption-controller",
    "endpointslice-controller",
    "persistentvolume-binder-controller",
    "serviceaccount-controller",
    "namespace-controller",
    "node-lifecycle-controller",
)


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    options = parse()
    steps = Steps(total=STEPS_OF_ONE * len(options.operators))
    results = {name: bench(name, options, steps) for name in options.operators}
    prefixed = {
        OPERATORS[n].prefix + k: v for n, found in results.items() for k, v in found.items()
    }
    print(json.dumps({**prefixed, **ratios(results), **surroundings()}), flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench-operator", description=__doc__.splitlines()[0])
    parser.add_argument("--deployments", type=int, default=1000)
    parser.add_argument("--replicas", type=int, default=4, help="pods of each")
    parser.add_argument("--samples", type=int, default=100, help="of them timed one by one")
    parser.add_argument("--rate", type=float, default=2.0, help="samples applied per second")
    parser.add_argument("--idle-seconds", type=float, default=180.0)
    parser.add_argument("--nodes", type=int, default=50)
    parser.add_argument("--operators", nargs="+", choices=OPERATORS, default=["headrace"])
    parser.add_argument(
        "--profile", type=Path, help="write Headrace's cProfile here: .1, after the restart .2"
    )
    options = parser.parse_args()
    if not RESTART_CHANGES <= options.samples < options.deployments:
        parser.error(f"--samples: from {RESTART_CHANGES} to less than --deployments")
    return options


def bench(name: str, options: argparse.Namespace, steps: Steps) -> dict[str, Any]:
    """Measure one operator in a new cluster."""
    with tempfile.TemporaryDirectory(prefix="bench-operator-") as root:
        audit = Audit(Path(root))
        cluster = Cluster(Path(root, "cluster")).up(
            kwok=options.nodes,
            controller_manager={"controllers": ",".join(CONTROLLERS)},
            api_server=audit.flags,
        )
        with cluster:
            return asyncio.run(measure(name, options, cluster, audit, steps))


async def measure(
    name: str, options: argparse.Namespace, cluster: Cluster, audit: Audit, steps: Steps
) -> dict[str, Any]:
    operator = OPERATORS[name](audit.directory, options.profile if name == "headrace" else None)
    async with Kube(cluster) as kube:
        with steps.step(f"{name}: CRD, RBAC, claims"):
            await prepare(cluster, kube, operator.kubeconfig, options.deployments)
        seen = Seen()
        async with followed(kube, seen):
            try:
                return await Bench(options, cluster, kube, seen, operator, audit, steps).run()
            except BaseException:
                print(operator.log_tail(), file=sys.stderr)
                raise
            finally:
                operator.kill()


def ratios(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Return Headrace's numbers by the peer's, where both were measured."""
    if not {"headrace", "go"} <= results.keys():
        return {}
    ours, peers = results["headrace"], results["go"]
    return {f"ratio_{k}": round(ours[k] / peers[k], 2) for k in RATIOS if peers[k]}


def surroundings() -> dict[str, Any]:
    commit = ["git", "rev-parse", "--short", "HEAD"]
    found = subprocess.run(commit, cwd=ROOT, capture_output=True, text=True, check=False)
    return {
        "load_average": round(os.getloadavg()[0], 1),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": found.stdout.strip(),
        "etcd_fsync": False,
    }


if __name__ == "__main__":
    main()
