"""GGUF, the files of llama.cpp: `file` is the door."""
