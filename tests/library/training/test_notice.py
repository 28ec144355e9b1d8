"""Signals that ask a run to end."""

import os
import signal
import time

import pytest
from pairs import in_two

from scae_dali.training import notice
from scae_dali.training.notice import Ended, Notice
from scae_dali.training.ranks import Ranks


@pytest.fixture(autouse=True)
def handlers():
    """The test's own, whatever the shell has set."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in notice.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_signal_ends_the_run_at_once_where_nothing_is_to_be_saved():
    with Notice(Ranks("cpu")), pytest.raises(Ended, match="SIGUSR1") as found:
        os.kill(os.getpid(), signal.SIGUSR1)
    assert found.value.number == signal.SIGUSR1
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def test_a_signal_waits_until_the_run_can_save():
    with Notice(Ranks("cpu")) as one:
        with one.saving():
            assert not one.due(1)
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)  # a scheduler's, and its echo by torchrun
            os.kill(os.getpid(), signal.SIGINT)
            assert one.due(2)
        with pytest.raises(Ended, match="SIGTERM"):
            one.end()


def test_ctrl_c_twice_does_not_wait(monkeypatch):
    monkeypatch.setattr(notice, "ECHO_S", 0.01)
    with Notice(Ranks("cpu")) as one, one.saving():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.02)
        with pytest.raises(Ended, match="SIGINT"):
            os.kill(os.getpid(), signal.SIGINT)


def test_what_the_process_ignores_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Notice(Ranks("cpu")) as one, one.saving():
        os.kill(os.getpid(), signal.SIGINT)
        assert not one.due(1)


CODE = """
import os, signal
from scae_dali.training.notice import Notice
from scae_dali.training.ranks import Ranks
ranks = Ranks("cpu")
with Notice(ranks) as one, one.saving():
    for step in range(1, 50):
        if ranks.rank == 1 and step == 13:
            os.kill(os.getpid(), signal.SIGUSR1)
        if one.due(step):
            break
    try:
        one.end()
    except BaseException as ended:
        print(step, ended)
ranks.close()
"""


def test_processes_end_after_the_same_step():
    assert in_two(CODE).splitlines() == ["20 SIGUSR1"] * 2
