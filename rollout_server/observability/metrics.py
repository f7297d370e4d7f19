"""What a server counts, and what it reads from its parts when someone looks.

Plain numbers of one server, registered nowhere: several servers in a process don't meet, and what a
closed one counted is served no more. `http/scrape.py` puts them beside vLLM's own on `/metrics`.

A label's values are chosen by the code, never by a client: each value makes a series that lives as
long as the server.
"""

import threading
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

PREFIX = "rollout_server_"
# Upper ends of the histograms' buckets, in seconds.
BUCKETS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)

# name: (help, label or labels)
COUNTERS = {
    "gate_refused_requests": ("Requests that the gate refused.", ("reason",)),
    "sync_bytes": ("Bytes copied into the engine by syncs.", ("path",)),
    "sync_failures": ("Syncs of weights that failed.", ()),
    "sessions_opened": ("Sessions opened.", ()),
    "sessions_ended": ("Sessions ended.", ()),
    "session_calls": ("Calls recorded in sessions.", ()),
    "interrupted_generations": (
        "Generations that a sync, a sleep or a restart interrupted, and that went on.",
        ("by",),
    ),
    "engine_restarts": ("Engines started in the place of one that had died.", ()),
    "http_requests": ("Requests answered.", ("route", "status")),
    "loop_held_seconds": (
        "Of the waits in loop_lag_seconds, those past 20 ms, by whose code the loop was at: "
        "rollout_server's, vllm's, or others' (a thread of the trainer's).",
        ("by",),
    ),
}
HISTOGRAMS = {
    "gate_held_seconds": "How long held requests waited at the gate.",
    "sync_seconds": "Syncs of weights, from the call until requests flowed, waking included.",
    "sleep_seconds": "Falling asleep, bringing running requests to rest included.",
    "wake_seconds": "Waking, without the sync that goes with it.",
    "loop_lag_seconds": "How late the event loop was with what was due, ten times a second.",
}
# A gauge is read from its owner, or set where there is none to ask.
GAUGES = {
    "gate_held_requests": ("Requests that wait at the gate.", ()),
    "queued_requests": ("Requests past the gate that wait for their turn.", ()),
    "running_requests": ("Requests whose turn it is.", ()),
    "running_generations": ("Generations in the engine, frozen ones included.", ()),
    "sessions_open": ("Sessions that are open.", ()),
    "state": ("1 for the server's present state.", ("state",)),
    "policy_version": ("Version of the weights that the engine holds.", ()),
    "http_connections": ("Open HTTP connections.", ()),
    "logprob_mean_absolute_difference_nats": (
        "The trainer's log-probabilities from the engine's, per token, as last reported; of tokens "
        "sampled freely, or under a grammar.",
        ("sampled",),
    ),
}

Labels = tuple[str, ...]


class Family(NamedTuple):
    """One metric; samples: (ending of the name, labels, value)."""

    name: str
    kind: str
    help: str
    samples: list[tuple[str, dict[str, str], float]]


class Metrics:
    """Counted in any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, dict[Labels, float]] = {
            name: {} if labels else {(): 0.0} for name, (_, labels) in COUNTERS.items()
        }
        self._seen = {name: [0] * (len(BUCKETS) + 1) for name in HISTOGRAMS}
        self._sums = dict.fromkeys(HISTOGRAMS, 0.0)
        self._gauges: dict[str, Callable[[], float | Mapping[str, float]]] = {}
        self._set: dict[str, dict[Labels, float]] = {}

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        """Add to one of `COUNTERS`, given its labels."""
        key = _key(COUNTERS[name][1], labels)
        with self._lock:
            self._counts[name][key] = self._counts[name].get(key, 0.0) + amount

    def observe(self, name: str, seconds: float) -> None:
        """Add to one of `HISTOGRAMS`."""
        at = bisect_left(BUCKETS, seconds)
        with self._lock:
            self._seen[name][at] += 1
            self._sums[name] += seconds

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set one of `GAUGES`, given its labels."""
        key = _key(GAUGES[name][1], labels)
        with self._lock:
            self._set.setdefault(name, {})[key] = value

    def read(self, name: str, owner: Callable[[], float | Mapping[str, float]]) -> None:
        """Have `owner` asked for one of `GAUGES`: a number, or one for each value of its label."""
        if name not in GAUGES:
            raise KeyError(name)
        self._gauges[name] = owner

    def families(self) -> Iterator[Family]:
        """Everything, as it is now. A gauge whose owner can't tell is left out."""
        with self._lock:
            counts = {name: dict(series) for name, series in self._counts.items()}
            seen = {name: list(buckets) for name, buckets in self._seen.items()}
            sums = dict(self._sums)
            gauges = {name: dict(series) for name, series in self._set.items()}
        for name, series in counts.items():
            text, labels = COUNTERS[name]
            yield Family(PREFIX + name, "counter", text, _samples("_total", labels, series))
        for name, buckets in seen.items():
            samples, below = [], 0
            for end, number in zip((*map(str, BUCKETS), "+Inf"), buckets, strict=True):
                below += number
                samples.append(("_bucket", {"le": end}, float(below)))
            samples += [("_count", {}, float(below)), ("_sum", {}, sums[name])]
            yield Family(PREFIX + name, "histogram", HISTOGRAMS[name], samples)
        for name, (text, labels) in GAUGES.items():
            series = gauges.get(name, {}) | self._asked(name)
            if series:
                yield Family(PREFIX + name, "gauge", text, _samples("", labels, series))

    def _asked(self, name: str) -> dict[Labels, float]:
        try:
            told = self._gauges[name]()
        except Exception:  # its owner isn't there yet, or no more
            return {}
        if isinstance(told, Mapping):
            return {(label,): float(value) for label, value in told.items()}
        return {(): float(told)}

    def values(self) -> dict[str, float]:
        """Each sample under the name that `/metrics` gives it; histograms by count and sum."""
        return {
            family.name + ending + _shown(labels): value
            for family in self.families()
            for ending, labels, value in family.samples
            if ending != "_bucket"
        }


def _key(names: Labels, labels: Mapping[str, str]) -> Labels:
    if labels.keys() != set(names):
        raise ValueError(f"the labels are {names}, not {tuple(labels)}")
    return tuple(labels[name] for name in names)


def _samples(
    ending: str, names: Labels, series: Mapping[Labels, float]
) -> list[tuple[str, dict[str, str], float]]:
    return [
        (ending, dict(zip(names, key, strict=True)), value) for key, value in sorted(series.items())
    ]


def _shown(labels: Mapping[str, str]) -> str:
    pairs = ",".join(f'{name}="{value}"' for name, value in labels.items())
    return f"{{{pairs}}}" if labels else ""
