"""A model's path, which vLLM's compilation caches go by, is the same at each attach. No engine."""

import json
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import compiling
import pytest

from rollout_server.engine import model_cache
from rollout_server.engine.folder import write_model_folder
from rollout_server.engine.model_cache import cache_root, held_folder
from rollout_server.engine.temporary import TemporaryFolder


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("ROLLOUT_SERVER_CACHE", str(tmp_path / "cache"))
    return cache_root()


def writing(text):
    def write(folder):
        Path(folder, "config.json").write_text(text)
        Path(folder, "inside").mkdir()
        Path(folder, "inside", "tokenizer.json").write_text("{}")

    return write


def folders(root):
    return {p.name for p in root.iterdir()}


@pytest.mark.slow
def test_the_second_attach_has_the_keys_of_the_first(tiny, tokenizer, root, tmp_path):
    """And a model that differs in nothing but a number of its config has others."""
    one, other = tmp_path / "step-1", tmp_path / "step-2"  # the same, from another checkpoint
    for folder in (one, other):
        tiny.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    done = subprocess.run(
        [sys.executable, compiling.__file__, str(other), "12345"],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = [line for line in done.stdout.splitlines() if line.startswith("{")]  # vLLM logs there
    elsewhere, unlike = map(json.loads, told)
    here = compiling.cache_keys(one)
    assert here["server"] != elsewhere["server"]
    assert not (here["server_told"] or elsewhere["server_told"]), "a server's own is in the cache"
    assert (here["path"], here["keys"]) == (elsewhere["path"], elsewhere["keys"])
    assert unlike["path"] != here["path"]
    assert {n for n, key in unlike["keys"].items() if key == here["keys"][n]} == {"variables"}
    assert os.stat(root).st_mode & 0o077 == 0


def test_the_same_content_has_one_path(root):
    first, second = held_folder(writing("a")), held_folder(writing("a"))
    other = held_folder(writing("b"))
    assert first.path == second.path != other.path
    assert folders(root) == {Path(first.path).name, Path(other.path).name}
    assert Path(first.path, "inside", "tokenizer.json").read_text() == "{}"


def test_folders_in_use_stay_and_of_the_others_the_last(root, monkeypatch):
    monkeypatch.setattr(model_cache, "KEPT", 2)
    used = held_folder(writing("used"))
    os.utime(used.path, (0, 0))
    for number in range(4):
        held_folder(writing(f"{number}")).release()
        os.utime(next(p for p in root.iterdir() if (p / "config.json").read_text() == f"{number}"),
                 (number + 1, number + 1))  # fmt: skip
    held_folder(writing("last")).release()
    assert {(p / "config.json").read_text() for p in root.iterdir()} == {"used", "3", "last"}
    again = held_folder(writing("used"))
    used.release()
    os.utime(again.path, (0, 0))
    held_folder(writing("more")).release()
    assert os.path.exists(again.path), "one server ended while another used the model"
    again.release()
    os.utime(again.path, (0, 0))
    held_folder(writing("more still")).release()
    assert not os.path.exists(again.path)


def test_what_somebody_damaged_is_mended(root):
    folder = Path(held_folder(writing("a")).path)
    (folder / "config.json").write_text("{")
    (folder / "inside" / "tokenizer.json").unlink()
    (folder / "preprocessor_config.json").write_text("{}")
    assert held_folder(writing("a")).path == str(folder)
    assert (folder / "config.json").read_text() == "a"
    assert (folder / "inside" / "tokenizer.json").exists()
    assert not (folder / "preprocessor_config.json").exists()


def test_what_a_killed_process_was_writing_is_removed_later(root):
    held_folder(writing("a"))
    young, old = root / ".writing-1", root / ".writing-2"
    for folder in (young, old):
        folder.mkdir()
        (folder / "config.json").touch()
    os.utime(old, (0, 0))
    held_folder(writing("b"))
    assert young.exists() and not old.exists()


# Without the package, whose import takes longer than all that is tried here.
ALONE = textwrap.dedent(f"""
    import sys
    from importlib.util import module_from_spec, spec_from_file_location
    from pathlib import Path
    spec = spec_from_file_location("model_cache", {model_cache.__file__!r})
    model_cache = module_from_spec(spec)
    spec.loader.exec_module(model_cache)
    model_cache.KEPT = 0  # so that each one removes what nobody holds
""")
RACE = ALONE + textwrap.dedent("""
    for number in range(200):
        text = str(number % 2)
        held = model_cache.held_folder(lambda folder: Path(folder, "config.json").write_text(text))
        assert Path(held.path, "config.json").read_text() == text
        held.release()
""")


def test_processes_that_begin_and_end_at_once_are_in_no_ones_way(root):
    started = [
        subprocess.Popen([sys.executable, "-c", RACE], stderr=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    for process in started:
        _, error = process.communicate(timeout=120)
        assert process.returncode == 0, error[-2000:]


def test_a_folder_that_is_removed_as_it_is_locked_is_made_anew(root, monkeypatch):
    first = held_folder(writing("a"))
    first.release()
    flock, calls = model_cache.fcntl.flock, []

    def late(lock, how):
        if not calls:
            os.rename(first.path, root / ".removed-by-another")
        calls.append(how)
        flock(lock, how)

    monkeypatch.setattr(model_cache.fcntl, "flock", late)
    held = held_folder(writing("a"))
    assert held.path == first.path and Path(held.path, "config.json").read_text() == "a"
    assert len(calls) > 1


def test_the_lock_of_a_process_that_was_killed_is_gone(root, monkeypatch):
    script = ALONE + textwrap.dedent("""
        held = model_cache.held_folder(lambda folder: Path(folder, "config.json").write_text("x"))
        print(held.path, flush=True)
        sys.stdin.read()
    """)
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    path = process.stdout.readline().strip()
    monkeypatch.setattr(model_cache, "KEPT", 0)
    held_folder(writing("a")).release()
    assert os.path.exists(path)
    process.kill()
    process.communicate(timeout=20)
    held_folder(writing("a")).release()
    assert not os.path.exists(path)


def test_without_a_cache_the_model_is_in_the_servers_folder(tmp_path, monkeypatch, tiny, tokenizer):
    (tmp_path / "file").touch()
    monkeypatch.setenv("ROLLOUT_SERVER_CACHE", str(tmp_path / "file"))
    temporary = TemporaryFolder()
    path = temporary.model(lambda p: write_model_folder(p, tiny, tokenizer, "float32", False))
    assert Path(path).parent == Path(temporary.path)
    assert Path(path, "config.json").exists()
    temporary.remove()
    assert not os.path.exists(path)


def test_threads_of_one_process_hold_it_each_for_itself(root, monkeypatch):
    monkeypatch.setattr(model_cache, "KEPT", 0)
    held = []
    threads = [threading.Thread(target=lambda: held.append(held_folder(writing("a"))))
               for _ in range(8)]  # fmt: skip
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len({one.path for one in held}) == 1 and len(held) == 8
    for one in held[1:]:
        one.release()
    held_folder(writing("b")).release()
    assert os.path.exists(held[0].path)
