#!/bin/bash
# Ray in a Slurm allocation, and `diffit evaluate` on it. Send it by sbatch.
# Preempted or at its time limit, it saves, is requeued and resumes.
# Functions are called by traps and on other nodes, where shellcheck does not look.
# shellcheck disable=SC1091,SC2317
#SBATCH --job-name=diffit-evaluate-imagenet256
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=90G
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@300

set -euo pipefail

stage=evaluate
arguments=(--run imagenet256)
restarts=100
shared_folder="$HOME/.diffit"
export scratch_folder=/tmp
export interface=''
export ray_cpus=8 ray_gpus=8 join_s=300
arguments+=("tracking.uri=${MLFLOW_TRACKING_URI:?export it before sbatch: the MLflow server, as http://host:5000}")

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
name: imagenet256
data:
  name: imagenet256
  source: root:images/imagenet/train
  format: auto
  columns:
    image: image
    label: label
  labels: null
  resolution: 256
  num_classes: 1000
  flip: true
  images_per_shard: 512
  max_rejected_fraction: 0.01
  expected_images: 1281167
  lanes: 256
  shuffle_window: 1024
autoencoder:
  kind: kl
  source: stabilityai/sd-vae-ft-ema
  known_as: ''
  latent_channels: 4
  downsample: 8
  scale: 0.18215
  batch_size: 32
  precision: tf32
  fit:
    steps: 250
    batch_size: 64
    lr: 0.002
    kl_weight: 0.0001
    block_out_channels:
    - 16
    - 32
    - 32
    - 32
    layers_per_block: 1
    norm_num_groups: 8
    seed: 0
model:
  preset: diffit_xl
  architecture: diffit
  options: {}
  patch_size: 2
  hidden_size: 1152
  depth: 28
  num_heads: 16
  mlp_ratio: 4.0
  conditional: true
  position_side: null
  label_init_std: 0.02
  attention: auto
  image:
    channels:
    - 128
    - 256
    - 256
    blocks:
    - 4
    - 4
    - 4
    window: 4
    head_size: 32
    time_size: 512
    dropout: 0.0
    resample: convolution
    time: tmsa
    time_embedding: positional
    encoder: diffit
    decoder: diffit
  unet:
    channels: 128
    multipliers:
    - 2
    - 2
    - 2
    blocks: 4
    attention_resolutions:
    - 16
    attention: plain
    dropout: 0.0
diffusion:
  objective: epsilon
  options: {}
  timesteps: 1000
  beta_start: 0.0001
  beta_end: 0.02
  edm:
    variant: edm
    p_mean: -1.2
    p_std: 1.2
    sigma_data: 0.5
train:
  steps: 7000000
  batch_size: 256
  lr: 0.0003
  betas:
  - 0.9
  - 0.999
  weight_decay: 0.0
  warmup_steps: 0
  lr_schedule: constant
  lr_decay_start: 70000
  grad_clip: null
  label_dropout: 0.1
  augment: 0.0
  start: null
  ema:
    ema:
      decay: 0.9999
      half_life_images: null
      ramp_ratio: null
      sigma_rel: null
  ema_snapshot_every: null
  zero_stage: 2
  offload: none
  micro_batch_size: null
  precision: bf16
  compile: false
  activation_checkpointing: none
  checkpoint_every_nth_block: 1
  overlap_comm: null
  bucket_elements: null
  deterministic: false
  seed: 0
  checkpoint_every: 10000
  checkpoint_every_s: null
  keep_checkpoints: 3
  keep_every: 100000
  validate_every: 100000
  validate_samples: 10000
  sample_every: null
  log_every: 50
  loss_limit: null
  grad_norm_limit: null
  max_consecutive_bad_steps: 5
  max_rollbacks: 3
  profile_steps: null
evaluate:
  samples: 50000
  batch_size: 64
  weights: ema
  precision: bf16_autocast
  compile: true
  seed: 0
  sampler:
    name: ddpm
    steps: 250
    eta: 0.0
    spacing: even
    diffusion: 2sigma
    last_step: mean
    last_step_size: 0.04
    edm:
      levels: edm
      sigma_min: 0.002
      sigma_max: 80.0
      rho: 7.0
      churn: 0.0
      churn_min: 0.0
      churn_max: null
      churn_noise: 1.0
  guidance:
    kind: power_cosine
    scale: 4.4
    power: 4.0
    low: 0.0
    high: 1.0
    channels: 3
    skip_within: 0.0001
  labels: random
  pixels: truncate
  features:
    name: inception
    kind: inception
    options: {}
    source: published
    fit:
      steps: 400
      batch_size: 64
      lr: 0.002
      channels:
      - 32
      - 64
      - 64
      features: 64
      held_out_fraction: 0.2
      seed: 0
  reference: https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256/VIRTUAL_imagenet256_labeled.npz
  num_neighbors: 3
  reference_images: 10000
  keep_images: grid
  grid_columns: 10
  grid_rows: 10
scaling:
  workers: 8
  cpus_per_worker: 8
  gpus_per_worker: 1
  encode_actors: 8
  encode_min_actors: 1
  encode_threads: 1
  evaluate_actors: 8
  evaluate_batches: 1
  gpus_per_actor: 1.0
  max_failures: 3
  max_preemptions: -1
  resize_check_s: 60.0
  wait_s: 0.0
  hang_s: 300.0
  shard_cache_gib: null
  shard_cache_folder: ''
storage:
  root: s3://bucket/project
tracking:
  uri: null
  experiment: imagenet256
  register_best: true
END_OF_RECIPE
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
