"""A batch script for Slurm that brings Ray up in an allocation and runs a stage on it.

A job that is preempted or reaches its time limit saves a checkpoint, is requeued and resumes.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from diffit_train import storage
from diffit_train.config import Recipe, dump_recipe
from diffit_train.errors import UserError

SlurmStage = Literal["encode", "references", "train", "evaluate"]
SLURM_STAGES: tuple[SlurmStage, ...] = get_args(SlurmStage)

WORKERS_PER_NODE = 8
# Below the shared folder: for each running job, where Prometheus finds its metrics.
METRICS_FILES = "metrics/*.json"
# A socket's path has at most 107 bytes, of which Ray takes up to 66 below its folder and the name
# of that, ray-JOB-NODE, up to 20.
LONGEST_SCRATCH = 20
END_OF_RECIPE = "END_OF_RECIPE"
# `#SBATCH` lines are not shell: what they hold is restricted instead of quoted.
_PLAIN = re.compile(r"[\w.,:@%+=/\[\]&|*()!-]+", re.ASCII)
_TIME = re.compile(r"\d+(-\d+(:\d+){0,2}|(:\d+){0,2})", re.ASCII)
_PASSWORD = re.compile(r"://[^/\s@]*:[^/\s@]*@")


@dataclass(frozen=True)
class Site:
    """What a cluster wants to be told, and what the recipe does not say.

    Attributes:
        partition: with account, qos and constraint, as `sbatch` takes them; empty: the default.
        gpu_type: as in --gpus-per-node=a100:8.
        time_limit: of one attempt; [days-]hours:minutes:seconds.
        workers_per_node: training workers or actors on each node.
        memory_gib: of each node; None: what the stage is planned to take. 0: all there is.
        modules: for `module load`.
        venv: a virtual environment with this package, at the same path on every node.
        interface: network interface of Ray, gloo and NCCL, as ib0; empty: the node's first address.
        shared_folder: which all nodes see, for the token; empty: $HOME/.diffit.
        scratch_folder: local to each node, for Ray's own files.
        stop_s: seconds before the end at which the job is told to save.
        restarts: times that a job is requeued.
        join_s: seconds in which every node must have joined.
    """

    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    gpu_type: str = ""
    time_limit: str = "24:00:00"
    workers_per_node: int = WORKERS_PER_NODE
    memory_gib: int | None = None
    modules: Sequence[str] = ()
    venv: str = ""
    interface: str = ""
    shared_folder: str = ""
    scratch_folder: str = "/tmp"
    stop_s: int = 300
    restarts: int = 100
    join_s: int = 300


@dataclass(frozen=True)
class Size:
    """What a stage takes: nodes, and of each of them CPUs and GPUs for Ray."""

    nodes: int
    workers: int
    cpus: int
    gpus: int


def parse_site(words: Sequence[str], workers_per_node: int = WORKERS_PER_NODE) -> Site:
    """A site from `KEY=VALUE` words; `modules` takes a list with commas.

    Raises:
        UserError: an unknown key, or a value that is no number where one is needed.
    """
    values: dict[str, Any] = {"workers_per_node": workers_per_node}
    known = {field.name: str(field.type) for field in fields(Site)}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or key not in known:
            raise UserError(
                f"--site is {word!r}, but must be KEY=VALUE with one of: {', '.join(known)}"
            )
        if known[key].startswith("int"):
            if not text.isdecimal():
                raise UserError(f"--site {key} is {text!r}, but must be a number")
            values[key] = int(text)
        else:
            values[key] = tuple(text.split(",")) if key == "modules" else text
    return Site(**values)


def slurm_script(
    recipe: Recipe,
    stage: str = "train",
    site: Site | None = None,
    run: str | None = None,
    steps: Sequence[str] = (),
    memory: int = 0,
) -> str:
    """A script for `sbatch`.

    Args:
        stage: encode, references, train or evaluate.
        run: name of the run; None: the recipe's.
        steps: checkpoints to evaluate.
        memory: bytes of a node, where the site names none; 0: all there is.

    The resolved recipe is part of it. A relative root is relative to the folder of `sbatch`. Where
    the root is remote and the recipe names no MLflow server, MLFLOW_TRACKING_URI does.

    Raises:
        UserError: an option that `sbatch` could not read, or a recipe with a password in it.
    """
    site = site or Site()
    if stage not in SLURM_STAGES:
        raise UserError(f"stage is {stage!r}, but must be one of {', '.join(SLURM_STAGES)}")
    if steps and stage != "evaluate":
        raise UserError(f"steps are for evaluate; {stage} has none")
    _check(site)
    recipe_text = dump_recipe(recipe)
    if _PASSWORD.search(recipe.model_dump_json()):
        raise UserError(
            "the recipe has a password in a URL, and would be stored in the script; give it by "
            "the environment, as MLFLOW_TRACKING_PASSWORD"
        )
    if END_OF_RECIPE in recipe_text.splitlines():
        raise UserError(f"the recipe must not have a line {END_OF_RECIPE}")
    size = size_of(recipe, stage, site.workers_per_node)
    name = recipe.data.name if stage in ("encode", "references") else run or recipe.name
    arguments = ["--run", name] if stage in ("train", "evaluate") else []
    for step in steps:
        arguments += ["--step", step]
    return "\n".join(
        [
            "#!/bin/bash",
            f"# Ray in a Slurm allocation, and `diffit {stage}` on it. Send it by sbatch.",
            "# Preempted or at its time limit, it saves, is requeued and resumes.",
            "# Functions are called by traps and on other nodes, where shellcheck does not look.",
            "# shellcheck disable=SC1091,SC2317",
            *(
                f"#SBATCH --{option}"
                for option in _sbatch_options(site, size, memory, f"diffit-{stage}-{name}")
            ),
            "",
            *_environment(site),
            "set -euo pipefail",
            "",
            *_settings(site, size, stage, arguments),
            *tracking(recipe),
            SCRIPT.replace("@RECIPE@", f"{recipe_text}{END_OF_RECIPE}"),
        ]
    )


def size_of(recipe: Recipe, stage: str, workers_per_node: int) -> Size:
    """How many nodes of which size a stage takes at most."""
    scaling = recipe.scaling
    workers, cpus, gpus = scaling.evaluate_actors, 1.0, scaling.gpus_per_actor
    if stage == "train":
        workers, cpus, gpus = scaling.most_workers, scaling.cpus_per_worker, scaling.gpus_per_worker
    elif stage == "encode":
        # Ray Data's readers take as much as the actors.
        workers, cpus = scaling.encode_actors, scaling.encode_threads + 1
    nodes = math.ceil(workers / workers_per_node)
    each = math.ceil(workers / nodes)
    return Size(nodes, each, math.ceil(each * cpus), math.ceil(each * gpus))


def _check(site: Site) -> None:
    for key in ("partition", "account", "qos", "constraint", "gpu_type", "interface"):
        value = getattr(site, key)
        if value and not _PLAIN.fullmatch(value):
            raise UserError(f"{key} is {value!r}, which has characters that sbatch cannot take")
    if not _TIME.fullmatch(site.time_limit):
        raise UserError(f"time_limit is {site.time_limit!r}, but must be as 24:00:00 or 2-00:00:00")
    if 2 * site.stop_s > _seconds(site.time_limit):
        raise UserError(
            f"stop_s is {site.stop_s}, but must be at most half of time_limit ({site.time_limit}), "
            "or an attempt is told to end before it has got anywhere"
        )
    for key, least in (
        ("workers_per_node", 1),
        ("stop_s", 1),
        ("restarts", 0),
        ("join_s", 1),
        ("memory_gib", 0),
    ):
        value = getattr(site, key)
        if value is not None and value < least:
            raise UserError(f"{key} is {value}, but must be at least {least}")
    if len(site.scratch_folder) > LONGEST_SCRATCH or not site.scratch_folder.startswith("/"):
        raise UserError(
            f"scratch_folder is {site.scratch_folder!r}, but must be an absolute path of at most "
            f"{LONGEST_SCRATCH} characters: Ray makes sockets below it"
        )
    for key in ("venv", "shared_folder"):
        value = getattr(site, key)
        if value and not value.startswith("/"):
            raise UserError(f"{key} is {value!r}, but must be an absolute path")


def _seconds(time_limit: str) -> int:
    """A time limit as sbatch reads it: minutes[:seconds], or [days-]hours[:minutes[:seconds]]."""
    days, dash, rest = time_limit.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    units = (3600, 60, 1) if dash or len(parts) == 3 else (60, 1)
    return int(days or 0) * 86400 + sum(n * unit for n, unit in zip(parts, units, strict=False))


def _sbatch_options(site: Site, size: Size, memory: int, name: str) -> list[str]:
    """Options of sbatch, without their dashes."""
    if not _PLAIN.fullmatch(name):
        raise UserError(f"the job's name {name!r} has characters that sbatch cannot take")
    options = [f"job-name={name}", "output=%x-%j.log", "open-mode=append"]
    options += [f"nodes={size.nodes}", "ntasks-per-node=1", f"cpus-per-task={size.cpus}"]
    gib = math.ceil(memory / storage.GIB) if site.memory_gib is None else site.memory_gib
    options.append(f"mem={gib}G" if gib else "mem=0")
    if size.gpus:
        kind = f"{site.gpu_type}:" if site.gpu_type else ""
        options.append(f"gpus-per-node={kind}{size.gpus}")
    for key in ("partition", "account", "qos", "constraint"):
        if value := getattr(site, key):
            options.append(f"{key}={value}")
    return [*options, f"time={site.time_limit}", "requeue", f"signal=B:TERM@{site.stop_s}"]


def _environment(site: Site) -> list[str]:
    """What makes `diffit` known; before `set -u`, which module files do not survive."""
    lines = [f"module load {shlex.join(site.modules)}"] if site.modules else []
    if site.venv:
        lines.append(f". {shlex.quote(site.venv + '/bin/activate')}")
    return lines


def _settings(site: Site, size: Size, stage: str, arguments: list[str]) -> list[str]:
    shared = shlex.quote(site.shared_folder) if site.shared_folder else '"$HOME/.diffit"'
    return [
        f"stage={stage}",
        f"arguments=({shlex.join(arguments)})",
        f"restarts={site.restarts}",
        f"shared_folder={shared}",
        f"export scratch_folder={shlex.quote(site.scratch_folder)}",
        f"export interface={shlex.quote(site.interface)}",
        f"export ray_cpus={size.cpus} ray_gpus={size.gpus} join_s={site.join_s}",
    ]


def tracking(recipe: Recipe) -> list[str]:
    """What hands MLFLOW_TRACKING_URI on, where the recipe names no server and needs one."""
    if recipe.tracking.uri is not None or storage.is_local(recipe.storage.root):
        return []
    missing = "export it before sbatch: the MLflow server, as http://host:5000"
    return [f'arguments+=("tracking.uri=${{MLFLOW_TRACKING_URI:?{missing}}}")']


def shared_folder(words: Sequence[str]) -> str:
    """The shared folder of a site, for files that no shell reads."""
    return parse_site(words).shared_folder or "/home/USER/.diffit"


# Ray's head is on the node of the batch script, which is the first. Ports follow from the job's id,
# and go on to the next free one where another job has them. `ray stop` is not used: it would end
# other jobs' Ray on the node, too.
SCRIPT = r"""
say() { printf '%s %s\n' "$(date +%FT%T)" "$*" >&2; }

node_address() {
  if [[ -n $interface ]]; then
    ip -4 -oneline address show dev "$interface" | sed -n '1s|.* inet \([0-9.]*\)/.*|\1|p'
  else
    hostname -I | cut -d ' ' -f 1
  fi
}

listens() { (exec 3<>"/dev/tcp/$1/$2") 2>/dev/null; }

free_port() {
  local port=$1
  while listens "$head_address" "$port" || listens 127.0.0.1 "$port"; do port=$((port + 1)); done
  echo "$port"
}

node_folder() { echo "$scratch_folder/ray-$SLURM_JOB_ID-$SLURM_NODEID"; }

# Runs on every node until Ray ends there.
ray_node() {
  local own address options
  own=$(node_folder) address=$(node_address)
  if [[ -z $address ]]; then
    say "$SLURMD_NODENAME has no IPv4 address on ${interface:-any interface}"
    return 1
  fi
  if [[ ! -r $RAY_AUTH_TOKEN_PATH ]]; then
    say "$SLURMD_NODENAME cannot read $RAY_AUTH_TOKEN_PATH; shared_folder must be seen by all nodes"
    return 1
  fi
  rm -rf -- "$own"
  mkdir -m 700 -- "$own" || return 1
  options=(--node-ip-address="$address" --node-name="$SLURMD_NODENAME" --temp-dir="$own")
  options+=(--num-cpus="$ray_cpus" --num-gpus="$ray_gpus" --dashboard-agent-listen-port=0)
  # Port 0: any free one. Two Rays on a node would share the default range of worker ports.
  options+=(--min-worker-port=0 --max-worker-port=0 --disable-usage-stats --block)
  if [[ $SLURMD_NODENAME == "$head_node" ]]; then
    # Ray's client server cannot be switched off or bound to loopback; it, too, asks for the token.
    ray start --head --port="$head_port" --ray-client-server-port="$client_port" \
      --dashboard-host=127.0.0.1 --dashboard-port="$dashboard_port" "${options[@]}"
    return
  fi
  until listens "$head_address" "$head_port"; do
    if ((SECONDS > join_s)); then
      say "$SLURMD_NODENAME found no head at $head_address:$head_port within $join_s s"
      return 1
    fi
    sleep 1
  done
  ray start --address="$head_address:$head_port" "${options[@]}"
}

# Ray may miss its own deadlines on a busy node: it gets three tries until all nodes have joined.
keep_ray_node() {
  local try
  for try in 1 2 3; do
    ray_node || true
    [[ ! -e $folder/joined ]] || break
    say "Ray has ended on $SLURMD_NODENAME before all nodes had joined, try $try of 3"
  done
  touch "$folder/$SLURMD_NODENAME.ended"
}

remove_node_folder() { rm -rf -- "$(node_folder)"; }

# Wait at most this many seconds until all nodes are in the cluster; else name those that are not.
# It takes the place of its shell.
wait_for_nodes() {
  exec python3 - "$1" "$folder" "$head_address" "$head_port" "${nodes[@]}" <<'END_OF_PYTHON'
import logging
import socket
import sys
import time
from pathlib import Path

import ray

limit_s, folder, host, port, *names = sys.argv[1:]
deadline_s = time.monotonic() + float(limit_s)
missing = names
while True:
    if ended := [name for name in names if Path(folder, f"{name}.ended").exists()]:
        sys.exit(f"Ray has ended on {', '.join(ended)}")
    try:
        if not ray.is_initialized():
            socket.create_connection((host, int(port)), 5).close()
            ray.init(f"{host}:{port}", log_to_driver=False, logging_level=logging.ERROR)
        alive = {node["NodeName"] for node in ray.nodes() if node["Alive"]}
        missing = [name for name in names if name not in alive]
    except (OSError, RuntimeError):  # the head is not up yet
        pass
    if not missing:
        break
    if time.monotonic() > deadline_s:
        sys.exit(f"not in the Ray cluster after {limit_s} s: {', '.join(missing)}")
    time.sleep(1)
END_OF_PYTHON
}

# Tell Prometheus, which runs elsewhere, the addresses that Ray lists on its head.
share_metrics() {
  while true; do
    if cp -- "$(node_folder)/prom_metrics_service_discovery.json" "$metrics.new" 2>/dev/null; then
      mv -- "$metrics.new" "$metrics"
    fi
    sleep 15
  done
}

# Run a command so that SIGTERM is handled while it runs; its status.
attend() {
  local status
  "$@" &
  child=$!
  while true; do
    status=0
    wait "$child" || status=$?
    kill -0 "$child" 2>/dev/null || break
  done
  status=0
  wait "$child" || status=$?  # once more: SIGTERM may have interrupted the wait above
  child=
  return "$status"
}

stop() {
  stopping=yes
  say "SIGTERM: preempted, canceled, or the time limit is near"
  [[ -z $child ]] || kill -TERM "$child" 2>/dev/null || true
}

end_ray() {
  [[ -n $ray_step ]] || return 0
  kill -TERM "$ray_step" 2>/dev/null || true
  wait "$ray_step" || true
  ray_step=
}

leave() {
  end_ray
  [[ -z $sharing ]] || kill "$sharing" 2>/dev/null || true
  rm -f -- "$metrics" "$metrics.new"
}

# An array instead of a function: a signal to a function in the background would miss srun.
on_every_node=(
  srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1
  --cpus-per-task="$SLURM_CPUS_PER_TASK" --export=ALL --overlap --kill-on-bad-exit=0 --wait=0
)
attempt=${SLURM_RESTART_COUNT:-0}
head_node=$SLURMD_NODENAME
head_address=$(node_address)
if [[ -z $head_address ]]; then
  say "$head_node has no IPv4 address on ${interface:-any interface}"
  exit 1
fi
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
first_port=$((20000 + SLURM_JOB_ID % 1200 * 10))
head_port=$(free_port "$first_port")
dashboard_port=$(free_port $((head_port + 1)))
client_port=$(free_port $((dashboard_port + 1)))
export head_node head_address head_port dashboard_port client_port
export -f say node_address listens node_folder ray_node keep_ray_node remove_node_folder

export folder=$shared_folder/slurm-$SLURM_JOB_ID
metrics=$shared_folder/metrics/$SLURM_JOB_ID.json
mkdir -p -- "$shared_folder/metrics"
rm -rf -- "$folder"
mkdir -m 700 -- "$folder"
(umask 077 && head -c 32 /dev/urandom | od -An -vtx1 | tr -d ' \n' >"$folder/token")
cat >"$folder/recipe.yaml" <<'END_OF_RECIPE'
@RECIPE@
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$folder/token RAY_USAGE_STATS_ENABLED=0
unset RAY_AUTH_TOKEN RAY_ADDRESS
if [[ -n $interface ]]; then
  export GLOO_SOCKET_IFNAME=$interface NCCL_SOCKET_IFNAME=$interface
fi

stopping='' child='' ray_step='' sharing=''
trap stop TERM
trap 'leave; rm -f -- "$folder/token"' EXIT

say "attempt $((attempt + 1)): Ray on ${nodes[*]}, head $head_address:$head_port"
"${on_every_node[@]}" --output="$folder/ray-%n.log" bash -c keep_ray_node &
ray_step=$!
status=0
attend wait_for_nodes "$join_s" || status=$?
if ((status)) && [[ -z $stopping ]]; then
  for log in "$folder"/ray-*.log; do tail -n 5 "$log" >&2 || true; done
  say "Ray did not start; its files are in $scratch_folder/ray-$SLURM_JOB_ID-* of each node"
  exit 1
fi
if [[ -z $stopping ]]; then
  touch "$folder/joined"
  say "all ${#nodes[@]} nodes have joined"
  share_metrics &
  sharing=$!
  attend diffit "$stage" "$folder/recipe.yaml" "${arguments[@]}" \
    --address "$head_address:$head_port" || status=$?
fi

# 2 is bad input, which another attempt would not mend.
again=
if ((status != 0 && status != 2)); then
  if [[ -n $stopping ]]; then
    again="it was stopped"
  elif ! attend wait_for_nodes 0; then
    again="a node was lost"
  fi
fi
trap '' TERM
leave
if [[ $status == 0 || -n $again ]]; then
  "${on_every_node[@]}" bash -c remove_node_folder || true
else
  say "Ray's logs are in $scratch_folder/ray-$SLURM_JOB_ID-* of each node"
fi
rm -rf -- "$folder"
if [[ -z $again ]]; then
  say "diffit $stage ended with status $status"
  exit "$status"
fi
state=$(squeue --noheader --format=%T --job="$SLURM_JOB_ID" || true)
if [[ $state != RUNNING ]]; then
  say "not requeued: the job is $state"
elif ((attempt >= restarts)); then
  say "not requeued: it has been $restarts times; sbatch again resumes"
elif scontrol requeue "$SLURM_JOB_ID"; then
  say "requeued: $again"
else
  say "not requeued: Slurm refuses; sbatch again resumes"
fi
exit "$status"
"""
