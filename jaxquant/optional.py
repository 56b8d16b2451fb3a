"""Packages that only some of jaxquant needs, found when they are needed."""

import importlib
from types import ModuleType

from jaxquant.errors import MissingPackageError


def optional(name: str, fix: str) -> ModuleType:
    """Imports a package.

    Args:
      name: of the module.
      fix: the command that installs it.

    Raises:
      MissingPackageError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise MissingPackageError(f"{name} is not installed: {fix}") from error
