"""Files: our own checkpoints (`save`, `load`), and those of others."""

from jaxquant.files.gguf.file import load_gguf as load_gguf
from jaxquant.files.gguf.file import save_gguf as save_gguf
from jaxquant.files.huggingface.compressed_tensors import save_compressed_tensors as save_compressed_tensors
from jaxquant.files.huggingface.gptq import save_gptq as save_gptq
from jaxquant.files.huggingface.load import load_safetensors as load_safetensors
from jaxquant.files.load import load as load
from jaxquant.files.load import load_metadata as load_metadata
from jaxquant.files.save import save as save
from jaxquant.files.stream import quantize_checkpoint as quantize_checkpoint
