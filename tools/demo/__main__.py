"""The demonstration itself: python -m demo [--keep | --down]."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING

import imagebuild
from localkube import Cluster, binaries, prerequisites
from workspace.errors import ToolError
from workspace.paths import ROOT
from workspace.steps import Steps

from . import setup
from .coldstart import cold_start
from .completion import Completion, complete
from .diagnose import diagnose
from .observe import Model, wait_for
from .once import run
from .reference import PlainAnswer
from .timeline import gantt

if TYPE_CHECKING:
    from pathlib import Path

NAME = "tiny-llama"
CLAIM = "models"
MANIFEST = ROOT / "examples" / "tiny-llama.yaml"
TENSOR_PARALLEL_SIZE = 2  # as in the manifest
PROMPT = "the river flows into"
TOKENS = 16
READY_SECONDS = 600.0
SCALE_SECONDS = 600.0


class Demo:
    """One run, from binaries to an answer."""

    def __init__(self, cluster: Cluster, volume: Path) -> None:
        self._cluster = cluster
        self._volume = volume
        self._steps = Steps(total=12)
        self._model = Model(cluster, NAME)

    def run(self) -> None:
        """Do all steps but the teardown; raises ToolError or LocalkubeError."""
        archives = self._build()
        with self._steps.step("a tiny random Llama with a tokenizer"):
            model = setup.make_model(self._volume / NAME)
        with ExitStack() as stack:
            plain = stack.enter_context(self._ask_plain_vllm(model))
            self._bring_up(archives)
            self._deploy()
            answer = self._ask()
            self._compare(answer, plain)
        with self._steps.step("timeline of the cold start"):
            self._steps.say(gantt(cold_start(self._model, answer)))
        self._scale()

    def tear_down(self) -> None:
        """Take everything away; does nothing where nothing is."""
        with self._steps.step("tear down"):
            self._cluster.down()
            shutil.rmtree(self._volume, ignore_errors=True)

    def _build(self) -> dict[str, Path]:
        with self._steps.step("Kubernetes from pinned Go modules (10 minutes when first built)"):
            prerequisites.install_packages()
            binaries.ensure([*binaries.CONTROL_PLANE, *binaries.NODE, "helm"])
        with self._steps.step("container images (5 minutes when first built)"):
            return imagebuild.ensure(report=self._steps.say)

    def _ask_plain_vllm(self, model: Path) -> PlainAnswer:
        self._steps.say("plain vLLM starts on it in the background, for comparison")
        size = TENSOR_PARALLEL_SIZE
        return PlainAnswer(model, PROMPT, tokens=TOKENS, tensor_parallel_size=size)

    def _bring_up(self, archives: dict[str, Path]) -> None:
        with self._steps.step("a cluster with a real node, and the images into it"):
            setup.prepare_node(self._cluster, archives.values())
            self._steps.say(f"export KUBECONFIG={self._cluster.kubeconfig}")
        with self._steps.step("volume and claim for the model"):
            setup.make_volume(self._cluster, self._volume, CLAIM)
        with self._steps.step("helm install headrace charts/headrace"):
            setup.install_operator(self._cluster)

    def _deploy(self) -> None:
        with self._steps.step(f"kubectl apply -f {MANIFEST.relative_to(ROOT)}, and wait for Ready"):
            self._cluster.kubectl("apply", "-f", str(MANIFEST))
            self._model.wait_true("Ready", timeout=READY_SECONDS, say=self._steps.say)
            self._steps.say(self._cluster.kubectl("get", "modeldeployments,pods,jobs"))

    def _ask(self) -> Completion:
        with self._steps.step("one completion through the Service"):
            service = self._model.get("service", NAME)["spec"]
            url = f"http://{service['clusterIP']}:{service['ports'][0]['port']}"
            answer = complete(url, NAME, PROMPT, TOKENS)
            self._steps.say(f"{PROMPT} ...{answer.text}")
            self._steps.say(f"tokens {list(answer.token_ids)}")
            return answer

    def _compare(self, answer: Completion, plain: PlainAnswer) -> None:
        with self._steps.step("the same tokens as plain vLLM from the unsharded model?"):
            expected = plain.token_ids()
            if answer.token_ids != expected:
                raise ToolError(f"different: plain vLLM answers {list(expected)}")
            self._steps.say(f"equal: {len(expected)} of {len(expected)} tokens")

    def _scale(self) -> None:
        with self._steps.step("kubectl scale to 2 and back to 0"):
            self._scale_to(2)
            self._scale_to(0)

    def _scale_to(self, replicas: int) -> None:
        self._cluster.kubectl("scale", "modeldeployment", NAME, f"--replicas={replicas}")
        wait_for(
            f"{replicas} ready replicas",
            lambda: self._ready_pods() == (replicas, replicas),
            timeout=SCALE_SECONDS,
        )
        self._steps.say(f"{replicas} replicas, all ready" if replicas else "no replicas")

    def _ready_pods(self) -> tuple[int, int]:
        """Return how many serving pods there are, and how many of them are ready."""
        pods = self._model.children("pods", "serve")
        conditions = (c for pod in pods for c in pod["status"].get("conditions", ()))
        ready = sum(c["type"] == "Ready" and c["status"] == "True" for c in conditions)
        return len(pods), ready


def main() -> int:
    """Run the demonstration and tear everything down, also when it fails or is interrupted."""
    parser = argparse.ArgumentParser(prog="demo", description="Headrace on a real cluster.")
    end = parser.add_mutually_exclusive_group()
    end.add_argument("--keep", action="store_true", help="leave the cluster up at the end")
    end.add_argument("--down", action="store_true", help="tear down a cluster that was kept")
    options = parser.parse_args()
    if os.geteuid() != 0:
        print("failed: root is missing; a real kubelet needs it: sudo make demo", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    cluster = Cluster(ROOT / ".cache" / "demo")
    demo = Demo(cluster, ROOT / ".cache" / "demo-volume")
    return run(
        (lambda: None) if options.down else demo.run,
        (lambda: None) if options.keep else demo.tear_down,
        lambda: f"\n{diagnose(cluster)}\n",
    )


if __name__ == "__main__":
    sys.exit(main())
