"""`jaxquant quantize`: a checkpoint leaf by leaf, with a bar that says how far it is."""

import sys
from pathlib import Path

from jaxquant.files import quantize_checkpoint
from jaxquant.format import Format
from jaxquant.optional import optional


def quantize(src: Path, dst: Path, format: Format) -> None:
    """Quantizes the checkpoint `src` into `dst` by nearest rounding, and says what became of its size."""
    rich, console = (optional(f"rich.{name}", "pip install 'jaxquant[cli]'") for name in ("progress", "console"))
    columns = (rich.BarColumn(), rich.DownloadColumn(), rich.TimeRemainingColumn())
    shown = {"console": console.Console(stderr=True), "disable": not sys.stderr.isatty()}
    with rich.Progress(*columns, transient=True, **shown) as bars:
        task = bars.add_task(src.name)
        quantize_checkpoint(
            src, dst, format, progress=lambda done, total: bars.update(task, completed=done, total=total)
        )
    print(f"{dst}: {src.name} as {format}. jq.load reads it, and jaxquant inspect lists it.")
