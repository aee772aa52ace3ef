"""The mathematics refuses what it can't take in one line: the argument, its type and shape, and the order."""

import itertools
from functools import partial

import pytest
import torch

from hf_ddpm.exact import ExactDenoiser
from hf_ddpm.likelihood import (
    bound_term,
    estimate_bound,
    evaluate_bound,
    image_noise,
    pilot_proposal,
    prior_kl,
    rate_distortion,
    with_variance,
)
from hf_ddpm.objectives import bound_loss, hybrid_loss, min_snr_loss, sddpm_loss, simple_loss
from hf_ddpm.parametrization import from_x0_eps, to_eps, to_score, to_x0
from hf_ddpm.process import DiffusionProcess
from tests.oracles import chain

LINEAR = chain("linear")
X = (torch.randint(256, (4, 3, 32, 32), generator=torch.Generator().manual_seed(0)) / 127.5 - 1).float()
NOISE, T = torch.randn(4, 3, 32, 32), torch.tensor([0, 5, 500, 999])


def model(x_t, t):
    return x_t


def line(call) -> str:
    with pytest.raises(ValueError) as error:
        call()
    words = str(error.value)
    assert len(words) < 300 and "\n" not in words and "tensor([" not in words
    return words


def reads(f, a, b, t):
    return f(LINEAR, "v_prediction", a, b, t)


EQUATIONS = {
    **{name: getattr(LINEAR, name) for name in ("q_sample", "q_sample_prev", "q_step", "q_posterior_mean")},
    **{name: getattr(LINEAR, name) for name in ("predict_x0", "predict_eps")},
    **{f.__name__: partial(reads, f) for f in (to_x0, to_eps, to_score, from_x0_eps)},
}


@pytest.mark.parametrize("name", EQUATIONS)
def test_equations_in_another_order(name):
    equation = EQUATIONS[name]
    for arguments in itertools.permutations([X, NOISE, T]):
        if arguments[2] is not T:
            assert "order is " in line(lambda arguments=arguments: equation(*arguments))
    for bad in (X.numpy(), X.tolist(), None, X.to(torch.uint8), X.long(), X[:2], X[:, :1], "x"):
        line(lambda bad=bad: equation(bad, NOISE, T))
        if bad is not None or not name.startswith("q_s"):  # which then draw the noise
            line(lambda bad=bad: equation(X, bad, T))


@pytest.mark.parametrize("name", EQUATIONS)
def test_steps_that_are_none(name):
    equation = EQUATIONS[name]
    bad = [T.float(), T.bool(), T[:3], T.repeat(2), T + 1, T - 1, T.tolist(), T.numpy(), None, "5", 1.5, True]
    for t in (*bad, -1, 1000, 10**30, X, T.double() / 0):
        assert "step t" in line(lambda t=t: equation(X, NOISE, t))
    line(lambda: equation(X.to("meta"), NOISE.to("meta"), T.to("meta").float()))
    line(lambda: equation(X.to("meta"), NOISE.to("meta"), T[:3].to("meta")))


@pytest.mark.parametrize("name", EQUATIONS)
def test_other_layouts_and_kinds_of_steps_change_nothing(name):
    equation = EQUATIONS[name]
    wanted = equation(X, NOISE, T)
    last = X.contiguous(memory_format=torch.channels_last)
    strided = X.transpose(2, 3).contiguous().transpose(2, 3)
    for images in (last, strided, X.clone().requires_grad_()):
        torch.testing.assert_close(equation(images, NOISE, T).detach(), wanted, rtol=0, atol=0)
    for t in (T.int(), T.to(torch.int16), T.view(4, 1)):
        assert torch.equal(equation(X, NOISE, t), wanted)
    assert equation(X[:0], NOISE[:0], T[:0]).shape == (0, 3, 32, 32)
    torch.testing.assert_close(
        equation(X[:1], NOISE[:1], T[1]), wanted[:0].new_tensor(equation(X[:1], NOISE[:1], 5).tolist())
    )
    assert equation(X.to("meta"), NOISE.to("meta"), T.to("meta")).shape == X.shape


def test_no_chain_of_these():
    for betas in (
        None,
        "linear",
        [],
        [[0.1]],
        [0.1, "x"],
        0.1,
        [0.1, None],
        object(),
        [1j],
        {},
        [0.0],
        [2.0],
    ):
        assert "betas" in line(lambda betas=betas: DiffusionProcess.from_betas(betas))
    for steps in (None, "all", [], [None], [0.5], [1000], [3, 3], [[1], [2, 3]], [True, False], object(), {}):
        line(lambda steps=steps: LINEAR.respaced(steps))
    for first in (None, 1, X, "x" * 5000):
        assert "first_variance" in line(lambda first=first: LINEAR.respaced([0, 1], first))
        assert "variance_type" in line(lambda first=first: LINEAR.log_variance(first))


HOW = {"prediction_type": "sample", "variance_type": "fixed_small"}
LOSSES = (simple_loss, min_snr_loss, bound_loss, hybrid_loss, sddpm_loss)


def test_losses_in_another_order():
    for loss in LOSSES:
        how = {"prediction_type": "sample"}
        how |= HOW if loss in (bound_loss, sddpm_loss) else {}
        more = [NOISE] if loss is sddpm_loss else []
        for arguments in itertools.permutations([X, T, NOISE]):
            if arguments[1] is not T:
                line(lambda loss=loss, a=arguments, m=more, h=how: loss(LINEAR, model, *a, *m, **h))
        words = line(lambda loss=loss, m=more, h=how: loss(model, LINEAR, X, T, NOISE, *m, **h))
        assert "process is a function" in words and "order is " in words
        for t in (T[:2], T.view(4, 1), T.float(), T + 1):
            line(lambda loss=loss, t=t, m=more, h=how: loss(LINEAR, model, X, t, NOISE, *m, **h))


def test_bounds_in_another_order():
    for f in (evaluate_bound, estimate_bound, pilot_proposal):
        for arguments in itertools.permutations([LINEAR, model, X]):
            if arguments != (LINEAR, model, X):
                line(lambda f=f, a=arguments: f(*a, **HOW))
        for images in (None, X.numpy(), X.tolist(), X[:0], X[0, 0, 0], "x", X.long()):
            line(lambda f=f, images=images: f(LINEAR, model, images, **HOW))
        for change in ({"variance_type": X}, {"prediction_type": X}, {"decoder": X}, {"clip_x0": X}):
            line(lambda f=f, change=change: f(LINEAR, model, X, **HOW | change))
        line(lambda f=f: f(LINEAR, None, X, **HOW))
        line(lambda f=f: f(LINEAR, lambda x_t, t: None, X, **HOW))
    for t in (T[:2], T.view(4, 1), T.float(), T.tolist(), None, "0", X):
        line(lambda t=t: bound_term(LINEAR, model, X, t, NOISE, **HOW))
    line(lambda: bound_term(LINEAR, model, X, NOISE, T, **HOW))
    for arguments in ((X, LINEAR), (LINEAR, None), (LINEAR, X.long())):
        line(lambda a=arguments: prior_kl(*a))
    for result in (None, X, LINEAR):
        line(lambda result=result: rate_distortion(result))
        line(lambda result=result: with_variance(result, LINEAR, "fixed_small"))


def test_numbers_that_are_none():
    for f, names in (
        (estimate_bound, ("num_evals_per_image", "num_decoder_evals", "batch_size", "seed", "image_indices")),
        (pilot_proposal, ("num_steps", "batch_size", "seed")),
    ):
        for name in names:
            for value in (-1, 1.5, "3", True, X, [None]):
                words = line(lambda f=f, o={name: value}: f(LINEAR, model, X, **HOW, **o))
                assert name in words, words
    for value in (None, 0):
        for name in ("num_evals_per_image", "batch_size"):
            assert name in line(lambda o={name: value}: estimate_bound(LINEAR, model, X, **HOW, **o))
    for indices in ([0, 1, 2, -3], [0, 1], [0.5] * 4, "abcd"):
        assert "image_indices" in line(
            lambda i=indices: estimate_bound(LINEAR, model, X, image_indices=i, **HOW)
        )
    for proposal in ("x", [1, 2], X, torch.zeros(1000)):
        assert "proposal" in line(lambda p=proposal: estimate_bound(LINEAR, model, X, proposal=p, **HOW))
    for arguments in ((-1, [0], X[:1]), (0, [-1], X[:1]), (0, [0], X)):
        line(lambda a=arguments: image_noise(*a))


def test_the_exact_denoiser():
    denoiser = ExactDenoiser(LINEAR, X)
    for arguments in ((T, X), (X.numpy(), T), (X.long(), T), (X[:, :1], T), (X, T[:3]), (X, T + 1), (X, "0")):
        line(lambda a=arguments: denoiser(*a))
    for images in (None, X.numpy(), X.long(), X[0], X[:0]):
        line(lambda images=images: ExactDenoiser(LINEAR, images))
    for changes in ({"weights": "x"}, {"weights": X}, {"chunk_size": 0}, {"chunk_size": X}):
        line(lambda c=changes: ExactDenoiser(LINEAR, X, **c))
    line(lambda: ExactDenoiser(X, LINEAR))
