"""`python -m rollout_server.bench NAME [options]`."""

import argparse

from rollout_server.bench import refit
from rollout_server.bench.gpu import command as gpu


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m rollout_server.bench", description=__doc__)
    names = parser.add_subparsers(required=True, metavar="NAME")
    one = names.add_parser("refit", help="ways to bring the policy's weights into the engine")
    refit.add_options(one)
    one.set_defaults(run=refit.main)
    one = names.add_parser("gpu", help="every claim on one GPU: speed, memory, what must hold")
    gpu.add_options(one)
    one.set_defaults(run=gpu.main)
    given = parser.parse_args()
    given.run(given)


if __name__ == "__main__":
    main()
