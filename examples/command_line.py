"""How an example ends: an error of its input is one line, not a traceback."""

import sys
from collections.abc import Callable
from pathlib import Path

from wheels import InputError


def ended(run: Callable[[], object]) -> int:
    """Runs an example and returns its exit code."""
    try:
        run()
    except (InputError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        return 1
    return 0
