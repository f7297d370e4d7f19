"""A tensor handed to another process, the way that weights go at a sync."""

import subprocess
import sys

import torch

from rollout_server.weights.transport import Exporter, Importer, shared_empty
from rollout_server.weights.wire import Part, Piece

_CHILD = "from rollout_server.doctor.round_trip import child; child()"
_NUMBERS = 1000


def main(device: str) -> None:
    """Print "{}" if another process reads here what this one wrote; raise otherwise."""
    tensor = shared_empty((_NUMBERS,), torch.float32, device)
    tensor.copy_(torch.arange(_NUMBERS))
    message = Exporter().export(Part(0, True, [Piece("tensor", 0, tensor)]))
    done = subprocess.run([sys.executable, "-c", _CHILD], input=message, capture_output=True)
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise SystemExit(lines[-1] if lines else f"ended with status {done.returncode}")
    if float(done.stdout) != float(tensor.sum()):
        raise SystemExit(f"the sum is {float(tensor.sum())} here and {float(done.stdout)} there")
    print("{}")


def child() -> None:
    """Print the sum of the tensor that the message on standard input tells of."""
    (piece,) = Importer().open(sys.stdin.buffer.read()).pieces
    print(float(piece.tensor.sum()))
