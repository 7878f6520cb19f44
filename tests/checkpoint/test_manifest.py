"""The manifest: read back as written, every rule of the format enforced, no other error."""

import copy
import json
import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace_checkpoint.errors import (
    InputError,
    InternalError,
    ManifestInvalid,
    TransientError,
)
from headrace_checkpoint.manifest import (
    CHUNK_BYTES,
    CopiedFile,
    Manifest,
    Parallelism,
    Part,
    TensorEntry,
    read_manifest,
)

from .conftest import REPOSITORY


def part(rank, number):
    tensors = (
        TensorEntry("weight", "BF16", (64, 2), 0, 256),
        TensorEntry("scale", "F32", (), 256, 4),
    )
    file = f"model-rank-{rank}-part-{number}.safetensors"
    renamed = tuple(
        TensorEntry(f"{t.name}{number}", t.dtype, t.shape, t.offset, t.nbytes) for t in tensors
    )
    return Part(rank, number, file, 4096 + 260, 4096, 260, ("0" * 16,), renamed)


MANIFEST = Manifest(
    layout="vllm",
    identity={"source": "pvc://models/llama", "tensor": 2},
    architecture="LlamaForCausalLM",
    parallelism=Parallelism(tensor=2),
    chunk_bytes=CHUNK_BYTES,
    parts=(part(0, 0), part(0, 1), part(1, 0), part(1, 1)),
    files=(CopiedFile("config.json", 5, "1" * 64),),
    digest_algorithm="multilinear64",
)
DOCUMENT = json.loads(MANIFEST.to_json())


def parse(document):
    return Manifest.from_json(json.dumps(document).encode())


def test_written_and_read_back():
    assert Manifest.from_json(MANIFEST.to_json()) == MANIFEST


def test_ranks_and_totals():
    assert [p.part for p in MANIFEST.rank_parts(1)] == [0, 1]
    assert MANIFEST.rank_parts(2) == ()
    assert MANIFEST.total_bytes == 4 * 260


def test_unknown_fields_are_left_to_later_versions():
    assert parse(DOCUMENT | {"comment": "x"}) == MANIFEST


def changed(*path, to):
    document = copy.deepcopy(DOCUMENT)
    target = document
    for key in path[:-1]:
        target = target[key]
    if to is ...:
        del target[path[-1]]
    else:
        target[path[-1]] = to
    return document


PART = ("parts", 1)
TENSOR = ("parts", 1, "tensors", 1)
BROKEN = [
    (changed("format", to="other"), "format: 'other': must be 'headrace-checkpoint'"),
    (changed("formatVersion", to=2), "formatVersion: 2: must be 1"),
    (changed("formatVersion", to=True), "formatVersion: True"),
    (changed("digestAlgorithm", to="md5"), "digestAlgorithm: 'md5': must be one of"),
    (changed("layout", to=""), "layout: '': must be a non-empty string"),
    (changed("identity", to=[]), "identity: []: must be an object"),
    (changed("architecture", to=...), "architecture: missing"),
    (changed("parallelism", "tensor", to=0), "parallelism.tensor: 0"),
    (changed("parallelism", "tensor", to=3), "(rank, part) pairs"),
    (changed("parallelism", "tensor", to=1), "(rank, part) pairs"),
    (changed("parallelism", "tensor", to=10**12), "1000000000000 ranks need"),
    (changed("chunkBytes", to=5000), "chunkBytes: 5000: must be a multiple"),
    (changed("chunkBytes", to=2**40), "chunkBytes"),
    (changed("totalBytes", to=1), "totalBytes: 1: must be 1040"),
    (changed("parts", to=[]), "totalBytes: 1040: must be 0"),
    (changed(*PART, "part", to=0), "(rank, part) pairs"),
    (changed(*PART, "rank", to=-1), "parts[1].rank: -1"),
    (changed(*PART, "file", to="../x"), "parts[1].file: '../x': must be a plain file name"),
    (changed(*PART, "file", to="model-rank-0-part-0.safetensors"), "is named twice"),
    (changed(*PART, "file", to="manifest.json"), "is named twice"),
    (changed(*PART, "bytes", to=1), "parts[1].bytes: 1: must be 4356"),
    (changed(*PART, "dataOffset", to=100), "parts[1].dataOffset: 100"),
    (changed(*PART, "dataOffset", to=4097), "must be a multiple of 4096"),
    (changed(*PART, "dataBytes", to=0), "parts[1].dataBytes: 0"),
    (changed(*PART, "chunkDigests", to=[]), "parts[1].chunkDigests: 0 digests"),
    (changed(*PART, "chunkDigests", 0, to="F" * 16), "must be 16 lower-case"),
    (changed(*PART, "chunkDigests", 0, to="0" * 64), "must be 16 lower-case"),
    (changed(*TENSOR, "name", to="weight1"), "rank 0 holds tensor 'weight1' twice"),
    (changed(*TENSOR, "name", to="other"), "rank 1 has other tensors than rank 0"),
    (changed("parallelism", "expert", to=3), "parallelism.expert: 3: must be 1 or the tensor"),
    (changed(*TENSOR, "dtype", to="F31"), "parts[1].tensors[1].dtype: 'F31'"),
    (changed(*TENSOR, "shape", to=[2]), "parts[1].tensors[1].bytes: 4: must be 8"),
    (changed(*TENSOR, "shape", to=[1.0]), "parts[1].tensors[1].shape[0]: 1.0"),
    (changed(*TENSOR, "offset", to=252), "parts[1].tensors[1].offset: 252: must be 256"),
    (changed(*TENSOR, "shape", to=[2**63, 0]), "shape[0]: 9223372036854775808: must be a whole"),
    (changed(*TENSOR, "shape", to=[1] * 65), "tensors[1].shape: [1, 1, "),
    (changed(*TENSOR, "name", to="x" * 4097), "must be Unicode of at most 4096 characters"),
    (changed(*TENSOR, "name", to="\ud800"), "must be Unicode of at most 4096 characters"),
    (changed("files", 0, "digest", to="x"), "files[0].digest: 'x'"),
    (changed("files", 0, "file", to="/etc/passwd"), "files[0].file"),
]


@pytest.mark.parametrize(("document", "message"), BROKEN, ids=[message for _, message in BROKEN])
def test_broken_rules_are_named(document, message):
    with pytest.raises(ManifestInvalid) as caught:
        parse(document)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 500


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


def paths(value, prefix=()):
    yield prefix
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        if isinstance(item, dict | list):
            yield from paths(item, (*prefix, key))
        else:
            yield (*prefix, key)


@given(st.sampled_from(list(paths(DOCUMENT))[1:]), JUNK)
def test_junk_anywhere_is_refused_by_our_error_alone(path, junk):
    try:
        manifest = parse(changed(*path, to=junk))
    except ManifestInvalid:
        return
    assert Manifest.from_json(manifest.to_json()) == manifest


@given(st.binary(max_size=100))
def test_garbage_is_refused_by_our_error_alone(content):
    with pytest.raises(ManifestInvalid):
        Manifest.from_json(content)


def test_names_in_any_script_are_taken():
    document = changed(*TENSOR, "name", to="échelle")
    document["parts"][3]["tensors"][1]["name"] = "échelle"
    assert parse(document).parts[3].tensors[1].name == "échelle"


def test_another_encoding_than_utf_8_is_refused():
    with pytest.raises(ManifestInvalid, match="not a JSON document"):
        Manifest.from_json(json.dumps(DOCUMENT).encode("utf-16"))


def test_nesting_without_end_is_refused():
    with pytest.raises(ManifestInvalid):
        Manifest.from_json(b"[" * 100_000)


def test_reading_a_directory(tmp_path):
    (tmp_path / "manifest.json").write_bytes(MANIFEST.to_json())
    assert read_manifest(tmp_path) == MANIFEST
    (tmp_path / "manifest.json").write_bytes(b"{}")
    with pytest.raises(ManifestInvalid, match=r"manifest\.json: format: missing"):
        read_manifest(tmp_path)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        read_manifest(tmp_path / "absent")
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(ManifestInvalid, match="must be a regular file"):
        read_manifest(tmp_path)


def test_needs_the_standard_library_alone():
    """The engine side imports it in processes that must not pay for numpy."""
    script = "import sys, headrace_checkpoint.manifest; print('numpy' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert result.stdout == b"False\n"


def test_the_documented_example_is_valid():
    text = (REPOSITORY / "docs" / "checkpoint.md").read_text()
    example = re.search(r"```json\n(.*?)```", text, re.DOTALL)[1]
    assert Manifest.from_json(example.encode()).total_bytes == 516


def test_every_reason_is_documented():
    text = (REPOSITORY / "docs" / "checkpoint.md").read_text()
    reasons = {*InputError.__subclasses__(), *TransientError.__subclasses__(), InternalError}
    assert len(reasons) > 10
    assert [cls.__name__ for cls in reasons if f"`{cls.__name__}`" not in text] == []
