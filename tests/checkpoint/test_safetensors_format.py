"""Header parsing and writing, against the safetensors library and against garbage."""

import json
import math

import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace_checkpoint.dtypes import ITEM_BYTES
from headrace_checkpoint.errors import SourceCorrupt
from headrace_checkpoint.manifest import TensorEntry
from headrace_checkpoint.safetensors_format import MAX_HEADER_BYTES, build_header, read_header

NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@st.composite
def tensor_lists(draw):
    entries, offset = [], 0
    names = NAMES.filter(lambda name: name != "__metadata__")
    for name in draw(st.lists(names, max_size=6, unique=True)):
        dtype, shape = draw(st.sampled_from(sorted(ITEM_BYTES))), draw(SHAPES)
        entries.append(
            TensorEntry(name, dtype, shape, offset, ITEM_BYTES[dtype] * math.prod(shape))
        )
        offset += entries[-1].nbytes
    return entries


def file_of(entries, alignment=8, **options):
    header = build_header(entries, alignment=alignment, **options)
    data = bytes(index % 251 for index in range(sum(entry.nbytes for entry in entries)))
    return header + data


def read(content):
    return read_header(lambda offset, length: content[offset : offset + length], len(content))


def file_with_header(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def as_the_library_reads(content):
    return {
        name: (info["dtype"], tuple(info["shape"]), bytes(info["data"]))
        for name, info in safetensors.deserialize(content)
    }


def as_we_read(content):
    header = read(content)
    return {
        t.name: (t.dtype, t.shape, content[header.data_offset + t.offset :][: t.nbytes])
        for t in header.tensors
    }


@given(tensor_lists(), st.sampled_from([8, 64, 4096]), st.dictionaries(NAMES, NAMES, max_size=2))
def test_what_is_written_is_read_back(entries, alignment, metadata):
    content = file_of(entries, alignment, metadata=metadata)
    header = read(content)
    assert header.data_offset % alignment == 0
    assert header.metadata == metadata
    # Empty tensors share their offset with a neighbour: their order is not kept.
    assert sorted(header.tensors, key=str) == sorted(entries, key=str)
    assert [t.offset for t in header.tensors] == sorted(t.offset for t in entries)


@given(tensor_lists())
def test_the_library_reads_what_we_write(entries):
    content = file_of(entries, 4096)
    assert as_the_library_reads(content) == as_we_read(content)


@settings(max_examples=300)
@given(tensor_lists(), st.data())
def test_what_we_accept_the_library_accepts_and_reads_alike(entries, data):
    content = bytearray(file_of(entries))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = bytes(content[: data.draw(st.sampled_from([None, -1, len(content) // 2]))])
    try:
        ours = as_we_read(content)
    except SourceCorrupt:
        return
    assert as_the_library_reads(content) == ours


@given(st.binary(max_size=200))
def test_garbage_is_refused_by_our_error_alone(content):
    with pytest.raises(SourceCorrupt):
        read(content)


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@given(
    st.dictionaries(
        st.sampled_from(["a", "b", "__metadata__"]),
        JUNK
        | st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "BF16", "F4", "x"]) | JUNK,
                "shape": st.lists(st.integers(-1, 3), max_size=2) | JUNK,
                "data_offsets": st.lists(st.integers(-1, 20), min_size=2, max_size=2) | JUNK,
            }
        ),
    ),
    st.binary(max_size=24),
)
def test_well_formed_json_that_lies_never_escapes_as_another_error(header, data):
    content = file_with_header(header, data)
    try:
        ours = as_we_read(content)
    except SourceCorrupt:
        return
    assert as_the_library_reads(content) == ours


def tensor(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


LIES = {
    "short file": (b"1234567", "too short"),
    "length beyond the file": ((100).to_bytes(8, "little") + b"{}", "exceeds"),
    "length beyond any header": (
        (MAX_HEADER_BYTES + 1).to_bytes(8, "little"),
        "must be at most",
    ),
    "no JSON": (file_with_header(b"{'a'}"), "no JSON object"),
    "not UTF-8": (file_with_header(b'{"\xff": 1}'), "no JSON object"),
    "no object": (file_with_header(b"[]"), "must be a JSON object"),
    "nested too deeply": (file_with_header(b'{"a":' * 100_000), "no JSON object"),
    "NaN": (file_with_header(b'{"a": NaN}'), "no JSON object"),
    "number with endless digits": (file_with_header(b'{"a": ' + b"9" * 5000 + b"}"), "no JSON"),
    "lone surrogate": (file_with_header(b'{"\\ud800": {}}'), "not valid Unicode"),
    "name twice": (file_with_header(b'{"a": {}, "a": {}}'), "'a' appears twice"),
    "metadata of numbers": (file_with_header({"__metadata__": {"a": 1}}), "__metadata__"),
    "tensor is no object": (file_with_header({"a": 1}), "tensor 'a'"),
    "unknown dtype": (file_with_header({"a": tensor("F31")}, bytes(8)), "dtype 'F31'"),
    "negative size": (file_with_header({"a": tensor(shape=(-2,))}, bytes(8)), "shape [-2]"),
    "size is true": (file_with_header({"a": tensor(shape=(True, 2))}, bytes(8)), "shape"),
    "negative offset": (file_with_header({"a": tensor(offsets=(-8, 0))}, bytes(8)), "[-8, 0]"),
    "end before begin": (file_with_header({"a": tensor(offsets=(8, 0))}, bytes(8)), "[8, 0]"),
    "three offsets": (file_with_header({"a": tensor(offsets=(0, 4, 8))}, bytes(8)), "[0, 4, 8]"),
    "shape and bytes disagree": (file_with_header({"a": tensor(shape=(3,))}, bytes(8)), "needs 12"),
    "overflowing shape": (
        file_with_header({"a": tensor(shape=(2**62, 2**62))}, bytes(8)),
        "span 8 bytes",
    ),
    "axes without end": (
        file_with_header({"a": tensor(shape=(2**62,) * 20_000)}, bytes(8)),
        "must be a list of at most 64",
    ),
    "overlap": (
        file_with_header({"a": tensor(), "b": tensor(offsets=(4, 12))}, bytes(12)),
        "tensor 'b': data_offsets start at 4, overlap",
    ),
    "hole": (
        file_with_header({"a": tensor(), "b": tensor(offsets=(12, 20))}, bytes(20)),
        "tensor 'b': data_offsets start at 12, leave a hole",
    ),
    "data missing": (file_with_header({"a": tensor()}, bytes(7)), "has 7 bytes"),
    "data appended": (file_with_header({"a": tensor()}, bytes(9)), "has 9 bytes"),
}


@pytest.mark.parametrize(("content", "message"), LIES.values(), ids=LIES.keys())
def test_lies_are_named(content, message):
    with pytest.raises(SourceCorrupt) as caught:
        read(content)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 500


def test_the_library_refuses_the_same_lies():
    stricter = {"name twice"}
    for name, (content, _) in LIES.items():
        if name not in stricter:
            with pytest.raises(safetensors.SafetensorError):
                safetensors.deserialize(content)


def test_zero_length_header_file_is_valid():
    assert read(file_with_header({})).tensors == ()
