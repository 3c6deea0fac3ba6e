"""The command line: help with examples, exit statuses; errors are one message, nothing written."""

from __future__ import annotations

import json
import runpy
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import typer
from mlflow.exceptions import MlflowException
from typer.core import TyperGroup
from typer.testing import CliRunner

from diffit_train import __version__
from diffit_train.cli.main import app, exit_status, main
from diffit_train.errors import DiffitError, UserError
from diffit_train.ray_session import connected

RUN = [sys.executable, "-c", "from diffit_train.cli.main import main; main()"]
COMMANDS = ["plan", "encode", "train", "evaluate", "sample", "compare", "import", "export"]
COMMANDS += ["submit", "verify", "references", "sweep", "data digits", "fit", "runs show"]


@pytest.mark.parametrize("words", COMMANDS)
def test_each_command_has_help_with_an_example(words: str) -> None:
    result = CliRunner().invoke(app, [*words.split(), "--help"], env={"COLUMNS": "120"})
    assert result.exit_code == 0
    assert f"Example: diffit {words}" in result.output.replace("`", "")


def test_help_lists_the_commands_in_the_order_of_use() -> None:
    output = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "120"}).output
    offsets = [output.index(f"│ {words.split()[0]} ") for words in ("data", "encode", "compare")]
    assert offsets == sorted(offsets)


def test_help_shows_no_value_after_a_flag() -> None:
    help_of = ["import", "--help"]
    lines = CliRunner().invoke(app, help_of, env={"COLUMNS": "120"}).output.splitlines()
    for flag in ("--json", "--allow-pickle"):
        line = next(line for line in lines if f"│ {flag} " in line)
        assert "bool" not in line.lower(), line


def test_version() -> None:
    first, *others = CliRunner().invoke(app, ["--version"]).output.splitlines()
    assert first == __version__
    assert f"torch {version('torch')}" in others
    assert f"ray {version('ray')}" in others


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "demo", "train.lrr=1"], ["'train.lrr'", "did you mean 'lr'"]),
        (["train", "demo", "model.patch_size=3"], ["model.patch_size is 3"]),
        (["train", "demo"], ["no finished latents", "diffit encode"]),
        (["encode", "demo"], ["does not exist"]),
        (["evaluate", "demo"], ["run 'demo' does not exist"]),
        (["compare"], ["mlflow.db", "train first"]),
        (["plan", "demo", "--gpu", "H9"], ["--gpu is 'H9'", "H100"]),
        (["sample", "demo", "--class", "eleven"], ["class is 'eleven'", "0 to 9"]),
        (["sample", "demo"], ["run 'demo' does not exist", "--run"]),
        (["sample", "demo", "evaluate.sampler.steps=-3"], ["evaluate.sampler.steps is -3"]),
        (["sample", "demo", "evaluate.sampler.steps=2000"], ["steps is 2000", "(1000)"]),
        (["import", "none.safetensors"], ["weight file", "none.safetensors does not exist"]),
        (["export", "demo"], ["run 'demo' does not exist"]),
        (["train", "demo", "--init-from", "../evil@3"], ["--init-from is '../evil', but must"]),
        (["train", "dmo"], ["did you mean 'demo'"]),
        (["fit", "autoencoder", "demo"], ["does not exist"]),
        (["fit", "features", "demo"], ["does not exist"]),
        (["submit", "train", "demo", "--address", "nowhere"], ["http://head:8265"]),
        (["train"], ["Missing argument"]),
        (["evaluate"], ["has no run; check --root"]),
        (["sweep", "demo", "--fleet", "--vary", "seed=1,2"], ["--fleet needs", "http://head"]),
        (["evaluate", "demo", "--watch", "--step", "3"], ["remove --step"]),
        (["export", "--sigma-rel", "0.1", "--format", "diffusers"], ["remove --format diffusers"]),
        (["references", "demo"], ["there is no feature network"]),
    ],
)
def test_bad_input_is_one_clear_message(
    tmp_path: Path,
    arguments: list[str],
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    root = [] if arguments == ["train"] else ["--root", str(tmp_path / "project")]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["diffit", *arguments, *root])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    said = capfd.readouterr().err
    assert "Traceback" not in said
    for word in words:
        assert word in said
    assert list(tmp_path.iterdir()) == []


def _options_of_runs() -> list[str]:
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    found = []
    for name, command in group.commands.items():
        parts = command.commands if isinstance(command, TyperGroup) else {"": command}
        for part, leaf in parts.items():
            if any("--run" in parameter.opts for parameter in leaf.params):
                found.append(f"{name} {part}".strip())
    return found


@pytest.mark.parametrize("name", ["../../evil", "", "a/b", ".hidden", "x" * 81, "a\nb"])
@pytest.mark.parametrize("words", _options_of_runs())
def test_a_run_cannot_be_outside_its_root(
    words: str, name: str, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    required = {"submit": ["train", "demo", "--address", "http://127.0.0.1:1"]}
    required |= {"import": ["weights.safetensors"]}
    required |= {"sweep": ["demo", "--vary", "seed=1,2"]}
    given = [*words.split(), *required.get(words, ["demo"]), "--run", name]
    assert exit_status(lambda: app([*given, "--root", str(tmp_path / "root")])) == 2
    assert f"--run is {name!r}, but must consist of at most 80" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "nobody:x"])
def test_a_cluster_that_does_not_answer_is_named(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    words = f"could not reach a Ray cluster at '{address}'"
    with pytest.raises(UserError, match=words), connected(address):
        pass


def test_statuses() -> None:
    def fails(error: BaseException) -> int:
        def body() -> None:
            raise error

        return exit_status(body)

    assert exit_status(lambda: None) == 0
    assert fails(DiffitError("x")) == 1
    assert fails(UserError("x")) == 2
    assert fails(MlflowException("x")) == 1
    assert fails(KeyboardInterrupt()) == 130
    assert fails(SystemExit(130)) == 130
    assert fails(SystemExit(2)) == 2
    assert fails(SystemExit()) == 0
    assert fails(OSError("disk full")) == 1
    with pytest.raises(ZeroDivisionError):
        fails(ZeroDivisionError())


def test_standard_output_is_only_json(trained: Path) -> None:
    from tests.conftest import TINY

    for words in (["encode", "demo", *TINY], ["train", "demo", *TINY, "--run", "tiny"]):
        arguments = [*RUN, *words, "--root", str(trained), "--json"]
        done = subprocess.run(arguments, capture_output=True, text=True, check=True)
        value = json.loads(done.stdout)
        assert value.get("step", 12) == 12
        assert value.get("written", 24) == 24
        assert "already" in done.stderr


def test_ctrl_c_while_the_command_line_is_imported_prints_no_traceback() -> None:
    code = """
import signal, sys, time
from diffit_train.__main__ import main

signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it

class Slow:
    def find_spec(self, name, path=None, target=None):
        if name == "diffit_train.cli":
            print("importing", flush=True)
            time.sleep(60)

sys.meta_path.insert(0, Slow())
main()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, "interrupted\n")


def test_the_shell_completes_commands_recipes_and_runs(tmp_path: Path) -> None:
    (tmp_path / "runs" / "mine").mkdir(parents=True)

    def completed(line: str) -> list[str]:
        words = {"_DIFFIT_COMPLETE": "complete_bash", "COMP_WORDS": line}
        words["COMP_CWORD"] = str(len(line.split(" ")) - 1)
        return CliRunner().invoke(app, [], env=words, prog_name="diffit").output.split()

    assert {"sample", "runs"} <= {*completed("diffit ")}
    assert completed("diffit train ffhq") == ["ffhq64"]
    assert completed(f"diffit sample --root {tmp_path} --run m") == ["mine"]
    assert completed(f"diffit runs show --root {tmp_path} m") == ["mine"]


@pytest.mark.parametrize("name", ["encode", "train", "evaluate", "imagenet"])
def test_a_pipeline_is_a_command(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It takes what `diffit submit` passes, and exits as the command line does."""
    file = Path(__file__).parents[2] / "pipelines" / f"{name}.py"
    words = ["demo", "--root", str(tmp_path), "--run", "none", "--step", "3", "data.source=nowhere"]
    for arguments, status in ((["--help"], 0), (words, 2)):
        monkeypatch.setattr(sys, "argv", [str(file), *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(file), run_name="__main__")
        assert ended.value.code == status
    assert "error: " in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
