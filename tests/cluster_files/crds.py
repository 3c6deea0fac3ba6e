"""KubeRay's CRDs, made strict: a field that they do not know is refused.

They are not part of this package. DIFFIT_KUBERAY_SCHEMAS names a folder that holds them as
`ray.io_rayjobs.yaml.gz` and `ray.io_rayclusters.yaml.gz`.
"""

from __future__ import annotations

import gzip
import os
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator

VARIABLE = "DIFFIT_KUBERAY_SCHEMAS"
FILES = {"RayJob": "ray.io_rayjobs.yaml.gz", "RayCluster": "ray.io_rayclusters.yaml.gz"}


def missing() -> str:
    """Why the CRDs cannot be checked against; empty if they can."""
    folder = os.environ.get(VARIABLE)
    if not folder:
        return f"KubeRay's CRDs are not here: {VARIABLE} is not set"
    absent = [name for name in FILES.values() if not (Path(folder) / name).exists()]
    return f"{VARIABLE}={folder} has no {', '.join(absent)}" if absent else ""


@cache
def validator(kind: str) -> Draft202012Validator:
    """Of version v1 of a kind."""
    text = gzip.decompress((Path(os.environ[VARIABLE]) / FILES[kind]).read_bytes())
    crd = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    schema = next(v for v in crd["spec"]["versions"] if v["name"] == "v1")["schema"]
    strict = _strict(schema["openAPIV3Schema"])
    strict["properties"]["metadata"] = {"type": "object"}
    # A CRD does not say it of itself: the server refuses objects without these.
    strict["required"] = ["apiVersion", "kind", "metadata", "spec"]
    return Draft202012Validator(strict)


def _strict(schema: Any) -> Any:
    """The schema with unknown fields refused, and without what only Kubernetes understands."""
    if isinstance(schema, list):
        return [_strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {}
    for key, value in schema.items():
        if key == "properties":
            made[key] = {name: _strict(inner) for name, inner in value.items()}
        elif not key.startswith("x-kubernetes"):
            made[key] = _strict(value)
    if "properties" in made and "additionalProperties" not in made:
        made["additionalProperties"] = False
    return made
