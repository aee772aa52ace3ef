"""The exact bound of batches, on any chain and in any dtype, and what it refuses."""

import math

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from hf_ddpm.likelihood import bound_term, evaluate_bound, prior_kl, rate_distortion
from hf_ddpm.process import DiffusionProcess
from tests.bound_oracles import (
    LN2,
    draw,
    levels,
    toy_learned,
    toy_model,
)
from tests.oracles import (
    chain,
    near,
    spaced,
)

LINEAR = chain("linear")
SHORT = DiffusionProcess.from_betas([0.1, 0.3, 0.2, 0.5])
T_4, X_4, EPS_4 = torch.arange(4), levels(4, 1, 2, 3), draw(4, 1, 2, 3)


# Batches, chains, dtypes


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (5, 3, 5, 2), (5, 1, 7, 3), (5, 3)], ids=str)
@pytest.mark.parametrize("variance_type", ["fixed_small", "learned_range", "learned"])
def test_a_mixed_batch_equals_one_by_one(shape, variance_type):
    model = toy_model if variance_type == "fixed_small" else toy_learned
    x_0, noise, t = levels(*shape), draw(*shape), torch.tensor([2, 0, 3, 0, 1])[: shape[0]]
    options = {"variance_type": variance_type}
    term = bound_term(SHORT, model, x_0, t, noise, **options)
    output = model(SHORT.q_sample(x_0, noise, t), t)
    again = bound_term(SHORT, None, x_0, t, noise, model_output=output, **options)
    rows = [[z[i : i + 1] for z in (x_0, t, noise)] for i in range(len(t))]
    alone = [bound_term(SHORT, model, *row, **options) for row in rows]
    for key in ("nats", "x0_mse", "eps_mse"):
        assert getattr(term, key).shape == t.shape
        assert torch.equal(getattr(term, key), getattr(again, key))
        assert_allclose(getattr(term, key), torch.cat([getattr(one, key) for one in alone]), rtol=1e-13)


@pytest.mark.parametrize("process", [SHORT, spaced("linear", 10)], ids=["full", "respaced"])
@pytest.mark.parametrize("shape", [(3, 1, 3, 5), (1, 3, 2, 2), (2, 6)], ids=str)
def test_evaluate_bound_asks_every_step_once(process, shape):
    x_0, dims, steps, asked = levels(*shape), math.prod(shape[1:]), [], []
    slope, count = torch.tensor(0.3).double().requires_grad_(), len(process)

    def model(x_t, step):
        steps.append(step.tolist())
        assert (x_t.shape, x_t.dtype, step.dtype) == (shape, torch.float64, torch.int64)
        return slope * x_t

    def noise_fn(t):
        asked.append(t)
        return draw(*shape, seed=t)

    bound = evaluate_bound(process, model, x_0, variance_type="fixed_large", noise_fn=noise_fn)
    assert sorted(asked) == list(range(count))
    assert sorted(steps) == [[step] * len(x_0) for step in process.timesteps.tolist()]
    for value in (bound.terms_bpd, bound.x0_mse, bound.eps_mse):
        assert value.dtype == torch.float64 and value.shape == (len(x_0), count) and not value.requires_grad
    for value in (bound.prior_bpd, bound.total_bpd, bound.rate_bpd, bound.distortion_bpd):
        assert value.dtype == torch.float64 and value.shape == (len(x_0),) and not value.requires_grad
    for t in range(count):
        index = torch.full((len(x_0),), t)
        term = bound_term(process, model, x_0, index, draw(*shape, seed=t), variance_type="fixed_large")
        assert_allclose(bound.terms_bpd[:, t], term.nats.detach() / (dims * LN2), rtol=1e-12)
        assert_allclose(bound.x0_mse[:, t], term.x0_mse, rtol=1e-12)
        assert_allclose(bound.eps_mse[:, t], term.eps_mse, rtol=1e-12)
    assert_allclose(bound.prior_bpd, prior_kl(process, x_0) / (dims * LN2), rtol=1e-12)
    assert_allclose(bound.rate_bpd, bound.prior_bpd + bound.terms_bpd[:, 1:].sum(1), rtol=1e-12)
    assert torch.equal(bound.distortion_bpd, bound.terms_bpd[:, 0])
    assert_allclose(bound.total_bpd, bound.rate_bpd + bound.distortion_bpd, rtol=1e-12)

    curve = rate_distortion(bound)
    assert curve.bpd.shape == curve.rmse_255.shape == (count,)
    for t in range(count):
        bits = np.mean(bound.prior_bpd.numpy() + bound.terms_bpd.numpy()[:, t + 1 :].sum(1))
        assert curve.bpd[t].item() == near(bits, rel=1e-12)
        assert curve.rmse_255[t].item() == near(127.5 * np.sqrt(bound.x0_mse.numpy()[:, t].mean()), rel=1e-12)
    assert isinstance(curve.rate_bpd, float) and isinstance(curve.distortion_bpd, float)
    assert curve.rate_bpd == near(bound.rate_bpd.mean().item(), rel=1e-12)
    assert curve.distortion_bpd == near(bound.distortion_bpd.mean().item(), rel=1e-12)


def test_noise_is_fresh_at_every_step_and_reproducible():
    x_0, seen, totals = levels(2, 1, 16, 16), [], []

    def model(x_t, steps):
        seen.append(SHORT.predict_eps(x_t, x_0, steps))
        return x_t

    for seed in (0, 0, 1):
        options = {"variance_type": "fixed_small", "generator": torch.Generator().manual_seed(seed)}
        totals.append(evaluate_bound(SHORT, model, x_0, **options).total_bpd)
    assert torch.equal(totals[0], totals[1]) and not (totals[0] == totals[2]).any()
    noise = torch.cat(seen[:4]).flatten(1)  # 4 steps × 2 images: uncorrelated, with variance 1
    error = noise @ noise.T / 256 - torch.eye(8)
    assert (error.abs() < 5 * math.sqrt(2 / 256)).all()


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("error", [0, 0.05])
def test_float32_images_at_both_ends(variance_type, error):
    t, x_0, noise = torch.tensor([0, 1, 2, 998, 999]), levels(5, 3, 4, 4), draw(5, 3, 4, 4).float()

    def term(dtype):
        model, options = lambda x_t, steps: noise.to(x_t.dtype) + error, {"variance_type": variance_type}
        return bound_term(LINEAR, model, x_0.to(dtype), t, noise.to(dtype), **options)

    thin, wide = term(torch.float32), term(torch.float64)
    # x̂_0 is known to 6e-8 times √(1/ᾱ), at most 158, and σ_0 to 7e-3.
    for key, rtol, atol in [("nats", 2e-4, 1e-7), ("x0_mse", 1e-3, 1e-9), ("eps_mse", 1e-3, 1e-9)]:
        assert getattr(thin, key).dtype == torch.float64
        assert_allclose(getattr(thin, key), getattr(wide, key), rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype):
    x_0, noise, options, seen = X_4.float(), EPS_4.float(), {"variance_type": "learned_range"}, []

    def model(x_t, steps):
        seen.append(x_t.dtype)
        return toy_learned(x_t, steps).to(dtype)

    exact = bound_term(SHORT, toy_learned, X_4, T_4, EPS_4, **options).nats
    output = bound_term(SHORT, model, x_0, T_4, noise, **options).nats
    later = T_4.clamp(min=1)
    images = bound_term(SHORT, model, x_0.to(dtype), later, noise.to(dtype), **options).nats
    assert output.dtype == images.dtype == torch.float64 and seen == [torch.float32, dtype]
    assert_allclose(output, exact, rtol=0.05)
    assert_allclose(images[1:], exact[1:], rtol=0.05)
    # They can't hold the levels that L_0 is of
    for refused in (
        lambda: bound_term(SHORT, model, x_0.to(dtype), T_4, noise.to(dtype), **options),
        lambda: evaluate_bound(SHORT, model, x_0.to(dtype), **options),
    ):
        with pytest.raises(ValueError, match="half precision can't hold: pass them in float32"):
            refused()


def test_a_chain_of_one_step_has_the_decoder_only():
    process, table = DiffusionProcess.from_betas([0.5]), torch.tensor([-3.0]).double()
    bound = evaluate_bound(process, toy_model, X_4, variance_type=table)
    assert bound.terms_bpd.shape == (4, 1) and torch.equal(bound.rate_bpd, bound.prior_bpd)
    for variance_type in ("fixed_small", "fixed_large", "learned_range"):
        with pytest.raises(ValueError, match="T >= 2"):
            model = toy_learned if variance_type == "learned_range" else toy_model
            evaluate_bound(process, model, X_4, variance_type=variance_type)


# Errors

NAMES = "fixed_small, fixed_large, learned, learned_range"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"variance_type": "fixed_medium"}, f"'fixed_medium'.*{NAMES}"),
        ({"variance_type": torch.zeros(3)}, r"\(3,\).*\(4,\)"),
        ({"variance_type": torch.zeros(4, 1)}, r"\(4, 1\).*\(4,\)"),
        ({"variance_type": "learned"}, r"\(4, 1, 2, 3\).*'learned'.*\(4, 2, 2, 3\)"),
        ({"variance_type": "learned_range"}, r"\(4, 1, 2, 3\).*'learned_range'.*\(4, 2, 2, 3\)"),
        ({"model": toy_learned}, r"\(4, 2, 2, 3\).*\(4, 1, 2, 3\)"),
        ({"prediction_type": "noise"}, "'noise'.*epsilon.*score"),
        ({"decoder": "erf"}, "'erf'.*exact.*tanh"),
        ({"decoder": "erf", "t": T_4.clamp(min=1)}, "'erf'.*exact.*tanh"),
        ({"model": None}, "model and model_output"),
        ({"model_output": X_4}, "model and model_output"),
        ({"model": None, "model_output": X_4[:1]}, r"\(1, 1, 2, 3\).*\(4, 1, 2, 3\)"),
        ({"t": T_4 + 1}, r"t = 4 is .*0\.\.3"),
        ({"t": T_4 - 1}, r"-1.*0\.\.3"),
        ({"t": T_4[:3]}, r"\(3,\).*\(4,\)"),
        ({"noise": draw(4, 1, 2, 2)}, r"\(4, 1, 2, 2\).*\(4, 1, 2, 3\)"),
        ({"noise": draw(1, 1, 2, 3)}, r"\(1, 1, 2, 3\).*\(4, 1, 2, 3\)"),
    ],
)
def test_what_is_refused(changed, message):
    options = {"model": toy_model, "t": T_4, "noise": EPS_4, "variance_type": "fixed_small", **changed}
    with pytest.raises(ValueError, match=message) as caught:
        bound_term(SHORT, x_0=X_4, **options)
    assert "\n" not in str(caught.value)
    if not {"t", "model_output"} & set(changed) and options["model"] is not None:  # evaluate_bound has it too
        noise = options.pop("noise")
        del options["t"]
        with pytest.raises(ValueError, match=message):
            evaluate_bound(SHORT, x_0=X_4, noise_fn=lambda t: noise, **options)
