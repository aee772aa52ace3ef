"""importance.py: which losses it remembers, what it draws, and that a weighted mean stays the mean."""

import math

import numpy as np
import pytest
import torch

from hf_ddpm.data.order import EMPTY
from hf_ddpm.training.importance import HISTORY, LossSecondMoment, UniformSteps


def filled(*losses, repeat: int = HISTORY) -> LossSecondMoment:
    """One that has seen each step's loss ten times."""
    sampler = LossSecondMoment(len(losses))
    t = torch.arange(len(losses)).repeat(repeat)
    sampler.add(torch.arange(len(t)), t, torch.tensor(losses).repeat(repeat))
    return sampler


def by_hand(num_steps: int, events: list[tuple[int, float]]) -> np.ndarray:
    """p_t after these (t, loss), one by one, as the paper says it."""
    history = [[] for _ in range(num_steps)]
    for t, loss in events:
        history[t] = [*history[t], loss][-10:]
    if any(len(seen) < 10 for seen in history):
        return np.full(num_steps, 1 / num_steps)
    size = np.array([np.sqrt(np.mean(np.square(seen))) for seen in history])
    return 0.999 * size / size.sum() + 0.001 / num_steps


def test_uniform_until_every_step_has_ten():
    sampler = filled(1.0, 2.0, 3.0, repeat=9)
    sampler.add(torch.arange(20), torch.tensor([0, 1] * 10), torch.ones(20))
    assert sampler.probabilities.tolist() == [1 / 3] * 3
    uniforms = torch.tensor([0.0, 0.33, 0.34, 0.66, 0.67, 1 - 2**-53], dtype=torch.float64)
    assert sampler.draw(uniforms).tolist() == [0, 0, 1, 1, 2, 2]
    assert sampler.weights(torch.tensor([0, 2])).tolist() == [1, 1]


@pytest.mark.parametrize("size", [1, 7, 64])
def test_the_last_ten_losses_of_each_step_count(size):
    # Whatever the batches, and however often a step comes in one of them.
    generator = np.random.default_rng(size)
    t, losses = generator.choice(4, 700, p=[0.7, 0.1, 0.1, 0.1]), generator.exponential(size=700)
    sampler = LossSecondMoment(4)
    for start in range(0, 700, size):
        chosen = np.arange(start, min(start + size, 700))
        mixed = generator.permutation(chosen)  # processes bring them in another order
        sampler.add(*(torch.from_numpy(z[mixed]) for z in (np.arange(700), t, losses)))
        expected = by_hand(4, list(zip(t[: chosen[-1] + 1], losses, strict=False)))
        np.testing.assert_allclose(sampler.probabilities, expected, rtol=1e-12)
    assert not np.allclose(sampler.probabilities, 0.25, rtol=0.01)


def test_empty_slots_are_no_losses():
    sampler, same = filled(1.0, 3.0), filled(1.0, 3.0)
    positions = torch.tensor([20, EMPTY, 21, EMPTY])
    sampler.add(positions, torch.tensor([1, 0, 0, 1]), torch.tensor([9.0, math.nan, 4.0, 1e9]))
    same.add(torch.tensor([20, 21]), torch.tensor([1, 0]), torch.tensor([9.0, 4.0]))
    assert torch.equal(sampler.probabilities, same.probabilities)
    assert torch.equal(sampler.state_dict()["counts"], torch.tensor([11, 11]))


def test_steps_come_as_often_as_they_should_and_the_mean_is_kept():
    sampler, count = filled(0.0, 1.0, 5.0, 2.0), 100_000
    uniforms = torch.rand(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = sampler.draw(uniforms)
    p = sampler.probabilities
    error = (p * (1 - p) / count).sqrt()
    assert ((t.bincount(minlength=4) / count - p).abs() < 5 * error).all()
    f = torch.tensor([3.0, -1.0, 10.0, 0.5], dtype=torch.float64)
    weighted = f[t] * sampler.weights(t)
    assert (weighted.mean() - f.mean()).abs() < 5 * weighted.std() / math.sqrt(count)
    assert (p * f * sampler.weights(torch.arange(4))).sum().item() == pytest.approx(
        f.mean().item(), rel=1e-14
    )


def test_losses_of_zero_leave_it_uniform():
    assert filled(0.0, 0.0).probabilities.tolist() == [0.5, 0.5]


def test_it_goes_on_from_its_state():
    sampler, other = filled(1.0, 2.0, 0.5), LossSecondMoment(3)
    other.load_state_dict(sampler.state_dict())
    for both in (sampler, other):
        both.add(torch.tensor([30, 31]), torch.tensor([2, 2]), torch.tensor([7.0, 8.0]))
    assert torch.equal(sampler.probabilities, other.probabilities)
    assert not torch.equal(sampler.probabilities, filled(1.0, 2.0, 0.5).probabilities)
    for state, count in ((sampler.state_dict(), 3), ({}, 0)):
        with pytest.raises(ValueError, match=f"losses of {count} steps; allowed: of 4"):
            LossSecondMoment(4).load_state_dict(state)


def test_what_is_noted_in_micro_steps_is_added_at_the_end_of_the_step():
    sampler, same, gathered = filled(1.0, 3.0), filled(1.0, 3.0), []

    def gather(columns):
        gathered.append(columns)
        return columns

    present = torch.tensor([True, False])
    for positions, losses in (([20, EMPTY], [9.0, 1e9]), ([22, EMPTY], [4.0, math.nan])):
        sampler.note(positions, torch.tensor([0, 1]), present, torch.tensor(losses))
    assert torch.equal(sampler.probabilities, same.probabilities)
    sampler.update(gather)
    same.add(torch.tensor([20, 22]), torch.tensor([0, 0]), torch.tensor([9.0, 4.0]))
    assert torch.equal(sampler.probabilities, same.probabilities)
    assert gathered[0][0].tolist() == [20, EMPTY, 22, EMPTY]
    sampler.note([30, 31], torch.tensor([0, 1]), torch.ones(2, dtype=torch.bool), torch.ones(2))
    sampler.update(gather)
    assert gathered[1][0].tolist() == [30, 31]  # each step begins anew


def test_uniform_steps_have_the_same_methods_and_learn_nothing():
    steps = UniformSteps(4)
    public = [name for name in dir(UniformSteps) if not name.startswith("_")]
    assert all(callable(getattr(LossSecondMoment, name)) for name in public)
    uniforms = torch.tensor([0.0, 0.24, 0.25, 0.99, 1 - 2**-53], dtype=torch.float64)
    t = steps.draw(uniforms)
    assert t.tolist() == [0, 0, 1, 3, 3] and steps.weights(t).tolist() == [1] * 5
    steps.note([1], t[:1], torch.tensor([True]), torch.tensor([2.0]))
    steps.update(lambda columns: pytest.fail("processes have nothing to tell each other"))
    steps.load_state_dict(steps.state_dict())
    assert steps.state_dict() == {}
