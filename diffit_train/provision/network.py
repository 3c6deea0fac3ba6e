"""NetworkPolicies: who may talk to whom in the namespace."""

from __future__ import annotations

from diffit_train.provision.pods import PART_OF, RAY, KubeObject, named, rule
from diffit_train.provision.target import MLFLOW_PORT, Target

# What the operator's chart and the Prometheus operator's namespace are called by default.
OPERATOR = {"app.kubernetes.io/name": "kuberay-operator"}
MONITORING = {"kubernetes.io/metadata.name": "monitoring"}
DNS_NAMESPACE = {"kubernetes.io/metadata.name": "kube-system"}
MLFLOW = {**PART_OF, "app.kubernetes.io/name": "diffit-mlflow"}
POSTGRES = {**PART_OF, "app.kubernetes.io/name": "diffit-postgres"}
POSTGRES_PORT = 5432
# Dashboard and job server; each node's agent, which answers health checks; metrics of a node, of
# the autoscaler and of the dashboard.
DASHBOARD_PORTS = [("TCP", 8265), ("TCP", 52365)]
METRICS_PORTS = [("TCP", 8080), ("TCP", 44217), ("TCP", 44227)]
# S3, hubs and the Kubernetes API, which some clusters serve on 6443.
OUTSIDE_PORTS = [("TCP", 443), ("TCP", 6443)]


def network_policies(target: Target) -> list[KubeObject]:
    """Everything is closed in both directions, but for what is named here."""
    return [_closed(target), _ray(target), _mlflow_rules(target), _postgres_rules(target)]


def _closed(target: Target) -> KubeObject:
    return _network_policy(target, "diffit-closed", {}, [], [])


def _ray(target: Target) -> KubeObject:
    operator = {"podSelector": {"matchLabels": OPERATOR}, "namespaceSelector": {}}
    outward = [
        rule([], [_pods(RAY)], "to"),
        rule([("TCP", MLFLOW_PORT)], [_pods(MLFLOW)], "to"),
        rule(OUTSIDE_PORTS, [], "to"),
        _dns(),
    ]
    if target.redis:
        outward.append(rule([("TCP", int(target.redis.rpartition(":")[2]))], [], "to"))
    inward = [
        rule([], [_pods(RAY)], "from"),
        rule(DASHBOARD_PORTS, [operator], "from"),
        rule(METRICS_PORTS, [_namespace(MONITORING)], "from"),
    ]
    return _network_policy(target, "diffit-ray", RAY, inward, outward)


def _mlflow_rules(target: Target) -> KubeObject:
    inward = [rule([("TCP", MLFLOW_PORT)], [_pods(RAY)], "from")]
    outward = [
        rule([("TCP", POSTGRES_PORT)], [_pods(POSTGRES)], "to"),
        rule(OUTSIDE_PORTS[:1], [], "to"),
        _dns(),
    ]
    return _network_policy(target, "diffit-mlflow", MLFLOW, inward, outward)


def _postgres_rules(target: Target) -> KubeObject:
    inward = [rule([("TCP", POSTGRES_PORT)], [_pods(MLFLOW)], "from")]
    return _network_policy(target, "diffit-postgres", POSTGRES, inward, [])


def _network_policy(
    target: Target,
    name: str,
    labels: dict[str, str],
    inward: list[KubeObject],
    outward: list[KubeObject],
) -> KubeObject:
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": named(target, name),
        "spec": {
            "podSelector": {"matchLabels": labels} if labels else {},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": inward,
            "egress": outward,
        },
    }


def _dns() -> KubeObject:
    return rule([("UDP", 53), ("TCP", 53)], [_namespace(DNS_NAMESPACE)], "to")


def _pods(labels: dict[str, str]) -> KubeObject:
    return {"podSelector": {"matchLabels": labels}}


def _namespace(labels: dict[str, str]) -> KubeObject:
    return {"namespaceSelector": {"matchLabels": labels}}
