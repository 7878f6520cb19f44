"""Messages: what is encoded decodes to the same, everything else is refused by name."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace_handover import messages
from headrace_handover.errors import ProtocolViolation
from headrace_handover.messages import (
    MAX_REGIONS,
    Failure,
    Loading,
    Ready,
    Region,
    Request,
    Tensor,
    decode_reply,
    grouped,
)

naturals = st.integers(0, 2**40)
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)
requests = st.builds(Request, rank=st.integers(0, 2**16 - 1), device=texts)


@st.composite
def regions(draw: st.DrawFn, part: int) -> Region:
    sizes = draw(st.lists(naturals, min_size=1, max_size=4))
    offset, tensors = 0, []
    for index, size in enumerate(sizes):
        shape = tuple(draw(st.lists(naturals, max_size=4)))
        tensors.append(Tensor(f"p{part}t{index}", draw(texts)[:32], shape, offset, size))
        offset += size
    data_bytes = max(offset, 1)
    return Region(part, data_bytes + draw(naturals), data_bytes, grouped(tensors))


@st.composite
def readies(draw: st.DrawFn) -> Ready:
    count = draw(st.integers(1, 4))
    parts = tuple(draw(regions(part)) for part in range(count))
    return Ready(draw(st.integers(0, 100)), draw(texts), parts)


replies = st.one_of(
    readies(),
    st.builds(Loading, naturals, naturals, st.text(st.characters(exclude_categories=["Cs"]))),
    st.builds(Failure, texts, texts),
)


@given(requests)
def test_a_request_survives_the_wire(request: Request) -> None:
    line = request.encode()
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert Request.decode(line[:-1]) == request


@given(replies)
def test_a_reply_survives_the_wire(reply: Ready | Loading | Failure) -> None:
    line = reply.encode()
    assert line.count(b"\n") == 1
    assert decode_reply(line[:-1]) == reply


@given(st.binary(max_size=200))
def test_garbage_is_refused(garbage: bytes) -> None:
    for decode in (Request.decode, decode_reply):
        with pytest.raises(ProtocolViolation):
            decode(garbage)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


def paths(value: object, path: tuple[object, ...] = ()) -> list[tuple[object, ...]]:
    found = [path]
    if isinstance(value, dict):
        for key, inner in value.items():
            found += paths(inner, (*path, key))
    if isinstance(value, list):
        for index, inner in enumerate(value):
            found += paths(inner, (*path, index))
    return found


def decoded(line: bytes) -> object:
    """The reply, or why it is refused."""
    try:
        return decode_reply(line)
    except ProtocolViolation as error:
        return str(error)


def with_one_changed(data: st.DataObject, ready: Ready, value: object) -> dict[str, object]:
    document = dict(json.loads(ready.encode()))
    *parents, last = data.draw(st.sampled_from(paths(document)[1:]))
    target = document
    for step in parents:
        target = target[step]
    target[last] = value
    return document


@pytest.mark.parametrize("shape", ["", {}, "12", None])
def test_a_shape_is_a_list(shape: object) -> None:
    ready = Ready(0, "c", (Region(0, 8, 8, grouped([Tensor("a", "U8", (), 0, 1)])),))
    document = json.loads(ready.encode())
    document["parts"][0]["tensors"][0]["shape"] = shape
    with pytest.raises(
        ProtocolViolation, match=r"parts\[0\].tensors\[0\].shape: .* must be a list"
    ):
        decode_reply(json.dumps(document).encode())


@given(st.data(), readies(), json_values)
def test_columns_accept_what_single_values_do(
    data: st.DataObject, ready: Ready, value: object
) -> None:
    line = json.dumps(with_one_changed(data, ready, value)).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(messages, "_are_valid", lambda *_: False)
        expected = decoded(line)
    assert decoded(line) == expected


@given(st.data(), readies(), json_values)
def test_a_changed_field_is_refused_or_keeps_every_rule(
    data: st.DataObject, ready: Ready, value: object
) -> None:
    document = with_one_changed(data, ready, value)
    try:
        reply = decode_reply(json.dumps(document).encode())
    except ProtocolViolation:
        return
    if isinstance(reply, Ready):
        assert 1 <= len(reply.regions) <= MAX_REGIONS
        for region in reply.regions:
            assert 1 <= region.data_bytes <= region.nbytes
            assert all(
                0 <= tensor.offset <= tensor.offset + tensor.nbytes <= region.data_bytes
                for tensor in region.tensors
            )


GROUP = {"dtype": "F32", "shape": [2], "bytes": 8, "names": ["a"], "offsets": [0]}
PART = {"part": 0, "dataBytes": 8, "tensors": [GROUP]}
READY = {
    "status": "ready",
    "rank": 0,
    "checkpoint": "c",
    "parts": [PART],
    "regions": [{"part": 0, "bytes": 4096}],
    "leaseFd": True,
}


def with_group(**fields: object) -> dict[str, object]:
    return READY | {"parts": [PART | {"tensors": [GROUP | fields]}]}


def test_what_is_changed_below_is_right() -> None:
    reply = decode_reply(json.dumps(READY).encode())
    assert isinstance(reply, Ready)
    assert [*reply.regions[0].tensors] == [Tensor("a", "F32", (2,), 0, 8)]


@pytest.mark.parametrize(
    ("document", "named"),
    [
        (READY | {"leaseFd": 1}, "leaseFd"),
        (READY | {"parts": []}, "parts"),
        (READY | {"regions": [{"part": 1, "bytes": 4096}]}, r"parts\[0\].part"),
        (READY | {"regions": [{"part": 0, "bytes": 7}]}, r"parts\[0\].dataBytes"),
        (with_group(offsets=[1]), r"parts\[0\].tensors\[0\].offsets\[0\]: 1: .* from 0 to 0"),
        (with_group(offsets=[-1]), r"parts\[0\].tensors\[0\].offsets\[0\]: -1"),
        (with_group(offsets=[False]), r"parts\[0\].tensors\[0\].offsets\[0\]: False"),
        (with_group(offsets=[0, 0]), r"parts\[0\].tensors\[0\]: 1 names, 2 offsets"),
        (with_group(offsets={}), r"parts\[0\].tensors\[0\].offsets: {}: must be a list"),
        (with_group(names=["\ud800"]), r"parts\[0\].tensors\[0\].names\[0\]"),
        (with_group(names=[""]), r"parts\[0\].tensors\[0\].names\[0\]"),
        (with_group(names=["a" * 4097]), r"parts\[0\].tensors\[0\].names\[0\]"),
        (with_group(names=["a", "a"], offsets=[0, 0]), "tensor 'a' appears twice"),
        (with_group(bytes=9), r"parts\[0\].tensors\[0\].bytes"),
        (with_group(shape=[2.0]), r"parts\[0\].tensors\[0\].shape\[0\]"),
        (with_group(shape=[True]), r"shape\[0\]"),
        (READY | {"parts": READY["parts"] * 2, "regions": READY["regions"] * 2}, "twice"),
        (
            READY
            | {
                "parts": [PART | {"part": part} for part in range(2)],
                "regions": [{"part": part, "bytes": 8} for part in range(2)],
            },
            "tensor 'a'",
        ),
        ({"status": "ready"}, "leaseFd: missing"),
        ({"status": "fine"}, "status"),
        ([], "message"),
    ],
)
def test_a_wrong_ready_names_its_field(document: object, named: str) -> None:
    with pytest.raises(ProtocolViolation, match=named):
        decode_reply(json.dumps(document).encode())


@pytest.mark.parametrize(
    ("line", "named"),
    [
        (b'{"version":2,"rank":0,"device":"host"}', "version: 2"),
        (b'{"version":1,"rank":-1,"device":"host"}', "rank"),
        (b'{"version":1,"rank":0,"device":""}', "device"),
        (b'{"version":1,"rank":0}', "device: missing"),
        (b"[" * 4000, "JSON"),
        (b"1" * 5000, "JSON"),
    ],
)
def test_a_wrong_request_names_its_field(line: bytes, named: str) -> None:
    with pytest.raises(ProtocolViolation, match=named):
        Request.decode(line)


def test_more_regions_than_descriptors_are_not_encoded() -> None:
    regions = tuple(Region(part, 1, 1, ()) for part in range(MAX_REGIONS + 1))
    with pytest.raises(ValueError, match="253 regions"):
        Ready(0, "c", regions).encode()
