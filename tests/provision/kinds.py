"""Strict models of every Kubernetes kind that is rendered: the fields used, and no other.

A field that is renamed, missing or of another type is refused. They run everywhere; KubeRay's own
CRDs are checked against, too, where they are at hand (`crds.py`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from pydantic.alias_generators import to_camel


class Strict(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=True, alias_generator=to_camel, populate_by_name=False
    )


Quantity = Annotated[str, Field(pattern=r"^\d+(\.\d+)?(m|Mi|Gi)?$")]
Name = Annotated[str, Field(pattern=r"^[a-z]([a-z0-9-]*[a-z0-9])?$", max_length=63)]
Port = Annotated[int, Field(gt=0, lt=65536)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(gt=0)]
Text = Annotated[str, Field(min_length=1)]
Label = Literal[
    "app.kubernetes.io/part-of",
    "app.kubernetes.io/name",
    "diffit/job",
    "diffit/role",
    "pod-security.kubernetes.io/enforce",
    "kubernetes.io/metadata.name",
]
Labels = Annotated[dict[Label, Text], Field(min_length=1)]
Resource = Literal["cpu", "memory", "ephemeral-storage", "nvidia.com/gpu"]


class Metadata(Strict):
    name: Name
    namespace: Name
    labels: Labels


class TemplateMetadata(Strict):
    labels: Labels


class NamespaceMetadata(Strict):
    name: Name
    labels: Labels


class Seccomp(Strict):
    type: Literal["RuntimeDefault"]


class PodSecurity(Strict):
    run_as_non_root: Literal[True]
    run_as_user: Positive
    run_as_group: Positive
    fs_group: Positive
    seccomp_profile: Seccomp


class Capabilities(Strict):
    drop: Annotated[list[Literal["ALL"]], Field(min_length=1)]


class ContainerSecurity(Strict):
    run_as_non_root: Literal[True]
    read_only_root_filesystem: Literal[True]
    allow_privilege_escalation: Literal[False]
    capabilities: Capabilities


class Resources(Strict):
    requests: Annotated[dict[Resource, Quantity], Field(min_length=3)]
    limits: Annotated[dict[Resource, Quantity], Field(min_length=3)]


class SecretKey(Strict):
    name: Name
    key: Text


class ValueFrom(Strict):
    secret_key_ref: SecretKey


class Variable(Strict):
    name: Text
    value: str


class SecretVariable(Strict):
    name: Text
    value_from: ValueFrom


class SecretReference(Strict):
    name: Name
    optional: bool


class EnvironmentFrom(Strict):
    secret_ref: SecretReference


class Mount(Strict):
    name: Name
    mount_path: Annotated[str, Field(pattern="^/")]
    read_only: bool | None = None


class EmptyDir(Strict):
    size_limit: Quantity
    medium: Literal["Memory"] | None = None


class EmptyVolume(Strict):
    name: Name
    empty_dir: EmptyDir


class ConfigMapName(Strict):
    name: Name


class ConfigVolume(Strict):
    name: Name
    config_map: ConfigMapName


class Claim(Strict):
    claim_name: Name


class ClaimVolume(Strict):
    name: Name
    persistent_volume_claim: Claim


class Exec(Strict):
    command: Annotated[list[str], Field(min_length=1)]


class Handler(Strict):
    exec: Exec


class Lifecycle(Strict):
    pre_stop: Handler


class Probe(Strict):
    exec: Exec
    period_seconds: Positive
    timeout_seconds: Positive | None = None


class ContainerPort(Strict):
    name: Name
    container_port: Port


class Container(Strict):
    name: Name
    image: Text
    command: list[str] | None = None
    args: list[str] | None = None
    resources: Resources
    env: list[Variable | SecretVariable]
    env_from: list[EnvironmentFrom] | None = None
    ports: list[ContainerPort] | None = None
    security_context: ContainerSecurity
    readiness_probe: Probe | None = None
    lifecycle: Lifecycle | None = None
    volume_mounts: Annotated[list[Mount], Field(min_length=1)]


class Toleration(Strict):
    key: Literal["nvidia.com/gpu"]
    operator: Literal["Exists"]
    effect: Literal["NoSchedule"]


class PodSpec(Strict):
    restart_policy: Literal["Never"] | None = None
    termination_grace_period_seconds: Positive | None = None
    automount_service_account_token: Literal[False] | None = None
    security_context: PodSecurity
    containers: Annotated[list[Container], Field(min_length=1)]
    volumes: list[EmptyVolume | ConfigVolume | ClaimVolume]
    tolerations: list[Toleration] | None = None


class PodTemplate(Strict):
    metadata: TemplateMetadata
    spec: PodSpec


# ---- KubeRay ----


class Auth(Strict):
    mode: Literal["token"]


class Autoscaler(Strict):
    version: Literal["v2"]
    idle_timeout_seconds: Positive
    upscaling_mode: Literal["Default", "Aggressive", "Conservative"]
    resources: Resources
    security_context: ContainerSecurity
    volume_mounts: list[Mount]


StartParameter = Literal["num-cpus", "num-gpus", "object-store-memory", "dashboard-host"]


class Head(Strict):
    ray_start_params: dict[StartParameter, Text]
    template: PodTemplate


class Workers(Strict):
    group_name: Name
    replicas: Count
    min_replicas: Count
    max_replicas: Positive
    ray_start_params: dict[StartParameter, Text]
    template: PodTemplate


class RedisPassword(Strict):
    value_from: ValueFrom


class Gcs(Strict):
    redis_address: Annotated[str, Field(pattern=r"^[\w.-]+:\d+$")]
    redis_password: RedisPassword


class ClusterSpec(Strict):
    ray_version: Annotated[str, Field(pattern=r"^\d+\.\d+\.\d+$")]
    auth_options: Auth
    enable_in_tree_autoscaling: Literal[True]
    autoscaler_options: Autoscaler
    gcs_fault_tolerance_options: Gcs | None = None
    head_group_spec: Head
    worker_group_specs: Annotated[list[Workers], Field(min_length=1)]


class SubmitterConfig(Strict):
    backoff_limit: Count


class JobSpec(Strict):
    entrypoint: Text
    submission_mode: Literal["K8sJobMode"]
    backoff_limit: Count
    shutdown_after_job_finishes: bool
    ttl_seconds_after_finished: Count
    submitter_config: SubmitterConfig
    submitter_pod_template: PodTemplate
    ray_cluster_spec: ClusterSpec


class RayJob(Strict):
    api_version: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Metadata
    spec: JobSpec


class RayCluster(Strict):
    api_version: Literal["ray.io/v1"]
    kind: Literal["RayCluster"]
    metadata: Metadata
    spec: ClusterSpec


# ---- Core kinds ----


class Selector(Strict):
    match_labels: Labels


class AnySelector(Strict):
    match_labels: Labels | None = None


class Strategy(Strict):
    type: Literal["Recreate"]


class DeploymentSpec(Strict):
    replicas: Literal[1]
    strategy: Strategy
    selector: Selector
    template: PodTemplate


class Deployment(Strict):
    api_version: Literal["apps/v1"]
    kind: Literal["Deployment"]
    metadata: Metadata
    spec: DeploymentSpec


class ServicePort(Strict):
    name: Name
    protocol: Literal["TCP"]
    port: Port
    target_port: Port


class ServiceSpec(Strict):
    type: Literal["ClusterIP"]
    selector: Labels
    ports: Annotated[list[ServicePort], Field(min_length=1)]


class Service(Strict):
    api_version: Literal["v1"]
    kind: Literal["Service"]
    metadata: Metadata
    spec: ServiceSpec


class PolicyPort(Strict):
    protocol: Literal["TCP", "UDP"]
    port: Port


class Peer(Strict):
    pod_selector: Selector | None = None
    namespace_selector: AnySelector | None = None


class Ingress(Strict):
    from_: Annotated[list[Peer], Field(min_length=1, alias="from")]
    ports: list[PolicyPort] | None = None


class Egress(Strict):
    to: list[Peer] | None = None
    ports: list[PolicyPort] | None = None


class PolicySpec(Strict):
    pod_selector: AnySelector
    policy_types: Annotated[list[Literal["Ingress", "Egress"]], Field(min_length=2, max_length=2)]
    ingress: list[Ingress]
    egress: list[Egress]


class NetworkPolicy(Strict):
    api_version: Literal["networking.k8s.io/v1"]
    kind: Literal["NetworkPolicy"]
    metadata: Metadata
    spec: PolicySpec


class BudgetSpec(Strict):
    min_available: Positive
    selector: Selector


class Budget(Strict):
    api_version: Literal["policy/v1"]
    kind: Literal["PodDisruptionBudget"]
    metadata: Metadata
    spec: BudgetSpec


class StorageRequest(Strict):
    storage: Quantity


class StorageRequests(Strict):
    requests: StorageRequest


class ClaimSpec(Strict):
    access_modes: Annotated[list[Literal["ReadWriteOnce"]], Field(min_length=1)]
    resources: StorageRequests


class VolumeClaim(Strict):
    api_version: Literal["v1"]
    kind: Literal["PersistentVolumeClaim"]
    metadata: Metadata
    spec: ClaimSpec


class RecipeData(Strict):
    recipe: Annotated[str, Field(min_length=1, alias="recipe.yaml")]


class ConfigMap(Strict):
    api_version: Literal["v1"]
    kind: Literal["ConfigMap"]
    metadata: Metadata
    data: RecipeData


class Namespace(Strict):
    api_version: Literal["v1"]
    kind: Literal["Namespace"]
    metadata: NamespaceMetadata


Kind = Annotated[
    RayJob
    | RayCluster
    | Deployment
    | Service
    | NetworkPolicy
    | Budget
    | VolumeClaim
    | ConfigMap
    | Namespace,
    Field(discriminator="kind"),
]
ADAPTER: TypeAdapter[Any] = TypeAdapter(Kind)


def check_kind(manifest: dict[str, Any]) -> None:
    """A ValidationError where the manifest is not one of ours, field by field."""
    ADAPTER.validate_python(manifest)
