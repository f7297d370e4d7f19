"""`python -m rollout_server.bench NAME [options]`."""

import argparse

from rollout_server.bench import refit


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m rollout_server.bench", description=__doc__)
    names = parser.add_subparsers(required=True, metavar="NAME")
    one = names.add_parser("refit", help="ways to bring the policy's weights into the engine")
    refit.add_options(one)
    one.set_defaults(run=refit.main)
    given = parser.parse_args()
    given.run(given)


if __name__ == "__main__":
    main()
