"""`python -m rollout_server.doctor [--json]`: checks this installation and says what to do.

Ends with 1 if there is a problem, else with 0. `python -m rollout_server.doctor memory` says what
fits on a GPU.
"""

import argparse
import json
import sys
from collections.abc import Iterator

from rollout_server.doctor import gpu, host, software
from rollout_server.doctor.finding import PROBLEM, WARNING, Finding, problem
from rollout_server.doctor.system import System


def findings(system: System) -> Iterator[tuple[str, Finding]]:
    """(name of the check, what it found), one by one; some take seconds."""
    for module in (software, gpu, host):
        for check in module.CHECKS:
            name = f"{module.__name__.rpartition('.')[2]}.{check.__name__}"
            try:
                yield name, check(system)
            except Exception as error:
                text = f"the check itself failed: {type(error).__name__}: {error}"
                yield name, problem(text, "report it, with this line")


def main(system: System | None = None) -> int:
    if sys.argv[1:2] == ["memory"]:
        from rollout_server.doctor import memory  # imports torch, which may be what is broken

        return memory.main(sys.argv[2:])
    parser = argparse.ArgumentParser(
        prog="python -m rollout_server.doctor",
        description="Checks an installation; `memory --help`: what fits on a GPU.",
    )
    parser.add_argument("--json", action="store_true", help="one JSON list instead of lines")
    given = parser.parse_args()
    told = []
    for name, finding in findings(system or System()):
        told.append({"check": name, **vars(finding)})
        if not given.json:
            print(f"{finding.level:8} {name:24} {finding.text}", flush=True)
            if finding.remedy:
                print(f"{'':33} -> {finding.remedy}", flush=True)
    levels = [one["level"] for one in told]
    if given.json:
        print(json.dumps(told, indent=1))
    else:
        print(f"\n{levels.count(PROBLEM)} problems, {levels.count(WARNING)} warnings")
    return int(PROBLEM in levels)


if __name__ == "__main__":
    sys.exit(main())
