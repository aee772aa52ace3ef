"""scheduler.py as a drop-in: diffusers' contract, and the same images where the stock scheduler is right."""

import copy
import inspect
import pickle

import diffusers
import numpy as np
import pytest
import torch
from diffusers.training_utils import compute_snr

from hf_ddpm.gaussian import discretized_gaussian_log_likelihood
from hf_ddpm.scheduler import DDPMScheduler

SHAPE = (2, 3, 4, 4)
KEYS = inspect.signature(diffusers.DDPMScheduler.__init__).parameters.keys() - {"self"}


def draw(seed=0, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def run(scheduler, num_steps, dtype=torch.float32):
    """A whole sampling run with a fixed smooth function in the network's place."""
    x, noise = draw().to(dtype), generator(1)
    scheduler.set_timesteps(num_steps)
    for t in scheduler.timesteps:
        x = scheduler.step(torch.tanh(0.7 * x + 0.1), t, x, generator=noise).prev_sample
    return x


# Drop-in


def test_signature_and_config_are_the_stock_ones():
    stock, ours = (inspect.signature(c.__init__).parameters for c in (diffusers.DDPMScheduler, DDPMScheduler))
    assert {k: p.default for k, p in ours.items()} == {k: p.default for k, p in stock.items()}
    stock, ours = (
        {k: v for k, v in c().config.items() if k[0] != "_"} for c in (diffusers.DDPMScheduler, DDPMScheduler)
    )
    assert ours == stock
    assert set(vars(diffusers.DDPMScheduler())) - {"variance_type"} <= set(vars(DDPMScheduler()))
    for name in ("step", "set_timesteps", "add_noise", "get_velocity", "scale_model_input"):
        stock, ours = (
            list(inspect.signature(getattr(c, name)).parameters)
            for c in (diffusers.DDPMScheduler, DDPMScheduler)
        )
        assert ours == stock


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"])
def test_float32_tables_agree_with_the_stock_ones(schedule):
    stock, ours = diffusers.DDPMScheduler(beta_schedule=schedule), DDPMScheduler(beta_schedule=schedule)
    for name in ("betas", "alphas", "alphas_cumprod"):
        ours_table, stock_table = getattr(ours, name), getattr(stock, name)
        assert ours_table.dtype == torch.float32
        # diffusers' own rounding: betas of a cosine are differences of float32, ᾱ a product of a thousand.
        torch.testing.assert_close(ours_table, stock_table, rtol=2e-4, atol=1e-7)
    torch.testing.assert_close(
        compute_snr(ours, torch.tensor([0, 500, 998])),
        compute_snr(stock, torch.tensor([0, 500, 998])),
        rtol=2e-3,
        atol=0,
    )


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("num_steps", [3, 5, 10, 40, 100, 250, 1000])
@pytest.mark.parametrize("offset", [0, 1])
def test_timesteps_are_the_stock_ones(spacing, num_steps, offset):
    if spacing == "leading" and num_steps == 1000:
        offset = 0  # with 1 the stock grid leaves the chain: test_scheduler_defects.py, 5
    stock, ours = (
        c(timestep_spacing=spacing, steps_offset=offset) for c in (diffusers.DDPMScheduler, DDPMScheduler)
    )
    stock.set_timesteps(num_steps)
    ours.set_timesteps(num_steps)
    assert ours.timesteps.tolist() == stock.timesteps.tolist()
    assert ours.timesteps.dtype == torch.int64
    assert ours.num_inference_steps == num_steps


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_every_number_of_steps_has_the_stock_grid_or_a_mended_one(spacing):
    for n in range(1, 1001, 3):
        stock, ours = (c(timestep_spacing=spacing) for c in (diffusers.DDPMScheduler, DDPMScheduler))
        stock.set_timesteps(n)
        ours.set_timesteps(n)
        if n == 1 and spacing != "trailing":  # the stock grid starts at 0: the same defect
            assert ours.timesteps.tolist() == [650]
        elif spacing == "leading" and 501 <= n <= 650:  # the stock grid starts at n − 1: defect 6
            assert ours.timesteps[0] >= 997
        else:  # beyond the n-th step the stock grid may have a step −1: defect 2
            assert ours.timesteps.tolist() == stock.timesteps[:n].tolist()


CONFIGS = [
    {},
    {"variance_type": "fixed_large"},
    {"prediction_type": "v_prediction", "beta_schedule": "squaredcos_cap_v2"},
    {"prediction_type": "sample", "beta_schedule": "scaled_linear"},
    {"clip_sample": False, "beta_start": 0.00085, "beta_end": 0.012},
    {"thresholding": True, "sample_max_value": 1.5},
    {"clip_sample_range": 2.0, "beta_schedule": "sigmoid"},
    {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    {"trained_betas": [0.02] * 200, "num_train_timesteps": 200},
    {"num_train_timesteps": 1},
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: "-".join(map(str, c)) or "default")
@pytest.mark.parametrize("spacing", ["leading", "linspace"])
def test_same_images_as_the_stock_scheduler(config, spacing):
    stock, ours = (c(timestep_spacing=spacing, **config) for c in (diffusers.DDPMScheduler, DDPMScheduler))
    steps = min(40, stock.config.num_train_timesteps)
    # Per step the stock tables err by up to 5e-4 relative on beta; over 40 steps that stays below 2e-3.
    torch.testing.assert_close(run(ours, steps), run(stock, steps), rtol=0, atol=2e-3)


def test_same_images_trailing_fixed_small():
    stock, ours = (c(timestep_spacing="trailing") for c in (diffusers.DDPMScheduler, DDPMScheduler))
    stock.set_timesteps(50)
    ours.set_timesteps(50)
    for t in ours.timesteps[:-1].tolist():  # at the last one the stock scheduler adds noise: defect 4
        a, b = (s.step(draw(2), t, draw(), generator=generator()).prev_sample for s in (ours, stock))
        torch.testing.assert_close(a, b, rtol=0, atol=2e-4)


@pytest.mark.parametrize("t", [999, 500, 1, 0])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_full_chain_without_set_timesteps(t, variance_type):
    stock, ours = (c(variance_type=variance_type) for c in (diffusers.DDPMScheduler, DDPMScheduler))
    a, b = (s.step(draw(2), t, draw(), generator=generator()) for s in (ours, stock))
    torch.testing.assert_close(a.prev_sample, b.prev_sample, rtol=0, atol=2e-4)
    torch.testing.assert_close(a.pred_original_sample, b.pred_original_sample, rtol=0, atol=2e-4)


def test_tuple_and_output_agree():
    scheduler = DDPMScheduler()
    output = scheduler.step(draw(1), 10, draw(), generator=generator())
    x_prev, x_0 = scheduler.step(draw(1), 10, draw(), generator=generator(), return_dict=False)
    assert torch.equal(output.prev_sample, x_prev)
    assert torch.equal(output.pred_original_sample, x_0)


def test_draws_once_a_step_and_never_at_the_last():
    scheduler, noise = DDPMScheduler(timestep_spacing="trailing"), generator()
    scheduler.set_timesteps(3)
    expected = generator()
    for t in scheduler.timesteps:
        scheduler.step(draw(1), t, draw(), generator=noise)
        if t != scheduler.timesteps[-1]:
            torch.randn(SHAPE, generator=expected)
    assert torch.equal(noise.get_state(), expected.get_state())


@pytest.mark.parametrize(
    "other",
    [
        "DDPMScheduler",
        "DDIMScheduler",
        "DPMSolverMultistepScheduler",
        "UniPCMultistepScheduler",
        "PNDMScheduler",
    ],
)
def test_from_config_both_ways(other):
    ours = DDPMScheduler(
        variance_type="fixed_large" if other == "DDPMScheduler" else "fixed_small",
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        num_train_timesteps=500,
    )
    theirs = getattr(diffusers, other).from_config(ours.config)
    assert theirs.config.beta_schedule == "squaredcos_cap_v2"
    assert theirs.config.prediction_type == "v_prediction"
    back = DDPMScheduler.from_config(theirs.config)
    if other == "DDPMScheduler":
        assert {k: back.config[k] for k in KEYS} == {k: ours.config[k] for k in KEYS}
    assert torch.equal(back.process.betas, ours.process.betas)


def test_save_load_deepcopy_pickle(tmp_path):
    ours = DDPMScheduler(
        trained_betas=np.linspace(0.1, 0.2, 7), num_train_timesteps=7, variance_type="fixed_large"
    )
    ours.set_timesteps(3)
    ours.save_pretrained(tmp_path)
    for copied in (
        DDPMScheduler.from_pretrained(tmp_path),
        copy.deepcopy(ours),
        pickle.loads(pickle.dumps(ours)),
        DDPMScheduler.from_config(diffusers.DDPMScheduler.from_pretrained(tmp_path).config),
    ):
        assert type(copied) is DDPMScheduler
        assert {k: copied.config[k] for k in KEYS} == {k: ours.config[k] for k in KEYS}
        assert torch.equal(copied.process.betas, torch.linspace(0.1, 0.2, 7, dtype=torch.float64))
        assert torch.equal(run(copied, 3), run(ours, 3))


def test_trained_betas_are_exact_whatever_holds_them():
    betas = [0.1, 0.2, 1 / 3]
    for given in (betas, tuple(betas), np.array(betas), torch.tensor(betas, dtype=torch.float64)):
        scheduler = DDPMScheduler(trained_betas=given, num_train_timesteps=3)
        assert scheduler.process.betas.tolist() == betas
        assert scheduler.config.trained_betas == betas  # a list: JSON knows no tensors
    flat = DDPMScheduler(num_train_timesteps=50, beta_start=0.2, beta_end=0.2)
    assert flat.process.betas.tolist() == [0.2] * 50


# Beyond the stock class


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned", "learned_range"])
def test_a_timestep_per_sample_equals_each_alone(spacing, variance_type):
    scheduler = DDPMScheduler(timestep_spacing=spacing, variance_type=variance_type)
    scheduler.set_timesteps(10)
    steps = scheduler.timesteps[[0, 4, 8, 9]]
    channels = 6 if variance_type.startswith("learned") else 3
    x, output = draw(0, (4, 3, 4, 4)), draw(1, (4, channels, 4, 4))
    seeds = [generator(i) for i in range(4)]
    together = scheduler.step(output, steps, x, generator=seeds)
    for i, t in enumerate(steps.tolist()):
        alone = scheduler.step(output[i : i + 1], t, x[i : i + 1], generator=generator(i))
        torch.testing.assert_close(together.prev_sample[i], alone.prev_sample[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(
            together.pred_original_sample[i], alone.pred_original_sample[0], rtol=0, atol=1e-6
        )


@pytest.mark.parametrize("t", [999, 500, 20])
def test_learned_log_variance_sets_the_noise(t):
    """With x̂_0 = x_t = 0 the step returns σ z alone."""
    scheduler = DDPMScheduler(variance_type="learned", prediction_type="sample")
    zero, log_variance = torch.zeros(SHAPE), draw(3)
    out = scheduler.step(torch.cat([zero, log_variance], 1), t, zero, generator=generator(4)).prev_sample
    expected = log_variance.double().exp().sqrt() * draw(4)
    torch.testing.assert_close(out.double(), expected.double(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("v", "table"), [(-1.0, "posterior_variance"), (1.0, "betas")])
@pytest.mark.parametrize("num_steps", [1000, 10])
def test_learned_range_ends_are_the_two_variances(v, table, num_steps):
    scheduler = DDPMScheduler(variance_type="learned_range", prediction_type="sample")
    scheduler.set_timesteps(num_steps)
    place = num_steps // 2
    zero = torch.zeros(SHAPE)
    output = torch.cat([zero, torch.full(SHAPE, v)], 1)
    out = scheduler.step(output, scheduler.timesteps[place], zero, generator=generator(4)).prev_sample
    sigma = getattr(scheduler.chain, table)[num_steps - 1 - place].sqrt()
    torch.testing.assert_close(out.double(), sigma * draw(4).double(), rtol=1e-6, atol=1e-7)


def test_timesteps_assigned_from_outside():
    """Image-to-image pipelines cut the list; the chain follows what stands there."""
    scheduler = DDPMScheduler()
    scheduler.set_timesteps(10)
    scheduler.timesteps = scheduler.timesteps[4:]
    assert scheduler.chain.timesteps.tolist() == [0, 100, 200, 300, 400, 500]
    scheduler.timesteps = torch.tensor(500).expand(1)
    assert scheduler.step(draw(1), scheduler.timesteps[0], draw()).prev_sample.isfinite().all()


def test_elements_of_timesteps_ints_and_copies_mean_the_same():
    scheduler = DDPMScheduler()
    scheduler.set_timesteps(10)
    for t in scheduler.timesteps:
        results = [
            scheduler.step(draw(1), given, draw(), generator=generator()).prev_sample
            for given in (t, t.item(), t.clone(), t.to(torch.int32), np.int64(t.item()), float(t))
        ]
        assert all(torch.equal(results[0], other) for other in results[1:])
    cut = scheduler.timesteps[3:]  # a strided or cut view has the same storage
    assert torch.equal(
        scheduler.step(draw(1), cut[0], draw(), generator=generator()).prev_sample,
        scheduler.step(draw(1), 600, draw(), generator=generator()).prev_sample,
    )


@pytest.mark.parametrize("variance_type", ["fixed_small", "learned", "learned_range"])
def test_nothing_is_read_back_from_the_device(variance_type):
    """A meta tensor has no values: whatever looks at one raises."""
    scheduler = DDPMScheduler(variance_type=variance_type)
    scheduler.set_timesteps(10, device="meta")
    channels = 6 if variance_type.startswith("learned") else 3
    x, output = torch.empty(SHAPE, device="meta"), torch.empty(2, channels, 4, 4, device="meta")
    batch = torch.zeros(2, dtype=torch.int64, device="meta")
    for t in (scheduler.timesteps[3], batch):
        assert scheduler.step(output, t, x).prev_sample.shape == SHAPE
    assert scheduler.add_noise(x, x, batch).is_meta
    assert scheduler.get_velocity(x, x, batch).is_meta


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_goes_through_float32(dtype):
    scheduler = DDPMScheduler()
    x, e = draw().to(dtype), draw(1).to(dtype)
    t = torch.tensor([0, 7])
    for method in (scheduler.add_noise, scheduler.get_velocity):
        assert torch.equal(method(x, e, t), method(x.float(), e.float(), t).to(dtype))
    out = scheduler.step(e, 5, x, generator=generator())
    noise = torch.randn(SHAPE, generator=generator(), dtype=dtype).float()
    process = scheduler.process
    x_0 = process.predict_x0(x.float(), e.float(), 5).clamp(-1, 1)
    wanted = (
        process.q_posterior_mean(x_0, x.float(), 5) + process.posterior_variance[5].sqrt().float() * noise
    )
    torch.testing.assert_close(out.prev_sample, wanted.to(dtype))
    assert out.prev_sample.dtype == out.pred_original_sample.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_wide_dtypes_stay(dtype):
    out = DDPMScheduler().step(draw(1).to(dtype), 5, draw().to(dtype))
    assert out.prev_sample.dtype == dtype


def test_samples_of_any_rank():
    scheduler = DDPMScheduler(variance_type="learned_range")
    for sides in ((7,), (5, 3), (2, 5, 3)):
        x, output = torch.randn(1, 1, *sides), torch.randn(1, 2, *sides)
        assert scheduler.step(output, torch.tensor([9]), x).prev_sample.shape == x.shape


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_ancestral_sampling_of_gaussian_data(variance_type):
    """docs/maths.md 8: variance after T exact steps on N(0, 1), no noise at the last."""
    scheduler = DDPMScheduler(variance_type=variance_type, clip_sample=False)
    wanted = {"fixed_small": 0.991067376353, "fixed_large": 0.9999}[variance_type]
    n, noise = 60_000, generator(3)
    x = torch.randn(n, 1, 1, 1, generator=noise)
    scheduler.set_timesteps(1000)
    for t in scheduler.timesteps:
        x = scheduler.step(
            (1 - scheduler.process.alphas_cumprod[t]).sqrt().float() * x, t, x, generator=noise
        ).prev_sample
    assert abs(x.var().item() - wanted) < 5 * wanted * (2 / n) ** 0.5


def test_decoder_log_likelihood():
    scheduler = DDPMScheduler()
    x_0 = (torch.randint(0, 256, SHAPE) / 127.5 - 1).float()
    log_variance = torch.tensor(5.45318766130e-5, dtype=torch.float64).log()  # β̃_2 of `linear`
    nats = discretized_gaussian_log_likelihood(x_0, 0.9 * x_0, log_variance)
    scheduler.set_timesteps(10)
    got = scheduler.decoder_log_likelihood(x_0, 0.9 * x_0)
    assert got.shape == (2,) and got.dtype == torch.float64
    torch.testing.assert_close(got, nats.sum((1, 2, 3)), rtol=1e-10, atol=0)
    # A perfect prediction still pays 0.904818841519 nats an interior pixel, 0.353383809998 at the ends.
    flat = torch.full((1, 1, 2, 2), 1 / 127.5 * 200 - 1)
    assert scheduler.decoder_log_likelihood(flat, flat).item() == pytest.approx(-4 * 0.904818841519, rel=1e-6)
    white = torch.ones(1, 1, 2, 2)
    assert scheduler.decoder_log_likelihood(white, white).item() == pytest.approx(
        -4 * 0.353383809998, rel=1e-9
    )


def test_decoder_with_learned_variances():
    x_0 = torch.zeros(SHAPE) + 1 / 255
    ranged = DDPMScheduler(variance_type="learned_range")
    fixed = DDPMScheduler().decoder_log_likelihood(x_0, x_0)
    at_lower_end = ranged.decoder_log_likelihood(x_0, x_0, torch.full(SHAPE, -1.0))
    torch.testing.assert_close(at_lower_end, fixed, rtol=1e-6, atol=0)
    learned = DDPMScheduler(variance_type="learned")
    log_variance = torch.full(SHAPE, ranged.process.log_variance("fixed_small")[0].item())
    torch.testing.assert_close(
        learned.decoder_log_likelihood(x_0, x_0, log_variance), fixed, rtol=1e-6, atol=0
    )
    with pytest.raises(ValueError, match="needs predicted_variance"):
        learned.decoder_log_likelihood(x_0, x_0)


def test_warns_when_sampling_starts_far_from_noise(caplog):
    DDPMScheduler(num_train_timesteps=50).set_timesteps(2)  # which has no step near enough to noise
    assert "step 25" in caplog.text
    caplog.clear()
    DDPMScheduler().set_timesteps(2)
    DDPMScheduler(timestep_spacing="trailing").set_timesteps(2)
    DDPMScheduler().set_timesteps(timesteps=[300, 0])  # chosen by hand
    assert not caplog.text
