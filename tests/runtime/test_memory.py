"""memory.py: what can't fit is refused by its least size."""

import resource

import pytest

from hf_ddpm.runtime.memory import check_memory, total_memory


def test_what_fits_and_what_does_not(monkeypatch):
    monkeypatch.setattr("hf_ddpm.runtime.memory.total_memory", lambda: 10**9)
    check_memory("batch_size", 1000, 10**6, "image")
    with pytest.raises(ValueError) as error:
        check_memory("batch_size", 1001, 10**6, "image")
    assert str(error.value) == (
        "batch_size is 1001: at least 1 GB, by 1 MB for each image, where there are 1 GB of memory; allowed "
        "here: <= 1000"
    )
    monkeypatch.setattr("hf_ddpm.runtime.memory.total_memory", lambda: None)
    check_memory("batch_size", 10**12, 10**6, "image")


def test_the_limit_of_a_shell_counts(monkeypatch):
    machine = total_memory()
    assert machine is not None and machine > 2**28
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (2**27, resource.RLIM_INFINITY))
    assert total_memory() == 2**27
