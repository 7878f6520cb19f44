"""Sources that cannot be sharded: each ends with its reason, a message that says what to do,
exit code 65, and nothing on the volume."""

import json
import os

import pytest

from .conftest import read_tensors, write_tensors
from .test_shard import split_model

WEIGHTS = "model.safetensors"
QUERY = "model.layers.0.self_attn.q_proj.weight"


def edit_tensors(change):
    def corrupt(model):
        tensors = read_tensors(model / WEIGHTS)
        change(tensors)
        write_tensors(model / WEIGHTS, tensors)

    return corrupt


def edit_header(change):
    """Rewrite the header's JSON and keep the data section."""

    def corrupt(model):
        content = (model / WEIGHTS).read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:end])
        change(header)
        text = json.dumps(header).encode()
        (model / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + content[end:])

    return corrupt


def edit_config(**fields):
    def corrupt(model):
        path = model / "config.json"
        config = json.loads(path.read_text()) | fields
        path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))

    return corrupt


def edit_index(change):
    def corrupt(model):
        split_model(model)
        path = model / "model.safetensors.index.json"
        document = json.loads(path.read_text())
        change(document["weight_map"])
        path.write_text(json.dumps(document))

    return corrupt


def replace_file(name, content):
    return lambda model: (model / name).write_bytes(content)


def truncate(name, size):
    return lambda model: os.truncate(model / name, size)


def remove(name):
    return lambda model: (model / name).unlink()


def link_to(name, target):
    def corrupt(model):
        (model / name).unlink()
        (model / name).symlink_to(target)

    return corrupt


def fifo(name):
    def corrupt(model):
        (model / name).unlink()
        os.mkfifo(model / name)

    return corrupt


def shift_offsets(header):
    header[QUERY]["data_offsets"] = [value + 2 for value in header[QUERY]["data_offsets"]]


def transpose(tensors):
    dtype, _, data = tensors[QUERY]
    tensors[QUERY] = (dtype, (128, 512), data)


def eight_bit(tensors):
    tensors[QUERY] = ("F8_E4M3", (256, 256), bytes(256 * 256))


BAD = {
    "config missing": (remove("config.json"), "ConfigInvalid", "config.json: missing"),
    "config is no JSON": (replace_file("config.json", b"{"), "ConfigInvalid", "no JSON"),
    "config is not UTF-8": (replace_file("config.json", b'"\xff"'), "ConfigInvalid", "no JSON"),
    "config is a list": (replace_file("config.json", b"[]"), "ConfigInvalid", "JSON object"),
    "config is nested without end": (
        replace_file("config.json", b"[" * 100_000),
        "ConfigInvalid",
        "no JSON",
    ),
    "no architectures": (
        edit_config(architectures=None),
        "ConfigInvalid",
        "architectures: null: must be a list",
    ),
    "empty architectures": (edit_config(architectures=[]), "ConfigInvalid", "architectures: []"),
    "unsupported architecture": (
        edit_config(architectures=["GPT2LMHeadModel"]),
        "ArchitectureUnsupported",
        '["GPT2LMHeadModel"]: none is supported; supported are DeepseekV2ForCausalLM, ',
    ),
    "quantized in a way of its own": (
        edit_config(quantization_config={"quant_method": "mxfp4"}),
        "ArchitectureUnsupported",
        "quantization_config.quant_method: 'mxfp4': supported: 'fp8', 'compressed-tensors'",
    ),
    "GPT-OSS as it is published": (
        edit_config(
            architectures=["GptOssForCausalLM"],
            num_local_experts=4,
            head_dim=64,
            quantization_config={"quant_method": "mxfp4"},
        ),
        "ArchitectureUnsupported",
        "quantization_config.quant_method: 'mxfp4': GptOssForCausalLM is supported unquantized",
    ),
    "said to be quantized": (
        edit_config(quantization_config={"quant_method": "fp8", "activation_scheme": "dynamic"}),
        "ArchitectureUnsupported",
        f"'{QUERY}': dtype BF16: supported with fp8 per tensor are F8_E4M3",
    ),
    "header over 100 MB": (
        replace_file(WEIGHTS, (100_000_001).to_bytes(8, "little") + b"{}"),
        "SourceCorrupt",
        "header length 100000001: must be at most 100000000",
    ),
    "no hidden size": (edit_config(hidden_size=None), "ConfigInvalid", "hidden_size: missing"),
    "parallel size does not divide": (
        edit_config(num_attention_heads=3, head_dim=64),
        "ParallelismInvalid",
        "tensor parallel size 2: does not divide num_attention_heads 3",
    ),
    "no weights": (remove(WEIGHTS), "SourceNotFound", "no *.safetensors files"),
    "weights of no bytes": (truncate(WEIGHTS, 0), "SourceCorrupt", f"{WEIGHTS}: 0 bytes"),
    "weights cut in the header": (truncate(WEIGHTS, 100), "SourceCorrupt", "truncated"),
    "weights cut in the data": (truncate(WEIGHTS, 100_000), "SourceCorrupt", "truncated"),
    "header of garbage": (
        replace_file(WEIGHTS, (20).to_bytes(8, "little") + b"x" * 40),
        "SourceCorrupt",
        "must be a JSON object",
    ),
    "offsets that leave a hole": (edit_header(shift_offsets), "SourceCorrupt", QUERY),
    "tensor missing": (
        edit_tensors(lambda tensors: tensors.pop(QUERY)),
        "TensorMissing",
        f"tensor '{QUERY}': in none",
    ),
    "tensor unexpected": (
        edit_tensors(lambda tensors: tensors.update(extra=("U8", (1,), b"x"))),
        "ArchitectureUnsupported",
        "tensor 'extra'",
    ),
    "more layers than config.json says": (
        edit_config(num_hidden_layers=1),
        "ArchitectureUnsupported",
        "tensor 'model.layers.1.",
    ),
    "fewer layers than config.json says": (
        edit_config(num_hidden_layers=3),
        "TensorMissing",
        "tensor 'model.layers.2.",
    ),
    "shape contradicts config.json": (
        edit_tensors(transpose),
        "SourceCorrupt",
        "[128, 512]: config.json demands [256, 256] (num_attention_heads * head_dim, hidden_size)",
    ),
    "element type of a quantized model": (
        edit_tensors(eight_bit),
        "ArchitectureUnsupported",
        f"'{QUERY}': dtype F8_E4M3",
    ),
    "tied, yet with another head": (
        edit_config(tie_word_embeddings=True),
        "ConfigInvalid",
        "'lm_head.weight' differs",
    ),
    "index of garbage": (
        replace_file("model.safetensors.index.json", b"{"),
        "SourceCorrupt",
        "index.json: no JSON",
    ),
    "index without weight map": (
        replace_file("model.safetensors.index.json", b"{}"),
        "SourceCorrupt",
        "weight_map",
    ),
    "index names an absent file": (
        edit_index(lambda index: index.update({QUERY: "absent.safetensors"})),
        "SourceNotFound",
        "absent.safetensors: No such file",
    ),
    "index names the wrong file": (
        edit_index(lambda index: index.update({"other": "model-00001-of-00002.safetensors"})),
        "TensorMissing",
        "tensor 'other': not in model-00001",
    ),
    "index leaves the directory": (
        edit_index(lambda index: index.update({QUERY: "../secret.safetensors"})),
        "SourceCorrupt",
        "'../secret.safetensors': must be the plain name",
    ),
    "index names the directory itself": (
        edit_index(lambda index: index.update({QUERY: "."})),
        "SourceCorrupt",
        "must be a regular file",
    ),
    "index with a NUL in a name": (
        edit_index(lambda index: index.update({QUERY: "a\0b"})),
        "SourceCorrupt",
        "plain name",
    ),
    "tensor in two files": (
        lambda model: write_tensors(model / "copy.safetensors", read_tensors(model / WEIGHTS)),
        "SourceCorrupt",
        "also in copy.safetensors",
    ),
    "link to another file system": (
        link_to("tokenizer.json", "/proc/self/environ"),
        "SourceCorrupt",
        "leaves the source's file system",
    ),
    "dangling link": (link_to(WEIGHTS, "absent"), "SourceNotFound", "No such file"),
    "link to itself": (link_to(WEIGHTS, WEIGHTS), "SourceNotFound", WEIGHTS),
    "FIFO in place of a file": (fifo(WEIGHTS), "SourceCorrupt", "must be a regular file"),
}


@pytest.mark.parametrize(("corrupt", "reason", "message"), BAD.values(), ids=BAD.keys())
def test_refused_with_reason(corrupt, reason, message, model, shard, volume):
    corrupt(model)
    outcome = shard(model, 2)
    assert (outcome.code, outcome.reason) == (65, reason)
    assert message in outcome.message
    assert outcome.events[-1]["event"] == "failed"
    assert not list(volume.glob("*")) + list(volume.glob(".*"))


def test_absent_source(shard, tmp_path, volume):
    outcome = shard(tmp_path / "absent")
    assert (outcome.code, outcome.reason) == (65, "SourceNotFound")
    assert str(tmp_path / "absent") in outcome.message
    assert not volume.exists()


def test_source_is_a_file(shard, model):
    assert shard(model / "config.json").reason == "SourceNotFound"


def test_target_holds_something_else(shard, model, volume):
    (volume / "checkpoint").mkdir(parents=True)
    (volume / "checkpoint" / "file").write_text("precious")
    outcome = shard(model)
    assert (outcome.code, outcome.reason) == (65, "CheckpointConflict")
    assert (volume / "checkpoint" / "file").read_text() == "precious"


def test_target_is_a_file(shard, model, volume):
    volume.mkdir()
    (volume / "checkpoint").write_text("precious")
    assert shard(model).reason == "CheckpointConflict"


@pytest.mark.parametrize("damage", ["remove", "truncate"])
def test_published_checkpoint_is_damaged(shard, model, volume, damage):
    shard(model)
    part = volume / "checkpoint" / "model-rank-0-part-0.safetensors"
    part.unlink() if damage == "remove" else os.truncate(part, 10)
    outcome = shard(model)
    assert (outcome.code, outcome.reason) == (65, "CheckpointConflict")
    assert part.name in outcome.message


def test_long_messages_fit_the_kubelets_limit(model, shard, tmp_path):
    path = model / "model.safetensors"
    write_tensors(path, read_tensors(path) | {"\N{SNOWMAN}" * 3000: ("U8", (1,), b"x")})
    outcome = shard(model)
    assert outcome.reason == "ArchitectureUnsupported"
    assert (tmp_path / "termination-log").stat().st_size <= 3072
