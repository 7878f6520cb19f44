"""Autoscaling by kube-controller-manager's own HPA, through the scale subresource.

The metrics come from `ExternalMetrics`, a stand-in for an adapter such as KEDA's or Prometheus':
an aggregated API of one metric that the test sets.
"""

import json
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

import pytest
import yaml

from headrace_operator.cluster.kinds import MODEL_DEPLOYMENT, SERVICE, Kind
from localkube.pki import Authority
from localkube.sources import source

pytestmark = pytest.mark.cluster
ROOT = Path(__file__).parents[3]
GROUP, VERSION, METRIC = "external.metrics.k8s.io", "v1beta1", "vllm_num_requests_waiting"
API_SERVICE = Kind("APIService", "apiregistration.k8s.io", "v1", "apiservices", namespaced=False)
AUTOSCALER = Kind("HorizontalPodAutoscaler", "autoscaling", "v2", "horizontalpodautoscalers")


class ExternalMetrics:
    """An aggregated API server for one external metric, with whatever value the test gives it."""

    def __init__(self, directory: Path) -> None:
        self.value = 0
        metrics = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                answer = json.dumps(metrics.answer(self.path)).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        credential = Authority(directory).issue("metrics", "metrics", hosts=["localhost"])
        context.load_cert_chain(credential.certificate, credential.key)
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.port = self._server.server_address[1]

    def answer(self, path: str) -> dict[str, Any]:
        if path.partition("?")[0].endswith(METRIC):
            item = {
                "metricName": METRIC,
                "metricLabels": {},
                "timestamp": "2026-11-24T12:00:00Z",
                "value": str(self.value),
            }
            kind = {"kind": "ExternalMetricValueList", "apiVersion": f"{GROUP}/{VERSION}"}
            return {**kind, "metadata": {}, "items": [item]}
        resource = {"name": METRIC, "namespaced": True, "kind": "ExternalMetricValueList"}
        return {
            "kind": "APIResourceList",
            "apiVersion": "v1",
            "groupVersion": f"{GROUP}/{VERSION}",
            "resources": [{**resource, "singularName": "", "verbs": ["get"]}],
        }

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def external_metrics(
    kube: Any, namespace: str, tmp_path: Path, eventually: Any
) -> Iterator[ExternalMetrics]:
    """The stand-in, registered with the API server's aggregator."""
    name = f"{VERSION}.{GROUP}"
    with ExternalMetrics(tmp_path) as metrics:
        # The aggregator follows an ExternalName; a ClusterIP would need kube-proxy here.
        spec = {"type": "ExternalName", "externalName": "localhost", "ports": [{"port": 443}]}
        kube.apply(SERVICE, {"metadata": {"name": "metrics", "namespace": namespace}, "spec": spec})
        service = {"name": "metrics", "namespace": namespace, "port": metrics.port}
        spec = {"group": GROUP, "version": VERSION, "service": service}
        more = {"insecureSkipTLSVerify": True, "groupPriorityMinimum": 100, "versionPriority": 100}
        kube.apply(API_SERVICE, {"metadata": {"name": name}, "spec": {**spec, **more}})

        def is_available() -> bool:
            conditions = kube.get(API_SERVICE, name).get("status", {}).get("conditions", [])
            return any(c["type"] == "Available" and c["status"] == "True" for c in conditions)

        eventually(is_available, "the metrics API")
        yield metrics
        kube.delete(API_SERVICE, name)


def autoscaler(namespace: str) -> dict[str, Any]:
    target = {"type": "AverageValue", "averageValue": "10"}
    return {
        "metadata": {"name": "tiny", "namespace": namespace},
        "spec": {
            "scaleTargetRef": {
                "apiVersion": MODEL_DEPLOYMENT.api_version,
                "kind": MODEL_DEPLOYMENT.name,
                "name": "tiny",
            },
            "minReplicas": 1,
            "maxReplicas": 4,
            "metrics": [
                {"type": "External", "external": {"metric": {"name": METRIC}, "target": target}}
            ],
            "behavior": {"scaleDown": {"stabilizationWindowSeconds": 0}},
        },
    }


def test_an_autoscaler_follows_the_queue(
    operator: Any, world: Any, kubelet: Any, eventually: Any, external_metrics: ExternalMetrics
) -> None:
    world.add_claims("weights")
    world.create()
    (pod,) = world.wait_pods("shard")
    kubelet.publish(pod)
    world.wait_pods("serve", 1)
    external_metrics.value = 25  # waiting requests, 10 of which are one replica's share
    world.kube.apply(AUTOSCALER, autoscaler(world.namespace))
    for pod in world.wait_pods("serve", 3):
        kubelet.serving(pod)
    world.wait_condition("Ready", "True", "Serving")
    external_metrics.value = 5
    world.wait_pods("serve", 1)
    assert world.resource()["spec"]["replicas"] == 1
    # the operator writes no replicas of its own
    managers = {
        m["manager"]
        for m in world.resource()["metadata"]["managedFields"]
        if "f:replicas" in m.get("fieldsV1", {}).get("f:spec", {})
    }
    assert "headrace-operator" not in managers


def test_the_example_for_keda_fits_kedas_own_definition(
    kube: Any, world: Any, cluster: Any
) -> None:
    crds = source("github.com/kedacore/keda/v2") / "config/crd/bases"
    cluster.kubectl("apply", "--server-side", "-f", str(crds / "keda.sh_scaledobjects.yaml"))
    condition = "--for=condition=Established"
    cluster.kubectl("wait", condition, "crd/scaledobjects.keda.sh", "--timeout=20s")
    example = ("-n", world.namespace, "-f", str(ROOT / "examples/keda.yaml"))
    cluster.kubectl("create", "--dry-run=server", "--validate=strict", *example)
    (scaled,) = yaml.safe_load_all((ROOT / "examples/keda.yaml").read_text())
    target = scaled["spec"]["scaleTargetRef"]
    found = (target["apiVersion"], target["kind"])
    assert found == (MODEL_DEPLOYMENT.api_version, MODEL_DEPLOYMENT.name)
    assert scaled["spec"]["minReplicaCount"] == 0
