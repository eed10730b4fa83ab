"""The command line as a person meets it: help pages, exit codes, one clear line for a mistake, and how quick it is."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from crucible.cli.app import cli
from crucible.errors import ConfigNotFound
from tests.hubserver.faults import FaultyHub

HEAVY = ("ray", "pyarrow", "numpy", "httpx", "huggingface_hub", "aiohttp", "PIL", "rich", "crucible.session")


def commands(group: click.Command = cli, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command with the words that call it, groups included."""
    yield path, group
    if isinstance(group, click.Group):
        context = click.Context(group)
        for name in group.list_commands(context):
            command = group.get_command(context, name)
            assert command is not None
            yield from commands(command, (*path, name))


ALL = [pytest.param(path, command, id=" ".join(("crucible", *path))) for path, command in commands()]


def run(*args: str, env: dict[str, str | None] | None = None) -> Result:
    return CliRunner().invoke(cli, args, prog_name="crucible", env={"COLUMNS": "80", **(env or {})})


@pytest.mark.parametrize(("path", "command"), ALL)
def test_a_help_page_has_an_example_and_fits_80_columns(path: tuple[str, ...], command: click.Command) -> None:
    long, short = run(*path, "--help"), run(*path, "-h")
    assert long.exit_code == 0
    assert long.stdout == short.stdout
    assert re.search(rf"Example:\n    {' '.join(('crucible', *path))}\b", long.stdout)
    assert [line for line in long.stdout.splitlines() if len(line) > 80] == []
    assert "..." not in long.stdout.partition("Commands:")[2], "a summary is cut: make the first sentence shorter"
    if not isinstance(command, click.Group):
        assert "--json" in long.stdout


@pytest.mark.parametrize("args", [["--help"], ["--version"], ["prefetch", "--help"], ["hub", "serve", "--help"]])
def test_help_loads_nothing_heavy(args: list[str]) -> None:
    code = (
        "import sys; from crucible.cli.app import cli\n"
        f"try: cli({args!r}, prog_name='crucible')\n"
        "except SystemExit: pass\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert child.stderr.strip() == "[]"


def test_help_is_quick() -> None:
    """Beside what it cannot do without, importing click, in one run: the best of five of each, taken in turn."""
    took: dict[str, float] = {}
    for _ in range(5):
        for name, args in {"help": ["-m", "crucible", "--help"], "click": ["-c", "import click"]}.items():
            began = time.monotonic()
            subprocess.run([sys.executable, *args], capture_output=True, timeout=60, check=True)
            took[name] = min(took.get(name, 60.0), time.monotonic() - began)
    assert took["help"] < 4 * took["click"], took


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["prefech"], "no command 'prefech'; did you mean prefetch?"),
        (["xyzzy"], "no command 'xyzzy'; there are: prefetch, plan,"),
        (["data", "haed"], "no command 'haed'; did you mean head?"),
        (["plan"], "Missing argument 'REPO'"),
        (["plan", "a b"], "'a b' is not a repo id"),
        (["plan", "org/toy", "--nodes", "0"], "Invalid value for '--nodes'"),
        (["plan", "org/toy", "--columns", "a,,b"], "a column name is empty"),
        (["plan", "org/toy", "--endpoint", "huggingface"], "is not an http(s) address"),
        (["plan", "org/toy", "--bach", "3"], "No such option"),
    ],
)
def test_wrong_usage_exits_with_2_and_says_why(args: list[str], says: str) -> None:
    result = run(*args)
    assert result.exit_code == 2
    assert says in result.stderr
    assert result.stdout == ""


def test_a_rank_without_a_world_size_is_wrong_usage() -> None:
    result = run("status", env={"RANK": "1"})
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "RANK is set but WORLD_SIZE is not" in result.stderr


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["org/tou"], "org/tou: no such repo on http://"),
        (["org/toy"], "choose a config"),
        (["org/toy", "--config", "c"], "org/toy: no config 'c'; there are: a, b"),
        (["org/toy", "--config", "a", "--split", "trian"], "no split 'trian'; there are: train, test"),
        (["org/toy", "--config", "a", "--revision", "v9"], "org/toy: no revision 'v9'"),
    ],
)
@pytest.mark.parametrize("command", ["plan", "data head"])
def test_a_typo_is_one_line_that_names_what_there_is(data: FaultyHub, command: str, args: list[str], says: str) -> None:
    result = run(*command.split(), *args, *(["-q"] if command == "data head" else []))
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert says in result.stderr
    assert result.stdout == ""


def test_no_network_is_one_line() -> None:
    result = run("plan", "org/toy", env={"HF_ENDPOINT": "http://127.0.0.1:9", "CRUCIBLE_TRIES": "1"})
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "127.0.0.1:9" in result.stderr


def test_offline_is_one_line_and_opens_no_connection(data: FaultyHub) -> None:
    child = subprocess.run(
        [sys.executable, "-m", "crucible", "--offline", "plan", "org/toy"], capture_output=True, text=True, timeout=60
    )
    assert child.returncode == 1
    assert child.stderr.count("\n") == 1
    assert "HF_HUB_OFFLINE" in child.stderr
    assert data.log == []


def test_a_traceback_comes_only_with_debug(data: FaultyHub) -> None:
    quiet, loud = run("plan", "org/tou"), run("--debug", "plan", "org/tou")
    assert "Traceback" not in quiet.stderr
    assert "Traceback" in loud.stderr
    assert (quiet.exit_code, loud.exit_code) == (1, 1)


def test_an_unexpected_exception_says_it_is_a_defect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crucible.cluster.look.status", lambda _: 1 // 0)
    result = run("status")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ZeroDivisionError: ")
    assert "defect" in result.stderr
    assert "--debug" in result.stderr


def test_ctrl_c_exits_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("crucible.cluster.look.status", interrupted)
    result = run("status")
    assert result.exit_code == 130
    assert "Traceback" not in result.stderr


def test_a_ctrl_c_that_a_library_swallows_still_ends_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Ray did while it waited for an answer."""
    from crucible.report import Progress

    def swallowing(*_: object, on_progress: Callable[[Progress], None], **__: object) -> None:
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)
        on_progress(Progress("job", "items"))
        pytest.fail("it went on")

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr("crucible.session.prefetch", swallowing)
    result = run("prefetch", "org/toy")
    assert result.exit_code == 130, result.output
    assert "Interrupted" in result.stderr
    assert signal.getsignal(signal.SIGINT) is before


def test_a_pipe_that_closes_early_is_no_error(data: FaultyHub) -> None:
    script = f"{sys.executable} -m crucible data head org/toy --config a -n 100 --json -q | head -1"
    child = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(child.stdout) == {"n": 0, "text": "row 0"}
    assert child.stderr == ""


# --- plan


def test_a_plan_fits_80_columns_and_says_when_rows_are_not_known(data: FaultyHub) -> None:
    result = run("plan", "org/toy", "--config", "a", "--nodes", "3", "--batch", "8")
    assert result.exit_code == 0
    assert result.stderr == ""
    assert max(len(line) for line in result.stdout.splitlines()) <= 80
    assert "not known before conversion" in result.stdout
    assert re.search(r"^node-2 ", result.stdout, re.MULTILINE)


def test_a_plan_after_the_data_is_here_knows_rows_and_steps(data: FaultyHub) -> None:
    assert run("data", "head", "org/toy", "--config", "a", "-q").exit_code == 0
    args = ("plan", "org/toy", "--config", "a", "--split", "train", "--nodes", "2", "--ranks-per-node", "4")
    shown, told = run(*args, "--batch", "2"), json.loads(run(*args, "--batch", "2", "--json").stdout)
    assert "100 (exact, from the manifest in this node's store)" in shown.stdout
    assert told["rows"] == sum(rank["rows"] for rank in told["ranks"]) == 100
    assert [node["hub_bytes"] for node in told["nodes"]] == [0, 0]
    assert told["cached"] is True


def test_a_plan_asks_for_no_data(data: FaultyHub) -> None:
    data.clear_log()
    told = json.loads(run("plan", "org/toy", "--config", "a", "--json").stdout)
    assert not [request for request in data.log if request.path.endswith((".jsonl", ".csv"))]
    assert told["files"] == 2
    assert told["source_bytes"] == sum(node["hub_bytes"] for node in told["nodes"])


# --- status and data


def test_status_counts_what_a_read_left_in_the_store(data: FaultyHub) -> None:
    empty = json.loads(run("status", "--json").stdout)
    assert (empty["shards"], empty["manifests"]) == (0, [])
    run("data", "head", "org/toy", "--config", "a", "-q")
    full = json.loads(run("status", "--json").stdout)
    assert full["shards"] == 1
    assert [(one["repo"], one["split"], one["rows"]) for one in full["manifests"]] == [("org/toy", "train", 100)]
    assert "org/toy" in run("status").stdout


def test_head_prints_rows_on_stdout_and_progress_on_stderr(data: FaultyHub) -> None:
    args = ("data", "head", "org/toy", "--config", "a", "-n", "2", "--json")
    loud, quiet = run(*args), run(*args, "-q")
    rows = [json.loads(line) for line in loud.stdout.splitlines()]
    assert rows == [{"n": 0, "text": "row 0"}, {"n": 1, "text": "row 1"}]
    assert re.fullmatch(r"org/toy: started\norg/toy: done in \d+\.\d s\n", loud.stderr)
    assert (quiet.stdout, quiet.stderr) == (loud.stdout, "")


def test_head_shows_a_line_end_as_an_escape_and_only_the_columns_asked_for(data: FaultyHub) -> None:
    result = run("data", "head", "org/toy", "--config", "a", "--split", "test", "--columns", "text", "-q")
    assert result.stdout == "row 0\n  text  line\\nend\n"


def test_images_and_bytes_are_described_and_not_dumped() -> None:
    from PIL import Image

    from crucible.cli.data_head import for_json, for_person

    value = {"img": Image.new("RGB", (32, 16)), "raw": b"\x00" * 2048, "score": float("nan"), "tags": ["a"]}
    assert for_json(value) == {
        "img": {"width": 32, "height": 16, "mode": "RGB"},
        "raw": {"bytes": 2048},
        "score": None,
        "tags": ["a"],
    }
    assert for_person(value["img"]) == "<PIL image 32x16 RGB>"
    assert for_person(value["raw"]) == "<2,048 bytes>"
    assert for_person("x" * 1000) == "x" * 199 + "…"
    assert for_person("\x1b[31mred") == "\\x1b[31mred"


# --- hub serve


def serve(*args: str) -> tuple[subprocess.Popen[str], dict[str, str]]:
    """A `crucible hub serve --json` that has printed where it is."""
    command = [sys.executable, "-m", "crucible", "hub", "serve", *args, "--port", "0", "--json"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None
    line = child.stdout.readline()
    return child, json.loads(line) if line else {}


def test_a_served_folder_is_read_by_the_other_commands_until_ctrl_c(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"n": 1}\n')
    log = tmp_path / "log.jsonl"
    child, where = serve(str(tmp_path / "hub"), "--import", str(folder), "me/mine", "--request-log", str(log))
    try:
        result = run("data", "head", "me/mine", "--endpoint", where["endpoint"], "--json", "-q")
    finally:
        child.send_signal(signal.SIGINT)
        _, stderr = child.communicate(timeout=30)
    assert json.loads(result.stdout) == {"n": 1}
    assert child.returncode == 0
    assert "me/mine: imported" in stderr
    assert any(json.loads(line)["path"].endswith("train.jsonl") for line in log.read_text().splitlines())


def test_a_port_in_use_is_one_line(data: FaultyHub, tmp_path: Path) -> None:
    result = run("hub", "serve", str(tmp_path / "new"), "--port", str(data.port))
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert f"127.0.0.1:{data.port}" in result.stderr


def test_a_token_file_is_read_and_its_faults_are_named(tmp_path: Path) -> None:
    from crucible.cli.hub_serve import read_tokens

    good, bad = tmp_path / "good", tmp_path / "bad"
    good.write_text("# people\nhf_anna anna org team\n\nhf_bert bert\n")
    bad.write_text("hf_anna\n")
    assert {token: (user.name, user.orgs) for token, user in read_tokens(good).items()} == {
        "hf_anna": ("anna", ("org", "team")),
        "hf_bert": ("bert", ()),
    }
    result = run("hub", "serve", str(tmp_path / "hub"), "--tokens", str(bad))
    assert result.exit_code == 2
    assert "line 1" in result.stderr
    assert "hf_anna" not in result.stderr


def test_an_error_of_the_package_ends_with_its_own_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ConfigNotFound("org/toy", "c", ["a", "b"])

    monkeypatch.setattr("crucible.session.prefetch", refuse)
    result = run("prefetch", "org/toy", "--config", "c", "-q")
    assert result.exit_code == 1
    assert result.stderr == "Error: org/toy: no config 'c'; there are: a, b\n"


def test_the_module_is_the_command() -> None:
    child = subprocess.run(
        [sys.executable, "-m", "crucible", "--version"],
        capture_output=True,
        text=True,
        timeout=60,
        env=dict(os.environ),
    )
    assert re.fullmatch(r"crucible \S+\n", child.stdout)
