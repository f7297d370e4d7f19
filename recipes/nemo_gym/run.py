"""Rollouts of NVIDIA NeMo Gym: its weather example, with several forced tool calls in each.

    recipes/nemo_gym/setup.sh
    python recipes/nemo_gym/run.py --repeats 4

The policy is SmolLM2, served from this process. NeMo Gym's servers (agent, environment, tools, and
one in front of the model) are processes of its own environment, and end with this one. The folder
`--output` gets its results (rollouts.jsonl), what to train on (training.jsonl) and its log.
"""

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import torch
from rollout_server.integrations import nemo_gym
from transformers import AutoModelForCausalLM, AutoTokenizer

from rollout_server import RolloutServer, attach

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE.parent))
EXAMPLE = "example_single_tool_call"
SERVERS = (
    f"resources_servers/{EXAMPLE}",
    "responses_api_agents/simple_agent",
    "responses_api_models/vllm_model",
    "environment_servers/legacy_agent",
)
STOP_SECONDS = 20

# Run before NeMo Gym: an interrupt, which it ends its servers upon, comes when the parent dies.
_TIED = (
    "import ctypes, os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
    "ctypes.CDLL(None).prctl(1, signal.SIGINT); "
    "os.getppid() == int(sys.argv[1]) or sys.exit(1); os.execv(sys.argv[2], sys.argv[2:])"
)


class Gym:
    """NeMo Gym's command line in a folder of its own."""

    def __init__(self, venv: Path, folder: Path, log: Path):
        self._gym = venv / "bin" / "gym"
        if not self._gym.exists():
            raise SystemExit(f"no NeMo Gym in {venv}; run recipes/nemo_gym/setup.sh {venv}")
        self._folder, self._log = folder, log
        for server in SERVERS:  # each has an environment of its own otherwise
            (folder / "venvs" / server).mkdir(parents=True)
            (folder / "venvs" / server / ".venv").symlink_to(venv)
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port = free.getsockname()[1]

    def configure(self, server: RolloutServer, max_steps: int) -> None:
        """Write the configuration that all commands read."""
        agent = {"responses_api_agents": {"simple_agent": {"max_steps": max_steps}}}
        config = {
            "config_paths": [f"resources_servers/{EXAMPLE}/configs/{EXAMPLE}.yaml"],
            f"{EXAMPLE}_simple_agent": agent,
            **nemo_gym.model_server_config(server),
            "head_server": {"host": "127.0.0.1", "port": self._port},
            "skip_venv_if_present": True,
            "uv_venv_dir": str(self._folder / "venvs"),
        }
        nemo_gym.write_config(self._folder / "config.yaml", config)

    @contextlib.contextmanager
    def servers(self, deadline: float) -> Iterator[None]:
        """NeMo Gym's servers, ready to collect from."""
        with self._command("env", "start") as process:
            while not self._ready():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"NeMo Gym's servers didn't start; see {self._log}")
                time.sleep(0.5)
            yield

    def collect(self, inputs: Path, output: Path, repeats: int, deadline: float) -> None:
        """Write the results of `repeats` rollouts of each line of `inputs`."""
        options = {
            "agent_name": f"{EXAMPLE}_simple_agent",
            "input_jsonl_fpath": inputs,
            "output_jsonl_fpath": output,
            "num_repeats": repeats,
            "num_samples_in_parallel": 8,
        }
        settings = [f"+{name}={value}" for name, value in options.items()]
        with self._command("eval", "run", "--no-serve", *settings) as process:
            try:
                status = process.wait(max(0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                status = "late"
            if status != 0:
                raise SystemExit(f"NeMo Gym's collection failed ({status}); see {self._log}")

    def _ready(self) -> bool:
        try:
            with urlopen(f"http://127.0.0.1:{self._port}/health", timeout=5) as answer:
                return answer.status == 200
        except (URLError, OSError):
            return False

    @contextlib.contextmanager
    def _command(self, *arguments: str) -> Iterator[subprocess.Popen]:
        config = f"+config_paths=[{self._folder / 'config.yaml'}]"
        line = [sys.executable, "-c", _TIED, str(os.getpid()), str(self._gym), *arguments, config]
        with (
            self._log.open("a") as log,
            subprocess.Popen(
                line,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._folder,
                env=self._environment(),
                start_new_session=True,
            ) as process,
        ):
            try:
                yield process
            finally:
                with contextlib.suppress(subprocess.TimeoutExpired, ProcessLookupError):
                    process.send_signal(signal.SIGINT)
                    process.wait(STOP_SECONDS)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)

    def _environment(self) -> dict[str, str]:
        own = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        return own | {
            "PATH": f"{self._gym.parent}:{os.environ['PATH']}",
            "HF_HUB_OFFLINE": "1",
            "RAY_TMPDIR": str(self._folder),
            "RAY_USAGE_STATS_ENABLED": "0",
        }


def serve(**options) -> RolloutServer:
    """SmolLM2 with a chat template that has tools."""
    import smollm2

    folder = smollm2.model_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (HERE / "tool_template.jinja").read_text()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return attach(model, tokenizer, max_model_len=2048, **options)


def report(output: Path) -> None:
    """Write what to train on, and print the figures."""
    lines = (output / "rollouts.jsonl").read_text().splitlines()
    results = [json.loads(line) for line in lines]
    rows = nemo_gym.training_rows(lines)
    with (output / "training.jsonl").open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    wrong = [violation for result in results for violation in nemo_gym.violations(result)]
    for violation in wrong:
        print(violation)
    print(
        f"{len(results)} rollouts, {sum(len(nemo_gym.turns(r)) for r in results)} turns, "
        f"{len(wrong)} violations; {len(rows)} training rows, "
        f"{sum(sum(row['env_mask']) for row in rows)} sampled tokens, "
        f"mean reward {sum(row['reward'] for row in rows) / max(1, len(rows)):.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=1, help="rollouts of each of the inputs")
    parser.add_argument("--turns", type=int, default=3, help="tool calls in a rollout, at most")
    parser.add_argument("--inputs", type=Path, default=HERE / "inputs.jsonl")
    parser.add_argument("--output", type=Path, default=Path("runs/nemo_gym"))
    parser.add_argument("--deadline", type=float, default=600, help="seconds that it may all take")
    venv = os.environ.get("NEMO_GYM_VENV", ROOT / ".venv-nemo-gym")
    parser.add_argument("--venv", type=Path, default=venv, help="made by setup.sh")
    args = parser.parse_args()

    deadline = time.monotonic() + args.deadline
    output = args.output.absolute()
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="nemo-gym-", ignore_cleanup_errors=True) as folder:
        gym = Gym(args.venv.absolute(), Path(folder), output / "nemo_gym.log")
        with serve() as server:
            gym.configure(server, args.turns)
            with gym.servers(deadline):
                gym.collect(
                    args.inputs.absolute(), output / "rollouts.jsonl", args.repeats, deadline
                )
    report(output)


if __name__ == "__main__":
    main()
