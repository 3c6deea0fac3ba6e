"""What pods do before they end: shell lines for Kubernetes' preStop hooks.

The image has bash and grep, but no process tools; /proc says what runs.
"""

from __future__ import annotations

# No word of a hook's own command line matches its patterns, because of the brackets.
_DRIVERS = r"grep -lsaE '/[b]in/diffit' /proc/[0-9]*/cmdline | cut -d/ -f3"
# Ray names its processes `ray::NAME`, and those that wait for work `ray::IDLE`.
_BUSY = "grep -qsaE '^ray::[^I]' /proc/[0-9]*/cmdline"


def drain_worker(grace_s: int) -> str:
    """Announce that the node ends, so that training saves a checkpoint, and wait for it.

    The wait ends once nothing of ours runs on the node, at the latest after `grace_s`.
    """
    announce = (
        "ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION --reason-message 'the pod ends' "
        f"--deadline-remaining-seconds {grace_s}"
    )
    return f"{announce}; {_wait(_BUSY, grace_s)}"


def stop_driver(grace_s: int) -> str:
    """Ask the job's driver to save and leave, and wait for it."""
    drivers = f"drivers() {{ {_DRIVERS}; }}"
    ask = "for driver in $(drivers); do kill -TERM $driver; done"
    return f"{drivers}; {ask}; {_wait('drivers | grep -q .', grace_s)}"


def _wait(condition: str, seconds: int) -> str:
    within = f"end=$((SECONDS + {seconds})); while [ $SECONDS -lt $end ]"
    return f"{within} && {condition}; do sleep 2; done"
