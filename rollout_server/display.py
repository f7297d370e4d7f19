"""How a server shows itself: `repr`, and a table in a notebook."""

import html
from collections.abc import Mapping
from typing import Any


def as_text(kind: str, fields: Mapping[str, Any]) -> str:
    """`<kind name=value, ...>`."""
    shown = ", ".join(f"{name}={value}" for name, value in fields.items())
    return f"<{kind} {shown}>"


def as_table(kind: str, fields: Mapping[str, Any]) -> str:
    """The same in HTML, a row for each field."""
    rows = "".join(
        f"<tr><th>{name}</th><td>{html.escape(str(value))}</td></tr>"
        for name, value in fields.items()
    )
    return f"<table><caption>{kind}</caption>{rows}</table>"


def mebibytes(sizes: Mapping[str, int]) -> dict[str, str]:
    """Sizes in bytes, as they are shown."""
    return {name: f"{size / 2**20:.0f} MiB" for name, size in sizes.items()}
