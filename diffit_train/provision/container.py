"""The Containerfile: one image for head, workers, submitters and the MLflow server."""

from __future__ import annotations

from diffit_train.provision.pods import USER

PYTHON = "3.11"


def containerfile() -> str:
    """Text of the Containerfile; it is built from the root of the package's repository."""
    return f"""\
# One image for heads, workers, job submitters and the MLflow server; DEVICE is gpu or cpu:
#
#   podman build --file cluster/Containerfile --build-arg DEVICE=gpu --tag diffit:gpu .
#
# Every package comes from the lock file, and pip refuses what has another hash. The GPU image needs
# the node's driver only: PyTorch's packages bring CUDA and NCCL.

FROM docker.io/library/python:{PYTHON}-slim-bookworm AS build
ARG DEVICE=gpu
RUN apt-get update \\
    && apt-get install --yes --no-install-recommends build-essential \\
    && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/diffit
ENV PATH=/opt/diffit/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
COPY cluster/requirements-build.lock cluster/requirements-$DEVICE.lock /tmp/
RUN pip install --require-hashes --no-deps --requirement /tmp/requirements-build.lock
# PyTorch publishes its CPU builds on an index of its own.
RUN if [ "$DEVICE" = cpu ]; then \\
        export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu; \\
    fi \\
    && pip install --require-hashes --no-deps --no-build-isolation \\
        --requirement /tmp/requirements-$DEVICE.lock
COPY pyproject.toml README.md LICENSE /src/
COPY cluster/requirements-*.lock /src/cluster/
COPY diffit_train /src/diffit_train
COPY pipelines /src/pipelines
RUN pip install --no-deps --no-build-isolation /src

FROM docker.io/library/python:{PYTHON}-slim-bookworm
# gcc: Triton compiles a launcher for its kernels. wget: health checks of older KubeRay.
RUN apt-get update \\
    && apt-get install --yes --no-install-recommends gcc libc6-dev wget \\
    && rm -rf /var/lib/apt/lists/* \\
    && groupadd --gid {USER} diffit \\
    && useradd --uid {USER} --gid {USER} --create-home diffit
COPY --from=build /opt/diffit /opt/diffit
ENV PATH=/opt/diffit/bin:$PATH PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0
USER {USER}:{USER}
WORKDIR /home/diffit
"""
