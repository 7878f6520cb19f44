"""`headrace shard` from a model directory to a published checkpoint."""

import contextlib
import hashlib
import json
import os
import pty
import re
import subprocess
import sys
import termios
from itertools import pairwise

import pytest

from headrace_checkpoint import cli
from headrace_checkpoint.digest import chunk_digests
from headrace_checkpoint.manifest import CHUNK_BYTES, DATA_ALIGNMENT, MAX_PARTS, read_manifest
from headrace_checkpoint.safetensors_format import read_header

from .conftest import read_tensors, write_tensors


def rank_tensors(directory, rank):
    tensors = {}
    for path in directory.glob(f"model-rank-{rank}-part-*.safetensors"):
        tensors |= read_tensors(path)
    return tensors


def test_manifest_describes_the_files(model, shard, volume):
    outcome = shard(model, 2, "--identity", '{"revision": "main"}')
    assert outcome.code == 0
    directory = volume / "checkpoint"
    manifest = read_manifest(directory)
    assert manifest.identity == {"revision": "main"}
    assert manifest.architecture == "LlamaForCausalLM"
    assert [(part.rank, part.part) for part in manifest.parts] == [(0, 0), (1, 0)]
    for part in manifest.parts:
        content = (directory / part.file).read_bytes()
        header = read_header(lambda at, n, content=content: content[at : at + n], len(content))
        assert header.tensors == part.tensors
        assert header.data_offset == part.data_offset
        assert part.data_offset % DATA_ALIGNMENT == 0
        assert len(content) == part.file_bytes
        data = content[part.data_offset :]
        assert tuple(chunk_digests(data, CHUNK_BYTES)) == part.chunk_digests
    for file in manifest.files:
        content = (directory / file.file).read_bytes()
        assert content == (model / file.file).read_bytes()
        assert file.digest == hashlib.sha256(content).hexdigest()
    assert {path.name for path in directory.iterdir()} == {
        "manifest.json",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "model-rank-0-part-0.safetensors",
        "model-rank-1-part-0.safetensors",
    }
    assert [path.name for path in volume.iterdir()] == ["checkpoint"]


def test_what_it_reports(model, shard, volume):
    outcome = shard(model, 2)
    assert outcome.reason == "Published"
    total = read_manifest(volume / "checkpoint").total_bytes
    assert outcome.termination["totalBytes"] == total
    assert outcome.termination["seconds"] >= 0
    events = ["planned", "striping-skipped", "staging-joined", "part-written", "Published"]
    assert [event["event"] for event in outcome.events] == events
    assert all({"level", "time"} <= event.keys() for event in outcome.events)


def test_again_finds_it_published_and_touches_nothing(model, shard, volume):
    shard(model, 2)
    directory = volume / "checkpoint"
    before = {path: path.stat().st_mtime_ns for path in [directory, *directory.iterdir()]}
    outcome = shard(model, 2)
    assert (outcome.code, outcome.reason) == (0, "AlreadyPublished")
    assert before == {path: path.stat().st_mtime_ns for path in [directory, *directory.iterdir()]}
    assert outcome.termination["totalBytes"] == read_manifest(directory).total_bytes


def test_published_is_enough_even_without_the_source(model, shard):
    shard(model, 2)
    (model / "model.safetensors").unlink()
    assert shard(model, 2).reason == "AlreadyPublished"


def test_parts_split_between_tensors(model, shard, volume, tmp_path):
    shard(model, 2)
    outcome = shard(model, 2, "--part-bytes", 300_000, output=tmp_path / "split")
    assert outcome.code == 0
    manifest = read_manifest(tmp_path / "split")
    assert len(manifest.rank_parts(0)) == len(manifest.rank_parts(1)) > 2
    assert all(part.data_bytes <= 300_000 for part in manifest.parts)
    for rank in (0, 1):
        assert rank_tensors(tmp_path / "split", rank) == rank_tensors(volume / "checkpoint", rank)


def test_more_than_one_chunk_and_block(make_model, shard, volume, headrace):
    """Tensors of more than a chunk, of more than a read block, and chunks that end in a tensor."""
    source = make_model(layers=1, hidden_size=1024, heads=16, intermediate_size=5000, kv_heads=2)
    assert shard(source, 2).code == 0
    manifest = read_manifest(volume / "checkpoint")
    assert len(manifest.parts[0].chunk_digests) > 2
    assert headrace("verify", volume / "checkpoint").code == 0
    tensors = read_tensors(source / "model.safetensors")
    for rank in (0, 1):
        down = rank_tensors(volume / "checkpoint", rank)["model.layers.0.mlp.down_proj.weight"]
        rows = [
            tensors["model.layers.0.mlp.down_proj.weight"][2][i * 10_000 :][:10_000]
            for i in range(1024)
        ]
        assert down[2] == b"".join(row[rank * 5000 :][:5000] for row in rows)


def split_model(model):
    """Turn a model into two files with an index, as transformers stores large models."""
    tensors = read_tensors(model / "model.safetensors")
    names = sorted(tensors)
    halves = {
        "model-00001-of-00002.safetensors": names[::2],
        "model-00002-of-00002.safetensors": names[1::2],
    }
    for file, members in halves.items():
        write_tensors(model / file, {name: tensors[name] for name in members})
    (model / "model.safetensors").unlink()
    index = {name: file for file, members in halves.items() for name in members}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return index


def test_source_in_several_files(make_model, shard, tmp_path):
    one, several = make_model("one"), make_model("several")
    split_model(several)
    # Files beside the index are not the model's, as with a consolidated copy.
    write_tensors(several / "consolidated.safetensors", {"x": ("U8", (1,), b"x")})
    shard(one, 2, output=tmp_path / "a")
    assert shard(several, 2, output=tmp_path / "b").code == 0
    assert rank_tensors(tmp_path / "a", 1) == rank_tensors(tmp_path / "b", 1)


def test_source_behind_links_as_in_a_model_hub_cache(model, shard, tmp_path):
    snapshot = tmp_path / "models--x" / "snapshots" / "abc"
    blobs = tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(model.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert shard(snapshot, 2).code == 0


def test_recomputed_buffers_are_left_out(model, shard, volume):
    path = model / "model.safetensors"
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    write_tensors(path, read_tensors(path) | {name: ("F32", (1,), bytes(4))})
    outcome = shard(model)
    assert outcome.code == 0
    assert outcome.events[0]["ignoredTensors"] == [name]
    assert name not in rank_tensors(volume / "checkpoint", 0)


def test_nan_is_data_like_any_other(model, shard, volume):
    path = model / "model.safetensors"
    tensors = read_tensors(path)
    dtype, shape, data = tensors["model.norm.weight"]
    tensors["model.norm.weight"] = (dtype, shape, b"\xc1\x7f" * (len(data) // 2))
    write_tensors(path, tensors)
    assert shard(model).code == 0
    assert (
        rank_tensors(volume / "checkpoint", 0)["model.norm.weight"] == tensors["model.norm.weight"]
    )


def test_an_empty_target_directory_is_taken(model, shard, volume):
    (volume / "checkpoint").mkdir(parents=True)
    assert shard(model).reason == "Published"


def test_identity_by_default_tells_requests_apart(model, shard):
    assert shard(model, 1).reason == "Published"
    assert shard(model, 2).reason == "CheckpointConflict"
    assert shard(model, 1).reason == "AlreadyPublished"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["shard"],
        ["shard", "--source", "a", "--output", "b", "--tensor-parallel-size", "0"],
        ["shard", "--source", "a", "--output", "b", "--tensor-parallel-size", "x"],
        ["shard", "--source", "a", "--output", "b", "--tensor-parallel-size", "100000"],
        ["shard", "--source", "a", "--output", "b", "--dtype", "int8"],
        ["shard", "--source", "a", "--output", "b", "--layout", "hf"],
        ["shard", "--source", "a", "--output", "b", "--identity", "[1]"],
        ["shard", "--source", "a", "--output", "b", "--identity", "{"],
        ["shard", "--source", "a", "--output", ".."],
        ["shard", "--source", "a", "--output", ".hidden"],
        ["verify"],
    ],
)
def test_usage_errors_exit_64(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 64
    said = capsys.readouterr().err
    assert said.startswith("headrace")
    assert said.count("\n") == 1


def test_as_a_process_without_a_termination_log(model, tmp_path):
    """The installed command outside a container: no termination log, exit code by process."""
    environment = os.environ | {"HEADRACE_TERMINATION_LOG": str(tmp_path / "absent" / "log")}
    command = [sys.executable, "-m", "headrace_checkpoint.cli", "shard", "--source", model]
    result = subprocess.run(
        [*command, "--output", tmp_path / "out"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(result.stdout.splitlines()[-1])["event"] == "Published"
    assert not result.stderr


def test_memory_stays_bounded(make_model, tmp_path):
    """A model several times larger than the memory it takes to shard it."""
    source = make_model(layers=3, hidden_size=2048, heads=16, kv_heads=8, intermediate_size=8192)
    script = (
        "import sys; from headrace_checkpoint import cli; cli.main(sys.argv[1:]);"
        "print([line for line in open('/proc/self/status') if line.startswith('VmHWM')][0])"
    )
    arguments = ["shard", "--source", source, "--output", tmp_path / "out"]
    arguments += ["--tensor-parallel-size", "4"]
    result = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
    )
    resident = int(re.search(r"VmHWM:\s+(\d+) kB", result.stdout)[1]) * 1024
    size = (source / "model.safetensors").stat().st_size
    assert size > 350_000_000
    assert resident < 200_000_000


def test_alignment_of_what_is_written(make_model, shard, volume):
    """Sizes that are no multiples of 256 bytes come last, each aligned to its elements."""
    source = make_model(hidden_size=60, heads=4, intermediate_size=36)
    assert shard(source, 2).code == 0
    for part in read_manifest(volume / "checkpoint").parts:
        aligned = [entry.nbytes % 256 == 0 for entry in part.tensors]
        assert all(a >= b for a, b in pairwise(aligned))
        assert {True, False} == set(aligned)


def test_files_whose_names_no_checkpoint_can_have_are_left_out(model, shard, volume, headrace):
    (model / "tokenizer (1).json").write_text("{}")
    outcome = shard(model)
    assert outcome.reason == "Published"
    left_out = [event["files"] for event in outcome.events if event["event"] == "files-left-out"]
    assert left_out == [["tokenizer (1).json"]]
    assert headrace("verify", volume / "checkpoint").code == 0


def test_no_rank_gets_more_parts_than_can_be_handed_over(make_model, shard, volume):
    model = make_model(layers=26, hidden_size=16, heads=2, kv_heads=1, intermediate_size=16)
    assert shard(model, 1, "--part-bytes", 1).code == 0
    manifest = read_manifest(volume / "checkpoint")
    assert 26 * 4 < len(manifest.parts) <= MAX_PARTS


def on_a_terminal(*arguments):
    """Run the command with a terminal for standard error; returns what it shows, and stdout."""
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, 120))
    process = subprocess.run(
        [sys.executable, "-m", "headrace_loader.command", *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=follower,
        check=True,
    )
    os.close(follower)
    shown = b""
    with contextlib.suppress(OSError):  # EIO is a terminal's end
        while piece := os.read(leader, 65536):
            shown += piece
    os.close(leader)
    return shown.decode(), process.stdout


@pytest.mark.parametrize("option", [(), ("--json",), ("-o", "json")])
def test_a_bar_on_a_terminal_and_json_elsewhere(model, tmp_path, option):
    checkpoint = tmp_path / "checkpoint"
    for arguments in (("shard", "--source", model, "--output", checkpoint), ("verify", checkpoint)):
        shown, output = on_a_terminal(*arguments, *option)
        if option:
            assert shown == ""
            assert all("event" in json.loads(line) for line in output.splitlines())
        else:
            assert "100%" in shown
            assert "B/s" in shown
            assert output == b""


@pytest.mark.parametrize(("workers", "worker"), [(2, 2), (1, -1)])
def test_a_worker_that_does_not_exist(model, shard, capsys, workers, worker):
    with pytest.raises(SystemExit) as ended:
        shard(model, 1, "--workers", workers, f"--worker={worker}")
    assert ended.value.code == 64
    assert f"--worker {worker}: must be from 0 to {workers - 1}" in capsys.readouterr().err


def test_the_index_of_a_job_is_the_worker(model, shard, monkeypatch):
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "1")
    assert shard(model, 2, "--workers", 2).reason == "Published"
    with pytest.raises(SystemExit):
        shard(model, 2, "--workers", 1)
