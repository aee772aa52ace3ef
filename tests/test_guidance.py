"""Denoisers of a class and guidance, against exact denoisers of classes and against the network itself."""

import pytest
import torch
from torch import nn

from hf_ddpm import DiffusionProcess
from hf_ddpm.denoiser import as_denoiser, num_classes
from hf_ddpm.exact import ExactDenoiser
from hf_ddpm.guidance import Conditioned, Guided
from hf_ddpm.models import create_model
from hf_ddpm.parametrization import PREDICTION_TYPES, from_x0_eps, to_x0

PROCESS = DiffusionProcess.linear(100, beta_end=0.2)
CLASSES, EACH = 3, 4
PRIOR = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
IMAGES = (
    torch.rand(CLASSES, EACH, 1, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2
    - 1
)
OF_CLASS = [ExactDenoiser(PROCESS, images) for images in IMAGES]
OF_ALL = ExactDenoiser(PROCESS, IMAGES.flatten(0, 1), (PRIOR / EACH).repeat_interleave(EACH))


class Exact(nn.Module):
    """The perfect class-conditional network of twelve images, of any prediction type."""

    def __init__(self, kind="sample"):
        super().__init__()
        self.num_classes, self.kind, self.asked = CLASSES, kind, []

    def forward(self, x_t, t, class_labels):
        self.asked.append(class_labels.tolist())
        experts = [*OF_CLASS, OF_ALL]
        pairs = zip(x_t, t, class_labels.tolist(), strict=True)
        x_0 = torch.cat([experts[y](x[None], step[None]) for x, step, y in pairs])
        return from_x0_eps(PROCESS, self.kind, x_0, PROCESS.predict_eps(x_t, x_0, t), t)


def noisy(count=6, seed=1):
    """Images at steps of every kind, the ends among them."""
    generator = torch.Generator().manual_seed(seed)
    t = torch.cat([torch.tensor([0, 99]), torch.randint(0, 100, (count - 2,), generator=generator)])
    x_0 = IMAGES.flatten(0, 1)[torch.randint(0, 12, (count,), generator=generator)]
    noise = torch.randn(x_0.shape, generator=generator, dtype=torch.float64)
    return PROCESS.q_sample(x_0, noise, t), t


@pytest.mark.parametrize("w", [0, 0.5, 1, 3, 7.5])
@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_the_predicted_x0_is_guided_whatever_the_network_predicts(kind, w):
    x_t, t = noisy()
    y = torch.tensor([0, 1, 2, 3, 0, 1])  # 3 is no class
    output = Guided(Exact(kind), y, w)(x_t, t)
    none, of_class = (
        torch.stack([expert(x[None], s[None])[0] for x, s, expert in zip(x_t, t, experts, strict=True)])
        for experts in ([OF_ALL] * 6, [[*OF_CLASS, OF_ALL][i] for i in y])
    )
    expected = none + w * (of_class - none)
    torch.testing.assert_close(to_x0(PROCESS, kind, output, x_t, t), expected, rtol=0, atol=1e-10)


def test_without_a_class_the_answer_is_the_mean_over_the_classes():
    """x̂_none = Σ_y p(y | x_t) x̂_y, p by Bayes' rule."""
    x_t, t = noisy()
    network = Exact()
    a, s = PROCESS.sqrt_alphas_cumprod[t], PROCESS.sqrt_one_minus_alphas_cumprod[t]
    distance = (x_t[:, None] - a.view(-1, 1, 1, 1, 1) * IMAGES.flatten(0, 1)).flatten(2).square().sum(2)
    log_likelihood = (-distance / (2 * s[:, None] ** 2)).view(-1, CLASSES, EACH).logsumexp(2)
    p = (PRIOR.log() + log_likelihood).softmax(1)
    x_0s = torch.stack([Conditioned(network, y)(x_t, t) for y in range(CLASSES)], 1)
    expected = (p.view(-1, CLASSES, 1, 1, 1) * x_0s).sum(1)
    torch.testing.assert_close(Conditioned(network, None)(x_t, t), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(as_denoiser(network)(x_t, t), expected, rtol=0, atol=1e-12)


def test_w_0_and_1_are_one_call_and_the_network_itself_to_the_last_bit():
    torch.manual_seed(0)
    network = create_model("tiny", num_classes=4).eval()
    x_t, t = torch.randn(3, 1, 8, 8), torch.tensor([3, 500, 999])
    for labels, w, expected in (([0, 3, 1], 1, [0, 3, 1]), ([0, 3, 1], 0, [4, 4, 4]), (2, 1, [2, 2, 2])):
        with torch.no_grad():
            found, wanted = Guided(network, labels, w)(x_t, t), network(x_t, t, torch.tensor(expected)).sample
        assert torch.equal(found, wanted)
    assert torch.equal(Conditioned(network)(x_t, t), as_denoiser(network)(x_t, t))


def test_calls_of_the_network():
    x_t, t = noisy(4)
    for w, interval, asked in (
        (1, None, [0, 1, 2, 0]),
        (0, None, [3, 3, 3, 3]),
        (2, None, [0, 1, 2, 0, 3, 3, 3, 3]),
        (2, (50, 50), [0, 1, 2, 0]),  # nowhere
        (2, (0, 1), [0, 1, 2, 0, 3]),  # at the first alone
        (0, (99, 100), [0, 3, 2, 0]),  # at the second
    ):
        network = Exact()
        Guided(network, [0, 1, 2, 0], w, interval)(x_t, t.clamp(0, 99))
        assert network.asked == [asked], (w, interval)


def test_an_interval_guides_its_own_steps_alone():
    x_t, t = noisy()
    network, y = Exact("epsilon"), [0, 1, 2, 0, 1, 2]
    plain, guided = Conditioned(network, y)(x_t, t), Guided(network, y, 3)(x_t, t)
    assert torch.equal(Guided(network, y, 3, (20, 20))(x_t, t), plain)
    assert torch.equal(Guided(network, y, 3, (0, 100))(x_t, t), guided)
    low, high = sorted(t.tolist())[1], sorted(t.tolist())[4]  # lo is in it, hi is not
    inside = (t >= low) & (t < high)
    assert 0 < inside.sum() < 6
    found = Guided(network, y, 3, (low, high))(x_t, t)
    torch.testing.assert_close(
        found, torch.where(inside.view(-1, 1, 1, 1), guided, plain), rtol=0, atol=1e-12
    )


def test_a_learned_variance_is_that_of_the_class():
    torch.manual_seed(0)
    network = create_model("tiny", num_classes=2, out_channels=2).eval()
    x_t, t = torch.randn(2, 1, 8, 8), torch.tensor([10, 700])
    with torch.no_grad():
        of_class, none = (network(x_t, t, torch.tensor([y, y])).sample for y in (1, 2))
        found = Guided(network, 1, 2.5)(x_t, t)
    torch.testing.assert_close(found[:, :1], (none + 2.5 * (of_class - none))[:, :1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[:, 1:], of_class[:, 1:], rtol=1e-6, atol=1e-6)


def test_half_precision_is_guided_in_float32():
    class Half(nn.Module):
        num_classes = 1

        def forward(self, x_t, t, class_labels):
            return (10.0 + class_labels.view(-1, 1, 1, 1) * 0.0078125 * 8).to(x_t.dtype).expand(x_t.shape)

    x_t, t = torch.zeros(1, 1, 1, 1, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.int64)
    none, of_class = 10.0625, 10.0
    found = Guided(Half(), 0, 100)(x_t, t)
    assert found.dtype == torch.bfloat16 and found.item() == pytest.approx(
        none + 100 * (of_class - none), abs=0.02
    )


@pytest.mark.parametrize("wrapped", ["bare", "DataParallel", "compiled"])
def test_wrapped_networks_say_their_classes(wrapped):
    network: nn.Module = create_model("tiny", num_classes=4)
    if wrapped == "DataParallel":
        network = nn.DataParallel(network)
    if wrapped == "compiled":
        network = torch.compile(network)  # type: ignore[assignment]
    assert num_classes(network) == 4
    assert num_classes(create_model("tiny")) is None and num_classes(lambda x, t: x) is None


REFUSED = [
    (lambda network: Conditioned(network, 4), "class_labels holds 4; allowed: whole numbers in 0..3"),
    (lambda network: Conditioned(network, -1), "holds -1"),
    (lambda network: Conditioned(network, True), "class_labels is True"),
    (lambda network: Conditioned(network, 1.0), "class_labels is 1.0"),
    (lambda network: Conditioned(network, "boot"), "class_labels is 'boot'"),
    (lambda network: Conditioned(network, []), "class_labels is a list"),
    (lambda network: Conditioned(network, [0, True]), "class_labels holds True"),
    (lambda network: Conditioned(network, [0, 10**30]), "class_labels is a list"),
    (lambda network: Conditioned(network, torch.ones(3)), "a float32 tensor of shape (3,)"),
    (lambda network: Conditioned(network, torch.ones(3, 1).long()), "an int64 tensor of shape (3, 1)"),
    (lambda network: Conditioned(create_model("tiny"), 0), "network is a UNet2DModel without classes"),
    (lambda network: Conditioned(lambda x, t, y: x, 0), "network is a function without classes"),
    (lambda network: Guided(network, 0, -1), "scale is -1; allowed: finite numbers >= 0"),
    (lambda network: Guided(network, 0, float("nan")), "scale is nan"),
    (lambda network: Guided(network, 0, True), "scale is True"),
    (lambda network: Guided(network, None, 2), "class_labels is None; allowed: a class, or 1"),
    (lambda network: Guided(network, 0, 2, (3, 2)), "interval is (3, 2); allowed: (lo, hi), two steps"),
    (lambda network: Guided(network, 0, 2, 5), "interval is 5"),
    (lambda network: Guided(network, 0, 2, (0, "5")), "interval holds '5'"),
    (lambda network: Guided(network, 0, 2, (0, float("nan"))), "interval is (0, nan)"),
]


@pytest.mark.parametrize(("make", "words"), REFUSED, ids=[words[:30] for _, words in REFUSED])
def test_refused(make, words):
    with pytest.raises(ValueError) as caught:
        make(Exact())
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_one_label_goes_with_any_batch_and_others_with_their_own():
    x_t, t = noisy(4)
    assert torch.equal(Conditioned(Exact(), torch.tensor(1))(x_t, t), Conditioned(Exact(), [1] * 4)(x_t, t))
    for labels in ([1], [0, 1, 2], torch.tensor([0, 1, 2, 0, 1])):
        with pytest.raises(ValueError, match="class_labels for 4 images; allowed: as many, or one"):
            Conditioned(Exact(), labels)(x_t, t)


def test_a_network_conditioned_on_something_else_is_refused():
    from diffusers import UNet2DModel

    blocks = {
        "block_out_channels": (4,),
        "down_block_types": ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",),
    }
    network = UNet2DModel(
        8, 1, 1, class_embed_type="timestep", norm_num_groups=1, layers_per_block=1, **blocks
    )
    with pytest.raises(ValueError, match="class_embed_type of the network is 'timestep'; allowed: None"):
        as_denoiser(network)
