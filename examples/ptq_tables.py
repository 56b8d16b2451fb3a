"""The tables and the plot of `ptq_smollm2.py`, from the results it keeps."""

import math
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from rich.console import Console
from rich.table import Table

KINDS = ("in domain", "other kind")
SCORES = ("perplexity", "R", "KL", "top-1")
HEADINGS = ("method", "bits", "s", *(f"{kind}: {score}" for kind in KINDS for score in SCORES))

Results = dict[str, dict[str, dict[str, Any]]]


def closed(cell: dict[str, Any], baseline: dict[str, Any], kind: str) -> float:
    """R: the share of the baseline's loss gap that a cell closes; NaN for the baseline itself."""
    score, worst = cell["scores"][kind], baseline["scores"][kind]
    gap = math.log(worst["perplexity"] / score["reference_perplexity"])
    return math.log(worst["perplexity"] / score["perplexity"]) / gap if cell is not baseline else math.nan


def rows(cells: dict[str, dict[str, Any]]) -> list[list[str]]:
    """The cells of one setting as text."""
    baseline = next(iter(cells.values()))
    return [[name, f"{c['bits']:.2f}", f"{c['seconds']:.0f}", *_scores(c, baseline)] for name, c in cells.items()]


def _scores(cell: dict[str, Any], baseline: dict[str, Any]) -> list[str]:
    shown = []
    for kind in KINDS:
        score, share = cell["scores"][kind], closed(cell, baseline, kind)
        shown += [f"{score['perplexity']:.2f}", "" if math.isnan(share) else f"{share:.0%}"]
        shown += [f"{score['kl']:.4f} ± {score['kl_error']:.4f}", f"{score['agreement']:.1%}"]
    return shown


def show(results: Results, console: Console) -> None:
    """The tables on a terminal."""
    for setting, cells in results.items():
        table = Table(title=f"{setting} (float: {_floats(cells)})")
        for i, heading in enumerate(HEADINGS):
            table.add_column(heading, justify="right" if i else "left")
        for row in rows(cells):
            table.add_row(*row)
        console.print(table)


def _floats(cells: dict[str, dict[str, Any]]) -> str:
    scores = next(iter(cells.values()))["scores"]
    return ", ".join(f"{scores[kind]['reference_perplexity']:.2f} {kind}" for kind in KINDS)


def markdown(results: Results, about: str) -> str:
    """The tables as a page of the documentation."""
    lines = [
        "# Post-training quantization of SmolLM2-135M",
        "",
        f"Written by `python examples/ptq_smollm2.py`: {about}.",
        "Calibrated on a mix of CPython's documentation, licences, source code and text sampled from the model, unless",
        "a row says otherwise. *In domain* is held-out documentation, *other kind* the World Factbook. All matrices of",
        "the blocks are quantized, the embedding is not. R is the share of nearest rounding's loss gap that a method",
        "closes; below 0 it is worse than rounding. KL and top-1 agreement are against the float model, ± half a 95 %",
        "interval over windows. s is the time to quantize after calibration (sequential methods calibrate as they go),",
        "whatever else the machine did; `benchmarks/ptq.py` times it alone. Bits count scales, zero points and all.",
        "",
        "![R of every method](ptq_smollm2.png)",
    ]
    for setting, cells in results.items():
        lines += ["", f"## {setting}", "", f"Perplexity of the float model: {_floats(cells)}.", ""]
        lines += ["| " + " | ".join(HEADINGS) + " |", "|---" + "|--:" * (len(HEADINGS) - 1) + "|"]
        lines += ["| " + " | ".join(row) + " |" for row in rows(cells)]
    return "\n".join(lines) + "\n"


def plot(results: Results, path: Path) -> None:
    """R of every method, in domain and out of it, a panel for each setting."""
    figure, axes = plt.subplots(1, len(results), figsize=(5 * len(results), 5), squeeze=False, layout="constrained")
    for axis, (setting, cells) in zip(axes[0], results.items(), strict=True):
        baseline = next(iter(cells.values()))
        names = [name for name in cells if cells[name] is not baseline]
        for offset, (kind, colour) in enumerate(zip(KINDS, ("tab:blue", "tab:orange"), strict=True)):
            values = [100 * closed(cells[name], baseline, kind) for name in names]
            places = [i + 0.4 * offset for i in range(len(names))]
            axis.barh(places, [max(value, -50) for value in values], 0.4, color=colour, label=kind)
        axis.set_yticks([i + 0.2 for i in range(len(names))], names, fontsize=7)
        axis.invert_yaxis()
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set(title=setting, xlabel="R, % of rounding's loss gap closed", xlim=(-50, 100))
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
    figure.savefig(path, dpi=110)
    plt.close(figure)
