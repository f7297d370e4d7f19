"""Benchmarks: ratios of two things measured in one run, printed, and kept in runs/bench."""

import json
import os
from pathlib import Path

import pytest

RESULTS = Path(__file__).parents[2] / "runs" / "bench"


@pytest.fixture
def report(request):
    """Takes rows (what, figure), prints them and writes them to runs/bench/<test>.json."""

    def write(rows):
        name = request.node.name.removeprefix("test_")
        print(f"\n{name} ({os.cpu_count()} cores)")
        for what, figure in rows.items():
            print(f"  {what:<58} {figure}")
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / f"{name}.json").write_text(
            json.dumps({"cores": os.cpu_count(), **rows}, indent=1)
        )

    return write
