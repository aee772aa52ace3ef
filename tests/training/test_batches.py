"""batches.py: every image of a step is one process's, whatever their number."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_ddpm.data.order import EMPTY
from hf_ddpm.training.batches import StepShare

counts = st.integers(1, 40)


@st.composite
def launches(draw):
    """Images of a step, batch size, processes: all that is allowed."""
    images = draw(counts)
    return images, draw(counts), draw(st.integers(1, images))


def shares(images, batch_size, world):
    return [StepShare(images, batch_size, rank, world) for rank in range(world)]


def step_of(share, first_step):
    """The micro-steps of one step."""
    return list(itertools.islice(share.slots(first_step), share.micro_steps))


@given(launches(), st.integers(0, 10**6))
def test_a_step_is_shared_out_without_loss_or_double(launch, step):
    steps = [step_of(share, step) for share in shares(*launch)]
    slots = [slot for micros in steps for micro in micros for slot in micro]
    images = launch[0]
    assert sorted(slot for slot in slots if slot != EMPTY) == list(range(step * images, (step + 1) * images))
    assert all(slot == EMPTY or slot >= 0 for slot in slots)


@given(launches())
def test_all_processes_have_equal_shapes_within_the_batch_size(launch):
    all_shares = shares(*launch)
    shapes = {tuple(map(len, step_of(share, 3))) for share in all_shares}
    share = all_shares[0]
    assert shapes == {(share.micro_batch,) * share.micro_steps}
    assert 1 <= share.micro_batch <= launch[1]


@given(launches())
def test_no_micro_step_is_too_many(launch):
    images, batch_size, world = launch
    share = StepShare(images, batch_size, 0, world)
    assert (share.micro_steps - 1) * batch_size * world < images
    assert all(micro[0] != EMPTY for micro in step_of(share, 0))  # process 0 has work in each


@given(launches())
def test_positions_ascend_and_steps_follow_each_other(launch):
    for share in shares(*launch):
        micros = itertools.islice(share.slots(2), 3 * share.micro_steps)
        slots = list(itertools.chain.from_iterable(micros))
        positions = [slot for slot in slots if slot != EMPTY]
        assert positions == sorted(positions)
        assert slots == [s for n in (2, 3, 4) for micro in step_of(share, n) for s in micro]


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 8), st.integers(0, 100))
def test_a_fresh_run_has_no_empty_slot(world, batch_size, accumulated, step):
    for share in shares(world * batch_size * accumulated, batch_size, world):
        assert (share.micro_steps, share.micro_batch) == (accumulated, batch_size)
        assert all(EMPTY not in micro for micro in step_of(share, step))


def test_by_hand():
    micros = [step_of(share, 1) for share in shares(10, 2, 3)]  # 10 … 19 over three, four slots each
    assert micros == [[[10, 13], [16, 19]], [[11, 14], [17, EMPTY]], [[12, 15], [18, EMPTY]]]


def test_fewer_images_than_processes_are_refused():
    with pytest.raises(ValueError) as error:
        StepShare(3, 8, 0, 4)
    assert str(error.value) == "4 processes share the 3 images of a step; allowed: at most 3 processes"
