"""scheme.py: decode is the inverse of encode, and the bits are those of the bound."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_ddpm.compression.coder import Exhausted, Stack
from hf_ddpm.compression.scheme import Chain, WrongAnswer
from hf_ddpm.decoders import LevelsDecoder, smoothed_levels
from hf_ddpm.exact import ExactDenoiser
from hf_ddpm.gaussian import discretized_gaussian_log_likelihood
from hf_ddpm.likelihood import evaluate_bound, mean_and_stderr
from hf_ddpm.process import DiffusionProcess
from hf_ddpm.variances import VALUE_BINS, VarianceByValue
from tests.toy import mixture_denoiser, mixture_images

WHOLE = DiffusionProcess.linear(1000)


def stack(words, seed=0):
    return Stack(np.random.default_rng(seed).integers(0, 2**32, words, dtype=np.uint32), sealed=True)


def levels(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def squashed(x_t, t):
    """A network that knows nothing, but answers something else at every x_t and t."""
    return torch.tanh(x_t.flip(-1) + 0.001 * t.view(-1, 1, 1, 1).to(x_t.dtype))


def twice(x_t, t):
    """One that learns variances."""
    return torch.cat([squashed(x_t, t), 0.8 * torch.sin(3 * x_t)], 1)


def by_value(process):
    """Variances that differ between values."""
    rows = process.log_fixed_large[:, None] + 0.5 * torch.linspace(-1, 1, VALUE_BINS, dtype=torch.float64)
    return VarianceByValue(rows)


VARIANCES = {
    "fixed_large": lambda process: "fixed_large",
    "fixed_small": lambda process: "fixed_small",
    "numbers": lambda process: process.log_fixed_large - 0.3,
    "by value": by_value,
    "learned_range": lambda process: "learned_range",
    "learned": lambda process: "learned",
}


@settings(max_examples=40, deadline=None)
@given(
    channels=st.integers(1, 3),
    height=st.integers(1, 5),
    width=st.integers(1, 6),
    batches=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    steps=st.lists(st.integers(0, 999), min_size=2, max_size=6, unique=True),
    width_of_bins=st.sampled_from([0.25, 0.5, 1.0, 2.0]),
    parts=st.sampled_from([1, 4, 16, 33]),
    kind=st.sampled_from(sorted(VARIANCES)),
    prediction=st.sampled_from(["epsilon", "sample", "v_prediction"]),
    knows_levels=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 100),
)
def test_decode_is_the_inverse_of_encode(
    channels, height, width, batches, steps, width_of_bins, parts, kind, prediction, knows_levels, dtype, seed
):
    process = WHOLE.respaced(steps)
    model = twice if kind.startswith("learned") else squashed
    counts = torch.from_numpy(levels((channels, 256), seed).astype(np.int64))
    decoder = LevelsDecoder(smoothed_levels(counts), torch.tensor(-3.0)) if knows_levels else "exact"
    chain = Chain(
        process,
        model,
        (channels, height, width),
        prediction,
        VARIANCES[kind](process),
        decoder,
        dtype=dtype,
        bin_width=width_of_bins,
        parts=parts,
    )
    images = [levels((batch, channels, height, width), seed + i) for i, batch in enumerate(batches)]
    one = stack(4000, seed)
    begun = one.words
    for batch in images:
        chain.encode(one, batch)
    for batch in images[::-1]:
        assert np.array_equal(chain.decode(one, len(batch)), batch)
    assert np.array_equal(one.words, begun)


def test_a_chain_of_one_step():
    process = WHOLE.respaced([300])
    chain = Chain(process, squashed, (1, 3, 3), "sample", torch.tensor([-4.0]))
    one, images = stack(100), levels((2, 1, 3, 3))
    begun = one.words
    chain.encode(one, images)
    assert np.array_equal(chain.decode(one, 2), images) and np.array_equal(one.words, begun)


def test_labels_reach_the_network_both_ways():
    def shifted(x_t, t, labels):
        seen.append(labels.tolist())
        return squashed(x_t, t) + 0.3 * labels.view(-1, 1, 1, 1)

    process, seen = WHOLE.respaced([0, 100, 500]), []
    chain = Chain(process, shifted, (1, 3, 3), "sample")
    one, images, labels = stack(200), levels((2, 1, 3, 3)), np.array([0, 2])
    chain.encode(one, images, labels)
    assert np.array_equal(chain.decode(one, 2, labels), images)
    assert seen == [[0, 2]] * 6


# Bits


def path_bits(chain, images, seed, masses):
    """−log2 of the path that the coder takes, from the chain's definitions, and the coder's own bits.

    Of the latents, these are the masses of their bins, or the densities that a bound has.
    """
    one, drawn = stack(100_000, seed), []
    draw = one.draw
    one.draw = lambda law: drawn.append(draw(law)) or drawn[-1]
    before = len(one)
    chain.encode(one, images)
    bits = 32 * (len(one) - before)
    z = [torch.from_numpy((k * d).reshape(images.shape)) for k, d in zip(drawn, chain.delta, strict=True)]
    x_0, process = torch.from_numpy(images / 127.5 - 1), chain.process

    def log_p(t, mean, std):
        """Of z_t, under a Gaussian."""
        if not masses:
            return torch.distributions.Normal(mean, std).log_prob(z[t]).sum()
        half = chain.delta[t] / 2
        low, high = ((abs(z[t] - mean) + side * half) / std for side in (-1, 1))
        return (torch.special.ndtr(-low) - torch.special.ndtr(-high)).log().sum()

    total = -log_p(-1, torch.tensor(0.0), torch.tensor(1.0))
    for t, z_before in enumerate([x_0, *z[:-1]]):
        total += log_p(t, process.sqrt_alphas[t] * z_before, process.betas[t].sqrt())
    for t in range(1, len(process)):
        mean_x0, groups = chain.answer(z[t].numpy(), t)
        c0, ct = process.posterior_mean_coef_x0[t], process.posterior_mean_coef_xt[t]
        mean = c0 * torch.from_numpy(mean_x0) + ct * z[t]
        total -= log_p(t - 1, mean, torch.from_numpy(chain.std_p[t][groups]))
    mean_x0, groups = (torch.from_numpy(found) for found in chain.answer(z[0].numpy(), 0))
    if isinstance(chain.decoder, LevelsDecoder):
        total -= chain.decoder.log_likelihood(x_0, mean_x0).sum()
    else:
        log_variance = 2 * torch.from_numpy(chain.std_p[0])[groups].log()
        total -= discretized_gaussian_log_likelihood(x_0, mean_x0, log_variance).sum()
    return float(total) / math.log(2), bits


def toy_chain(steps, **options):
    """A chain of the toy, with the variances that its errors ask for, and images in grey levels."""
    process = WHOLE.respaced(steps)
    x_0 = mixture_images(300)
    terms = evaluate_bound(process, mixture_denoiser(), x_0[:100], prediction_type="sample")
    gap = process.snr[:-1] - process.snr[1:]
    log_variance = torch.full((len(process),), -6.4, dtype=torch.float64)
    later = process.posterior_variance[1:].log() + torch.log1p(gap * terms.x0_mse.mean(0)[1:])
    log_variance[1:] = later
    chain = Chain(process, mixture_denoiser(), (1, 8, 8), "sample", log_variance, **options)
    return chain, x_0, ((x_0 + 1) * 127.5).round().numpy().astype(np.uint8)


@pytest.mark.parametrize("masses, bin_width", [(True, 1.0), (False, 0.125)], ids=["masses", "densities"])
@pytest.mark.parametrize("decoder", ["exact", "levels"])
@pytest.mark.parametrize("steps", [5, 50, 100])
def test_net_bits_are_those_of_the_path(steps, decoder, masses, bin_width):
    if decoder == "levels":
        decoder = LevelsDecoder(torch.zeros(1, 256), torch.tensor(-3.2))
    spaced = np.linspace(2, 900, steps).astype(int).tolist()
    chain, _, images = toy_chain(spaced, decoder=decoder, bin_width=bin_width)
    ideal, bits = path_bits(chain, images[:64], steps, masses)
    assert abs(bits - ideal) / images[:64].size < 0.005 + 64 / images[:64].size


@pytest.mark.parametrize("steps", [10, 50])
def test_the_average_is_the_bound(steps):
    chain, x_0, images = toy_chain(np.linspace(1, 900, steps).astype(int).tolist())
    _, bits = path_bits(chain, images, 0, True)
    how = {"variance_type": chain.variance, "prediction_type": "sample"}
    bound = evaluate_bound(chain.process, chain.model, x_0, **how).total_bpd
    mean, stderr = mean_and_stderr(bound)
    assert abs(bits / images.size - mean) < 3 * stderr
    assert stderr < 0.1 * mean  # so that it can fail


def test_a_denoiser_that_knows_the_images_needs_their_names_alone():
    """7 bits tell 128 images apart, and the rest is what the Gaussian decoder leaves of each pixel."""
    x_0 = mixture_images(128, seed=1)
    process = WHOLE.respaced([0, 3, 10, 40, 90, 170, 300, 500, 700, 900])
    chain = Chain(process, ExactDenoiser(WHOLE, x_0), (1, 8, 8), "sample", "fixed_small")
    images = ((x_0 + 1) * 127.5).round().numpy().astype(np.uint8)
    _, bits = path_bits(chain, images, 0, True)
    bound = evaluate_bound(
        process, chain.model, x_0, variance_type="fixed_small", prediction_type="sample"
    ).total_bpd
    mean, stderr = mean_and_stderr(bound)
    assert abs(bits / images.size - mean) < 3 * stderr + 0.02
    assert 7 / 64 < bits / images.size < 2


# Refusals


def test_too_few_bits():
    chain = Chain(WHOLE.respaced([0, 500]), squashed, (1, 8, 8), "sample")
    with pytest.raises(Exhausted):
        chain.encode(stack(5), levels((4, 1, 8, 8)))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("clip", [True, False])
def test_answers_that_are_not_finite_are_refused(value, clip):
    chain = Chain(
        WHOLE.respaced([0, 500]), lambda x, t: x * value, (1, 4, 4), "sample", "fixed_large", clip_x0=clip
    )
    if clip and value == math.inf:  # which a clip makes 1 or −1 of
        return
    with pytest.raises(WrongAnswer, match="not finite"):
        chain.encode(stack(1000), levels((4, 1, 4, 4)))


def test_an_answer_that_is_far_too_large_is_refused():
    chain = Chain(WHOLE.respaced([0, 500]), lambda x, t: x * 1e20, (1, 4, 4), "sample", clip_x0=False)
    with pytest.raises(ValueError, match=r"allowed|far too large"):
        chain.encode(stack(1000), levels((4, 1, 4, 4)))


def test_a_decoder_of_other_channels_is_refused():
    with pytest.raises(ValueError, match="3 channels"):
        Chain(WHOLE, squashed, (1, 4, 4), decoder=LevelsDecoder(torch.zeros(3, 256), torch.tensor(-3.0)))
    with pytest.raises(ValueError, match="decoder is 'tanh'"):
        Chain(WHOLE, squashed, (1, 4, 4), decoder="tanh")


def test_the_digest_tells_tables_apart():
    process = WHOLE.respaced([0, 10, 500])
    chains = [
        Chain(process, squashed, (1, 4, 4), "sample"),
        Chain(process, squashed, (1, 4, 4), "sample", "fixed_small"),
        Chain(process, squashed, (1, 4, 4), "sample", bin_width=0.5),
        Chain(process, squashed, (1, 4, 4), "sample", parts=8),
        Chain(process, squashed, (1, 4, 4), "epsilon"),
        Chain(process, squashed, (1, 4, 4), "sample", clip_x0=False),
        Chain(process, squashed, (1, 4, 5), "sample"),
        Chain(WHOLE.respaced([0, 11, 500]), squashed, (1, 4, 4), "sample"),
        Chain(
            process,
            squashed,
            (1, 4, 4),
            "sample",
            decoder=LevelsDecoder(torch.zeros(1, 256), torch.tensor(-3.0)),
        ),
    ]
    assert len({chain.digest for chain in chains}) == len(chains)


def test_the_answers_tell_networks_apart_and_nothing_below_2_to_the_minus_24():
    def chain(model, dtype=torch.float64):
        return Chain(WHOLE.respaced([0, 10, 500]), model, (1, 4, 4), "sample", dtype=dtype)

    digest = chain(squashed).answers_digest([1, 3])
    assert digest == chain(lambda x, t: squashed(x, t) * (1 + 1e-13)).answers_digest([1, 3])
    assert digest != chain(lambda x, t: squashed(x, t) * (1 + 1e-5)).answers_digest([1, 3])
    assert digest != chain(squashed).answers_digest([2])
    single = chain(squashed, torch.float32).answers_digest([1])
    assert single != chain(lambda x, t: squashed(x, t) * (1 + 1e-6), torch.float32).answers_digest([1])
