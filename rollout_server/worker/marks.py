"""Marks on parameters that are about to be written, to see that they were. Imports nothing of vLLM.

A mark is a NaN of its own, which no weight is, so that it tells of each element. A parameter that
isn't floating-point (packed weights) is looked at as a whole.
"""

from collections.abc import Iterator

import torch

_MARKS = {
    1: (torch.uint8, 0x7F),  # of float8
    2: (torch.int16, 0x7FDB),  # of bfloat16 and float16
    4: (torch.int32, 0x7FC0DEAD),
    8: (torch.int64, 0x7FF8DEADDEADDEAD),
}


_Named = tuple[str, torch.nn.Parameter]


def mark(model: torch.nn.Module) -> None:
    """Overwrite every parameter with marks."""
    for _, bits, value in _bits(model):
        bits.fill_(value)


def marked(model: torch.nn.Module) -> list[str]:
    """Lines about the parameters that weren't written to since, or not in full."""
    lines = []
    for (name, parameter), bits, value in _bits(model):
        left = int((bits == value).sum())
        if left == parameter.numel():
            lines.append(f"{name} {tuple(parameter.shape)}")
        elif left and parameter.is_floating_point():
            lines.append(f"{left} of the {parameter.numel()} elements of {name}")
    return lines


def _bits(
    model: torch.nn.Module,
) -> Iterator[tuple[_Named, torch.Tensor, int]]:
    for name, parameter in model.named_parameters():
        if parameter.numel() and not parameter.is_meta and parameter.element_size() in _MARKS:
            dtype, value = _MARKS[parameter.element_size()]
            yield (name, parameter), parameter.data.view(dtype), value
