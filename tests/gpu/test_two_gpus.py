"""Two ranks, each on a GPU of its own: one loader, one engine over both."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from headrace_engine import attach

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

MIB = 1 << 20
RANKS = 2
TWO_RANKS = ("--backend", "cuda", f"--tensor-parallel-size={RANKS}")
PARTS = ((("a", "U8", (40 * MIB + 3,)), ("b", "BF16", (1024, 512))), (("c", "F32", (MIB,)),))
TENSOR_PARALLEL = {
    "enforce_eager": True,
    "tensor_parallel_size": RANKS,
    "disable_custom_all_reduce": True,
}


def raw(tensor: Any) -> bytes:
    return bytes(tensor.contiguous().view(-1).view(torch.uint8).cpu().numpy())


def test_each_rank_is_on_its_own_gpu(
    support: Any, start_loader: Callable[..., Any], tmp_path: Path
) -> None:
    manifest = support.make_checkpoint(
        tmp_path / "c", ranks=RANKS, parts=PARTS, chunk_bytes=MIB, algorithm="multilinear64"
    )
    loader = start_loader(tmp_path / "c", *TWO_RANKS)
    ranks = loader.until_phase("Ready")["ranks"]
    uuids = [str(torch.cuda.get_device_properties(rank).uuid) for rank in range(RANKS)]
    assert [rank["device"] for rank in ranks] == [f"GPU-{uuid}" for uuid in uuids]
    for rank in range(RANKS):
        weights = attach(loader.socket, rank=rank, device=f"cuda:{rank}")
        for region, part in zip(
            weights.attachment.ready.regions, manifest.rank_parts(rank), strict=True
        ):
            data = support.part_data(tmp_path / "c", part)
            for entry in region.tensors:
                tensor = weights[entry.name]
                assert tensor.device.index == rank
                assert raw(tensor) == data[entry.offset : entry.offset + entry.nbytes]
        weights.attachment.close()


def test_the_gpu_of_another_rank_is_refused(
    support: Any, start_loader: Callable[..., Any], tmp_path: Path
) -> None:
    support.make_checkpoint(tmp_path / "c", ranks=RANKS, algorithm="multilinear64")
    loader = start_loader(tmp_path / "c", *TWO_RANKS)
    loader.until_phase("Ready")
    with pytest.raises(Exception, match="GPU-"):
        attach(loader.socket, rank=0, device="cuda:1")


@pytest.mark.skipif(not importlib.util.find_spec("vllm"), reason="needs vLLM")
def test_vllm_over_two_gpus_serves_the_same_tokens(
    make_model: Callable[..., Path],
    make_checkpoint: Callable[..., Path],
    ask_plain: Callable[..., Any],
    hold: Callable[..., Any],
    start_engine: Callable[..., Any],
) -> None:
    model = make_model(layers=4, hidden_size=2048, intermediate_size=5632, heads=16, kv_heads=4)
    options = {"SERVE_OPTIONS": json.dumps(TENSOR_PARALLEL)}
    _, tokens = ask_plain("serve.py", model, "auto", 0.2, **options)
    checkpoint = make_checkpoint(model, ranks=RANKS)
    _, environment = hold(checkpoint, f"--tensor-parallel-size={RANKS}")
    options |= environment
    for _ in range(2):  # the second attaches after the first was killed
        engine = start_engine("serve.py", checkpoint, "headrace", 0.2, **options)
        engine.ready()
        assert engine.ask() == tokens
        assert engine.output().count("headrace: zero-copy: bytes=") == RANKS
        engine.kill()


def test_no_rank_leaves_anything_on_another_gpu(
    support: Any, start_loader: Callable[..., Any], tmp_path: Path
) -> None:
    parts = ((("a", "U8", (512 * MIB,)),),)
    support.make_checkpoint(
        tmp_path / "c", parts=parts, chunk_bytes=4 * MIB, algorithm="multilinear64"
    )
    free = [torch.cuda.mem_get_info(device)[0] for device in range(RANKS)]
    loader = start_loader(tmp_path / "c", "--backend", "cuda")
    loader.until_phase("Ready")
    taken = [free[device] - torch.cuda.mem_get_info(device)[0] for device in range(RANKS)]
    assert taken[0] >= 512 * MIB
    assert taken[1] < 16 * MIB
    loader.terminate()
