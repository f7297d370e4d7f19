"""The command: its options, and what it prints."""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from rollout_server.bench.gpu.findings import Findings
from rollout_server.bench.gpu.parts import NAMES, PARTS
from rollout_server.bench.gpu.runner import FILE, Results, run_parts
from rollout_server.bench.gpu.table import markdown
from rollout_server.bench.report import processor
from rollout_server.observability.machine import hardware, versions

# Of tiny models on a CPU: importing takes longer than the rest, and on one core.
_TINY_JOBS = 2


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--only", type=_names, metavar="PARTS", help=f"some of {','.join(NAMES)} (all)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/bench/gpu"), metavar="FOLDER", help="%(default)s"
    )
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="for all; what there's no time for is left out"
    )
    parser.add_argument("--again", action="store_true", help="run parts that are done once more")
    parser.add_argument(
        "--tiny", action="store_true", help="tiny models, on any machine: shows that it works"
    )


def main(given: argparse.Namespace) -> None:
    """Exits with status 1 if a part failed."""
    if not (given.tiny or torch.cuda.is_available()):
        raise SystemExit("no GPU is to be seen; --tiny runs on a CPU")
    results = Results(given.out, "tiny" if given.tiny else "full", machine())
    results.read()
    wanted = [part for part in PARTS if part.name in (given.only or NAMES)]
    to_run = [part for part in wanted if given.again or not results.has(part.name)]
    jobs = _TINY_JOBS if given.tiny and not torch.cuda.is_available() else 1
    run_parts(to_run, results, 60 * given.minutes, jobs, _tell)
    text = markdown(results.scale, results.machine, results.parts)
    table = given.out / FILE.replace(".json", ".md")
    table.write_text(text, encoding="utf-8")
    print(f"\n{text}\n{given.out / FILE}\n{table}")
    statuses = {part.name: results.parts[part.name].status for part in wanted}
    if failed := [name for name, status in statuses.items() if status == "failed"]:
        raise SystemExit(f"failed: {', '.join(failed)}")


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in NAMES:
            raise argparse.ArgumentTypeError(f"{name!r}: the parts are {', '.join(NAMES)}")
    return names


def _tell(name: str, found: Findings) -> None:
    why = f": {found.failures[0].splitlines()[-1]}" if found.failures else ""
    print(f"{name}: {found.status}, {found.seconds:.0f} s{why}", file=sys.stderr, flush=True)


def machine() -> dict[str, Any]:
    """What it runs on. Doesn't open the GPU: a context of this process would stay in it."""
    told = {name: version for name, version in versions().items() if version is not None}
    told = {"cores": hardware()["cores"], "processor": processor()} | told
    if torch.cuda.is_available():
        told = {"gpu": _card()} | told
    return told


def _card() -> str:
    """Name and memory, as nvidia-smi has them."""
    asked = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=True)
    return done.stdout.splitlines()[0]
