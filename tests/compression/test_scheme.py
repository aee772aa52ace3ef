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
from hf_ddpm.likelihood import evaluate_bound
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


def by_value(process, scale=0.5):
    """Variances that differ between values, which no network was asked for."""
    rows = process.log_fixed_large[:, None] + scale * torch.linspace(-1, 1, VALUE_BINS, dtype=torch.float64)
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


def path_bits(chain, images, seed):
    """−log2 of the densities of the path that the coder takes, from their definitions, and its own bits."""
    one, pops, z = stack(100_000, seed), [], []
    draw = Stack.draw

    def watched(self, law):
        pops.append(draw(self, law))
        return pops[-1]

    Stack.draw = watched
    try:
        before = len(one)
        chain.encode(one, images)
    finally:
        Stack.draw = draw
    z = [torch.from_numpy((k * d).reshape(images.shape)) for k, d in zip(pops, chain.delta, strict=True)]
    x_0, process, total = torch.from_numpy(images / 127.5 - 1), chain.process, 0.0
    log_normal = lambda x, mean, std: torch.distributions.Normal(mean, std).log_prob(x).sum()  # noqa: E731
    before_z = [x_0, *z[:-1]]
    for t in range(len(process)):
        total += log_normal(z[t], process.sqrt_alphas[t] * before_z[t], process.betas[t].sqrt())
    total -= log_normal(z[-1], torch.tensor(0.0), torch.tensor(1.0))
    for t in range(1, len(process)):
        mean_x0, groups = chain.answer(z[t].numpy(), t)
        c0, ct = process.posterior_mean_coef_x0[t], process.posterior_mean_coef_xt[t]
        std = torch.from_numpy(chain.std_p[t][groups])
        total -= log_normal(z[t - 1], c0 * torch.from_numpy(mean_x0) + ct * z[t], std)
    mean_x0, groups = chain.answer(z[0].numpy(), 0)
    if isinstance(chain.decoder, LevelsDecoder):
        total -= chain.decoder.log_likelihood(x_0, torch.from_numpy(mean_x0)).sum()
    else:
        mean, std = torch.from_numpy(mean_x0), torch.from_numpy(chain.std_p[0][groups])
        high = torch.where(x_0 == 1, torch.inf, (x_0 - mean + 1 / 255) / std)
        low = torch.where(x_0 == -1, -torch.inf, (x_0 - mean - 1 / 255) / std)
        total -= (torch.special.ndtr(high) - torch.special.ndtr(low)).log().sum()
    return float(total) / math.log(2), 32 * (len(one) - before)


@pytest.mark.parametrize("decoder", ["exact", "levels"])
@pytest.mark.parametrize("steps", [5, 20, 50])
def test_net_bits_are_those_of_the_path(steps, decoder):
    process = WHOLE.respaced(np.linspace(2, 900, steps).astype(int).tolist())
    x_0 = mixture_images(64)
    images = ((x_0 + 1) * 127.5).round().numpy().astype(np.uint8)
    if decoder == "levels":
        counts = torch.from_numpy(np.bincount(images.ravel(), minlength=256))[None]
        decoder = LevelsDecoder(smoothed_levels(counts), torch.tensor(-3.2))
    log_variance = process.log_fixed_large.clone()
    log_variance[0] = -6.4
    chain = Chain(process, mixture_denoiser(), (1, 8, 8), "sample", log_variance, decoder)
    ideal, bits = path_bits(chain, images, steps)
    assert abs(bits - ideal) / images.size < 0.005 + 64 / images.size


def test_the_average_is_the_bound():
    """Of images, and of a denoiser that knows them all: L_0 and the rate are those of `evaluate_bound`."""
    process = WHOLE.respaced([0, 10, 40, 90, 170, 300, 500, 700, 900])
    x_0 = mixture_images(200, seed=3)
    images = ((x_0 + 1) * 127.5).round().numpy().astype(np.uint8)
    model = ExactDenoiser(WHOLE, mixture_images(300, seed=1))
    chain = Chain(process, model, (1, 8, 8), "sample", "fixed_large")
    _, bits = path_bits(chain, images, 0)
    bound = evaluate_bound(process, model, x_0, variance_type="fixed_large", prediction_type="sample")
    bpd = np.asarray(bound.per_image_bpd) if hasattr(bound, "per_image_bpd") else bound.bpd
    assert abs(bits / images.size - np.mean(bpd)) < 5 * bound.stderr / 2 + 0.01


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
    with pytest.raises(ValueError, match="allowed|far too large"):
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
