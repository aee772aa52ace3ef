"""Every scheduler class of diffusers: those that draw do so by the network's process, others are refused."""

import inspect
import itertools

import diffusers
import numpy as np
import pytest
import torch

from hf_ddpm.generation.pipeline import DDPMPipeline
from hf_ddpm.generation.samplers import SAMPLERS, SCHEDULERS, check_process, swap_scheduler
from hf_ddpm.scheduler import DDPMScheduler
from tests.generation.networks import gaussian, quiet, seeds

# numpy tells diffusers' schedulers what numpy 3 will want of them.
pytestmark = pytest.mark.filterwarnings("ignore:.*(copy keyword|__array_wrap__):DeprecationWarning")
PROCESSES = {
    "linear": {},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "scaled_linear": {"beta_schedule": "scaled_linear"},
    "sigmoid": {"beta_schedule": "sigmoid"},
    "laplace": {"beta_schedule": "laplace"},
    "constant": {"beta_schedule": "constant", "beta_start": 0.01},
    "trained": {"trained_betas": np.linspace(1e-3, 0.02, 1000)},
    "other ends": {"beta_start": 0.0002, "beta_end": 0.015},
    "sixty steps": {"num_train_timesteps": 60, "beta_end": 0.3},
}
ZERO_SNR = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
KEEPS_ZERO_SNR = (
    "DDPM DDPMParallel DDIM DDIMParallel DPMSolverMultistep UniPCMultistep EulerDiscrete "
    "EulerAncestralDiscrete TCD LCM"
).split()
MEAN, STD = 0.1, 0.2
WARNED = {"LCM"}


def exported():
    """Names of all scheduler classes that diffusers exports."""
    found = (getattr(diffusers, name) for name in dir(diffusers) if name.endswith("Scheduler"))
    return sorted(kind.__name__ for kind in found if isinstance(kind, type))


def others():
    return [name for name in exported() if name.removesuffix("Scheduler") not in SAMPLERS]


def sampler(name):
    return getattr(diffusers, name + "Scheduler")


def gaussian_pipeline(scheduler=None):
    scheduler = DDPMScheduler(clip_sample=False) if scheduler is None else scheduler  # some have length 0
    return quiet(DDPMPipeline(gaussian(MEAN, STD), scheduler))


def draw(pipeline, steps):
    return pipeline(1, seeds(1)[0], steps, "np", image_shape=(1, 64, 64)).images * 2 - 1


# Their process


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_plain_idiom_keeps_every_process(name):
    # The constructor of KDPM2 takes a second for every thousand steps
    names = ("linear", "other ends", "sixty steps") if name.startswith("KDPM2") else PROCESSES
    for config in (PROCESSES[process] for process in names):
        ours = DDPMScheduler(**config)
        theirs = sampler(name).from_config(ours.config)
        np.testing.assert_allclose(theirs.alphas_cumprod, ours.process.alphas_cumprod, rtol=0, atol=2e-6)
        assert torch.equal(DDPMScheduler.from_config(theirs.config).process.betas, ours.process.betas)


@pytest.mark.parametrize("beta", [1e-5, 1e-4, 2e-4])
def test_rounding_is_no_other_process(beta):
    """In float32 the product of a thousand equal factors errs by up to 2e-5, in one direction."""
    ours = DDPMScheduler(beta_schedule="constant", beta_start=beta)
    for name in ("DDIM", "EulerDiscrete", "DPMSolverMultistep"):
        check_process(sampler(name).from_config(ours.config), ours)
    other = DDPMScheduler(beta_schedule="constant", beta_start=beta * 1.01)
    with pytest.raises(ValueError, match="DDIMScheduler runs another process than the network's: alphas_cum"):
        check_process(diffusers.DDIMScheduler.from_config(other.config), ours)


@pytest.mark.parametrize("name", SAMPLERS)
def test_zero_terminal_snr_is_kept_or_refused(name):
    ours = DDPMScheduler(**ZERO_SNR)
    pipeline = quiet(DDPMPipeline(lambda x_t, t: x_t, ours))
    pipeline.scheduler = sampler(name).from_config(ours.config)
    if name in KEEPS_ZERO_SNR:
        np.testing.assert_allclose(
            pipeline.scheduler.alphas_cumprod, ours.process.alphas_cumprod, rtol=0, atol=2e-6
        )
        pipeline.check_inputs(num_inference_steps=10, image_shape=(1, 8, 8))
        return
    words = (
        rf"^{name}Scheduler runs another process than the network's \(it ignores rescale_betas_zero_snr\): "
    )
    with pytest.raises(ValueError, match=words) as error:
        pipeline(num_inference_steps=10, image_shape=(1, 8, 8))
    assert len(str(error.value)) < 300


# Their images


@pytest.mark.parametrize("name", SAMPLERS)
def test_images_of_gaussian_data_have_its_mean_and_spread(name, caplog):
    pipeline = gaussian_pipeline()
    pipeline.scheduler = sampler(name).from_config(pipeline.scheduler.config)
    x = draw(pipeline, 50)
    assert abs(x.mean() - MEAN) < 5 * STD / np.sqrt(x.size)
    if name in WARNED:  # not a sampler of q: it goes to E[x_0 | x_t] at once, and so loses spread
        assert "LCMScheduler draws with networks that were distilled for it" in caplog.text
        assert x.std() < 0.8 * STD
        return
    # 50 steps cost the ancestral ones a fifth of the spread, the other ones of first order an eighth
    first_order = {"DDIM": 0.15, "DDIMParallel": 0.15, "EulerDiscrete": 0.15, "DPMSolverSinglestep": 0.15}
    ancestral = {"DDPM": 0.25, "DDPMParallel": 0.25, "EulerAncestralDiscrete": 0.25, "TCD": 0.25}
    loss = (first_order | ancestral).get(name, 0.1)
    assert (1 - loss) * STD < x.std() < 1.1 * STD
    assert not [record for record in caplog.records if record.name.startswith("hf_ddpm")]


@pytest.mark.parametrize("name", ["HeunDiscrete", "EulerDiscrete", "DPMSolverMultistep"])
@pytest.mark.parametrize("option", ["use_karras_sigmas", "use_exponential_sigmas"])
def test_other_spacings_of_sigma_are_the_same_process(name, option):
    pipeline = gaussian_pipeline()
    pipeline.scheduler = sampler(name).from_config(pipeline.scheduler.config, **{option: True})
    assert draw(pipeline, 50).std() == pytest.approx(STD, rel=0.15)


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("steps", [7, 20, 50])
@pytest.mark.parametrize("name", ["DDIM", "DDIMParallel", "PNDM", "DDPM", "DDPMParallel", "TCD"])
def test_steps_that_are_reported_are_those_that_are_taken(name, steps, spacing):
    """By hand: the deterministic and the ancestral step of a linear denoiser, over the listed steps."""
    pipeline = gaussian_pipeline()
    options = {"eta": 0.0} if "eta" in inspect.signature(sampler(name).__init__).parameters else {}
    scheduler = sampler(name).from_config(pipeline.scheduler.config, timestep_spacing=spacing, **options)
    pipeline.scheduler = scheduler
    if name in ("DDIM", "DDIMParallel", "PNDM") and (
        spacing == "linspace" or (spacing == "trailing" and 1000 % steps)
    ):
        with pytest.raises(ValueError, match=rf"goes down by {1000 // steps} from each step, but") as error:
            draw(pipeline, steps)
        assert len(str(error.value)) < 300
        return
    x = draw(pipeline, steps)
    if name in ("PNDM", "TCD"):  # of higher order; and random
        return
    spread, abar = 1.0, np.append(pipeline.process.alphas_cumprod.numpy(), 1.0)
    listed = [*scheduler.timesteps.tolist(), -1]
    for t, previous in itertools.pairwise(listed):
        a, b = abar[t], abar[previous]
        slope = a**0.5 * STD**2 / (a * STD**2 + 1 - a)
        if name.startswith("DDIM"):
            spread *= b**0.5 * slope + ((1 - b) / (1 - a)) ** 0.5 * (1 - a**0.5 * slope)
        else:
            factor = (b**0.5 * (1 - a / b) * slope + (a / b) ** 0.5 * (1 - b)) / (1 - a)
            spread = (factor**2 * spread**2 + (1 - a / b) * (1 - b) / (1 - a)) ** 0.5
    assert x.std() == pytest.approx(spread, abs=5 * spread / np.sqrt(2 * x.size))


# Refused


@pytest.mark.parametrize("name", others())
def test_every_other_scheduler_is_refused_by_name(name):
    kind = getattr(diffusers, name)
    try:
        scheduler = kind()
    except (ImportError, TypeError):  # torchsde is missing, or arguments that no DDPM has are required
        return
    for pipeline in (gaussian_pipeline(scheduler), gaussian_pipeline()):
        pipeline.scheduler = scheduler
        with pytest.raises(
            ValueError, match=rf"can't draw with {name}; allowed: DDPM, DDIM, .*, LCM$"
        ) as error:
            draw(pipeline, 10)
        assert len(str(error.value)) <= 300


def test_a_sampler_of_ones_own_is_held_to_the_process():
    class Own(diffusers.DDIMScheduler):
        pass

    class Alone:
        def __init__(self):
            self.config = dict(DDPMScheduler().config)

    pipeline = gaussian_pipeline()
    pipeline.scheduler = Own.from_config(pipeline.scheduler.config)
    assert draw(pipeline, 50).std() == pytest.approx(STD, rel=0.15)
    pipeline.scheduler = Own.from_config(pipeline.scheduler.config, beta_end=0.03)
    with pytest.raises(ValueError, match="Own runs another process than the network's: alphas_cumprod"):
        draw(pipeline, 50)
    with pytest.raises(ValueError, match="can't draw with Alone"):
        gaussian_pipeline(Alone()).check_inputs(image_shape=(1, 8, 8))


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        (
            "EulerDiscrete",
            {"timestep_type": "continuous"},
            "timestep_type of EulerDiscreteScheduler is 'cont",
        ),
        ("UniPCMultistep", {"use_flow_sigmas": True}, "use_flow_sigmas of UniPCMultistepScheduler is True"),
        ("DPMSolverMultistep", {"use_flow_sigmas": True}, "use_flow_sigmas of DPMSolverMultistepScheduler"),
        (
            "DDIM",
            {"prediction_type": "sample"},
            "reads prediction_type 'sample', but the network was trained f",
        ),
        (
            "DDIM",
            {"prediction_type": "flow_prediction"},
            "prediction_type is 'flow_prediction'; allowed: eps",
        ),
        (
            "DDPM",
            {"variance_type": "learned"},
            "DDPMScheduler can't do variance_type 'learned'; allowed: hf_d",
        ),
        (
            "DDIM",
            {"num_train_timesteps": 500},
            "has 500 steps, but the network was trained for 1000; allowed",
        ),
        (
            "DDIM",
            {"beta_schedule": "scaled_linear"},
            "runs another process than the network's: alphas_cumprod[",
        ),
    ],
    ids=str,
)
def test_configs_of_another_kind(name, changes, words):
    pipeline = gaussian_pipeline()
    pipeline.scheduler = sampler(name).from_config(pipeline.scheduler.config, **changes)
    with pytest.raises(ValueError) as error:
        draw(pipeline, 10)
    assert words in str(error.value) and len(str(error.value)) < 300 and "\n" not in str(error.value)


def test_what_a_sampler_does_not_read_is_refused_before_the_network_is_asked():
    def network(x_t, t):
        raise AssertionError("it was asked")

    for name in ("EulerAncestralDiscrete", "HeunDiscrete", "KDPM2Discrete"):
        ours = DDPMScheduler(prediction_type="sample")
        pipeline = quiet(DDPMPipeline(network, ours))
        pipeline.scheduler = sampler(name).from_config(ours.config)
        with pytest.raises((ValueError, AssertionError)) as error:
            pipeline(num_inference_steps=5, image_shape=(1, 4, 4))
        if "it was asked" not in str(error.value):
            assert str(error.value).startswith(f"{name}Scheduler can't take a step: ")


@pytest.mark.parametrize("name", ["ddim", "euler"])
def test_epsilon_says_nothing_at_zero_snr(name):
    pipeline = gaussian_pipeline(DDPMScheduler(rescale_betas_zero_snr=True))
    swap_scheduler(pipeline, name, timestep_spacing="trailing")
    with pytest.raises(
        ValueError, match=r"alphas_cumprod is 0 at step 999, where prediction_type 'epsilon' says"
    ):
        draw(pipeline, 10)


def test_a_late_start_of_any_sampler_is_said_once(caplog):
    pipeline = gaussian_pipeline()
    swap_scheduler(pipeline, "ddim")
    for _ in range(2):
        pipeline.check_inputs(num_inference_steps=600, image_shape=(1, 8, 8))  # diffusers' grid starts at 599
    assert [record.getMessage()[:46] for record in caplog.records] == [
        "sampling starts from N(0, I) at step 599, wher"
    ]


def test_names_of_the_command_line_are_among_them():
    assert {kind.__name__.removesuffix("Scheduler") for kind in SCHEDULERS.values()} <= set(SAMPLERS)
    with pytest.raises(
        ValueError, match=r"timestep_spcing is no config key of DDIMScheduler .did you mean 'time"
    ):
        swap_scheduler(gaussian_pipeline(), "ddim", timestep_spcing="trailing")
