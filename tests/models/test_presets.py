"""presets.py: the presets against what the paper says of them, and every kind of model as a denoiser."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d import UNet2DModel

from hf_ddpm.denoiser import as_denoiser, scoring_device
from hf_ddpm.models import PRESETS, create_model
from hf_ddpm.models.presets import AUTO, UNETS, choose_preset, nearest_sizes

NAMES = [name for name, config in PRESETS.items() if config["_class_name"] == "UNet2DModel"]


def on_meta(preset: str, **changes) -> UNet2DModel:
    """The model's layout without its weights: nothing is allocated or drawn."""
    with torch.device("meta"):
        return create_model(preset, **changes)


def attention_sides(model: UNet2DModel, size: int) -> set[int]:
    """Side of the images that each attention outside the middle block really sees."""
    sides = set()

    def record(module, inputs):
        sides.add(inputs[0].shape[-1])

    for part in (model.down_blocks, model.up_blocks):
        for module in part.modules():
            if isinstance(module, Attention):
                module.register_forward_pre_hook(record)
    model(
        torch.zeros(1, model.config["in_channels"], size, size, device="meta"), torch.zeros(1, device="meta")
    )
    return sides


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [
        ("cifar10", 35_746_307),  # "35.7 million", Ho et al. appendix B
        ("256", 113_673_219),  # "114 million"
        ("fashion-mnist", 1_112_801),
        ("digits", 284_513),
        ("tiny", 44_969),
        ("small-32", 4_329_059),
        ("small-64", 6_806_179),
        ("small-128", 10_244_611),
        ("small-256", 10_354_083),
    ],
)
def test_parameter_count(preset, parameters):
    assert sum(p.numel() for p in on_meta(preset).parameters()) == parameters


def test_cifar10_is_the_published_layout():
    # The config of google/ddpm-cifar10-32, written out; that file lost the paper's dropout.
    published = {
        "sample_size": 32,
        "in_channels": 3,
        "out_channels": 3,
        "act_fn": "silu",
        "attention_head_dim": None,
        "block_out_channels": (128, 256, 256, 256),
        "center_input_sample": False,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-6,
        "norm_num_groups": 32,
        "time_embedding_type": "positional",
        "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    }
    config = on_meta("cifar10").config
    assert {key: config[key] for key in published} == published
    assert config["dropout"] == 0.1


@pytest.mark.parametrize("preset", NAMES)
def test_every_attention_has_one_head(preset):
    attentions = [m for m in on_meta(preset).modules() if isinstance(m, Attention)]
    assert attentions and all(a.heads == 1 and a.inner_dim == a.query_dim for a in attentions)


@pytest.mark.parametrize(
    ("preset", "side"),
    [
        *(("cifar10", 16), ("256", 16), ("fashion-mnist", 7), ("digits", 4), ("tiny", 4)),
        *(("small-32", 8), ("small-64", 16), ("small-128", 16), ("small-256", 16)),
    ],
)
def test_attention_acts_at_one_resolution(preset, side):
    model = on_meta(preset)
    assert attention_sides(model, model.config["sample_size"]) == {side}
    assert isinstance(model.mid_block.attentions[0], Attention)


@pytest.mark.parametrize(
    ("preset", "changes", "p"),
    [("cifar10", {}, 0.1), ("256", {}, 0.0), ("digits", {}, 0.0), ("tiny", {"dropout": 0.3}, 0.3)],
)
def test_dropout_acts_in_every_residual_block_and_nowhere_else(preset, changes, p):
    model = on_meta(preset, **changes)
    blocks = [m for m in model.modules() if isinstance(m, ResnetBlock2D)]
    assert {id(b) for b in model.mid_block.resnets} <= {id(b) for b in blocks}
    assert all(b.dropout.p == p for b in blocks)
    others = [m for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    assert all(m.p == 0 for m in others if id(m) not in {id(b.dropout) for b in blocks})


def test_dropout_is_random_in_training_and_off_in_eval():
    torch.manual_seed(0)
    denoise = as_denoiser(model := create_model("tiny", dropout=0.5))
    x_t, t = torch.randn(1, 1, 8, 8), torch.tensor([3])
    with torch.no_grad():
        assert not torch.equal(denoise(x_t, t), denoise(x_t, t))
        model.eval()
        assert torch.equal(denoise(x_t, t), denoise(x_t, t))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("preset", "size"),
    [("fashion-mnist", 28), ("fashion-mnist", (8, 16))]
    + [(preset, size) for preset in ("digits", "tiny") for size in (8, 16, (8, 16), (12, 4))],
)
def test_small_presets_keep_the_shape(preset, size, channels):
    model = create_model(preset, image_size=size, channels=channels)
    height, width = size if isinstance(size, tuple) else (size, size)
    x_t = torch.randn(1, channels, height, width)
    with torch.no_grad():
        output = as_denoiser(model)(x_t, torch.tensor([999]))
    assert output.shape == x_t.shape and output.isfinite().all()
    assert model.config["sample_size"] == size


def test_paper_presets_keep_the_shape():
    for preset, side in (("cifar10", 32), ("256", 256)):
        x_t = torch.zeros(2, 3, side, side, device="meta")
        assert (
            as_denoiser(on_meta(preset))(x_t, torch.zeros(2, dtype=torch.int64, device="meta")).shape
            == x_t.shape
        )


def test_fashion_mnist_halves_28_to_7_without_padding():
    sizes = []
    model = on_meta("fashion-mnist")
    for block in model.down_blocks:
        block.register_forward_hook(lambda module, inputs, output: sizes.append(output[0].shape[-1]))
    model(torch.zeros(1, 1, 28, 28, device="meta"), 0)
    assert sizes == [14, 7, 7]


def test_defaults_are_the_presets():
    config, spelled_out = on_meta("tiny").config, on_meta("tiny", image_size=8, channels=1, dropout=0).config
    assert all(spelled_out[key] == value for key, value in config.items() if key[0] != "_")
    assert on_meta("tiny", channels=3).config["out_channels"] == 3


def test_learned_variances_double_the_output():
    model = create_model("tiny", channels=3, out_channels=6)
    assert as_denoiser(model)(torch.zeros(2, 3, 8, 8), torch.tensor([0, 5])).shape == (2, 6, 8, 8)


def test_models_share_nothing():
    model = create_model("tiny")
    model.register_to_config(sample_size=99)
    assert create_model("tiny").config["sample_size"] == PRESETS["tiny"]["sample_size"] == 8


@pytest.fixture
def unet():
    torch.manual_seed(0)
    return create_model("tiny").eval()


X_T, T = torch.linspace(-1, 1, 2 * 64).reshape(2, 1, 8, 8), torch.tensor([0, 999])


@pytest.mark.parametrize(
    "wrap",
    [
        lambda answer: answer,
        lambda answer: (answer,),
        lambda answer: (answer, "more"),
        lambda answer: SimpleNamespace(sample=answer),
    ],
)
def test_function_answers(wrap):
    assert torch.equal(
        as_denoiser(lambda x_t, t: wrap(x_t + t[:, None, None, None]))(X_T, T), X_T + T.view(2, 1, 1, 1)
    )


def test_module_that_answers_a_tensor():
    class Half(torch.nn.Module):
        def forward(self, x_t, t):
            return x_t / 2

    assert torch.equal(as_denoiser(Half())(X_T, T), X_T / 2)


@torch.no_grad()
def test_unet_answers(unet):
    expected = unet(X_T, T).sample
    assert torch.equal(as_denoiser(unet)(X_T, T), expected)
    assert torch.equal(as_denoiser(lambda x_t, t: unet(x_t, t, return_dict=False))(X_T, T), expected)


@pytest.mark.slow  # importing the compiler takes seconds
@torch.no_grad()
def test_compiled_unet(unet):
    compiled = torch.compile(unet, backend="eager")
    assert not isinstance(compiled, UNet2DModel)
    torch.testing.assert_close(as_denoiser(compiled)(X_T, T), unet(X_T, T).sample)


@torch.no_grad()
def test_unet_in_ddp(unet):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(unet)
        assert torch.equal(as_denoiser(wrapped)(X_T, T), unet(X_T, T).sample)
    finally:
        dist.destroy_process_group()


def test_gradients_reach_the_model(unet):
    as_denoiser(unet)(X_T, T).square().mean().backward()
    assert all(p.grad is not None for p in unet.parameters())


def test_as_denoiser_is_idempotent(unet):
    denoise = as_denoiser(unet)
    assert as_denoiser(denoise) is denoise


@pytest.mark.parametrize(
    ("preset", "changes", "message"),
    [
        (
            "cifar",
            {},
            r"preset 'cifar' is unknown \(did you mean 'cifar10'\?\); allowed: cifar10, 256, fashion-mnist",
        ),
        ("Fashion_MNIST", {}, r"preset 'Fashion_MNIST' is unknown"),
        ("zzz", {}, r"preset 'zzz' is unknown; allowed: cifar10, 256"),
        (256, {}, r"preset 256 is unknown \(did you mean '256'"),
        (["tiny"], {}, r"preset \['tiny'\] is unknown"),
        (
            "tiny",
            {"image_size": 9},
            r"image_size is 9; allowed for 'tiny': a positive multiple of 2, or a pair",
        ),
        (
            "fashion-mnist",
            {"image_size": 30},
            r"image_size is 30; allowed for 'fashion-mnist': .* multiple of 4",
        ),
        (
            "256",
            {"image_size": (256, 240)},
            r"image_size is \(256, 240\); allowed for '256': .* multiple of 32",
        ),
        ("tiny", {"image_size": 0}, r"image_size is 0; allowed"),
        ("tiny", {"image_size": -8}, r"image_size is -8; allowed"),
        ("tiny", {"image_size": 8.0}, r"image_size is 8.0; allowed"),
        ("tiny", {"image_size": "8"}, r"image_size is '8'; allowed"),
        ("tiny", {"image_size": (8,)}, r"image_size is \(8,\); allowed"),
        ("tiny", {"image_size": (8, 0)}, r"image_size is \(8, 0\); allowed"),
        ("tiny", {"channels": 0}, r"channels is 0; allowed: a positive integer"),
        ("tiny", {"channels": -1}, r"channels is -1; allowed"),
        ("tiny", {"channels": 1.0}, r"channels is 1.0; allowed"),
        ("tiny", {"channels": True}, r"channels is True; allowed"),
        ("tiny", {"out_channels": 0}, r"out_channels is 0; allowed: one of \(1, 2\)"),
        ("tiny", {"out_channels": 2.0}, r"out_channels is 2.0; allowed"),
        ("tiny", {"channels": 3, "out_channels": 4}, r"out_channels is 4; allowed: one of \(3, 6\)"),
        ("tiny", {"dropout": 1.0}, r"dropout is 1.0; allowed: a probability in \[0, 1\)"),
        ("tiny", {"dropout": -0.1}, r"dropout is -0.1; allowed"),
        ("tiny", {"dropout": float("nan")}, r"dropout is nan; allowed"),
        ("tiny", {"dropout": "0.1"}, r"dropout is '0.1'; allowed"),
    ],
)
def test_bad_arguments(preset, changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        create_model(preset, **changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model", [None, "google/ddpm-cifar10-32", UNet2DModel, {"weight": torch.zeros(99)}])
def test_not_a_model(model):
    shown = r"((a|the class) \w+|None|'google/ddpm-cifar10-32')"
    with pytest.raises(
        ValueError, match=rf"^model is {shown}; allowed: an nn.Module or a function of \(x_t, t\)$"
    ):
        as_denoiser(model)


@pytest.mark.parametrize("answer", [None, 0.0, (), ("no tensor",), {"x_0": X_T}])
def test_answer_without_a_tensor(answer):
    with pytest.raises(ValueError, match=rf"the model answered {type(answer).__name__}; allowed: Tensor"):
        as_denoiser(lambda x_t, t: answer)(X_T, T)


@pytest.mark.parametrize("shape", [(), (1, 1, 8, 8), (2, 1, 1, 1), (2, 3, 8, 8), (2, 8, 8)])
def test_answer_of_another_shape(shape):
    with pytest.raises(
        ValueError, match=r"to x_t of shape \(2, 1, 8, 8\); allowed: the same shape, or twice"
    ):
        as_denoiser(lambda x_t, t: torch.zeros(shape))(X_T, T)


def test_a_denoiser_elsewhere():
    places = []

    def model(x_t, t):
        places.append((x_t.device.type, t.device.type))
        return torch.ones(x_t.shape)

    answer = as_denoiser(model, torch.device("meta"))(
        torch.zeros(2, 1, 4, 4), torch.zeros(2, dtype=torch.long)
    )
    assert places == [("meta", "meta")] and answer.device.type == "cpu" and answer.sum() == 32


@pytest.mark.parametrize(("network", "bound"), [("cpu", "cpu"), ("cuda:1", "cuda:1"), ("mps", "cpu")])
def test_the_bound_is_computed_where_float64_is(network, bound):
    assert scoring_device(torch.device(network)) == torch.device(bound)


# The preset for a size


@pytest.mark.parametrize(
    ("size", "name"),
    [
        *((8, "digits"), (16, "digits"), (28, "fashion-mnist"), (32, "small-32"), (48, "small-32")),
        *((64, "small-64"), (96, "small-64"), (128, "small-128"), (192, "small-128"), (256, "small-256")),
        *((512, "small-256"), ((28, 32), "fashion-mnist"), ((64, 128), "small-64"), (36, "fashion-mnist")),
        *((18, "digits"), (9, None), (30, None), (100, None), ((101, 100), None)),
    ],
    ids=str,
)
def test_auto_takes_a_preset_by_the_size(size, name):
    sides = size if isinstance(size, tuple) else (size, size)
    row = choose_preset(*sides)
    assert (row and row.name) == name
    if row is not None:
        assert on_meta(row.name, image_size=sides).config["sample_size"] == sides


@pytest.mark.parametrize("size", [(30, 30), (100, 100), (200, 190), (9, 9), (1, 1), (41, 54), (163, 217)])
def test_sizes_near_one_that_can_not_be_halved_are_taken(size):
    near = nearest_sizes(AUTO, *size)
    assert near and size not in near and len(near) <= 2
    assert all(choose_preset(*sides) is not None for sides in near)


def test_sizes_near():
    assert nearest_sizes(AUTO, 64, 64) == [(64, 64)] and nearest_sizes("256", 64, 64) == [(64, 64)]
    assert nearest_sizes(AUTO, 100, 100) == [(96, 96), (104, 104)]
    assert nearest_sizes("cifar10", 30, 41) == [(24, 40), (32, 48)]
    assert nearest_sizes("conv-autoencoder", 7, 9) == [(7, 9)]
    with pytest.raises(ValueError, match=r"multiple of 8, .* such as 96 or 104$"):
        create_model("cifar10", image_size=100)


def test_auto_takes_small_networks_of_the_table():
    taken = [row for row in UNETS if row.up_to is not None]
    counts = [sum(weight.numel() for weight in on_meta(row.name).parameters()) for row in taken]
    assert max(counts) < 35_746_307 / 3 and len({row.up_to for row in taken}) == len(taken)
    assert all(row.reason and row.size <= (row.up_to or 0) for row in taken)
