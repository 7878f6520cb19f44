"""The command itself: help, completion, exit codes, and the commands that other packages bring."""

import json
import os
import subprocess
import sys
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest

from headrace_cli import __main__ as program
from headrace_cli import external

COMMANDS = {"status", "plan", "timeline", "doctor", "shard", "verify", "delete", "load", "node"}


def test_help_names_every_command(headrace):
    ran = headrace("--help")
    assert ran.code == 0
    assert all(f"  {name} " in ran.out for name in COMMANDS)


def test_without_a_command_it_shows_its_help(headrace):
    ran = headrace()
    assert (ran.code, ran.out) == (os.EX_USAGE, "")
    assert "\n  status " in ran.err


@pytest.mark.parametrize("name", ["status", "plan", "timeline", "doctor"])
def test_every_own_command_has_help_and_json(headrace, name):
    ran = headrace(name, "--help")
    assert ran.code == 0
    assert "--output" in ran.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plon"], "No such command 'plon'"),
        (["plan", "--what"], "--what"),
        (["status", "--interval=-1"], "--interval"),
        (["status", "--interval=nan"], "--interval"),
        (["timeline"], "NAME"),
        (["timeline", "x", "--format=gif"], "--format"),
        (["timeline", "x", "-A"], "--namespace"),
        (["doctor", "--output=xml"], "--output"),
        (["completion", "tcsh"], "tcsh"),
    ],
)
def test_wrong_usage_is_one_sentence(headrace, arguments, words):
    ran = headrace(*arguments)
    assert ran.code == os.EX_USAGE
    assert words in ran.err
    assert ran.err.count("\n") == 1


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(headrace, shell):
    ran = headrace("completion", shell)
    assert ran.code == 0
    assert "_HEADRACE_COMPLETE" in ran.out


def test_a_shell_completes_commands():
    environment = {
        **os.environ,
        "_HEADRACE_COMPLETE": "bash_complete",
        "COMP_WORDS": "headrace ti",
        "COMP_CWORD": "1",
    }
    ran = subprocess.run(
        [sys.executable, "-m", "headrace_cli"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.stdout == "plain,timeline\n"


def test_kubectl_completes_commands(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["kubectl_complete-headrace", "doc"])
    assert program.complete_kubectl() == 0
    assert capsys.readouterr().out.splitlines()[0].startswith("doctor")


@pytest.mark.parametrize("name", sorted(external.KNOWN))
def test_commands_of_packages_that_are_missing(headrace, monkeypatch, name):
    monkeypatch.setattr(external, "entry_points", lambda **_: EntryPoints())
    ran = headrace(name, "--help")
    assert ran.code == os.EX_UNAVAILABLE
    assert "headrace-loader" in ran.err


def test_other_packages_get_all_arguments_and_give_the_exit_code(headrace, monkeypatch, tmp_path):
    point = EntryPoint("verify", "headrace_loader.command:main", external.GROUP)
    monkeypatch.setattr(external, "entry_points", lambda **_: EntryPoints([point]))
    ran = headrace("verify", tmp_path / "none")
    assert ran.code == os.EX_DATAERR
    assert "ManifestInvalid" in ran.out


@pytest.mark.parametrize(
    ("kubeconfig", "words"),
    [
        (None, "there is no such file"),
        ("", "is malformed"),
        ("apiVersion: v1", "current-context"),
        ("[1, 2", "is malformed"),
        ("clusters: 7\nusers: []\ncontexts: []\ncurrent-context: it\n", "kubeconfig "),
    ],
)
@pytest.mark.parametrize("command", [["status"], ["doctor"], ["timeline", "x"]])
def test_unusable_kubeconfigs(headrace, tmp_path, command, kubeconfig, words):
    path = tmp_path / "kubeconfig"
    if kubeconfig is not None:
        path.write_text(kubeconfig)
    ran = headrace(*command, "--kubeconfig", path)
    assert ran.code == os.EX_UNAVAILABLE
    assert words in ran.err
    assert ran.err.count("\n") == 1


PLUGIN = """\
apiVersion: v1
kind: Config
current-context: it
clusters: [{name: it, cluster: {server: "https://127.0.0.1:9"}}]
contexts: [{name: it, context: {cluster: it, user: it}}]
users:
- name: it
  user:
    exec:
      apiVersion: client.authentication.k8s.io/v1
      command: %s
      args: [-c, "echo 'The SSO session has expired' >&2; exit 255"]
      interactiveMode: Never
"""


@pytest.mark.parametrize(
    ("program", "words"),
    [("sh", "returned 255. The SSO session has expired;"), ("no-such-program", "no-such")],
)
def test_a_credential_plugin_that_fails_is_one_sentence(headrace, tmp_path, program, words):
    path = tmp_path / "kubeconfig"
    path.write_text(PLUGIN % program)
    ran = headrace("status", "--kubeconfig", path)
    assert ran.code == os.EX_NOPERM
    assert "credential plugin failed" in ran.err
    assert words in ran.err
    assert ran.err.count("\n") == 1


def test_a_context_that_is_not_there(headrace, tmp_path):
    path = tmp_path / "kubeconfig"
    path.write_text(PLUGIN % "true")
    ran = headrace("status", "--kubeconfig", path, "--context=other")
    assert ran.code == os.EX_UNAVAILABLE
    assert "other" in ran.err


def test_a_defect_is_no_traceback(headrace, monkeypatch):
    monkeypatch.setattr("headrace_cli.plan_command.predict", lambda _: 1 / 0)
    ran = headrace("plan", "--model-gb=1")
    assert ran.code == os.EX_SOFTWARE
    assert "ZeroDivisionError" in ran.err


def test_the_loaders_script_gives_what_it_has_not_to_the_command_line(monkeypatch, capsys):
    from headrace_loader import command

    point = EntryPoint("main", "headrace_cli.__main__:main", "headrace.cli")
    monkeypatch.setattr(command, "entry_points", lambda **_: EntryPoints([point]))
    assert command.main(["plan", "--published"]) == 0
    assert "AWS measured" in capsys.readouterr().out
    for own in ("verify", "delete"):
        assert command.main([own, "/nowhere/x", "-o", "json"]) in (os.EX_DATAERR, 0)
        assert "event" in json.loads(capsys.readouterr().out)


def test_the_loaders_script_without_its_own_dependencies(monkeypatch, capsys):
    from headrace_loader import command

    monkeypatch.setitem(sys.modules, "headrace_checkpoint.cli", None)
    assert command.main(["shard"]) == os.EX_UNAVAILABLE
    assert "install headrace-loader[loader]" in capsys.readouterr().err


OUTPUT = (
    ("plan", "--published"),
    ("plan", "--published", "-o", "json"),
    ("plan", "--help"),
    ("completion", "bash"),
    ("verify", "/absent"),
    ("delete", "/tmp/absent"),
    ("shard", "--help"),
    ("node", "check", "-o", "json"),
)


@pytest.mark.parametrize("command", OUTPUT, ids=" ".join)
def test_output_that_cannot_be_written_is_one_sentence(command):
    program = [sys.executable, "-m", "headrace_loader.command", *command]
    environment = os.environ | {"PYTHONUNBUFFERED": ""}
    with Path("/dev/full").open("w") as full:
        ran = subprocess.run(program, stdout=full, stderr=subprocess.PIPE, env=environment)
    said = ran.stderr.decode().splitlines()
    assert "output cannot be written: No space left on device; free space" in said[-1]
    assert len(said) == 1 + ("headrace-node: " in said[0])  # which may have more to say
    assert ran.returncode == (os.EX_DATAERR if command[0] == "verify" else os.EX_IOERR)


@pytest.mark.parametrize("command", OUTPUT, ids=" ".join)
def test_a_reader_that_is_gone_is_nothing_to_talk_of(command):
    program = [sys.executable, "-m", "headrace_loader.command", *command]
    reading, writing = os.pipe()
    os.close(reading)
    environment = os.environ | {"PYTHONUNBUFFERED": ""}
    ran = subprocess.run(program, stdout=writing, stderr=subprocess.PIPE, env=environment)
    os.close(writing)
    assert [line for line in ran.stderr.splitlines() if b"headrace-node: " not in line] == []
    assert ran.returncode == (os.EX_DATAERR if command[0] == "verify" else 0)
