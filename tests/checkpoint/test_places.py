"""Sources that are no directories: a real S3 server, and a mocked Hugging Face Hub."""

import hashlib
import http.server
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time

import obstore
import pytest
from obstore.store import S3Store

from headrace_checkpoint import cli
from headrace_checkpoint.errors import SourceForbidden, SourceNotFound, StorageError
from headrace_checkpoint.places import find_place, s3
from headrace_checkpoint.sharder import ShardRequest, shard
from localkube import binaries

from .conftest import tiny_llama

BUCKET, ACCESS, SECRET = "models", "headrace-test", "not-a-secret-but-never-shown"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "headrace/tiny"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small Llama, and a folder and a file that are no part of it."""
    directory = tmp_path_factory.mktemp("model")
    tiny_llama.make_tiny_llama(directory, tiny_llama.Size(layers=1))
    (directory / "original").mkdir()
    (directory / "original/model.safetensors").write_bytes(b"no weights")
    return directory


def sharded(source, output, revision="main"):
    """Every file of the checkpoint that is made of a source, by name."""
    shard(
        ShardRequest(
            source=source, output=output, tensor_parallel_size=2, identity={}, revision=revision
        )
    )
    files = {path.name: path.read_bytes() for path in output.iterdir()}
    # All but what identifies the source, which a bucket does by other means than a directory.
    manifest = json.loads(files["manifest.json"])
    assert [file["file"] for file in manifest["source"]][-1] == "model.safetensors"
    return files | {"manifest.json": manifest | {"source": None, "selfDigest": None}}


@pytest.fixture(scope="module")
def expected(model, tmp_path_factory):
    return sharded(model, tmp_path_factory.mktemp("made") / "checkpoint")


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    """versitygw over a directory, with the model at models/llm/tiny; yields its address."""
    root = tmp_path_factory.mktemp("s3")
    (root / BUCKET).mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    program = binaries.ensure(["versitygw"])["versitygw"]
    command = [program, "--port", address, "--quiet", "posix", root]
    keys = {"ROOT_ACCESS_KEY": ACCESS, "ROOT_SECRET_KEY": SECRET}
    with subprocess.Popen(command, env=keys) as process:
        try:
            store = client(address)
            wait_for(store)
            for path in model.rglob("*"):
                if path.is_file():
                    key = f"llm/tiny/{path.relative_to(model)}"
                    obstore.put(store, key, path.read_bytes())
            yield address
        finally:
            process.terminate()


def client(address):
    return S3Store(
        BUCKET,
        endpoint=f"http://{address}",
        access_key_id=ACCESS,
        secret_access_key=SECRET,
        region="us-east-1",
        client_options={"allow_http": True},
    )


def wait_for(store):
    deadline = time.monotonic() + 30
    while True:
        try:
            return obstore.list_with_delimiter(store)
        except obstore.exceptions.BaseError:
            assert time.monotonic() < deadline, "the S3 server did not start"
            time.sleep(0.1)


@pytest.fixture
def credentials(server, monkeypatch):
    """The environment of a pod that may read the bucket."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{server}")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    return monkeypatch


@pytest.mark.parametrize("source", ["s3://models/llm/tiny", "s3://models/llm/tiny/"])
def test_a_bucket_makes_the_checkpoint_of_the_directory(
    credentials, expected, tmp_path, capfd, source
):
    assert sharded(source, tmp_path / "checkpoint") == expected
    assert SECRET not in "".join(capfd.readouterr())


def test_only_what_lies_directly_below_the_prefix_is_part_of_the_model(credentials, model):
    names = find_place("s3://models/llm/tiny", "main").names()
    assert names == sorted(path.name for path in model.iterdir() if path.is_file())


@pytest.mark.parametrize("source", ["s3://models/absent", "s3://absent-bucket/llm/tiny"])
def test_what_is_not_there_is_named(credentials, source):
    with pytest.raises(SourceNotFound, match=source):
        find_place(source, "main").names()


def test_wrong_credentials_are_told_without_them(credentials, capfd):
    credentials.setenv("AWS_SECRET_ACCESS_KEY", "wrong-and-never-shown")
    with pytest.raises(SourceForbidden, match=r"s3://models/llm/tiny: access denied") as raised:
        find_place("s3://models/llm/tiny", "main").names()
    assert "never-shown" not in str(raised.value) + "".join(capfd.readouterr())


def test_an_object_that_changes_is_noticed(credentials, server):
    store = client(server)
    obstore.put(store, "changing/config.json", b"{ }")
    file = find_place("s3://models/changing", "main").open("config.json")
    assert file.read_at(1, 1) == b" "
    file.check_unchanged()
    obstore.put(store, "changing/config.json", b"[ ]")
    for use in (file.check_unchanged, lambda: file.read_at(0, 3)):
        with pytest.raises(StorageError, match=r"changing/config.json: changed while"):
            use()


def test_a_server_that_does_not_answer_ends_in_an_error(credentials, monkeypatch):
    monkeypatch.setattr(s3, "_RETRIES", 1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match=r"^s3://models/llm/tiny: [^\n]+$"):
        find_place("s3://models/llm/tiny", "main").names()


class MockedHub(http.server.ThreadingHTTPServer):
    """The two requests of the Hub that a download makes, answered from a directory."""

    def __init__(self, directory):
        super().__init__(("127.0.0.1", 0), Answers)
        self.directory = directory
        self.status = 200
        self.refusals = []
        self.honours_ranges = True
        self.redirects = False
        self.breaks_off = 0
        self.encodings = set()
        self.ranges = []


class Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        hub = self.server
        if hub.refusals:
            status, headers = hub.refusals.pop()
            self.answer(status, b"no JSON", headers)
        elif hub.status != 200:
            self.send_error(hub.status)
        elif self.path.startswith(f"/api/models/{REPOSITORY}/revision/v1"):
            self.answer(200, json.dumps(self.description()).encode())
        elif self.path.startswith("/signed"):
            self.send_error(410)
        elif hub.redirects:
            self.send_response(302)
            self.send_header("Location", f"/signed/file?X-Amz-Signature={SECRET}")
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif match := re.fullmatch(f"/{REPOSITORY}/resolve/{COMMIT}/(.+)", self.path):
            self.file(hub.directory / match[1])
        else:
            kind = "RepoNotFound" if REPOSITORY not in self.path else "RevisionNotFound"
            self.send_response(404)
            self.send_header("X-Error-Code", kind)
            self.send_header("Content-Length", "0")
            self.end_headers()

    def description(self):
        files = [path for path in self.server.directory.rglob("*") if path.is_file()]
        siblings = [
            {
                "rfilename": str(path.relative_to(self.server.directory)),
                "size": path.stat().st_size,
                "blobId": hashlib.sha256(path.read_bytes()).hexdigest(),
            }
            for path in files
        ]
        return {"id": REPOSITORY, "sha": COMMIT, "siblings": siblings}

    def file(self, path):
        begin, end = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups())
        self.server.ranges.append((path.name, begin, end))
        self.server.encodings.add(self.headers["Accept-Encoding"])
        content = path.read_bytes()
        if self.server.honours_ranges:
            self.answer(206, content[begin : end + 1])
        else:
            self.answer(200, content)

    def answer(self, code, content, headers=()):
        self.send_response(code)
        for header in headers:
            self.send_header(*header)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.server.breaks_off:
            self.server.breaks_off -= 1
            content = content[: len(content) // 2]
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def mocked_hub(model, monkeypatch):
    with MockedHub(model) as hub:
        thread = threading.Thread(target=hub.serve_forever, args=(0.05,))
        thread.start()
        address = f"http://127.0.0.1:{hub.server_port}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield hub
        hub.shutdown()
        thread.join()


def test_a_mocked_hub_makes_the_checkpoint_of_the_directory(mocked_hub, expected, tmp_path):
    assert sharded(f"hf://{REPOSITORY}", tmp_path / "checkpoint", "v1") == expected
    assert {name for name, _, _ in mocked_hub.ranges} > {"config.json", "model.safetensors"}
    assert mocked_hub.encodings == {"identity"}


@pytest.mark.parametrize(
    ("source", "revision", "error", "word"),
    [
        ("hf://headrace/absent", "v1", SourceForbidden, "headrace/absent@v1: no such repository"),
        (f"hf://{REPOSITORY}", "v2", SourceNotFound, "tiny@v2.*correct source or revision"),
    ],
)
def test_what_a_mocked_hub_does_not_have_is_named(mocked_hub, source, revision, error, word):
    with pytest.raises(error, match=word):
        find_place(source, revision)


@pytest.mark.parametrize(("status", "error"), [(403, SourceForbidden), (400, StorageError)])
def test_refusals_of_a_mocked_hub_are_told(mocked_hub, status, error):
    file = find_place(f"hf://{REPOSITORY}", "v1").open("config.json")
    mocked_hub.status = status
    with pytest.raises(error, match=r"headrace/tiny@v1/config.json: "):
        file.read_at(0, 2)


def test_the_signature_of_an_address_of_a_mocked_hub_is_not_told(mocked_hub, capfd):
    file = find_place(f"hf://{REPOSITORY}", "v1").open("config.json")
    mocked_hub.redirects = True
    with pytest.raises(StorageError, match=r"config.json: .*/signed/file\?\.\.\.") as raised:
        file.read_at(0, 2)
    assert SECRET not in str(raised.value) + "".join(capfd.readouterr())


def test_a_mocked_hub_that_ignores_ranges_is_noticed(mocked_hub):
    file = find_place(f"hf://{REPOSITORY}", "v1").open("config.json")
    mocked_hub.honours_ranges = False
    with pytest.raises(StorageError, match=r"config.json: the server ignores ranges"):
        file.read_at(1, 2)
    assert file.read_at(0, file.size).startswith(b"{")


def test_answers_of_a_mocked_hub_that_break_off_are_asked_for_again(mocked_hub, model):
    content = (model / "config.json").read_bytes()
    file = find_place(f"hf://{REPOSITORY}", "v1").open("config.json")
    mocked_hub.breaks_off = 2
    assert file.read_at(1, 50) == content[1:51]
    mocked_hub.breaks_off = 100
    with pytest.raises(StorageError, match=r"config.json: 5 answers broke off"):
        file.read_at(1, 50)


AT_ONCE = [("Retry-After", "0")]


def test_a_mocked_hub_that_is_busy_is_asked_again_when_it_says(mocked_hub, model):
    file = find_place(f"hf://{REPOSITORY}", "v1").open("config.json")
    limited = [("RateLimit", '"resolvers";r=0;t=0'), ("Retry-After", "999")]
    mocked_hub.refusals = [(503, AT_ONCE), (429, limited), (500, AT_ONCE), (429, AT_ONCE)]
    assert file.read_at(0, 50) == (model / "config.json").read_bytes()[:50]
    mocked_hub.refusals = [(503, AT_ONCE)] * 9
    with pytest.raises(StorageError, match=r"config.json: .*503"):
        file.read_at(0, 50)
    assert len(mocked_hub.refusals) == 4


@pytest.mark.parametrize(
    ("header", "told"),
    [
        (("Retry-After", "86400"), "86400"),
        (("Retry-After", "9" * 5000), "inf"),
        (("RateLimit", '"resolvers";r=0;t=301'), "301"),
    ],
)
@pytest.mark.timeout(20)
def test_a_mocked_hub_is_not_waited_for_for_ever(mocked_hub, header, told):
    file = find_place(f"hf://{REPOSITORY}", "v1").open("config.json")
    mocked_hub.refusals = [(429, [header])]
    with pytest.raises(StorageError, match=rf"asks to wait for {told} s, at most 300 .*HF_TOKEN"):
        file.read_at(0, 50)


def test_nonsense_of_a_mocked_hub_is_told(mocked_hub):
    mocked_hub.refusals = [(200, ())]
    with pytest.raises(StorageError, match=r"tiny@v1: Expecting value"):
        find_place(f"hf://{REPOSITORY}", "v1")


def test_another_scheme_is_refused():
    with pytest.raises(SourceNotFound, match="gs is no known scheme; give s3://"):
        find_place("gs://bucket/model", "main")


@pytest.mark.parametrize("command", ["shard", "verify"])
def test_without_the_extra_packages_it_says_what_to_install(
    command, model, tmp_path, monkeypatch, capsys
):
    monkeypatch.delitem(sys.modules, "headrace_checkpoint.places.hub", raising=False)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    output, source = str(tmp_path / "checkpoint"), f"hf://{REPOSITORY}"
    if command == "verify":
        assert cli.main(["shard", "--source", str(model), "--output", output]) == 0
        arguments = ["verify", output, "--source", source]
    else:
        arguments = ["shard", "--source", source, "--output", output]
    assert cli.main(arguments) == os.EX_UNAVAILABLE
    said = capsys.readouterr().out
    assert "install headrace-loader[loader,sources]" in said
    assert "Traceback" not in said
