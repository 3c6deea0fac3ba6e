"""Native code's useless lines are kept from the terminal, and nothing else is."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import os, sys
from diffit_train.native_stderr import without_lines
from diffit_train.progress import say

os.write(2, b"useless before\\n")
with without_lines("useless"):
    os.write(2, b"native 1\\n[core_worker.cc] a useless line\\nnative 2\\n")
    say("python")
    print("useless, says python", file=sys.stderr)
    os.write(2, b"half a line")
os.write(2, b" and its end\\nuseless after\\n")
sys.stderr.write("python after\\n")
"""


def test_only_native_lines_with_the_text_are_dropped() -> None:
    found = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, check=True
    ).stderr.splitlines()
    assert [line for line in found if "native" in line] == ["native 1", "native 2"]
    assert [line for line in found if "useless" in line] == [
        "useless before",
        "useless, says python",
        "useless after",
    ]
    assert "half a line and its end" in found
    assert "python" in found
    assert found[-1] == "python after"


def test_an_object_in_place_of_stderr_is_left_alone() -> None:
    code = """
import io, os, sys
from diffit_train.native_stderr import without_lines
sys.stderr = kept = io.StringIO()
with without_lines("useless"):
    sys.stderr.write("x")
    os.write(2, b"useless")
assert kept.getvalue() == "x"
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert found.stderr == b"useless"
