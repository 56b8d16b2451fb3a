"""Python programs in processes of their own, which say what they found as the last line that they print, in JSON."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax

ROOT = Path(__file__).parent.parent
# XLA's newer way to compile a fusion takes twice as long: a flag for programs that run once, where XLA still has it. A
# flag that it does not know ends the process.
QUICK = "--xla_cpu_use_fusion_emitters=false" if jax.__version_info__ < (0, 11) else ""


def started(program: str, *args: str, **environment: str) -> subprocess.Popen:
    """A process of Python on the CPU that finds jaxquant and what the tests share."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    env, pipe = os.environ | {"PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"} | environment, subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", program, *args], env=env, stdout=pipe, stderr=pipe, text=True)


def found(*processes: subprocess.Popen) -> list:
    """What each of the processes found; all of them have ended."""
    try:
        answers = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, said) in zip(processes, answers, strict=True):
        assert process.returncode == 0, said[-4000:]
    return [json.loads(out.splitlines()[-1]) for out, _ in answers]
