"""Secrets taken out of text that others will read: logs and reports.

A session's key and id are known by their form, wherever they turn up and long after the session;
the servers' keys, which a user may choose, and the environment's secrets, by their value.
"""

import os
import re
from collections.abc import Mapping
from typing import Any

GONE = "[secret]"
SESSION_ID, SESSION_KEY = "ses-", "rollout-"

_FORMS = re.compile(
    rf"\b(?:{SESSION_ID}[\w-]{{24}}|{SESSION_KEY}[\w-]{{32}})"
    r"|(?<=/sessions/)[^/\s\"'<>?#]+"
    r"|\b(?:hf_\w{16,}|sk-[\w-]{16,}|gh[opsu]_\w{16,}|github_pat_\w{16,}|xox[bp]-[\w-]{10,})"
    r"|\beyJ[\w-]{8,}\.[\w-]+\.[\w-]+"  # JSON web tokens
    r"|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"  # of a URL
    r"|(?i:(?<=bearer ))[\w.~+/=-]{6,}"
)
_NAMES = re.compile(
    r"(?:^|[_\-.])(?:api_?keys?|keys?|tokens?|secrets?|passw(?:or)?d|credentials?|auth"
    r"|authorization|cookie|pat)(?:$|[_\-.])",
    re.IGNORECASE,
)
_NUMBERS = re.compile(r"[\d.,:\s-]*|true|false|none", re.IGNORECASE)
_SHORTEST = 6  # characters of an environment's secret: "1" and "true" aren't any
_known: set[str] = set()


def remember(secret: str) -> None:
    """Take `secret` out from now on, in this process."""
    _known.add(secret)


def scrub(text: str) -> str:
    """`text` without secrets."""
    for secret in sorted(_known | _environment(), key=len, reverse=True):
        text = text.replace(secret, GONE)
    return _FORMS.sub(GONE, text)


def scrubbed(value: Any, name: str = "") -> Any:
    """A value made of dicts and lists without secrets: neither in its texts nor under a name that
    says that it is one. What isn't a number or a bool becomes text."""
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if names_a_secret(name):
        return GONE
    if isinstance(value, Mapping):
        return {scrub(str(k)): scrubbed(v, str(k)) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [scrubbed(one) for one in value]
    return scrub(str(value))


def names_a_secret(name: str) -> bool:
    """Whether a variable or field is called as secrets are."""
    return _NAMES.search(name) is not None


def _environment() -> set[str]:
    return {
        value
        for name, value in os.environ.items()
        if len(value) >= _SHORTEST and names_a_secret(name) and not _NUMBERS.fullmatch(value)
    }
