"""signals.py: signals become a flag, and all processes learn of it at the same step."""

import os
import signal
import threading

import pytest
import torch.distributed as dist

from hf_ddpm.runtime.signals import SIGNALS, StopSignals, TrainingStopped, ignore_signals
from tests.launching import together


def send(number):
    os.kill(os.getpid(), number)


def handlers():
    return [signal.getsignal(number) for number in SIGNALS]


def test_the_signals():
    assert [number.name for number in SIGNALS] == ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"])
def test_a_signal_sets_the_flag_and_the_process_goes_on(name):
    with StopSignals(1) as stop:
        assert not stop.agreed() and stop.name is None
        send(getattr(signal, name))
        assert stop.agreed() and stop.name == name
        assert stop.agreed()


def test_the_first_signal_is_named():
    with StopSignals(1) as stop:
        for name in ("SIGUSR1", "SIGTERM", "SIGINT"):
            send(getattr(signal, name))
        assert stop.agreed() and stop.name == "SIGUSR1"


def test_check_raises_once_told():
    with StopSignals(1) as stop:
        stop.check()
        send(signal.SIGTERM)
        with pytest.raises(TrainingStopped):
            stop.check()


def test_handlers_come_back():
    before, seen = handlers(), []
    mine = signal.signal(signal.SIGUSR1, lambda *_: seen.append("mine"))
    try:
        own = handlers()
        with StopSignals(1) as stop:
            assert all(handler == stop._note for handler in handlers())
        assert handlers() == own
        send(signal.SIGUSR1)
        assert seen == ["mine"]
        with pytest.raises(RuntimeError), StopSignals(1):
            raise RuntimeError
        assert handlers() == own
    finally:
        signal.signal(signal.SIGUSR1, mine)
    assert handlers() == before


def test_a_handler_that_python_does_not_know(monkeypatch):
    """A C library's handler reads as None, which can't be put back."""
    before, real = handlers(), signal.signal
    monkeypatch.setattr(signal, "signal", lambda number, handler: real(number, handler) and None)
    try:
        with StopSignals(1):
            pass
    finally:
        monkeypatch.undo()
        for number, handler in zip(SIGNALS, before, strict=True):
            signal.signal(number, handler)


def test_outside_the_main_thread_nothing_happens():
    before, seen = handlers(), []

    def work():
        with StopSignals(1) as stop:
            seen.append(handlers() == before)
            stop.check()
            seen.append(stop.agreed())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [True, False] and handlers() == before


def test_helpers_ignore_signals():
    before = handlers()
    try:
        ignore_signals(0)
        for number in SIGNALS:
            send(number)
    finally:
        for number, handler in zip(SIGNALS, before, strict=True):
            signal.signal(number, handler)


def stopped_at(step, rank):
    """Six steps of which one process is signalled in one: what this process is told at each, and why."""
    dist.init_process_group("gloo")
    answers = []
    with StopSignals(dist.get_world_size()) as stop:
        for now in range(6):
            if (now, dist.get_rank()) == (step, rank):
                send(signal.SIGUSR1)
            answers.append(stop.agreed())
    return dist.get_world_size(), answers, stop.name


@pytest.mark.distributed
def test_one_signalled_process_stops_both_at_the_same_step(tmp_path):
    expected = (2, [False] * 3 + [True] * 3, "SIGUSR1")
    assert together(tmp_path, stopped_at, 3, 1) == [expected, expected]


def test_a_signal_after_the_processes_asked_waits_for_the_next_step(monkeypatch):
    stop, all_reduce = StopSignals(1), []
    stop._group = "others, of whom none was told"
    monkeypatch.setattr("torch.distributed.all_reduce", lambda *_, **__: [act() for act in all_reduce])
    with stop:
        all_reduce.append(lambda: os.kill(os.getpid(), signal.SIGUSR1))
        assert not stop.agreed()
        all_reduce.clear()
        assert stop.agreed()


def test_a_signal_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopSignals(1) as stop:
            send(signal.SIGINT)
            assert not stop.agreed()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
