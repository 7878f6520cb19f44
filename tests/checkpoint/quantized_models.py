"""Turns tiny models into quantized ones, as the field's tools write them.

Every element of a weight or scale is random, so that no two tensors are the same: what is
compared is where bytes go, never what they mean.
"""

import json
from pathlib import Path

import numpy as np

from .conftest import read_tensors, write_tensors

_BLOCK, _GROUP = 128, 32


def _fp8(**fields):
    return {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"} | fields


def _compressed(form, weights, activations=None, **fields):
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
        "quantization_status": "compressed",
    } | fields


def _float8(strategy, **fields):
    return {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "strategy": strategy,
        "dynamic": False,
    } | fields


def _int4(strategy, **fields):
    return {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "dynamic": False,
        "strategy": strategy,
    } | fields


_TOKEN = _float8("token", dynamic=True)
_STATIC = _float8("tensor")

CONFIGS = {
    "fp8-block": _fp8(weight_block_size=[_BLOCK, _BLOCK]),
    "fp8-tensor": _fp8(),
    "fp8-tensor-static": _fp8(activation_scheme="static"),
    "ct-fp8-tensor": _compressed("float-quantized", _float8("tensor"), _TOKEN),
    "ct-fp8-tensor-static": _compressed("float-quantized", _float8("tensor"), _STATIC),
    "ct-fp8-channel": _compressed("float-quantized", _float8("channel"), _TOKEN),
    "ct-fp8-channel-static": _compressed("float-quantized", _float8("channel"), _STATIC),
    "ct-fp8-block": _compressed(
        "float-quantized",
        _float8("block", block_structure=[_BLOCK, _BLOCK]),
        _float8("group", dynamic=True, group_size=_BLOCK),
    ),
    "ct-int4-group": _compressed("pack-quantized", _int4("group", group_size=_GROUP)),
    "ct-int4-channel": _compressed("pack-quantized", _int4("channel")),
    "ct-int4-zero": _compressed(
        "pack-quantized", _int4("group", group_size=_GROUP, symmetric=False)
    ),
    "gptq": {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": _GROUP,
        "desc_act": False,
        "sym": True,
    },
    "gptq-channel": {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": -1,
        "desc_act": False,
        "sym": True,
    },
    "awq": {
        "quant_method": "awq",
        "bits": 4,
        "group_size": _GROUP,
        "zero_point": True,
        "version": "gemm",
    },
}
"""What config.json says, by the name of the format."""


def _random(generator, dtype, *shape):
    """A tensor of random elements; scales are small, positive, never NaN."""
    count = int(np.prod(shape))
    match dtype:
        case "F32":
            data = generator.uniform(1e-3, 1e-2, count).astype("<f4")
        case "BF16":
            data = (generator.uniform(1e-3, 1e-2, count).astype("<f4").view("<u4") >> 16).astype(
                "<u2"
            )
        case "F8_E4M3":
            data = generator.integers(0, 0x7F, count, dtype=np.uint8)
            data |= generator.integers(0, 2, count, dtype=np.uint8) << 7
        case _:
            data = generator.integers(-(2**31), 2**31, count, dtype=np.int32)
    return (dtype, shape, data.tobytes())


def _shape(*values):
    return ("I64", (len(values),), np.array(values, "<i8").tobytes())


def _tensors(name, form, rows, columns, generator):
    def random(dtype, *shape):
        return _random(generator, dtype, *shape)

    groups = columns // _GROUP
    if form.startswith(("gptq", "awq")):
        packed = form.startswith("gptq")
        groups = 1 if form == "gptq-channel" else groups
        qweight = (columns // 8, rows) if packed else (columns, rows // 8)
        found = {
            "qweight": random("I32", *qweight),
            "qzeros": random("I32", groups, rows // 8),
            "scales": random("BF16", groups, rows),
        }
        if packed:
            found["g_idx"] = (
                "I32",
                (columns,),
                (np.arange(columns) // _GROUP).astype("<i4").tobytes(),
            )
        return found
    if form.startswith("ct-int4"):
        groups = 1 if form == "ct-int4-channel" else groups
        found = {
            "weight_packed": random("I32", rows, columns // 8),
            "weight_scale": random("BF16", rows, groups),
            "weight_shape": _shape(rows, columns),
        }
        if form == "ct-int4-zero":
            found["weight_zero_point"] = random("I32", rows // 8, groups)
        return found
    found = {"weight": random("F8_E4M3", rows, columns)}
    if "block" in form:
        blocks = (-(-rows // _BLOCK), -(-columns // _BLOCK))
        suffix = "weight_scale" if form.startswith("ct") else "weight_scale_inv"
        found[suffix] = random("F32", *blocks)
    else:
        scale = (rows, 1) if "channel" in form else (1,) if form.startswith("ct") else ()
        found["weight_scale"] = random("F32", *scale)
        if form.endswith("static"):
            found["input_scale"] = random("F32", *((1,) if form.startswith("ct") else ()))
    return found


def quantize(source: Path, directory: Path, form: str, kept: tuple[str, ...] = ()) -> None:
    """Write the model at `source` in another format; modules in `kept` stay as they are."""
    generator = np.random.default_rng(0)
    directory.mkdir()
    tensors = {}
    for name, tensor in read_tensors(source / "model.safetensors").items():
        module = name.removesuffix(".weight")
        quantized = module.endswith(("_proj", "_with_mqa")) or "experts." in name
        if not quantized or name.endswith(".bias") or module in kept or "eh_proj" in name:
            tensors[name] = tensor
            continue
        for suffix, made in _tensors(name, form, *tensor[1], generator).items():
            tensors[f"{module}.{suffix}"] = made
    write_tensors(directory / "model.safetensors", tensors)
    config = json.loads((source / "config.json").read_text())
    quantization = dict(CONFIGS[form])
    for field in ("ignore", "modules_to_not_convert"):
        if kept and (field in quantization or (field != "ignore" and "ct" not in form)):
            quantization[field] = [*quantization.get(field, ()), *kept]
    config["quantization_config"] = quantization
    (directory / "config.json").write_text(json.dumps(config))
