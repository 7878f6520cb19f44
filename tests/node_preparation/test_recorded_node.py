"""headrace-node on a recorded node: a fake sysroot and recorded programs, no real hardware."""

import json
import os
import shutil
import socket
import subprocess
import threading

import pytest

from headrace_node import __main__ as program
from headrace_node import cufile, unit
from headrace_node.checks import check as find
from headrace_node.errors import PublishFailed, Unsupported
from headrace_node.facts import gather
from headrace_node.host import run_here
from headrace_node.publish import Cluster, labels, publish
from headrace_node.steps import all_steps, apply, check, revert

STEPS = all_steps(5128)


def outcomes(reports):
    return {report.step: report.outcome for report in reports}


def grades(node):
    return {found.check: found.grade for found in find(node.host())}


def test_recorded_node_is_prepared_and_verified(recorded_node):
    node = recorded_node()
    reports = apply(node.host(), STEPS)
    assert "failed" not in outcomes(reports).values(), reports
    facts = gather(node.host())
    assert labels(facts) == {"headrace.dev/gds": "verified", "headrace.dev/efa-interfaces": "4"}
    calls = node.calls()
    assert calls.index("modprobe kefalnd ipif_name=enp71s0") < calls.index("lnetctl lnet configure")
    assert calls.index("lnetctl udsp add --src efa --priority 0") < calls.index("modprobe lustre")
    added = node.calls("net add --net efa")
    assert added[0] == "lnetctl net add --net efa --if rdmap100s0 --peer-credits 128 --cpt [0]"
    assert added[3].endswith("--if rdmap103s0 --peer-credits 128 --cpt [1]")


def test_applying_again_changes_nothing(recorded_node):
    node = recorded_node()
    apply(node.host(), STEPS)
    node.put("proc/sys/vm/nr_hugepages", "5128\n")
    before, files = node.calls(), node.files()
    assert set(outcomes(apply(node.host(), STEPS)).values()) == {"done"}
    assert (node.calls(), node.files()) == (before, files)
    assert set(outcomes(check(node.host(), STEPS)).values()) == {"done"}


def test_a_dry_run_changes_nothing_and_says_what_would_be(recorded_node):
    node = recorded_node()
    files = node.files()
    reports = apply(node.host(dry_run=True), STEPS)
    assert (node.calls(), node.files()) == ([], files)
    said = {report.step: report.message for report in reports}
    assert "lnetctl net add --net efa --if rdmap100s0" in said["lnet-efa"]
    assert f"write {unit.UNIT_PATH}" in said["unit"]


def test_reverting_brings_back_what_was_there(recorded_node):
    node = recorded_node()
    node.put("etc/cufile.json", '{"mine": true}\n')
    files = node.files()
    apply(node.host(), STEPS)
    assert node.files() != files
    assert "failed" not in outcomes(revert(node.host(), STEPS)).values()
    assert node.files() == files
    assert [net for net, _ in node.state["nets"]] == ["tcp"]


def test_reverting_brings_back_every_byte_and_the_mode(recorded_node):
    node = recorded_node()
    path = node.root / "etc/cufile.json"
    path.write_bytes(b'{"mine": "\xff"}\r\n')
    path.chmod(0o600)
    apply(node.host(), STEPS)
    assert path.stat().st_mode & 0o777 == 0o644
    revert(node.host(), STEPS)
    assert path.read_bytes() == b'{"mine": "\xff"}\r\n'
    assert path.stat().st_mode & 0o777 == 0o600


def test_what_is_left_of_a_unit_is_taken_back_and_what_others_wrote_is_not(recorded_node):
    node = recorded_node()
    apply(node.host(), STEPS)
    unit_file = node.root / unit.UNIT_PATH.lstrip("/")
    unit_file.unlink()
    assert outcomes(revert(node.host(), STEPS))["unit"] == "changed"
    assert not any("headrace" in name for name in node.files())
    assert not node.calls("systemctl disable")
    node.put(unit.UNIT_PATH.lstrip("/"), "[Unit]\n")
    assert outcomes(revert(node.host(), STEPS))["unit"] == "done"
    assert unit_file.read_text() == "[Unit]\n"


def test_gdscheck_is_found_behind_an_absolute_link(recorded_node):
    """/usr/local/cuda is one, which seen from a container leads to the container's own files."""
    node = recorded_node()
    apply(node.host(), STEPS)
    shutil.rmtree(node.root / "usr/local/cuda")
    (node.root / "usr/local/cuda").symlink_to("/etc/alternatives/cuda")
    assert labels(gather(node.host()))["headrace.dev/gds"] == "verified"


def test_the_network_of_a_mounted_file_system_is_not_taken_away(recorded_node):
    node = recorded_node()
    apply(node.host(), STEPS)
    node.mount()
    reports = {report.step: report for report in revert(node.host(), STEPS)}
    assert reports["lnet-efa"].outcome == "failed"
    assert "drain the node" in reports["lnet-efa"].message
    assert ["efa", "rdmap100s0"] in node.state["nets"]


def test_mounts_are_tuned_and_their_servers_discovered(recorded_node):
    node = recorded_node()
    apply(node.host(), STEPS)
    node.mount()
    assert outcomes(apply(node.host(), STEPS))["tuning"] == "changed"
    assert "lctl set_param ldlm.namespaces.*.lru_size=19200" in node.calls("lctl")
    assert node.calls("lnetctl discover") == ["lnetctl discover 10.0.1.9@tcp"]
    assert outcomes(check(node.host(), STEPS))["tuning"] == "done"
    assert grades(node)["mount"] == "ok"


def test_an_interface_that_is_half_there_is_left_and_the_others_added(recorded_node):
    node = recorded_node()
    node.change(lnet=True, nets=[["tcp", "enp71s0"], ["efa", "rdmap100s0"]])
    apply(node.host(), STEPS)
    assert len(node.calls("net add")) == 3


def test_bottlerocket_is_refused_with_the_reason(recorded_node, capsys):
    node = recorded_node(system="bottlerocket")
    with pytest.raises(Unsupported, match="root file system is read-only"):
        apply(node.host(), STEPS)
    assert node.calls() == []
    assert labels(gather(node.host()))["headrace.dev/gds"] == "unsupported"


def test_a_missing_module_is_said_and_the_other_steps_are_done(recorded_node):
    node = recorded_node(gds=False)
    reports = {report.step: report for report in apply(node.host(), STEPS)}
    assert reports["nvidia-fs"].outcome == "failed"
    assert "bake an image" in reports["nvidia-fs"].message
    assert reports["lnet-efa"].outcome == "changed"
    assert labels(gather(node.host()))["headrace.dev/gds"] == "missing"


@pytest.mark.parametrize(
    ("spoil", "check_name", "words"),
    [
        ({"gds": "Unsupported"}, "GDS", "Lustre is Unsupported"),
        ({"down": ["rdmap102s0"]}, "LNet", "3 of 4"),
    ],
)
def test_what_makes_loads_fall_back_is_found(recorded_node, spoil, check_name, words):
    node = recorded_node()
    apply(node.host(), STEPS)
    node.change(**spoil)
    assert labels(gather(node.host()))["headrace.dev/gds"] == "fallback"
    found = next(found for found in find(node.host()) if found.check == check_name)
    assert found.grade == "problem"
    assert words in found.message
    assert found.fix


def test_a_failing_program_is_named_with_what_it_said(recorded_node):
    node = recorded_node()
    node.change(failing={"lnetctl lnet configure": "No such device or address"})
    reports = {report.step: report for report in apply(node.host(), STEPS)}
    assert reports["lnet-efa"].message == (
        "lnetctl lnet configure: status 1: No such device or address"
    )


def test_checks_of_an_untouched_node(recorded_node):
    found = grades(recorded_node(gds=False))
    problems = {name for name, grade in found.items() if grade == "problem"}
    assert problems == {"nvidia-fs", "LNet", "Lustre"}


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_the_unit_is_one_that_systemd_takes(recorded_node, tmp_path):
    node = recorded_node()
    apply(node.host(), STEPS)
    path = tmp_path / unit.NAME
    # Programs that are not here; systemd looks for each.
    text = (node.root / unit.UNIT_PATH.lstrip("/")).read_text()
    programs = ("/usr/sbin/lnetctl", "/usr/sbin/modprobe", "/usr/bin/udevadm")
    for name in programs:
        text = text.replace(name, "/usr/bin/true")
    path.write_text(text)
    command = ["systemd-analyze", "verify", "--man=no", str(path)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert unit.NAME not in ran.stderr, ran.stderr
    assert ran.returncode == 0, ran.stderr


def test_the_unit_waits_for_every_device_and_goes_before_the_kubelet(recorded_node):
    node = recorded_node()
    text = unit.unit(gather(node.host()))
    waiting = next(line for line in text.splitlines() if "udevadm wait" in line)
    assert all(f"/sys/class/infiniband/rdmap{100 + n}s0" in waiting for n in range(4))
    assert "mlx5_0" not in text
    assert "Before=kubelet.service" in text
    assert "169.254.169.254" not in text


def test_the_command_prepares_and_reports(recorded_node, monkeypatch, capsys):
    node = recorded_node()
    monkeypatch.setattr(program, "Host", lambda root, dry_run: node.host(dry_run=dry_run))
    root = f"--root={node.root}"
    assert program.main(["check", root]) == 1
    assert program.main(["node", "apply", root, "-o", "json"]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["labels"]["headrace.dev/gds"] == "verified"
    assert {"step": "peers", "outcome": "done", "message": ""} in document["steps"]


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["prepare"],
        ["check", "--root=/nowhere"],
        ["apply", "--huge-pages=-1"],
        ["apply", "--every=nan"],
        ["apply", "--every=0"],
    ],
)
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        program.main(arguments)
    assert ended.value.code == os.EX_USAGE
    assert "Traceback" not in capsys.readouterr().err


def test_publishing_outside_of_a_cluster_is_one_sentence(recorded_node, monkeypatch, capsys):
    node = recorded_node()
    monkeypatch.setattr(program, "Host", lambda root, dry_run: node.host(dry_run=dry_run))
    assert program.main(["check", f"--root={node.root}", "--publish"]) == os.EX_NOPERM
    assert capsys.readouterr().err.startswith("headrace-node: PublishFailed: --publish:")


def test_what_is_no_api_server_is_one_sentence(recorded_node, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"

        def answer():
            with server.accept()[0] as connection:
                connection.recv(10_000)
                connection.sendall(b"220 mail.example ESMTP\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        cluster = Cluster(url, "token", None, "default")
        with pytest.raises(PublishFailed, match="check the network to the API server"):
            publish(cluster, "node", gather(recorded_node().host()))
        thread.join()


def test_cufile_configuration_allows_the_slow_path_only_where_the_fast_one_is_not_verified(
    recorded_node,
):
    node = recorded_node()
    apply(node.host(), STEPS)
    document = json.loads(node.files()["etc/cufile.json"])
    assert document["properties"]["allow_compat_mode"] is False
    node.change(gds="Unsupported")
    document = json.loads(cufile.configuration(gather(node.host())))
    assert document["properties"]["allow_compat_mode"] is True


def test_programs_that_are_missing_or_fail_are_outcomes():
    assert run_here(["true"]).ok
    assert run_here(["false"]).status == 1
    assert run_here(["headrace-no-such-program"]).status == 127
