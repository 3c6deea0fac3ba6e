"""Metrics on their way to MLflow."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Mapping

from diffit_train.config.recipe import Recipe
from diffit_train.redaction import first_line, redact
from diffit_train.tracking.address import tracking_uri
from diffit_train.tracking.tracker import Tracker, unreachable_errors


class MetricsOutbox:
    """Sends a run's metrics from a thread, so that training never waits for MLflow.

    Points that MLflow already has are dropped. While MLflow is unreachable, points are kept and
    sent once it is back.

    Args:
        recipe: determines the MLflow URI.
        run_id: the MLflow run.
        say: told when MLflow becomes unreachable, and when it is back.
        pause_s: seconds between attempts.
        may_send: asked before each point, which is dropped if not.
    """

    def __init__(
        self,
        recipe: Recipe,
        run_id: str,
        say: Callable[[str], None],
        pause_s: float = 10.0,
        may_send: Callable[[], bool] = lambda: True,
    ) -> None:
        self.recipe, self.run_id, self.say, self.pause_s = recipe, run_id, say, pause_s
        self.may_send = may_send
        self._points: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue()
        self._leaving = threading.Event()
        self.unsent = 0
        self._thread = threading.Thread(target=self._send_all, name="metrics", daemon=True)
        self._thread.start()

    def put(self, step: int, metrics: Mapping[str, float]) -> None:
        """Queue the values at a step; steps must ascend."""
        self._points.put((step, dict(metrics)))

    def close(self) -> int:
        """Try once more to send what is left; returns the number of points not sent."""
        self._leaving.set()
        self._points.put(None)
        self._thread.join()
        if self.unsent:
            self.say(
                f"MLflow at {redact(tracking_uri(self.recipe))} is unreachable: {self.unsent} "
                "points are kept in log.jsonl; rerun the same command later to send them"
            )
        return self.unsent

    def _send_all(self) -> None:
        tracker: Tracker | None = None
        sent, away = -1, False
        while (point := self._points.get()) is not None:
            step, metrics = point
            while True:
                try:
                    if tracker is None:
                        tracker = Tracker.of(self.recipe, patient=False)
                        sent = tracker.last_step(self.run_id, "perf/step_s")
                    if step > sent and self.may_send():
                        tracker.log_metrics(self.run_id, metrics, step)
                        sent = step
                except unreachable_errors() as error:
                    if not away:
                        away = True
                        self.say(
                            f"Could not reach MLflow; metrics are kept and sent later: "
                            f"{first_line(error)}"
                        )
                    if self._leaving.is_set():
                        self.unsent = 1 + sum(p is not None for p in self._drained())
                        return
                    self._leaving.wait(self.pause_s)
                    continue
                if away:
                    away = False
                    self.say("MLflow is reachable again")
                break

    def _drained(self) -> list[tuple[int, dict[str, float]] | None]:
        left = []
        with contextlib.suppress(queue.Empty):
            while True:
                left.append(self._points.get_nowait())
        return left
