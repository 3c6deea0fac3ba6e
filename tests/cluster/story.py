"""The story of a cluster: encode, train, lose a node, gain one, evaluate; and what is checked."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.cluster.machines import REPOSITORY, Machine, wait_until
from tests.cluster.services import BIN, JOB_SERVER, ROOT, TRACKING, Cluster
from tests.faults.driver import Begun, Driver, Line

STEPS, LOG_EVERY, CHECKPOINT_EVERY = 900, 10, 50
# Of the demo, what a node of one CPU does in a minute.
SMALL = [
    "data.images_per_shard=256",
    "data.shuffle_streams=4",
    "autoencoder.fit.steps=30",
    "model.hidden_size=64",
    "model.depth=4",
    "model.num_heads=4",
    f"train.steps={STEPS}",
    "train.batch_size=128",
    "train.lr=1e-3",
    "train.warmup_steps=10",
    f"train.checkpoint_every={CHECKPOINT_EVERY}",
    f"train.log_every={LOG_EVERY}",
    "train.keep_checkpoints=2",
    "evaluate.samples=100",
    "evaluate.batch_size=50",
    "evaluate.sampler.steps=5",
    "evaluate.features.fit.steps=30",
    f"tracking.uri={TRACKING}",
    "tracking.register_best=false",
]
ELASTIC = ["scaling.workers=1..2", "scaling.resize_check_s=2", "scaling.max_failures=5"]
# fp32, summed in another order by another number of workers.
SAME_CURVE = 1e-3
GUIDANCE = ("1.0", "2.0")
GUIDE = REPOSITORY / "docs" / "cluster.md"
# What the guide's commands name, and what stands for it here.
HERE = {
    "imagenet256": " ".join(["demo", *SMALL]),
    "s3://bucket/project": ROOT,
    "http://head:8265": JOB_SERVER,
    "http://mlflow:5000": TRACKING,
    "scaling.workers=16": "scaling.workers=1",
    "scaling.workers=32": "scaling.workers=2",
    "curves.png": "/tmp/curves.png",
}
FOLLOW_S = 300.0


@dataclass
class Report:
    """What was done, what it cost, and what was checked."""

    rows: list[tuple[str, str, str]] = field(default_factory=list)
    checks: list[tuple[str, bool, str]] = field(default_factory=list)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time a step."""
        print(f"... {name}", flush=True)
        begun_s = time.monotonic()
        yield
        self.rows.append((name, f"{time.monotonic() - begun_s:.0f}", ""))

    def lost(self, name: str, seconds: float, cost: str) -> None:
        """A row about what was taken away or added."""
        print(f"... {name}: {cost}", flush=True)
        self.rows.append((name, f"{seconds:.0f}", cost))

    def check(self, name: str, passed: bool, detail: object) -> None:
        """Add a check."""
        print(f"... {'pass' if passed else 'FAIL'}: {name}: {detail}", flush=True)
        self.checks.append((name, passed, str(detail)))

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return bool(self.checks) and all(passed for _, passed, _ in self.checks)

    def print(self) -> None:
        """Both tables."""
        console = Console(width=130)
        steps = Table("step", "s", "what it cost", title="Steps")
        for row in self.rows:
            steps.add_row(*row)
        console.print(steps)
        checks = Table("check", "", "found", title="Checks")
        for name, passed, detail in self.checks:
            checks.add_row(name, "pass" if passed else "FAIL", detail)
        console.print(checks)


class Followed(Driver):
    """A command on the user's machine that follows a job, read as `diffit train` is."""

    def __init__(self, machine: Machine, command: Sequence[str], environment: dict[str, str]):
        self.lines: list[Line] = []
        self.process = subprocess.Popen(
            [*machine.enter, *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=machine.environment(environment),
            cwd="/",
            start_new_session=True,
        )
        threading.Thread(target=self._read, args=(self.process,), daemon=True).start()

    def shown_until(self, at_s: float) -> int:
        """The last step that the progress line showed before a time."""
        found = [
            re.match(r"train +([\d,]+)/", line.text) for line in self.lines if line.at_s < at_s
        ]
        return max((int(match[1].replace(",", "")) for match in found if match), default=0)

    def ended(self, within_s: float = FOLLOW_S) -> int:
        """Exit status, when the command has ended."""
        return self.process.wait(timeout=within_s)


class Story:
    """Runs all of it on a cluster without nodes."""

    def __init__(self, cluster: Cluster, report: Report) -> None:
        self.cluster, self.report = cluster, report
        self.user = cluster.user

    def diffit(
        self, *words: str, environment: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run `diffit` on the user's machine."""
        return self.user.run(
            [str(BIN / "diffit"), *words],
            self.cluster.user_environment if environment is None else environment,
            600,
        )

    def must(self, done: subprocess.CompletedProcess[str]) -> str:
        """The output of a command; it must have succeeded."""
        if done.returncode:
            raise RuntimeError(
                f"{done.args[-6:]}: {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
            )
        return done.stdout + done.stderr

    def tell(self) -> None:
        """All chapters in order."""
        with self.report.step("two nodes join"):
            nodes = [self.cluster.start_node(name) for name in ("node1", "node2")]
            wait_until("two nodes", lambda: self.live_nodes() == 3, within_s=120)
        self.security()
        self.prepare()
        self.undisturbed(nodes)
        self.disturbed(nodes)
        self.fleet()
        self.records()
        self.guide()

    def live_nodes(self) -> int:
        """Nodes of which Prometheus' discovery file tells, or 0 without one."""
        file = self.cluster.network.machines["head"].tmp / "ray"
        found = list(file.glob("session_2*/prom_metrics_service_discovery.json"))
        targets = json.loads(found[0].read_text())[0]["targets"] if found else []
        return len({target.split(":")[0] for target in targets})

    # ---- Chapters ----

    def security(self) -> None:
        """Who has no token, or another, is refused."""
        for name, token in (("no token", None), ("a wrong token", "0" * 64)):
            environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} if token else {}
            done = self.diffit("jobs", "list", "--address", JOB_SERVER, environment=environment)
            said = done.stderr.strip().splitlines()[-1:] or [""]
            refused = done.returncode == 2 and "token" in said[0]
            self.report.check(f"{name}: refused, status 2", refused, said[0][:90])
        head = self.cluster.network.machines["head"]
        listening = head.run(["ss", "-Hltn", "sport", "=", ":8265"]).stdout.split()
        found = [word for word in listening if word.endswith(":8265")]
        self.report.check(
            "the job server listens on the head's address only",
            found == [f"{head.address}:8265"],
            found,
        )

    def prepare(self) -> None:
        """Images, autoencoder, features from the user's machine; doctor and encode as jobs."""
        with self.report.step("digits, autoencoder, features: to S3, from the user's machine"):
            self.must(self.diffit("data", "digits", f"{ROOT}/images/digits"))
            self.must(self.diffit("autoencoder", "fit", "demo", *SMALL, "--root", ROOT))
            self.must(self.diffit("features", "fit", "demo", *SMALL, "--root", ROOT))
        with self.report.step("diffit doctor --address: every node"):
            words = ["doctor", "demo", *SMALL, "--root", ROOT, "--address", JOB_SERVER]
            said = self.must(self.diffit(*words))
            self.report.check("doctor finds every node well", "all checks passed" in said, "")
        with self.report.step("diffit submit encode"):
            said = self.must(
                self.diffit(
                    "submit", "encode", "demo", *SMALL, "--root", ROOT, "--address", JOB_SERVER
                )
            )
            found = re.search(r"[\d,]+ images in \d+ shards, 0 rejected", said)
            self.report.check(
                "all images are encoded", bool(found), found[0] if found else said[-90:]
            )

    def undisturbed(self, nodes: list[Machine]) -> None:
        """By `ray job submit`: two workers, nothing lost."""
        before = [node.bytes_received() for node in nodes]
        with self.report.step("ray job submit: train on two nodes, undisturbed"):
            command = [str(BIN / "ray"), "job", "submit", "--address", JOB_SERVER]
            command += ["--working-dir", str(REPOSITORY), "--", "python", "pipelines/train.py"]
            command += ["demo", *SMALL, "scaling.workers=2", "--root", ROOT, "--run", "calm"]
            said = self.must(self.user.run(command, self.cluster.user_environment, 600))
        self.report.check(
            "training from step 0 on 2 workers, to the end",
            "Training from step 0 on 2 workers" in said and f"Trained {STEPS} steps" in said,
            "",
        )
        received = [node.bytes_received() - b for node, b in zip(nodes, before, strict=True)]
        mib = ", ".join(f"{count / 2**20:.0f} MiB" for count in received)
        self.report.check("both nodes heard of each other", min(received) > 2**20, mib)

    def disturbed(self, nodes: list[Machine]) -> None:
        """By `diffit submit pipeline`: a node is lost amid training, another one joins."""
        begun_s = time.monotonic()
        command = [str(BIN / "diffit"), "submit", "pipeline", "demo", *SMALL, *ELASTIC]
        command += ["--root", ROOT, "--run", "stormy", "--address", JOB_SERVER]
        job = Followed(self.user, command, self.cluster.user_environment)
        first = job.wait_begun(0.0)
        self.report.check(
            "the pipeline trains on two nodes", (first.step, first.workers) == (0, 2), first.workers
        )
        job.wait(lambda: (job.stepped(first.at_s) or 0) >= STEPS // 3)
        cut_s = time.monotonic()
        self.cluster.network.cut(nodes[1])
        print("... node2's link is gone", flush=True)
        alone = job.wait_begun(cut_s)
        reached = job.shown_until(alone.at_s)
        self._account("node2 lost: its link is gone", alone, cut_s, reached)
        self.report.check("one worker continues", alone.workers == 1, alone.workers)
        self.report.check("from a checkpoint", alone.step > 0, f"step {alone.step}")

        added_s = time.monotonic()
        self.cluster.start_node("node3")
        joined = job.wait_begun(max(alone.at_s, added_s))
        self._account("node3 added", joined, added_s, None)
        self.report.check("two workers again", joined.workers == 2, f"from step {joined.step}")
        status = job.ended()
        said = "\n".join(line.text for line in job.lines)
        self.report.check("the pipeline ends well", status == 0, f"status {status}")
        if status:
            raise RuntimeError(said[-4000:])
        self.report.check("all stages are done", "all 4 stages are done" in said, "")
        self.report.rows.append(
            ("diffit submit pipeline, all of it", f"{time.monotonic() - begun_s:.0f}", "")
        )
        self._same_curve()

    def _account(self, name: str, begun: Begun, since_s: float, reached: int | None) -> None:
        seconds = begun.at_s - since_s
        cost = f"training from step {begun.step} on {begun.workers}, {seconds:.0f} s later"
        if reached is not None:
            cost += f"; {reached - begun.step} or some more steps repeated"
        self.report.lost(name, seconds, cost)

    def _same_curve(self) -> None:
        calm, stormy = self._losses("calm"), self._losses("stormy")
        steps = list(range(LOG_EVERY, STEPS + 1, LOG_EVERY))
        self.report.check(
            "each logged step is there once",
            [step for step, _ in stormy] == steps == [step for step, _ in calm],
            f"{len(stormy)} records",
        )
        far = max(abs(a - b) / abs(b) for (_, a), (_, b) in zip(stormy, calm, strict=False))
        self.report.check(
            "the curve is that of the undisturbed run", far < SAME_CURVE, f"{far:.1e}"
        )

    def _losses(self, run: str) -> list[tuple[int, float]]:
        url = f"{ROOT}/runs/{run}/log.jsonl"
        read = f"import s3fs; print(s3fs.S3FileSystem().cat({url!r}).decode())"
        done = self.user.run([sys.executable, "-c", read], self.cluster.user_environment)
        records = [
            json.loads(line) for line in self.must(done).splitlines() if line.startswith("{")
        ]
        return [(record["step"], record["loss"]) for record in records]

    def fleet(self) -> None:
        """A sweep as a fleet of Ray jobs."""
        with self.report.step("diffit sweep --fleet: two Ray jobs"):
            words = ["sweep", "demo", *SMALL, "--root", ROOT, "--run", "stormy"]
            words += ["--step", "newest", "--vary", f"guidance.scale={','.join(GUIDANCE)}"]
            words += ["--name", "swept", "--fleet", "--max-concurrent", "2"]
            words += ["--address", JOB_SERVER]
            found = json.loads(self.must_out(self.diffit(*words, "--json")))
        scores = [row["fd_digits"] for row in found["rows"]]
        self.report.check("each job has its metrics", len(scores) == 2 and all(scores), scores)

    def must_out(self, done: subprocess.CompletedProcess[str]) -> str:
        """Standard output only."""
        self.must(done)
        return done.stdout

    def guide(self) -> None:
        """The commands of the operations guide, in their order."""
        saved = 0
        for command in guide_commands(GUIDE.read_text()):
            words = command.split()[1:]
            if words[0] != "plan":
                words = " ".join(HERE.get(word, word) for word in words).split()
                words = [word.replace("@400000", f"@{saved}") for word in words]
            if words[:2] == ["jobs", "stop"]:
                wait_until("a first step", lambda: self._progress().startswith("train "), None, 180)
            with self.report.step(f"guide: {' '.join(command.split()[:5])}"):
                said = self.must(self.diffit(*words))
            if stopped := re.search(r"[Ss]topped at step (\d+)", said):
                saved = int(stopped[1])
        self.report.check("every command of the guide succeeds", saved > 0, f"step {saved}")

    def _progress(self) -> str:
        """The last line of the newest job's log."""
        rows = json.loads(
            self.must_out(self.diffit("jobs", "list", "--address", JOB_SERVER, "--json"))
        )
        return str(rows[0]["progress"])

    def records(self) -> None:
        """What Postgres and Prometheus hold."""
        sql = self.cluster.sql
        states = sql("select name || ' ' || status from runs where name in ('calm', 'stormy')")
        self.report.check(
            "Postgres: both trainings have finished",
            sorted(states) == ["calm FINISHED", "stormy FINISHED"],
            states,
        )
        points = sql(
            "select count(*) || ' ' || count(distinct step) from metrics m join runs r using "
            "(run_uuid) where r.name = 'stormy' and m.key = 'train/loss'"
        )
        wanted = STEPS // LOG_EVERY
        self.report.check("Postgres: no point is doubled", points == [f"{wanted} {wanted}"], points)
        evaluations = sql(
            "select count(distinct run_uuid) from metrics where key = 'eval/fd_digits'"
        )
        # The pipeline's, and the sweep's; one of them may be the pipeline's.
        enough = bool(evaluations) and int(evaluations[0]) >= len(GUIDANCE) + 1
        self.report.check("Postgres: every evaluation is logged", enough, evaluations)

        def last(gauge: str) -> float:
            found = self.cluster.query(
                f'max_over_time(ray_diffit_train_{gauge}{{run="stormy"}}[1h])'
            )
            return max((float(item["value"][1]) for item in found), default=0.0)

        wait_until("Prometheus' next scrape", lambda: last("step") > 0, within_s=60)
        for gauge in ("step", "images_per_s", "loss"):
            value = last(gauge)
            self.report.check(f"Prometheus: diffit_train_{gauge}", value > 0, f"{value:.4g}")


def guide_commands(text: str) -> list[str]:
    """Each `diffit …` in the code blocks of the section on operations, on one line."""
    section = text.split("\n## Operations\n")[1].split("\n## ")[0]
    blocks = section.split("```")[1::2]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [" ".join(line.split()) for line in lines if line.startswith("diffit ")]


def logs_of(cluster: Cluster) -> str:
    """The end of each server's log."""
    files: list[Path] = sorted(cluster.logs.iterdir())
    return "\n".join(
        f"== {file.name}\n{file.read_text(errors='replace')[-1500:]}" for file in files
    )
