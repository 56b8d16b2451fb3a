"""Checkpoints of Hugging Face: `load` reads all of them, and `gptq` and `compressed_tensors` write theirs."""
