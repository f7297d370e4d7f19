"""Sizes in bytes, read and shown."""

import re

from rollout_server.errors import ConfigError

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
_UNITS = {
    "": 1, "b": 1, "kib": KIB, "mib": MIB, "gib": GIB, "tib": 1 << 40,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
}  # fmt: skip


def size_of(name: str, text: str) -> int:
    """Bytes of "80GiB", "512 MiB" or "80e9"; `ConfigError` names the option `name`."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:e\d+)?)\s*([kmgt]?i?b?)\s*", text.lower())
    if found is None or found[2] not in _UNITS or not float(found[1]):
        raise ConfigError(
            f"{name}={text!r}: give a size above 0 with its unit, as in 80GiB or 24GB"
        )
    return int(float(found[1]) * _UNITS[found[2]])


def shown(size: int) -> str:
    """In GiB, or in MiB below one; "-" for nothing."""
    if not size:
        return "-"
    if abs(size) < GIB:
        return f"{size / MIB:.0f} MiB" if abs(size) >= MIB else f"{size / KIB:.0f} KiB"
    return f"{size / GIB:.1f} GiB"
