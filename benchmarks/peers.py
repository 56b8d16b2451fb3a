"""Other libraries' matmuls and models, only to compare with; `pip install -r benchmarks/requirements.txt` brings them.

Every one is optional: `present` says which are absent, and why. A contender's name is that of ours that does the same
arithmetic, with the library in brackets.
"""

import functools
import itertools
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import measure
import numpy as np
from chains import Contender
from rich.console import Console

ROWS_BY_COLUMNS = (((1,), (0,)), ((), ()))
GROUP = 64


def present(makers: Mapping[str, Callable[..., dict[str, Any]]], console: Console, *args: Any) -> dict[str, Any]:
    """The contenders of every library that can be imported; the others are named, with the reason."""
    found = {}
    for name, make in makers.items():
        try:
            found |= make(*args)
        except (ImportError, AttributeError, OSError) as error:
            console.print(f"Without {name}: {error}", style="yellow")
    return found


def qwix_matmuls() -> dict[str, Contender]:
    """Qwix's `dot_general` on weights quantized beforehand."""
    import qwix

    def multiply(x: jax.Array, q: Any, in_codes: bool) -> jax.Array:
        x = qwix.quantize(x, jnp.int8, channelwise_axes=[0]) if in_codes else x
        return qwix.dot_general(x, q, ROWS_BY_COLUMNS)

    def contender(dtype: Any, group: int | None, in_codes: bool) -> Contender:
        tiled = {0: group} if group else {}
        store = functools.partial(qwix.quantize, qtype=dtype, channelwise_axes=[1], tiled_axes=tiled)
        return Contender(store, functools.partial(multiply, in_codes=in_codes))

    return {
        "W8A8 (Qwix)": contender(jnp.int8, None, True),
        "W8 (Qwix)": contender(jnp.int8, None, False),
        "W4 (Qwix)": contender(jnp.int4, None, False),
        "W4 g64 (Qwix)": contender(jnp.int4, GROUP, False),
    }


def aqt_matmuls() -> dict[str, Contender]:
    """AQT's Flax layer with its weight frozen, as it serves."""
    from aqt.jax.v2 import config
    from aqt.jax.v2.flax.aqt_flax import AqtDotGeneral, FreezerMode
    from aqt.jax.v2.utils import QuantMode

    def dense(outputs: int, bits: tuple[int | None, int], mode: Any) -> nn.Module:
        frozen = {"rhs_quant_mode": mode, "rhs_freeze_mode": FreezerMode.CALIBRATION_AND_VALUE}
        injected = functools.partial(AqtDotGeneral, config.dot_general_make(*bits), **frozen)
        return nn.Dense(outputs, use_bias=False, dot_general_cls=injected)

    def multiply(x: jax.Array, variables: Any, bits: tuple[int | None, int]) -> jax.Array:
        # The float kernel only has to be there: jit drops what nothing reads.
        outputs = variables["params"]["kernel"].shape[1]
        return dense(outputs, bits, QuantMode.SERVE).apply(variables, x, rngs={"params": jax.random.key(0)})

    def contender(*bits: int | None) -> Contender:
        def store(w: jax.Array) -> Any:
            variables, key = {"params": {"kernel": w}}, {"params": jax.random.key(0)}
            convert = dense(w.shape[1], bits, QuantMode.CONVERT)
            return convert.apply(variables, jnp.ones((1, w.shape[0])), mutable=True, rngs=key)[1]

        return Contender(store, functools.partial(multiply, bits=bits))

    return {"W8A8 (AQT)": contender(8, 8), "W8 (AQT)": contender(None, 8)}


def torch_matmuls() -> dict[str, Contender]:
    """The CPU kernels of PyTorch that torchao calls, without the time that its tensor classes take outside a compiler.

    They want bfloat16 activations: in float32 the weight-only ones are many times slower.
    """
    import torch

    torch.set_num_threads(measure.threads())
    torch.set_grad_enabled(False)

    def tensor(array: jax.Array) -> Any:
        return torch.from_numpy(np.array(array))

    def contender(store: Callable[[Any], Any], multiply: Callable[[Any, Any], Any], dtype: Any) -> Contender:
        return Contender(
            lambda w: store(tensor(w.T).contiguous()), multiply, lambda x: tensor(x).to(dtype), lambda program: program
        )

    def linear(dtype: Any) -> Contender:
        return contender(lambda kernel: kernel.to(dtype), torch.nn.functional.linear, dtype)

    def codes_of(kernel: Any, limit: int) -> tuple[Any, Any]:
        scale = kernel.abs().amax(-1, keepdim=True) / limit
        return (kernel / scale).round().to(torch.int8), scale

    def by_codes(x: Any, kept: tuple[Any, Any]) -> Any:
        (kernel, scale), (codes, tokens) = kept, codes_of(x, 127)
        return torch._int_mm(codes, kernel.T).float() * tokens * scale.T

    def dynamic(kernel: Any) -> Any:
        module = torch.nn.Sequential(torch.nn.Linear(*kernel.T.shape, bias=False))
        module[0].weight.copy_(kernel)
        config = torch.ao.quantization.per_channel_dynamic_qconfig
        with warnings.catch_warnings(action="ignore"):  # that its quantized dtypes will be gone in some later release
            return torch.ao.quantization.quantize_dynamic(module, {"0": config})

    def int8_only(kernel: Any) -> tuple[Any, Any]:
        codes, scale = codes_of(kernel, 127)
        return codes, scale[:, 0].bfloat16()

    def int4_only(kernel: Any) -> tuple[Any, Any]:
        codes, scale = codes_of(kernel.reshape(len(kernel), -1, GROUP), 7)
        packed = torch._convert_weight_to_int4pack_for_cpu(codes.reshape(kernel.shape).int() + 8, 1)
        return packed, torch.stack([scale[..., 0].T, torch.zeros_like(scale[..., 0].T)], -1).bfloat16().contiguous()

    def by_int4(x: Any, kept: tuple[Any, Any]) -> Any:
        return torch._weight_int4pack_mm_for_cpu(x, kept[0], GROUP, kept[1])

    return {
        "float32 (torch)": linear(torch.float32),
        "bf16 (torch)": linear(torch.bfloat16),
        "W8A8 (torch)": contender(lambda kernel: codes_of(kernel, 127), by_codes, torch.float32),
        "W8A8 (torch, dynamic)": contender(dynamic, lambda x, module: module(x), torch.float32),
        "W8 (torch)": contender(int8_only, lambda x, kept: torch._weight_int8pack_mm(x, *kept), torch.bfloat16),
        "W4 g64 (torch)": contender(int4_only, by_int4, torch.bfloat16),
    }


MATMULS = {"Qwix": qwix_matmuls, "AQT": aqt_matmuls, "torch": torch_matmuls}


def qwix_models(
    model: nn.Module, params: Any, x: jax.Array, group: int, modules: str = ".*"
) -> dict[str, tuple[Callable[..., Any], Any]]:
    """A Flax model as Qwix quantizes it: functions to compile, and their parameters in codes.

    Args:
      model, params, x: the model, its parameters and an argument.
      group: how many 4-bit weights share a scale.
      modules: the paths of those it quantizes, as a regular expression.
    """
    import qwix

    def contender(**rule: Any) -> tuple[Callable[..., Any], Any]:
        rules = [qwix.QuantizationRule(module_path=modules, **rule)]
        quantized = qwix.quantize_model(model, qwix.PtqProvider(rules))
        shapes = jax.eval_shape(quantized.init, jax.random.key(0), x)
        return quantized.apply, {"params": qwix.quantize_params(params["params"], shapes["params"])}

    return {
        "W8A8 (Qwix)": contender(weight_qtype=jnp.int8, act_qtype=jnp.int8),
        "W8 (Qwix)": contender(weight_qtype=jnp.int8),
        f"W4 g{group} (Qwix)": contender(weight_qtype=jnp.int4, tile_size=group),
    }


def llama_cpp_models(
    files: Mapping[str, Path], prompt: list[int], steps: int
) -> dict[str, tuple[Callable[[], dict[str, float]], Callable[[], np.ndarray]]]:
    """GGUF files in llama.cpp, with and without its flash attention, which helps prompts and slows decoding.

    Args:
      files: by name.
      prompt: the tokens to read at once.
      steps: how many more to decode, greedily.

    Returns:
      For each, a pass that times both parts, and a function that gives the logits of the prompt's last token.
    """
    import llama_cpp

    def contender(path: Path, flash: bool) -> tuple[Callable[[], dict[str, float]], Callable[[], np.ndarray]]:
        count, length = measure.threads(), len(prompt) + steps
        counts = {"n_threads": count, "n_threads_batch": count, "n_batch": length, "n_ubatch": length}
        model = llama_cpp.Llama(str(path), n_ctx=length, flash_attn=flash, verbose=False, **counts)

        def read(tokens: list[int]) -> np.ndarray:
            model.eval(tokens)
            return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(model.ctx, -1), (model.n_vocab(),))

        def decode(logits: np.ndarray) -> None:
            for _ in range(steps):
                logits = read([int(logits.argmax())])

        def one() -> dict[str, float]:
            model.reset()
            logits, reading = measure.timed(lambda: read(prompt))
            return {"prompt": reading, "decode": measure.timed(lambda: decode(logits))[1]}

        def last_logits() -> np.ndarray:
            model.reset()
            return read(prompt).copy()

        return one, last_logits

    attentions = {"llama.cpp": False, "llama.cpp, flash": True}
    pairs = itertools.product(files.items(), attentions.items())
    return {f"{name} ({how})": contender(path, flash) for (name, path), (how, flash) in pairs}
