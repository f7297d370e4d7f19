"""What was found, as Markdown: each figure with what it is compared with."""

from collections.abc import Mapping
from typing import Any

from rollout_server.bench.gpu.findings import Figure, Findings
from rollout_server.bench.gpu.parts import PARTS
from rollout_server.bench.report import table_row, table_rule

_HEADS = ("what", "figure", "against", "", "ratio")


def markdown(scale: str, machine: Mapping[str, Any], parts: Mapping[str, Findings]) -> str:
    """A table of all figures, the checks, and what isn't there and why."""
    lines = [", ".join(f"{name} {value}" for name, value in machine.items()), ""]
    if scale == "tiny":
        lines += ["Tiny random models: the figures show that the command works, nothing else.", ""]
    for part in PARTS:
        if part.name not in parts:
            continue
        found = parts[part.name]
        lines += [f"## {part.name}: {part.about}", ""]
        passed = sum(check.passed for check in found.checks)
        counted = f", {passed} of {len(found.checks)} checks passed" if found.checks else ""
        lines += [f"{found.status}, {found.seconds:.0f} s{counted}", ""]
        if found.figures:
            lines += table_row(*_HEADS) + table_rule(len(_HEADS))
            for figure in found.figures:
                lines += table_row(*_cells(figure))
            lines.append("")
        lines += [f"- not here: {what}: {why}" for what, why in found.skipped.items()]
        failed = found.failures if found.status == "failed" else [found.why] if found.why else []
        lines += [f"- {found.status}: {_last_line(why)}" for why in failed]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _cells(figure: Figure) -> list[str]:
    cells = [figure.what, _shown(figure.value, figure.unit), figure.against, "", ""]
    if figure.other is not None:
        cells[3] = _shown(figure.other, figure.unit)
        cells[4] = f"{figure.value / figure.other:.3g}" if figure.other else ""
    return cells


def _shown(value: float, unit: str) -> str:
    if unit == "bytes":
        return f"{value / 2**20:.1f} MiB"
    return f"{value:.4g} {unit}".rstrip()


def _last_line(text: str) -> str:
    """Of a traceback, what it comes to; the whole is in the JSON."""
    return text.strip().splitlines()[-1] if text.strip() else ""
