"""Records what other packages write and decode: one safetensors file for each layout, for tests/test_huggingface.py.

    pip install torch transformers compressed-tensors bitsandbytes gptqmodel safetensors
    pip download --no-deps --no-binary :all: autoawq       # its packing_utils.py is run from the archive
    python tests/golden/make_huggingface.py path/to/awq/utils/packing_utils.py

Each file holds the tensors of a checkpoint, the weight that the package itself decodes from them (`expected`), and as
metadata the config that belongs beside them and the package with its version.
"""

import importlib.metadata
import importlib.util
import json
import pathlib
import sys

import bitsandbytes.functional as bnb
import torch
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module
from safetensors.torch import save_file

HERE = pathlib.Path(__file__).parent
OUT, IN = 32, 128
STEM = "model.layers.0.mlp.up_proj."


def weight(seed, dtype=torch.float32):
    return torch.randn(OUT, IN, generator=torch.Generator().manual_seed(seed)).to(dtype)


def record(name, package, tensors, expected, dtype, quantization):
    """Writes one golden file."""
    version = package if " " in package else f"{package} {importlib.metadata.version(package)}"
    config = {"torch_dtype": str(dtype).removeprefix("torch."), "quantization_config": quantization}
    named = {STEM + suffix: tensor.contiguous() for suffix, tensor in tensors.items()}
    named["model.norm.weight"] = torch.arange(IN, dtype=dtype)
    metadata = {"made_by": version, "config": json.dumps(config)}
    path = HERE / f"{name}.safetensors"
    save_file({**named, "expected": expected.contiguous()}, path, metadata)
    path.chmod(0o644)


def grid(w, group, bits, symmetric):
    """Scales `[out, groups]` in float16 and zero points for nearest rounding."""
    members = w.reshape(OUT, -1, group)
    low, high = members.amin(-1).clamp(max=0), members.amax(-1).clamp(min=0)
    if symmetric:
        scale = torch.maximum(-low, high) / (2 ** (bits - 1) - 1)
        return scale.half(), torch.full_like(scale, 2 ** (bits - 1))
    scale = ((high - low) / (2**bits - 1)).half()
    return scale, (-low / scale).round().clamp(0, 2**bits - 1)


def gptq(name, bits, group, symmetric, version, act_order=False):
    w = weight(1)
    w[:2] = w[:2].abs()  # zero points of 0, which version 1 borrows from their neighbours to subtract from
    scale, zero = grid(w, group, bits, symmetric)
    g_idx = torch.arange(IN) // group
    if act_order:
        g_idx = g_idx[torch.randperm(IN, generator=torch.Generator().manual_seed(2))]
        w = w.half().float()
    linear = torch.nn.Linear(IN, OUT, bias=False)
    linear.weight.data = w
    layer = TorchLinear(bits, group, symmetric, act_order, IN, OUT, False, register_buffers=True)
    layer.pack_original(linear, scale, zero, g_idx.to(torch.int32))
    layer.post_init()
    expected = layer.dequantize_weight().T
    if version == "gptq":
        convert_gptq_v2_to_v1_format_module(layer, type("Config", (), {"bits": bits, "pack_dtype": torch.int32}))
    tensors = {key: getattr(layer, key) for key in ("qweight", "qzeros", "scales", "g_idx")}
    group_size = -1 if group == IN else group
    config = {"quant_method": "gptq", "bits": bits, "group_size": group_size, "sym": symmetric, "desc_act": act_order}
    record(name, "gptqmodel", tensors, expected, torch.float16, {**config, "checkpoint_format": version})


def awq(path):
    spec = importlib.util.spec_from_file_location("packing_utils", path)
    packing = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(packing)
    group, bits = 32, 4
    generator = torch.Generator().manual_seed(3)
    words = torch.randint(-(2**31), 2**31, (IN, OUT // 8), generator=generator).to(torch.int32)
    zeros = torch.randint(-(2**31), 2**31, (IN // group, OUT // 8), generator=generator).to(torch.int32)
    scales = (torch.rand(IN // group, OUT, generator=generator) + 0.5).half()
    expected = packing.dequantize_gemm(words, zeros, scales, bits, group).T
    config = {"quant_method": "awq", "bits": bits, "group_size": group, "zero_point": True, "version": "gemm"}
    tensors = {"qweight": words, "qzeros": zeros, "scales": scales}
    record("awq", "autoawq 0.2.9", tensors, expected, torch.float16, config)


def four_bits(name, kind, dtype, nested, block=64):
    w = weight(4, dtype)
    packed, state = bnb.quantize_4bit(w, blocksize=block, quant_type=kind, compress_statistics=nested)
    tensors = {"weight": packed, **{f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}}
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
    if block <= IN:
        expected = bnb.dequantize_4bit(packed, state)
    else:  # the compiled kernel of 0.50.2 takes wrong ranges where a block has several rows; the one in torch does not
        expected = _dequantize_4bit_compute(packed.reshape(-1), state.absmax, state.code, block, w.shape, dtype)
    record(name, "bitsandbytes", tensors, expected, dtype, config)


def eight_bits():
    codes, scale, _ = bnb.int8_vectorwise_quant(weight(5, torch.float16))
    tensors = {"weight": codes, "SCB": scale, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    expected = bnb.int8_vectorwise_dequant(codes, scale)
    config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    record("bnb_int8", "bitsandbytes", tensors, expected, torch.float32, config)


def compressed(name, layout, weights, activations=None, dtype=torch.bfloat16):
    args = QuantizationArgs(**weights)
    scheme = QuantizationScheme(
        targets=["Linear"], weights=args, input_activations=activations and QuantizationArgs(**activations)
    )
    w = weight(6, dtype)
    group = args.group_size or IN
    if args.type == "float":
        scale, zero = (w.abs().amax(1, keepdim=True) / 448).to(dtype), None
    else:
        scale, zero = (part.to(dtype) for part in grid(w.float(), group, args.num_bits, args.symmetric))
        zero = (zero - 2 ** (args.num_bits - 1)).to(torch.int8)
    if args.strategy == "tensor":
        scale = scale.amax().reshape(1)
    state = {"weight": w, "weight_scale": scale, **({} if zero is None else {"weight_zero_point": zero})}
    compressor = BaseCompressor.get_value_from_registry(layout)
    tensors = compressor.compress(state, scheme)
    expected = compressor.decompress(tensors, scheme)["weight"]
    config = {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": json.loads(scheme.model_dump_json())},
        "ignore": ["lm_head"],
    }
    record(name, "compressed-tensors", tensors, expected, dtype, config)


if __name__ == "__main__":
    gptq("gptq_v1", 4, 32, True, "gptq")
    gptq("gptq_v1_affine_act_order", 4, 32, False, "gptq", act_order=True)
    gptq("gptq_v2_8bit", 8, IN, False, "gptq_v2")
    gptq("gptq_v2_2bit", 2, 32, False, "gptq_v2")
    awq(sys.argv[1])
    four_bits("bnb_nf4", "nf4", torch.float32, False)
    four_bits("bnb_nf4_double", "nf4", torch.bfloat16, True)
    four_bits("bnb_nf4_two_rows", "nf4", torch.float16, False, block=2 * IN)
    four_bits("bnb_fp4", "fp4", torch.float16, False)
    eight_bits()
    ints = {"type": "int", "symmetric": True}
    tokens = {"num_bits": 8, "strategy": "token", "dynamic": True}
    compressed("ct_w4a16", "pack-quantized", {**ints, "num_bits": 4, "strategy": "group", "group_size": 32})
    affine = {"type": "int", "symmetric": False, "num_bits": 4, "strategy": "group", "group_size": 32}
    compressed("ct_w4a16_affine", "pack-quantized", affine)
    compressed("ct_w8a16", "pack-quantized", {**ints, "num_bits": 8, "strategy": "channel"})
    compressed("ct_w8a8", "int-quantized", {**ints, "num_bits": 8, "strategy": "channel"}, tokens)
    fp8 = {"type": "float", "num_bits": 8, "symmetric": True, "strategy": "tensor"}
    compressed("ct_fp8", "float-quantized", fp8, {**tokens, "type": "float"})
