"""process.py: chains by name, noise that is drawn where none is given, and `p_sample`, algorithm 2's step."""

import copy
import pickle
import re

import diffusers
import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from hf_ddpm import DDPMScheduler, create_model
from hf_ddpm.exact import ExactDenoiser
from hf_ddpm.parametrization import from_x0_eps, to_x0
from hf_ddpm.process import DiffusionProcess

T = 1000
STEPS = torch.tensor([0, 1, 500, 999])


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def generator(seed=5):
    return torch.Generator().manual_seed(seed)


# Made by name


def test_linear_is_that_of_the_paper():
    process = DiffusionProcess.linear(T)
    assert_allclose(process.betas, np.linspace(1e-4, 0.02, T), rtol=1e-14)
    assert torch.equal(process.betas, DiffusionProcess.linear().betas)
    assert torch.equal(process.betas, DDPMScheduler(beta_schedule="linear").process.betas)
    other = DiffusionProcess.linear(num_train_timesteps=7, beta_start=0.1, beta_end=0.3)
    assert_allclose(other.betas, np.linspace(0.1, 0.3, 7), rtol=1e-14)


def test_cosine_is_that_of_improved_ddpm():
    level = np.cos((np.arange(51) / 50 + 0.008) / 1.008 * np.pi / 2) ** 2
    assert_allclose(
        DiffusionProcess.cosine(50).betas, np.minimum(1 - level[1:] / level[:-1], 0.999), rtol=1e-11
    )
    stock = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    assert_allclose(DiffusionProcess.cosine(1000).alphas_cumprod, stock.alphas_cumprod, rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_train_timesteps": 0}, "num_train_timesteps is 0; allowed: a whole number >= 1"),
        ({"num_train_timesteps": "x"}, "num_train_timesteps is 'x'"),
        ({"num_train_timesteps": 1e3}, "num_train_timesteps is 1000.0"),
        ({"beta_start": 5}, "beta_start is 5; allowed: numbers in (0, 1]"),
        ({"beta_start": 0}, "beta_start is 0;"),
        ({"beta_end": float("nan")}, "beta_end is nan;"),
        ({"beta_end": "0.02"}, "beta_end is '0.02'"),
        ({"beta_start": 1.0}, "betas[0] is 1.0"),
    ],
)
def test_chains_that_can_not_be(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        DiffusionProcess.linear(**arguments)


@pytest.mark.parametrize(
    ("arguments", "keywords"),
    [
        ((), {}),
        ((1000,), {}),
        ((1000, 1e-4, 0.02), {}),
        ((torch.linspace(1e-4, 0.02, 1000),), {}),
        (("linear",), {}),
        ((), {"num_timesteps": 1000}),
        ((), {"betas": np.full(3, 0.1)}),
    ],
)
def test_the_constructor_says_what_to_call(arguments, keywords):
    with pytest.raises(TypeError) as error:
        DiffusionProcess(*arguments, **keywords)
    makers = "DiffusionProcess.linear(1000), .cosine(1000) or .from_betas(betas)"
    assert str(error.value) == f"DiffusionProcess(...) is not called by its users; call {makers}"


def test_copies_and_pickles_are_made_as_before():
    process = DiffusionProcess.linear(10).respaced([0, 5, 9])
    for twin in (copy.copy(process), copy.deepcopy(process), pickle.loads(pickle.dumps(process))):
        assert torch.equal(twin.betas, process.betas) and twin.original is not None
    with pytest.raises(TypeError, match="did you mean 'num_train_timesteps'"):
        DiffusionProcess.linear(num_timesteps=10)  # pyright: ignore[reportCallIssue]


# Noise that is drawn


@pytest.mark.parametrize("name", ["q_sample", "q_sample_prev", "q_step"])
def test_noise_is_drawn_where_none_is_given(name):
    equation = getattr(DiffusionProcess.linear(T), name)
    x = draw(4, 1, 3, 3, dtype=torch.float32)
    noise = draw(4, 1, 3, 3, seed=5, dtype=torch.float32)
    assert torch.equal(equation(x, t=STEPS, generator=generator()), equation(x, noise, STEPS))
    torch.manual_seed(5)
    first, second = equation(x, t=STEPS), equation(x, None, STEPS)
    torch.manual_seed(5)
    assert torch.equal(first, equation(x, torch.randn(4, 1, 3, 3), STEPS)) and not torch.equal(first, second)
    for half in (torch.float16, torch.bfloat16):
        assert equation(x.to(half), t=3).dtype == half
    assert equation(x.to("meta"), t=3).shape == x.shape
    for call, message in [
        (
            lambda: equation(x, STEPS),
            rf"noise is an int64 .*; the order is {name}\(x_.*, or {name}\(.*, t=t\) to",
        ),
        (lambda: equation(x, 5), "noise is 5; .*to draw the noise"),
        (lambda: equation(x), r"t is missing; allowed: .*, t=t\)"),
        (lambda: equation(x, x), "step t = None"),
        (lambda: equation(x, t=T), "step t = 1000"),
        (lambda: equation(x.numpy(), t=3), "is a float32 NumPy array"),
        (lambda: equation(x, t=3, generator=5), "generator is 5; allowed: a torch.Generator"),
        (lambda: equation(x, noise, 3, generator=generator()), "noise and a generator"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


# Algorithm 2, one step


def step_in_numpy(x_t, answer, z, t, variance_type, clip, kind):
    """A step of p_θ from the β_t alone, in float64: Bayes' rule for N(x_prev; √ᾱ_prev x̂_0, 1 − ᾱ_prev)."""
    betas = np.linspace(1e-4, 0.02, T)
    level = np.cumprod(1 - betas)
    x_0 = answer if kind == "sample" else (x_t - np.sqrt(1 - level[t]) * answer) / np.sqrt(level[t])
    x_0 = np.clip(x_0, -1, 1) if clip else x_0
    if t == 0:
        return x_0
    before = level[t - 1]
    precision = (1 - betas[t]) / betas[t] + 1 / (1 - before)
    mean = (np.sqrt(1 - betas[t]) / betas[t] * x_t + np.sqrt(before) / (1 - before) * x_0) / precision
    return mean + np.sqrt(1 / precision if variance_type == "fixed_small" else betas[t]) * z


@pytest.mark.parametrize("kind", ["epsilon", "sample"])
@pytest.mark.parametrize("clip", [True, False], ids=["clipped", "free"])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_p_sample_in_numpy(variance_type, clip, kind):
    process = DiffusionProcess.linear(T)
    x_t, answer, z = draw(4, 2, 3, 3), draw(4, 2, 3, 3, seed=1), draw(4, 2, 3, 3, seed=5)
    how = {"prediction_type": kind, "variance_type": variance_type, "clip_x0": clip}
    together = process.p_sample(x_t, STEPS, answer, generator=generator(), **how)
    for i, t in enumerate(STEPS.tolist()):
        wanted = step_in_numpy(x_t[i].numpy(), answer[i].numpy(), z[i].numpy(), t, variance_type, clip, kind)
        assert_allclose(together[i], wanted, rtol=1e-9, atol=1e-12)


def test_line_4_of_algorithm_2():
    process, x_t, eps, z = (
        DiffusionProcess.linear(T),
        draw(2, 1, 4, 4),
        draw(2, 1, 4, 4, seed=1),
        draw(2, 1, 4, 4, seed=5),
    )
    beta, level = np.linspace(1e-4, 0.02, T)[700], np.prod(1 - np.linspace(1e-4, 0.02, T)[:701])
    wanted = (x_t - beta / np.sqrt(1 - level) * eps) / np.sqrt(1 - beta) + np.sqrt(beta) * z
    found = process.p_sample(x_t, 700, eps, variance_type="fixed_large", clip_x0=False, generator=generator())
    assert_allclose(found, wanted, rtol=1e-9)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("steps", [T, 10])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_p_sample_is_the_step_of_the_scheduler(dtype, steps, variance_type):
    scheduler = DDPMScheduler(variance_type=variance_type)
    scheduler.set_timesteps(steps)
    chain, x_t, eps = scheduler.chain, draw(2, 3, 4, 4).to(dtype), draw(2, 3, 4, 4, seed=1).to(dtype)
    for t in (0, 1, steps // 2, steps - 1):
        wanted = scheduler.step(eps, int(chain.timesteps[t]), x_t, generator()).prev_sample
        found = chain.p_sample(x_t, t, eps, variance_type=variance_type, generator=generator())
        assert found.dtype == dtype and torch.equal(found, wanted)


def test_the_model_sees_the_step_of_each_image_in_its_own_numbering():
    seen = []

    def model(x_t, t):
        seen.append(t.tolist())
        return 0 * x_t

    process = DiffusionProcess.linear(T).respaced([0, 400, 999])
    x_t = draw(2, 1, 4, 4)
    for t in (2, torch.tensor([2, 0]), torch.tensor(1), torch.tensor([[1]]), np.int64(0)):
        process.p_sample(x_t, t, model)  # pyright: ignore[reportArgumentType]
    assert seen == [[999, 999], [999, 0], [400, 400], [400, 400], [0, 0]]


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_a_loop_with_the_exact_answer_ends_at_the_only_image(variance_type):
    image = draw(1, 1, 4, 4).clamp(-1, 1)
    process = DiffusionProcess.cosine(30)
    exact = ExactDenoiser(process, image)
    x = draw(3, 1, 4, 4, seed=2)
    for t in reversed(range(len(process))):
        x = process.p_sample(x, t, exact, variance_type=variance_type, prediction_type="sample")
    assert_allclose(x, image.expand(3, 1, 4, 4), rtol=1e-12)


def test_networks_of_all_kinds_and_their_answers():
    process, network, x_t = DiffusionProcess.linear(T), create_model("tiny").eval(), draw(2, 1, 8, 8).float()
    found = process.p_sample(x_t, 9, network, generator=generator())
    assert not found.requires_grad  # a loop of a thousand steps keeps no graph
    answer = network(x_t, torch.tensor([9, 9])).sample
    assert torch.equal(found, process.p_sample(x_t, 9, answer, generator=generator()))
    for form in (lambda x, t: answer, lambda x, t: (answer,)):
        assert torch.equal(found, process.p_sample(x_t, 9, form, generator=generator()))
    v = from_x0_eps(process, "v_prediction", x_t, answer, 9)
    x_0 = to_x0(process, "v_prediction", v, x_t, 9)
    assert process.p_sample(x_t, 9, x_0, prediction_type="sample").shape == x_t.shape


def test_no_noise_is_drawn_at_the_last_step():
    process, x_t = DiffusionProcess.linear(T), draw(2, 1, 4, 4)
    source = generator()
    before = source.get_state()
    for t in (0, torch.tensor([0, 0])):
        assert torch.equal(process.p_sample(x_t, t, x_t, generator=source), process.p_sample(x_t, t, x_t))
        assert torch.equal(source.get_state(), before)
    mixed = process.p_sample(x_t, torch.tensor([0, 9]), x_t, variance_type="fixed_large", generator=source)
    assert torch.equal(mixed[0], process.p_sample(x_t, 0, x_t)[0])
    assert not torch.equal(source.get_state(), before)
    one = DiffusionProcess.from_betas([0.36])
    assert_allclose(one.p_sample(x_t, 0, 0 * x_t, clip_x0=False), x_t / 0.8, rtol=1e-12)


def test_steps_that_can_not_be_taken():
    process, x_t, to_noise = (
        DiffusionProcess.linear(T),
        draw(2, 3, 4, 4),
        DiffusionProcess.from_betas([0.5, 1.0]),
    )
    for call, message in [
        (
            lambda: process.p_sample(lambda x, t: x, x_t, 3),
            r"x_t is a function; .*order is p_sample\(x_t, t, model\)",
        ),
        (lambda: process.p_sample(x_t, lambda x, t: x, 3), "step t = a function"),
        (lambda: process.p_sample(x_t, T, x_t), "step t = 1000 is not in the chain"),
        (lambda: process.p_sample(x_t, STEPS, x_t), "for 2 images"),
        (lambda: process.p_sample(x_t, 3, None), "model is None; allowed: an nn.Module or a function"),
        (lambda: process.p_sample(x_t, 3, x_t.long()), "the model's answer is an int64 tensor"),
        (lambda: process.p_sample(x_t, 3, lambda x, t: x[:, :1]), "the model answered shape"),
        (lambda: process.p_sample(x_t, 3, torch.cat([x_t, x_t], 1)), r"answer has shape \(2, 6, 4, 4\)"),
        (
            lambda: process.p_sample(x_t, 3, x_t, prediction_type="score"),
            "prediction_type is 'score'; .*to_x0",
        ),
        (lambda: process.p_sample(x_t, 3, x_t, variance_type="learned"), "variance_type is 'learned'"),
        (lambda: process.p_sample(x_t, 3, x_t, generator=3), "generator is 3"),
        (lambda: to_noise.p_sample(x_t, 1, x_t), "alphas_cumprod is 0 at step 1"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert len(str(error.value)) < 300 and "\n" not in str(error.value)
    with pytest.raises(TypeError, match="no keyword 'clip_denoised'"):
        process.p_sample(x_t, 3, x_t, clip_denoised=True)  # pyright: ignore[reportCallIssue]
    assert to_noise.p_sample(x_t, 1, x_t, prediction_type="sample").isfinite().all()
