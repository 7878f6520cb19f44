"""`headrace verify` finds any damage and names file and tensor."""

import json
import os
import random
import socket

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace_checkpoint.errors import DigestMismatch, ManifestInvalid
from headrace_checkpoint.manifest import (
    check_self_digest,
    read_manifest,
    read_manifest_and_content,
)
from headrace_checkpoint.verifier import verify_part


@pytest.fixture
def checkpoint(model, shard, volume):
    shard(model, 2, "--part-bytes", 1_000_000)
    return volume / "checkpoint"


def verify(headrace, checkpoint):
    outcome = headrace("verify", checkpoint)
    return outcome.code, outcome.events[-1]


def test_sound(headrace, checkpoint):
    code, event = verify(headrace, checkpoint)
    assert (code, event["event"]) == (0, "verified")
    assert event["totalBytes"] == read_manifest(checkpoint).total_bytes


def test_any_flipped_bit_is_found_and_named(headrace, checkpoint):
    generator = random.Random(7)
    files = sorted(path for path in checkpoint.iterdir() if path.name != "manifest.json")
    for path in files * 3:
        sound = path.read_bytes()
        damaged = bytearray(sound)
        position = generator.randrange(len(damaged))
        damaged[position] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        code, event = verify(headrace, checkpoint)
        assert (code, event["reason"]) == (65, "DigestMismatch")
        assert path.name in event["message"]
        path.write_bytes(sound)
    assert verify(headrace, checkpoint)[0] == 0


def test_any_flipped_bit_of_the_manifest_is_found(checkpoint):
    """But for the name of its digest of itself, without which there is nothing to compare."""
    path = checkpoint / "manifest.json"
    sound = path.read_bytes()
    name = sound.index(b"selfDigest")
    generator = random.Random(7)
    for position in (*(generator.randrange(len(sound)) for _ in range(300)), name):
        damaged = bytearray(sound)
        damaged[position] ^= 1 << generator.randrange(7)
        path.write_bytes(damaged)
        if name <= position < name + len("selfDigest"):
            assert not check_self_digest(bytes(damaged))
            continue
        with pytest.raises(ManifestInvalid):
            check_self_digest(read_manifest_and_content(checkpoint)[1])
    path.write_bytes(sound)
    assert check_self_digest(sound)


def test_a_changed_identity_is_found(headrace, checkpoint):
    path = checkpoint / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"revision":"main"', b'"revision":"mail"'))
    code, event = verify(headrace, checkpoint)
    assert (code, event["reason"]) == (65, "ManifestInvalid")
    assert "manifest.json: selfDigest: " in event["message"]


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(where=st.integers(min_value=0), bit=st.integers(0, 7))
def test_any_flipped_bit_of_the_data_names_its_tensor(checkpoint, where, bit):
    """Whatever bit it is: the file and, among the chunk's tensors, the one that has it."""
    manifest = read_manifest(checkpoint)
    part = manifest.parts[where % len(manifest.parts)]
    position = where % part.data_bytes
    (tensor,) = part.names_between(position, position + 1)
    with (checkpoint / part.file).open("r+b") as file:
        flip(file, part.data_offset + position, bit)
        file.flush()
        with pytest.raises(DigestMismatch) as caught:
            verify_part(checkpoint, part, manifest.digest_algorithm, manifest.chunk_bytes)
        flip(file, part.data_offset + position, bit)
        file.flush()
    assert part.file in str(caught.value)
    assert tensor in str(caught.value)
    verify_part(checkpoint, part, manifest.digest_algorithm, manifest.chunk_bytes)


def flip(file, position, bit):
    file.seek(position)
    (byte,) = file.read(1)
    file.seek(position)
    file.write(bytes([byte ^ 1 << bit]))


def test_the_damaged_tensor_is_named(headrace, checkpoint):
    part = read_manifest(checkpoint).parts[-1]
    tensor = part.tensors[0]
    with (checkpoint / part.file).open("r+b") as file:
        file.seek(part.data_offset + tensor.offset)
        file.write(b"\xff\xff\xff")
    _, event = verify(headrace, checkpoint)
    assert tensor.name in event["message"]
    assert "chunk 0 (data bytes 0 to" in event["message"]


@pytest.mark.parametrize("damage", [os.unlink, lambda path: os.truncate(path, 5000)])
def test_missing_and_short_files_are_named(headrace, checkpoint, damage):
    damage(checkpoint / "model-rank-1-part-0.safetensors")
    code, event = verify(headrace, checkpoint)
    assert (code, event["reason"]) == (65, "DigestMismatch")
    assert "model-rank-1-part-0.safetensors" in event["message"]


def listen(path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, listen])
@pytest.mark.parametrize(
    "name", ["manifest.json", "config.json", "model-rank-1-part-0.safetensors"]
)
def test_what_is_no_file_is_named(headrace, checkpoint, name, make, monkeypatch):
    monkeypatch.chdir(checkpoint)  # names of sockets are short
    (checkpoint / name).unlink()
    make(name)
    code, event = verify(headrace, checkpoint)
    reason = "ManifestInvalid" if name == "manifest.json" else "DigestMismatch"
    assert (code, event["reason"]) == (65, reason)
    assert f"{checkpoint / name}: must be a regular file" in event["message"]


def test_manifest_and_header_must_agree(headrace, checkpoint):
    path = checkpoint / "manifest.json"
    document = json.loads(path.read_text())
    for part in document["parts"]:
        if part["part"] == 0:
            part["tensors"][0]["name"] = "renamed"
    del document["selfDigest"]
    path.write_text(json.dumps(document))
    code, event = verify(headrace, checkpoint)
    assert code == 65
    assert "header's tensors differ" in event["message"]


@pytest.mark.parametrize("directory", ["absent", "."])
def test_no_checkpoint(headrace, tmp_path, directory):
    code, event = verify(headrace, tmp_path / directory)
    assert (code, event["reason"]) == (65, "ManifestInvalid")
    assert "manifest.json" in event["message"]
