"""`jaxquant`, the command: what it takes, and how it ends.

It exits with 0 when all is well, 1 when a file or an option is not what it should be, 2 when it was called wrongly.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxquant import errors
from jaxquant.cli.evaluate import evaluate
from jaxquant.cli.inspect import inspect
from jaxquant.cli.quantize import quantize
from jaxquant.format import Format, fp8, int2, int3, int4, int8, nf4

FORMATS = {"int8": int8, "int4": int4, "int3": int3, "int2": int2, "fp8": fp8, "nf4": nf4}
_EXPECTED = (
    *(error for error in vars(errors).values() if isinstance(error, type) and issubclass(error, Exception)),
    OSError,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code; an error of what it was given is one line, not a traceback."""
    chosen = _parser().parse_args(arguments)
    try:
        chosen.run(chosen)
    except _EXPECTED as error:
        print(f"jaxquant {chosen.command}: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("jaxquant", description="Quantize checkpoints, look into them, measure them.")
    commands = parser.add_subparsers(dest="command", required=True)

    one = _command(
        commands,
        "quantize",
        "Quantize a checkpoint of safetensors files, in the memory of its largest tensor. Started again after it was "
        "stopped, it goes on where it was.",
        "jaxquant quantize llama-3-8b/ llama-3-8b-int4.safetensors --format int4 --group 64",
    )
    one.add_argument("src", type=Path, help="a safetensors file, the index of several, or their folder")
    one.add_argument("dst", type=Path, help="the file to write, for jq.load; more files lie beside it")
    _add_format(one)
    one.set_defaults(run=lambda chosen: quantize(chosen.src, chosen.dst, _format(chosen)))

    one = _command(
        commands,
        "inspect",
        "List the tensors of a checkpoint of jaxquant's, of Hugging Face's or of llama.cpp's: shapes, formats, the "
        "bytes they take in memory, and how often each sixteenth of its range of codes or values is taken.",
        "jaxquant inspect llama-3-8b-int4.safetensors",
    )
    one.add_argument("file", type=Path, help="a safetensors or GGUF file, or a folder of safetensors files")
    one.set_defaults(run=lambda chosen: print(inspect(chosen.file)))

    one = _command(
        commands,
        "eval",
        "Measure the perplexity of a Llama in a GGUF file as it is, and quantized anew by nearest rounding.",
        "jaxquant eval SmolLM2-135M-Instruct.gguf --format int4 --group 64 --text book.txt",
    )
    one.add_argument("file", type=Path, help="a GGUF file of the architecture 'llama'")
    one.add_argument("--text", type=Path, help="the text to read (default: Python's own documentation)")
    one.add_argument("--windows", type=int, default=4, help="how many texts of 512 tokens (default: 4)")
    _add_format(one)
    one.set_defaults(run=lambda chosen: evaluate(chosen.file, chosen.text, chosen.windows, _format(chosen)))
    return parser


def _command(commands, name: str, description: str, example: str) -> argparse.ArgumentParser:
    return commands.add_parser(name, help=description, description=description, epilog=f"example: {example}")


def _add_format(command: argparse.ArgumentParser) -> None:
    command.add_argument("--format", choices=FORMATS, default="int8", help="of the codes (default: int8)")
    command.add_argument("--group", type=int, help="inputs that share a scale (default: all of an output)")
    command.add_argument("--affine", action="store_true", help="with zero points")


def _format(chosen: argparse.Namespace) -> Format:
    format = FORMATS[chosen.format]
    group = format.group if chosen.group is None else chosen.group
    return format(group=group, symmetric=format.symmetric and not chosen.affine)
