"""Every option of `attach`, in one dataclass."""

import dataclasses
import difflib
import ipaddress
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from rollout_server.errors import ConfigError, NotAvailableError

COLOCATE = ("sleep", "share", "resident")
IN_FLIGHT = ("interrupt", "drain")
ON_SYNC = ("continue", "restart", "finish")
SYNC_PATHS = ("auto", "plan", "layerwise", "load_weights")
PEFT = ("merge", "adapter")
CHECK_FINITE = ("verified", "always", "never")
DTYPES = ("auto", "float32", "bfloat16", "float16")
LONGEST_BACKOFF = 30.0  # seconds between two tries to start an engine
_KEY_LENGTH = 16


@dataclass(frozen=True)
class RolloutConfig:
    """Options of `attach`. Durations are in seconds, sizes in bytes.

    Where it listens:
        host: address to bind. By default loopback, where only this machine's processes reach it.
        port: TCP port; 0 takes a free one. With several ranks on a machine, the first one's; the
            others take those after it.
        api_key: secret that clients send as `Authorization: Bearer`; None makes one of 256 random
            bits at start. One that is given for a `host` that isn't loopback needs 16 characters.
        served_model_name: the name clients give as `model`. The base model's name works too.

    The engine:
        dtype: "auto", "float32", "bfloat16" or "float16". "auto" is what the trainer computes
            with: its mixed precision if it has one, else the dtype of the parameters.
        max_model_len: context length in tokens (prompt and completion). None takes the model's
            own, shortened to what the KV cache holds.
        kv_cache_memory_bytes: size of the KV cache. None is a quarter of the free memory, at
            most 1 GiB, on a CPU, and on a GPU nine tenths (resident: half) of what is left beside
            trainer and engine, by the plan that `attach` prints.
        gpu_memory_utilization: share (0 to 1) of the GPU's whole memory that the engine may
            use, weights included; vLLM sizes the KV cache by it. None: see `kv_cache_memory_bytes`.
        engine_args: fields of vLLM's `AsyncEngineArgs`, over everything chosen here. With
            `tensor_parallel_size` N, each N consecutive ranks of a machine have one engine.
        sampling: defaults of the sampling fields that a request leaves out, named as in vLLM's
            `SamplingParams` (temperature, top_p, top_k, min_p, repetition_penalty,
            presence_penalty, frequency_penalty, max_tokens). None takes the trainer's
            settings, or temperature 1 and nothing cut off where there is no trainer.
        tool_call_parser: name of vLLM's parser of tool calls; "auto" tells it from the chat
            template, None turns parsing off.
        reasoning_parser: name of vLLM's parser of reasoning, or None. Grammars (structured outputs,
            forced tool calls) hold from the end of the reasoning on.

    Sharing memory and time with the trainer:
        colocate: "sleep" gives the engine's memory back while the trainer trains, "resident"
            keeps it and serves meanwhile, "share" holds one copy of the weights for both.
        offload_optimizer: keep the optimizer's state in (pinned) host memory while the engine is
            awake. With attach(model, tokenizer) give `optimizer` too.
        in_flight: what becomes of running generations when weights move or the engine sleeps:
            "interrupt" freezes and later continues them from their own tokens, unless their
            request says otherwise (`on_sync`), "drain" lets them finish first.
        hold_timeout: how long a request waits for the engine before it gets 503.
        sync_path: "plan" copies weights straight to where the engine uses them, "layerwise" is
            vLLM's layerwise reload, "load_weights" vLLM's loader. "auto": "plan" for every model
            that it can be used for, else "layerwise".
        peft: how a PEFT policy goes to the engine: "merge" sends whole weights with the adapter in
            them, "adapter" the LoRA tensors alone, which the engine computes with beside the base.
        sync_bucket_bytes: weights that aren't there in full (sharded, or merged with an adapter)
            are put together in buckets of this size; a sync takes two of them as extra memory,
            and gives it back.
        verify_every: after each N-th sync, compare what the engine holds with the policy.
            The first sync is always compared. 0: only the first.
        check_finite: refuse weights that hold a NaN or an infinity: on the "verified" syncs,
            "always" or "never".
        max_restarts: how often within an hour an engine that died is restarted, with the policy's
            weights; running and waiting requests go on then. 0: never. An engine that ranks share
            (`tensor_parallel_size`) isn't restarted.

    What clients may ask for at a time (more: `rollout_server/http/refusals.py`):
        max_body_bytes: of one request; beyond: 413. All that are there at a time: 64 times that.
        max_connections: open at a time; beyond: 503. The process's soft limit of open files is
            raised for them, as far as its hard limit lets it.
        max_held_requests: that wait, for the gate or for their turn; beyond: 503 with Retry-After.
        max_running_requests: that the engine has at a time; sessions take turns for them. None is
            as many sequences as the engine batches (vLLM's max_num_seqs).
        max_retry_bytes: of sessions' last answers, kept (compressed) for clients that ask again as
            their connection broke; beyond, the oldest are forgotten, and such a request is sampled
            anew. 0 keeps none.
        max_session_bytes: of one session's record (its tokens and messages, about) while it is
            open; beyond, its calls get 413. What is there can be trained on.
        client_timeout: seconds for a client to send a request's header, for its body (beyond: 408),
            and to take what was written to it; then it is cut off, and its generation freed.

    Agents, with attach(trainer, rollout=...):
        rollout_concurrency: how many run at a time, on each rank.
        rollout_timeout: seconds for each, after which it has failed.

    Deadlines:
        start_timeout: start of the engine, its first weights included.
        liveness_timeout: an engine that is awake and answers nothing for so long counts as dead.
        sync_timeout: one sync of weights.
        sleep_timeout, wake_timeout: falling asleep (without draining), waking (without sync).
        drain_timeout: running generations that may finish first, with in_flight="drain" or
            those whose request has on_sync="finish".
        generate_timeout: one call of `generate`.
        close_timeout: ending the HTTP server and the engine before they are killed.

    progress: show what start-up does on standard error.
    """

    host: str = "127.0.0.1"
    port: int = 0
    api_key: str | None = field(default=None, repr=False)
    served_model_name: str = "policy"

    dtype: str = "auto"
    max_model_len: int | None = None
    kv_cache_memory_bytes: int | None = None
    gpu_memory_utilization: float | None = None
    engine_args: Mapping[str, Any] = field(default_factory=dict)
    sampling: Mapping[str, Any] | None = None
    tool_call_parser: str | None = "auto"
    reasoning_parser: str | None = None

    colocate: str = "sleep"
    offload_optimizer: bool = False
    in_flight: str = "interrupt"
    hold_timeout: float = 600.0
    sync_path: str = "auto"
    peft: str = "merge"
    sync_bucket_bytes: int = 512 << 20
    check_finite: str = "verified"
    verify_every: int = 0
    max_restarts: int = 5

    max_body_bytes: int = 16 << 20
    max_connections: int = 4096
    max_held_requests: int = 4096
    max_running_requests: int | None = None
    max_retry_bytes: int = 64 << 20
    max_session_bytes: int = 256 << 20
    client_timeout: float = 60.0

    rollout_concurrency: int = 64
    rollout_timeout: float = 1800.0

    start_timeout: float = 600.0
    liveness_timeout: float = 60.0
    sync_timeout: float = 300.0
    sleep_timeout: float = 60.0
    wake_timeout: float = 60.0
    drain_timeout: float = 600.0
    generate_timeout: float = 3600.0
    close_timeout: float = 10.0

    progress: bool = True

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "RolloutConfig":
        """Build from keyword options; an unknown name is refused with the nearest known one."""
        known = [f.name for f in dataclasses.fields(cls)]
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]!r}?" if near else f"options are: {', '.join(known)}"
                raise ConfigError(f"attach() has no option {name!r}; {hint}")
        return cls(**options)

    def __post_init__(self) -> None:
        _one_of("colocate", self.colocate, COLOCATE)
        _one_of("in_flight", self.in_flight, IN_FLIGHT)
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("sync_path", self.sync_path, SYNC_PATHS)
        _one_of("peft", self.peft, PEFT)
        _one_of("check_finite", self.check_finite, CHECK_FINITE)
        _text("host", self.host)
        _text("served_model_name", self.served_model_name)
        if self.api_key is not None:
            _text("api_key", self.api_key, secret=True)
            if not _is_loopback(self.host) and len(self.api_key) < _KEY_LENGTH:
                raise ConfigError(
                    f"api_key: host={self.host!r} can be reached from other machines, so give at "
                    f"least {_KEY_LENGTH} characters (secrets.token_urlsafe()), or None to have "
                    "one made"
                )
        _whole("port", self.port, low=0, high=65535)
        _whole("sync_bucket_bytes", self.sync_bucket_bytes, low=1 << 16)
        _whole("rollout_concurrency", self.rollout_concurrency, low=1)
        _whole("max_body_bytes", self.max_body_bytes, low=1 << 10)
        _whole("max_connections", self.max_connections, low=1)
        _whole("max_held_requests", self.max_held_requests, low=1)
        _whole("max_running_requests", self.max_running_requests, low=1, optional=True)
        _whole("max_retry_bytes", self.max_retry_bytes, low=0)
        _whole("max_session_bytes", self.max_session_bytes, low=1 << 10)
        _whole("verify_every", self.verify_every, low=0)
        _whole("max_restarts", self.max_restarts, low=0)
        _whole("max_model_len", self.max_model_len, low=1, optional=True)
        _whole("kv_cache_memory_bytes", self.kv_cache_memory_bytes, low=1, optional=True)
        share = self.gpu_memory_utilization
        if share is not None and not (_is_number(share) and 0 < share <= 1):
            raise ConfigError(
                f"gpu_memory_utilization={share!r}: give a share of the GPU's memory, above 0 "
                "and at most 1, or None"
            )
        for f in dataclasses.fields(self):
            if f.name.endswith("_timeout"):
                value = getattr(self, f.name)
                if not (_is_number(value) and value > 0 and math.isfinite(value)):
                    raise ConfigError(f"{f.name}={value!r}: give a number of seconds above 0")
        for name in ("engine_args", "sampling"):
            value = getattr(self, name)
            if not (isinstance(value, Mapping) or (name == "sampling" and value is None)):
                raise ConfigError(f"{name}={value!r}: give a dict of names and values")
        for name in ("offload_optimizer", "progress"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={getattr(self, name)!r}: give True or False")
        if self.offload_optimizer and self.colocate == "resident":
            raise ConfigError(
                "offload_optimizer=True with colocate='resident': the engine never sleeps, so the "
                "optimizer's state would never be needed back; use colocate='sleep' or 'share'"
            )
        self._check_parallel()

    @property
    def transition_time(self) -> float:
        """Seconds for one transition and one that it may have to wait for, each with its steps, and
        the engine's restarts on the way."""
        steps = self.sync_timeout + 2 * self.wake_timeout + 2 * self.sleep_timeout
        steps += self.drain_timeout + self.restarts * (self.start_timeout + LONGEST_BACKOFF)
        return 2 * steps

    @property
    def tensor_parallel(self) -> int:
        """How many ranks have an engine together."""
        return self.engine_args.get("tensor_parallel_size") or 1

    @property
    def restarts(self) -> int:
        """How often within an hour this server's engine can be restarted."""
        return self.max_restarts if self.tensor_parallel == 1 else 0

    def _check_parallel(self) -> None:
        _whole("engine_args['tensor_parallel_size']", self.tensor_parallel, low=1)
        if self.tensor_parallel > 1 and self.colocate == "share":
            raise ConfigError(
                f"colocate='share' with engine_args['tensor_parallel_size']={self.tensor_parallel}:"
                " each rank trains whole weights, of which the engine holds a part on each device; "
                "use colocate='sleep'"
            )
        for name in ("pipeline_parallel_size", "data_parallel_size"):
            if self.engine_args.get(name, 1) not in (1, None):
                raise NotAvailableError(
                    f"engine_args[{name!r}]={self.engine_args[name]!r}: leave it out; launch one "
                    "process per device (accelerate launch --num_processes), each gets an engine "
                    "of its own, or each group of engine_args['tensor_parallel_size']"
                )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _one_of(name: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        near = difflib.get_close_matches(str(value), allowed, n=1, cutoff=0.5)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ConfigError(f"{name}={value!r}: give one of {', '.join(map(repr, allowed))}{hint}")


def _text(name: str, value: object, secret: bool = False) -> None:
    if not isinstance(value, str) or not value.strip():
        shown = "" if secret else f"={value!r}"
        raise ConfigError(f"{name}{shown}: give a string that isn't empty")
    if secret and not (value.isascii() and value.isprintable() and " " not in value):
        # It travels in an HTTP header.
        raise ConfigError(f"{name}: use printable ASCII characters without spaces")


def _whole(
    name: str, value: object, low: int, high: int | None = None, optional: bool = False
) -> None:
    if value is None and optional:
        return
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or not low <= cast(int, value) <= (math.inf if high is None else high):
        bound = f"from {low} to {high}" if high is not None else f"of at least {low}"
        raise ConfigError(f"{name}={value!r}: give a whole number {bound}")
