"""scripts/vllm_names.py: what we use of vLLM is in the sources, and what isn't is told."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def looking():
    path = ROOT / "scripts/vllm_names.py"
    spec = importlib.util.spec_from_file_location("vllm_names", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def installed():
    return Path(importlib.util.find_spec("vllm").origin).parents[1]


def test_the_installed_vllm_has_all(looking, installed):
    assert looking.missing(installed) == []
    assert {"model", "worker_extension_cls", "gpu_memory_utilization", "max_lora_rank"} <= (
        looking._argument_names(ROOT / "rollout_server")
    )
    assert len(list(looking.imported(ROOT / "rollout_server"))) > 30


def test_what_is_missing_is_told(looking, installed, monkeypatch):
    engine = "vllm.v1.engine.async_llm:AsyncLLM."
    calls = [((engine + "sleep",), "self, depth=2"), ((engine + "doze",), "self")]
    monkeypatch.setattr(looking, "CALLS", calls)
    monkeypatch.setattr(looking, "OVERRIDES", [(engine + "record", "engine/stats.py")])
    monkeypatch.setattr(looking, "ATTRIBUTES", [("vllm.v1.engine.logprobs", "probabilities")])
    monkeypatch.setattr(looking, "imported", lambda _: [("a.py", "vllm.config", "NoSuchConfig")])
    monkeypatch.setattr(looking, "_argument_names", lambda _: {"model", "no_such_field"})
    lines = looking.missing(installed)
    expected = ("NoSuchConfig", "depth=2", "doze", "record", "probabilities", "no_such_field")
    assert len(lines) == len(expected)
    for told, line in zip(expected, lines, strict=True):
        assert told in line


def test_the_names_are_those_of_the_sources(looking, tmp_path):
    file = tmp_path / "a.py"
    file.write_text(
        "import vllm.envs\nfrom vllm.config import A as B\ntry:\n    from vllm.c import D\n"
        "except ImportError:\n    pass\n"
    )
    names = [(module, name) for _, module, name in looking.imported(tmp_path)]
    assert sorted(names) == [("vllm", "envs"), ("vllm.config", "A")]


def test_a_parameter_that_ours_has_no_place_for_is_told(looking):
    def signature(text):
        return looking._signature(looking.ast.parse(f"def f({text}): ...").body[0])

    ours = signature("self, level=1")
    assert looking._refused(ours, signature("self, level")) == []
    assert looking._refused(ours, signature("self, level, tags=None")) == ["tags"]
    assert looking._refused(signature("self, *a, **o"), signature("self, level, tags")) == []
