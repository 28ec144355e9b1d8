"""Two runs begun together in one folder both trained, and wrote each other's epochs; a process that
a killed torchrun had left behind trained on beside its successor. Processes race for a run's folder
elsewhere too: https://github.com/Physical-Intelligence/openpi/issues/868. A lock is on a
file, not on its name, so that a removed folder let a second run in:
https://github.com/unarbos/arbos/pull/655
"""

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_run
from tiny_run import arguments, rows, start

import train
from scae_dali.training import checkpoint, lock, ranks
from scae_dali.training.ranks import Ranks

images, tiny, whole = tiny_run.images, tiny_run.tiny, tiny_run.whole  # fixtures
ROOT = Path(__file__).parents[2]
# Forks, since importing takes longer than all else: two runs in one folder, then a launcher with a
# process of torchrun's that is killed once that has saved something. Prints how they ended.
SCRIPT = """
import ctypes, json, os, signal, sys, time
from pathlib import Path
import pipelines.state, train
from scae_dali.training import lock
from tiny_run import Tiny

pipelines.state.make_network = lambda name, classes, size: Tiny(classes)
out, argv = Path(sys.argv[1]), sys.argv[2:]
step, pause = train.Run.train_step, 0.1
def slow(*given):
    time.sleep(pause)
    return step(*given)
train.Run.train_step = slow
lock.PATIENCE_S = 0.2

def forked(action, log):
    if pid := os.fork():
        return pid
    for number in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), number)
    try:
        action()
        os._exit(0)
    except SystemExit as stop:
        print(stop.code, flush=True)
        os._exit(1)

def training(name):
    sys.argv = ["train.py", *argv, f"--out={out / name}"]
    train.main()

both = [forked(lambda: training("both"), out / f"both-{k}.log") for k in range(2)]
race = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in both]

ctypes.CDLL(None).prctl(36, 1)  # orphans become ours: PR_SET_CHILD_SUBREAPER
pause = 0.2
def launcher():
    os.environ["TORCHELASTIC_RUN_ID"] = "x"
    (out / "pid").write_text(str(forked(lambda: training("orphan"), out / "orphan.log")))
    signal.pause()
launching = forked(launcher, out / "launcher.log")
while not (out / "orphan" / "checkpoint.pt").exists():
    time.sleep(0.02)
os.kill(launching, signal.SIGKILL)
os.waitpid(launching, 0)
killed = time.monotonic()
status = os.waitstatus_to_exitcode(os.waitpid(int((out / "pid").read_text()), 0)[1])
print(json.dumps({"race": race, "orphan": status, "seconds": time.monotonic() - killed}))
"""


@pytest.fixture(scope="module")
def ended(images, tmp_path_factory):
    """How the processes ended, and their folder."""
    out = tmp_path_factory.mktemp("forked")
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests" / "field")))
    argv = arguments(images, out, checkpoint_every=1)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(out), *argv],
        env=os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), out


def test_of_two_runs_begun_together_one_trains(ended):
    how, out = ended
    assert sorted(how["race"]) == [0, 1]
    refused = (out / f"both-{how['race'].index(1)}.log").read_text()
    assert f"error: another process is training in '{out / 'both'}'" in refused
    assert "wait for its end, or give another --out" in refused
    assert [row["epoch"] for row in rows(out / "both")] == [0, 1]


def test_a_process_whose_torchrun_is_killed_ends_and_its_run_goes_on(ended, images):
    how, out = ended
    assert how["orphan"] == 1
    assert how["seconds"] < 5
    assert "which started this one, is gone: it ends too" in (out / "orphan.log").read_text()
    assert not (out / "orphan" / "weights.pt").exists()
    start(*arguments(images, out / "orphan", checkpoint_every=1), "--resume")
    assert [row["epoch"] for row in rows(out / "orphan")] == [0, 1]


def test_a_run_that_holds_the_folder_is_left_as_it_is(images, whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    with lock.hold(out, Ranks("cpu")):
        for flags in ((), ("--resume",)):
            with pytest.raises(SystemExit, match=r"another process is training in '.*run'"):
                start(*arguments(images, out), *flags)
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    start(*arguments(images, out), "--resume")  # nothing holds it any more


def test_a_moment_of_patience_outlasts_what_is_ending(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE_S", 5.0)
    first = lock.hold(tmp_path, Ranks("cpu"))
    first.__enter__()
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: first.__exit__(None, None, None))
    with lock.hold(tmp_path, Ranks("cpu")):
        pass


class Second(Ranks):
    """The second of two processes; the first one was refused."""

    def __init__(self):
        super().__init__("cpu")
        self.rank, self.world = 1, 2

    def gather(self, value):
        return ["another process is training", value]


def test_the_refusal_of_the_first_process_is_every_ones(tmp_path):
    with (
        pytest.raises(ValueError, match="another process is training"),
        lock.hold(tmp_path / "run", Second()),
    ):
        pytest.fail("it went on")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_it_goes_on_with_a_note(tmp_path, monkeypatch, capsys, number):
    def flock(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with lock.hold(tmp_path / "run", Ranks("cpu")):
        assert "note: " in capsys.readouterr().err
    monkeypatch.setattr(lock, "_NO_LOCKS", set())
    with pytest.raises(ValueError, match=os.strerror(number)), lock.hold(tmp_path, Ranks("cpu")):
        pass


def test_only_under_torchrun_the_parent_is_watched(monkeypatch):
    watched = []
    monkeypatch.setattr(ranks, "end_with_parent", lambda: watched.append(True))
    Ranks("cpu")
    assert not watched
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    Ranks("cpu")
    assert watched


def remove(out):
    shutil.rmtree(out)


def replace(out):
    shutil.rmtree(out)
    out.mkdir()
    (out / lock.NAME).touch()


@pytest.mark.parametrize("change", [remove, replace, lambda out: out.rename(f"{out}-old")])
def test_who_has_lost_its_folder_writes_nothing_more(images, tmp_path, monkeypatch, change):
    out = tmp_path / "run"
    step, calls = train.Run.train_step, []

    def losing(*given):
        calls.append(None)
        if len(calls) == 5:
            change(out)
        return step(*given)

    monkeypatch.setattr(train.Run, "train_step", losing)
    with pytest.raises(SystemExit, match=r"run', was moved, removed or taken by another run") as e:
        start(*arguments(images, out))
    assert "make room" not in str(e.value)
    assert not out.exists() or [path.name for path in out.iterdir()] == [lock.NAME]


def test_the_lock_is_of_the_file_that_is_there(tmp_path, monkeypatch):
    """Whoever has waited for a file that is gone meanwhile takes the lock of the new one."""
    monkeypatch.setattr(lock, "PATIENCE_S", 5.0)
    with lock.hold(tmp_path, Ranks("cpu")) as held:
        held()
        monkeypatch.setattr(lock.time, "sleep", lambda seconds: (tmp_path / lock.NAME).unlink())
        with lock.hold(tmp_path, Ranks("cpu")) as second:
            second()
            with pytest.raises(ValueError, match="nothing more is written"):
                held()
            monkeypatch.setattr(lock, "PATIENCE_S", 0.0)
            with (
                pytest.raises(ValueError, match="another process is training"),
                lock.hold(tmp_path, Ranks("cpu")),
            ):
                pass


def test_a_link_to_nowhere_and_a_file_of_a_removed_folder(tmp_path):
    (tmp_path / "run").symlink_to("gone")
    with (
        pytest.raises(ValueError, match=r"the link '.*run' to 'gone', which does not exist: make"),
        lock.hold(tmp_path / "run", Ranks("cpu")),
    ):
        pass
    with pytest.raises(OSError, match="its folder was moved or removed") as error:
        checkpoint.save(tmp_path / "gone" / "checkpoint.pt", {})
    assert "make room" not in str(error.value)


@pytest.mark.parametrize("launcher", [["/bin/torchrun"], ["-u", "-m", "torch.distributed.run"]])
def test_the_torchrun_above_a_script_is_watched(monkeypatch, launcher):
    """Its number and its start, whatever stands between."""
    script = ["bash", "wrap_torchrun.sh", *"abcde", "torchrun"]
    table = {os.getppid(): (8, script), 8: (9, ["sh"]), 9: (1, ["python", *launcher, "train.py"])}
    monkeypatch.setattr(ranks, "_process", lambda n: (table[n][0], "77") if n in table else None)
    monkeypatch.setattr(ranks, "_command", lambda n: table[n][1])
    assert ranks._torchrun() == (9, "77")
    del table[9]
    assert ranks._torchrun() is None  # an older one has ended, or there is no /proc


def test_a_process_is_known_by_its_number_and_its_start():
    with subprocess.Popen(["sleep", "60"]) as child:
        assert ranks._process(child.pid)[0] == os.getpid()
        end = time.monotonic() + 10
        while ranks._command(child.pid)[:2] != ["sleep", "60"]:  # it is being started
            assert time.monotonic() < end
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert ranks._process(child.pid) is None  # nobody has waited for it yet
    assert (ranks._process(child.pid), ranks._command(child.pid)) == (None, [])
