"""`bench gpu`: a part that fails or hangs costs no other; what is done isn't run again."""

import json
from argparse import Namespace
from pathlib import Path

import parts
import psutil
import pytest

from rollout_server.bench.gpu import command
from rollout_server.bench.gpu.companion import Companion, CompanionError
from rollout_server.bench.gpu.findings import Findings
from rollout_server.bench.gpu.runner import FILE, Results, run_parts
from rollout_server.bench.gpu.table import markdown

MACHINE = {"gpu": "one"}


@pytest.fixture(autouse=True)
def children_find_the_parts(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(parts.__file__).parent))


def sleepers():
    return [p for p in psutil.process_iter() if "time.sleep(600)" in " ".join(_words(p))]


def _words(process):
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_each_part_tells_what_became_of_it(tmp_path):
    names = ["quick", "raising", "unmet", "absent", "dying", "hanging"]
    before = {p.pid for p in sleepers()}
    wanted = [parts.part(name, deadline=45 if name == "hanging" else 90) for name in names]
    results, told = Results(tmp_path, "tiny", MACHINE), []
    run_parts(wanted, results, 600, 2, lambda name, found: told.append(name))
    assert sorted(told) == sorted(names)
    found = results.parts
    assert [found[name].status for name in names] == [
        "done", "failed", "failed", "skipped", "failed", "failed",
    ]  # fmt: skip
    assert found["quick"].value("time") == 2.0 and found["quick"].ratio("time") == 0.5
    assert "ValueError: not today" in found["raising"].why
    assert found["raising"].value("time") == 2.0, "what was found before is kept"
    assert found["unmet"].failures == ["it holds: it doesn't"]
    assert found["absent"].skipped == {"all of it": "there is no moon"}
    assert "status 3" in found["dying"].why and "last words" in found["dying"].why
    assert found["dying"].value("before") == 1.0
    assert "wasn't done after 45 s" in found["hanging"].why
    assert found["hanging"].value("before") == 1.0
    assert {p.pid for p in sleepers()} <= before, "its processes have ended with it"
    # What is in the file is what was found, and what is done needn't be run again.
    again = Results(tmp_path, "tiny", MACHINE)
    again.read()
    assert again.as_dict() == results.as_dict() == json.loads((tmp_path / FILE).read_text())
    assert [name for name in names if again.has(name)] == ["quick", "absent"]


def test_what_there_is_no_time_for_is_left_out(tmp_path):
    results = Results(tmp_path, "tiny", MACHINE)
    run_parts([parts.part("quick", seconds=100), parts.part("absent")], results, 60)
    assert results.parts["quick"].status == "left out"
    assert "it takes about 100 s" in results.parts["quick"].why
    assert results.parts["absent"].status == "skipped", "a shorter one is run all the same"
    assert not results.has("quick")


def test_results_of_another_machine_are_refused(tmp_path):
    Results(tmp_path, "tiny", MACHINE).add("quick", Findings(status="done"))
    with pytest.raises(SystemExit, match=r"another machine \(gpu one, not two\)"):
        Results(tmp_path, "tiny", {"gpu": "two"}).read()
    with pytest.raises(SystemExit, match=r"another scale \(tiny, not full\)"):
        Results(tmp_path, "full", MACHINE).read()


def test_the_table_shows_what_was_against_what():
    found = Findings(status="failed", seconds=3.4)
    found.figure("sync", 0.5, "s", "a copy", 0.25)
    found.figure("given back", 3 << 20, "bytes", "weights", 6 << 20)
    found.check("it holds", False, "no")
    found.skip("graphs", "it needs a GPU")
    left = Findings(status="left out", why="it takes long")
    text = markdown("tiny", {"gpu": "A card", "driver": "1.2"}, {"sleep": found, "http": left})
    assert text.startswith("gpu A card, driver 1.2\n")
    for line in (
        "| sync | 0.5 s | a copy | 0.25 s | 2 |",
        "| given back | 3.0 MiB | weights | 6.0 MiB | 0.5 |",
        "failed, 3 s, 0 of 1 checks passed",
        "- failed: it holds: no",
        "- not here: graphs: it needs a GPU",
        "- left out: it takes long",
    ):
        assert line in text.splitlines(), text
    assert text.index("## sleep") < text.index("## http")


def test_a_wrong_name_is_refused_with_the_right_ones():
    with pytest.raises(Exception, match=r"'shar': the parts are refit, sleep"):
        command._names("refit,shar")


def test_without_a_gpu_only_tiny_models_are_tried(tmp_path, monkeypatch):
    monkeypatch.setattr(command.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="--tiny runs on a CPU"):
        command.main(Namespace(tiny=False, out=tmp_path))


def test_a_companion_answers_or_says_why_not():
    target = "parts:Echo"
    with Companion(target, {"greeting": "Hello"}) as echo:
        echo.ready(30)
        assert echo.ask(2, 30) == "Hello, 0.5"
        with pytest.raises(CompanionError, match=r"no answer within 0\.5 s"):
            echo.ask("sleep", 0.5)
        psutil.Process(echo.pid).kill()
        with pytest.raises(CompanionError, match="ended with status -9"):
            echo._answer(30)
    with Companion(target, {"greeting": "Hello"}) as echo:
        echo.ready(30)
        with pytest.raises(CompanionError, match="ZeroDivisionError"):
            echo.ask(0, 30)
