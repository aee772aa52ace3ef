"""Interleaved timing in one process, A B A B ..., with the ratio pair by pair: a drifting machine cancels."""

import json
import statistics
import time

import pytest


def interleave(ours, peer, rounds=40, calls=25):
    """Times of `calls` calls of each, alternately; the ratio's quartiles say how noisy the machine was."""
    for function in (ours, peer):
        for _ in range(calls):
            function()
    times = {"ours": [], "peer": []}
    for i in range(rounds):
        order = [("ours", ours), ("peer", peer)]
        for name, function in order if i % 2 else reversed(order):
            start = time.perf_counter()
            for _ in range(calls):
                function()
            times[name].append((time.perf_counter() - start) / calls)
    ratios = [peer / ours for ours, peer in zip(times["ours"], times["peer"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "ours_us": round(statistics.median(times["ours"]) * 1e6, 1),
        "peer_us": round(statistics.median(times["peer"]) * 1e6, 1),
        "times_faster": round(middle, 2),
        "quartiles": [round(low, 2), round(high, 2)],
    }


@pytest.fixture
def report(capsys):
    """Print one JSON line, past pytest's capture."""

    def line(**facts):
        with capsys.disabled():
            print(json.dumps(facts))

    return line
