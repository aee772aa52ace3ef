"""gaussian.py, likelihood/: images that are not on the 256 levels are refused, and those that are, never."""

import numpy as np
import pytest
import torch

from hf_ddpm.exact import ExactDenoiser
from hf_ddpm.gaussian import discretized_gaussian_log_likelihood
from hf_ddpm.likelihood import bound_term, estimate_bound, evaluate_bound, pilot_proposal
from hf_ddpm.scheduler import DDPMScheduler
from tests.oracles import chain

LINEAR = chain("linear")
BYTES = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
X = BYTES.float() / 127.5 - 1
SAYS = {"variance_type": "fixed_small", "prediction_type": "sample"}


def model(x_t, t):
    return 0.9 * x_t


ENTRANCES = {
    "bound_term": lambda x: bound_term(LINEAR, model, x, 0, torch.zeros_like(x), **SAYS).nats,
    "bound_term of some": lambda x: (
        bound_term(
            LINEAR, model, torch.cat([x, x]), torch.tensor([5, 0]), torch.zeros(2, *x.shape[1:]).to(x), **SAYS
        ).nats
    ),
    "evaluate_bound": lambda x: (
        evaluate_bound(
            LINEAR.respaced([0, 500]), model, x, generator=torch.Generator().manual_seed(0), **SAYS
        ).total_bpd
    ),
    "estimate_bound": lambda x: estimate_bound(LINEAR, model, x, num_evals_per_image=2, **SAYS).per_image_bpd,
    "pilot_proposal": lambda x: pilot_proposal(LINEAR, model, x, num_steps=1, **SAYS),
    "decoder": lambda x: discretized_gaussian_log_likelihood(x, x, -9.0),
    "scheduler": lambda x: DDPMScheduler().decoder_log_likelihood(x, x),
}


@pytest.mark.parametrize("name", ENTRANCES)
@pytest.mark.parametrize(
    ("images", "words"),
    [
        (BYTES / 255, r"\[., 0, 0, 0\] is 0, none of .* did you mean 2 \* x - 1\?"),
        (BYTES.float(), r"\[., 0, 0, 0\] is 0, none of .* did you mean x / 127\.5 - 1\?"),
        (torch.randn(1, 1, 16, 16).clamp(-1, 1), "none of the 256 levels"),
        (X.bfloat16().float(), "rounded to half precision"),
        (X.half().float(), "rounded to half precision"),
        (X.bfloat16(), "bfloat16 tensor .* pass them in float32"),
        (X.half(), "float16 tensor .* pass them in float32"),
        (X.where(BYTES != 40, torch.nan), r"\[., 0, 2, 8\] is nan"),
        (X.where(BYTES != 255, torch.inf), r"\[., 0, 15, 15\] is inf"),
        (X + 2 / 255, r"\[., 0, 15, 15\] is 1\.00784"),
        (X - 0.5, "none of the 256 levels"),
        (X * 127.5 / 128, "none of the 256 levels"),
    ],
    ids=range(12),
)
def test_images_that_are_none(name, images, words):
    with pytest.raises(ValueError, match=words) as error:
        ENTRANCES[name](images)
    assert len(str(error.value)) < 300 and "\n" not in str(error.value)


@pytest.mark.parametrize("name", [name for name in ENTRANCES if name != "bound_term of some"])
def test_whole_numbers_are_no_images(name):
    for images in (BYTES, BYTES.long(), BYTES.bool()):
        with pytest.raises(ValueError, match=r"tensor of shape \(1, 1, 16, 16\); allowed: .*float") as error:
            ENTRANCES[name](images)
        assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    "spelling",
    [
        lambda u: u / 127.5 - 1,
        lambda u: 2 * (u / 255) - 1,
        lambda u: u / 255 * 2 - 1,
        lambda u: (u / 255 - 0.5) / 0.5,
        lambda u: (u - 127.5) / 127.5,
        lambda u: u * (1 / 255) * 2 - 1,
        lambda u: torch.lerp(torch.tensor(-1.0).to(u), torch.tensor(1.0).to(u), u / 255),
        lambda u: torch.linspace(-1, 1, 256).to(u)[u.long()],
    ],
    ids=range(8),
)
def test_every_usual_spelling_passes_and_means_the_same(spelling):
    exact = BYTES.double() / 127.5 - 1
    spelled = [spelling(BYTES.to(dtype)) for dtype in (torch.float32, torch.float64)]
    for x in (*spelled, spelled[1].float(), torch.from_numpy(np.asarray(spelled[1])).float()):
        for name in ("bound_term", "decoder", "scheduler"):
            torch.testing.assert_close(
                ENTRANCES[name](x).double(), ENTRANCES[name](exact), rtol=1e-4, atol=1e-4
            )


def test_layouts_and_gradients_change_nothing():
    x = X.expand(2, 3, 16, 16)
    last = x.contiguous(memory_format=torch.channels_last)
    wanted = discretized_gaussian_log_likelihood(x.contiguous(), x, -9.0)
    assert torch.equal(discretized_gaussian_log_likelihood(last, last, -9.0), wanted)
    grown = x.clone().requires_grad_()
    discretized_gaussian_log_likelihood(grown, x, -9.0).sum().backward()
    assert grown.grad is not None and estimate_bound(LINEAR, model, grown, num_evals_per_image=2).bpd > 0


def test_later_terms_are_of_any_images():
    """A KL is one of any real numbers: only L_0 is of 8-bit images."""
    x = torch.randn(2, 1, 2, 2)
    mixed = torch.cat([x, X[:, :, :2, :2]])
    noise = torch.zeros_like(mixed)
    assert bound_term(LINEAR, model, mixed, torch.tensor([3, 999, 0]), noise, **SAYS).nats.isfinite().all()
    meta = X.to("meta")
    assert bound_term(LINEAR, model, meta, 0, meta, **SAYS).nats.shape == (1,)


def test_the_exact_denoiser_is_scored_on_its_own_images():
    images = torch.cat([X, X.flip(-1)])
    bound = evaluate_bound(LINEAR.respaced([0, 300, 900]), ExactDenoiser(LINEAR, images), images, **SAYS)
    assert bound.total_bpd.isfinite().all()
