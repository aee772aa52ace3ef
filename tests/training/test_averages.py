"""averages.py: the moving averages against their definition in float64, and against diffusers' warm-up."""

import copy

import numpy as np
import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import nn

from hf_ddpm.training.averages import average_of, decay_at, rest_of, update_average

DECAYS = (0.0, 0.5, 0.999, 0.9999)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2, bias=False)).train()


def shake(model, step, lr=0.1):
    """What a training step does to weights and buffers, reproducibly."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight += lr * torch.randn(weight.shape, generator=generator)
        model(torch.randn(8, 3, generator=generator))


def flat(model):
    return np.concatenate([weight.detach().double().numpy().ravel() for weight in model.parameters()])


@pytest.mark.parametrize("decay", DECAYS)
def test_against_a_float64_recursion(decay):
    model = network()
    average, mean = average_of(model), flat(model)
    for n in range(60):
        shake(model, n)
        update_average(average, model, decay, n)
        d = min(decay, (1 + n) / (10 + n)) if n > 0 else 0.0
        mean = d * mean + (1 - d) * flat(model)
        np.testing.assert_allclose(flat(average), mean, rtol=1e-5, atol=1e-6)
    if decay > 0.5:
        assert np.abs(flat(average) - flat(model)).max() > 0.1


@pytest.mark.parametrize("decay", DECAYS)
def test_the_first_step_copies(decay):
    model = network()
    average = average_of(model)
    shake(model, 0, lr=1e3)
    update_average(average, model, decay, 0)
    assert all(map(torch.equal, average.parameters(), model.parameters()))


@pytest.mark.parametrize("decay", DECAYS)
def test_the_warm_up_is_that_of_diffusers(decay):
    ema = EMAModel([nn.Parameter(torch.zeros(1))], decay=decay, use_ema_warmup=False)
    for n in (*range(200), 1000, 8989, 8990, 8991, 10**5, 10**7):
        assert decay_at(decay, n) == ema.get_decay(n + 1)  # it counts a step before it asks


def test_steps_are_those_of_diffusers():
    model = network()
    average = average_of(model)
    ema = EMAModel(model.parameters(), decay=0.7)
    for n in range(40):
        shake(model, n)
        update_average(average, model, 0.7, n)
        ema.step(model.parameters())
    torch.testing.assert_close(list(average.parameters()), ema.shadow_params, rtol=1e-5, atol=1e-6)


def test_small_steps_are_not_lost():
    """In half precision a weight at 1 can't follow by 1e-4 of a difference of 0.01."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    average = average_of(model)
    nn.init.constant_(model.weight, 1.01)
    for _ in range(1000):
        update_average(average, model, 0.9999, 10**6)
    expected = 1.01 - 0.01 * 0.9999**1000
    assert average.weight.dtype == torch.float32
    assert float(average.weight) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("decay", [0.999, 0.9999, 0.99999, 0.999999, 1 - 1e-9])
@pytest.mark.parametrize("gap", [1e-1, 1e-3, 1e-5])
def test_no_step_is_too_small(decay, gap):
    """The weight goes one way and then the other; float32 alone stands still, or goes too far."""
    weight = torch.tensor([0.7, -1.3, 3e-4])
    model = nn.ParameterList([weight.clone()])
    average = average_of(model)
    mean = weight.double().numpy()
    for n in range(3000):
        away = weight * (1 + gap * (1 if n < 2000 else -0.5))
        with torch.no_grad():
            model[0].copy_(away)
        update_average(average, model, decay, 10**12 + n)
        mean = decay * mean + (1 - decay) * away.double().numpy()
    exact = np.abs(np.float32(mean) - mean)  # what float32 can't hold of it
    found, rest = (next(z.parameters()).double().numpy() for z in (average, rest_of(average)))
    assert (np.abs(found - mean) <= exact + 1e-8 * np.abs(mean)).all()
    np.testing.assert_allclose(found + rest, mean, rtol=1e-8)


def test_the_rest_is_what_float32_leaves_out():
    """A weight of another size than its average, where the smaller number of a sum is the average."""
    model = nn.ParameterList([torch.tensor([0.0, 1e-8, 1.0])])
    average = average_of(model)
    with torch.no_grad():
        model[0].copy_(torch.tensor([1.0, 1e8, 1e-8]))
    update_average(average, model, 0.9, 10**6)
    mean, rest = (next(z.parameters()) for z in (average, rest_of(average)))
    assert torch.equal(mean + rest, mean) and not rest.requires_grad
    exact = torch.tensor([0.1, 0.1 * 1e8, 0.9]).double() + torch.tensor([0, 0.9 * 1e-8, 0.1 * 1e-8]).double()
    torch.testing.assert_close(mean.double() + rest, exact, rtol=1e-7, atol=0)


def test_going_on_from_both_halves_changes_no_bit():
    model, ends = network(), []
    for broken in (False, True):
        average = average_of(model)
        for n in range(40):
            shaken = network()
            shake(shaken, n)
            if broken and n == 20:
                halves = [copy.deepcopy(z.state_dict()) for z in (average, rest_of(average))]
                average = average_of(shaken)
                for part, state in zip((average, rest_of(average)), halves, strict=True):
                    part.load_state_dict(state)
            update_average(average, shaken, 0.9999, 10**6 + n)
        ends.append([*average.parameters(), *rest_of(average).parameters()])
        assert any(rest.abs().max() > 0 for rest in rest_of(average).parameters())
    assert all(map(torch.equal, *ends))


def test_many_weights_are_moved_piece_by_piece(monkeypatch):
    model = network()
    whole, pieces = average_of(model), average_of(model)
    for n in range(5):
        shake(model, n)
        update_average(whole, model, 0.9, 100 + n)
        with monkeypatch.context() as patch:
            patch.setattr("hf_ddpm.training.averages.PIECE", 5)
            update_average(pieces, model, 0.9, 100 + n)
    assert all(map(torch.equal, whole.parameters(), pieces.parameters()))


def test_buffers_are_copied_not_averaged():
    model = network()
    average = average_of(model)
    for n in range(5):
        shake(model, n)
        update_average(average, model, 0.9999, n + 1000)
    assert all(map(torch.equal, average.buffers(), model.buffers()))
    assert average[1].num_batches_tracked == 5  # type: ignore[index]
    assert average[1].running_mean is not model[1].running_mean  # type: ignore[index]


def test_frozen_weights_stay_to_the_last_bit():
    model = network()
    frozen = model[0].requires_grad_(False).weight  # type: ignore[index]
    before = frozen.clone()
    average = average_of(model)
    for n in range(50):
        shake(model, n)
        update_average(average, model, 0.99, n)
    assert torch.equal(average[0].weight, before) and torch.equal(frozen, before)  # type: ignore[index]


def test_the_copy_is_of_its_own_and_only_for_looking():
    model = network()
    average = average_of(model)
    assert not average.training and model.training
    assert not any(weight.requires_grad for weight in average.parameters())
    assert all(weight.requires_grad for weight in model.parameters())
    before = flat(average)
    shake(model, 0)
    assert np.array_equal(flat(average), before)


def test_tied_weights_move_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(2, 2, bias=False)
            self.b = nn.Linear(2, 2, bias=False)
            self.b.weight = self.a.weight

    model = Tied()
    average = average_of(model)
    assert average.a.weight is average.b.weight
    old, new = average.a.weight.clone(), model.a.weight.detach() + 1
    model.a.weight.data += 1
    update_average(average, model, 0.75, 10**4)
    torch.testing.assert_close(average.a.weight, 0.75 * old + 0.25 * new)
