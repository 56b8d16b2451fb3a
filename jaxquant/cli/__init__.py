"""The command line: `jaxquant quantize`, `jaxquant inspect`, `jaxquant eval`."""
