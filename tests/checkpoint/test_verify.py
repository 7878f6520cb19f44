"""`headrace verify` finds any damage and names file and tensor."""

import json
import os
import random

import pytest

from headrace_checkpoint.manifest import read_manifest


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


def test_manifest_and_header_must_agree(headrace, checkpoint):
    path = checkpoint / "manifest.json"
    document = json.loads(path.read_text())
    document["parts"][0]["tensors"][0]["name"] = "renamed"
    path.write_text(json.dumps(document))
    code, event = verify(headrace, checkpoint)
    assert code == 65
    assert "header's tensors differ" in event["message"]


@pytest.mark.parametrize("directory", ["absent", "."])
def test_no_checkpoint(headrace, tmp_path, directory):
    code, event = verify(headrace, tmp_path / directory)
    assert (code, event["reason"]) == (65, "ManifestInvalid")
    assert "manifest.json" in event["message"]
