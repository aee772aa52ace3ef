"""sharding.py: whole states by name, of one process and of networks that processes share out with FSDP."""

import copy
import functools
import json

import numpy as np
import pytest
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from diffusers.models.unets.unet_2d import UNet2DModel
from PIL import Image
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW

import hf_ddpm.training.run
from hf_ddpm import TrainConfig, train
from hf_ddpm.folders.layout import variant_name
from hf_ddpm.training.averages import average_of, prepare_average, rest_of, update_average
from hf_ddpm.training.checkpoint import list_checkpoints, load_checkpoint
from hf_ddpm.training.sharding import (
    all_finite,
    gather_model,
    gather_optimizer,
    local,
    restore_model,
    restore_optimizer,
    whole,
)
from tests.launching import together


class Network(nn.Module):
    """Tied weights, buffers, a frozen weight, and one that no gradient reaches."""

    def __init__(self, width: int = 6, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(width, width, bias=False)
        self.norm = nn.BatchNorm1d(width)
        self.tied = nn.Linear(width, width, bias=False)
        self.tied.weight = self.first.weight
        self.frozen = nn.Linear(width, width).requires_grad_(False)
        self.unused = nn.Parameter(torch.ones(3))
        self.last = nn.Linear(width, 2)

    def forward(self, x):
        return self.last(self.frozen(self.tied(self.norm(self.first(x)))))


def adamw(model, lr=0.01):
    return AdamW(model.parameters(), lr=lr, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1)


def steps(model, optimizer, numbers, width=6):
    for n in numbers:
        x = torch.randn(8, width, generator=torch.Generator().manual_seed(n))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def assert_same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.fixture
def trained():
    model = Network()
    optimizer = adamw(model)
    steps(model, optimizer, range(3))
    return model, optimizer


def test_names_and_values(trained):
    model, optimizer = trained
    state = gather_model(model)
    assert_same(dict(state), dict(model.state_dict()))
    assert {"norm.running_mean", "norm.num_batches_tracked", "tied.weight", "unused"} <= state.keys()
    moments = gather_optimizer(model, optimizer)["state"]
    assert_same(moments["last.bias"]["exp_avg"], optimizer.state[model.last.bias]["exp_avg"])
    assert not moments["norm.weight"]["exp_avg"].equal(torch.zeros(6))


def test_a_round_trip_goes_on_to_the_last_bit(trained):
    model, optimizer = trained
    saved = copy.deepcopy((gather_model(model), gather_optimizer(model, optimizer)))
    other = Network(seed=1)
    fresh = adamw(other)
    restore_model(other, saved[0])
    restore_optimizer(other, fresh, saved[1])
    assert_same(dict(other.state_dict()), dict(model.state_dict()))
    assert other.tied.weight is other.first.weight
    for net, its in ((model, optimizer), (other, fresh)):
        steps(net, its, range(3, 6))
    assert_same(dict(other.state_dict()), dict(model.state_dict()))
    ours, theirs = gather_optimizer(other, fresh)["state"], gather_optimizer(model, optimizer)["state"]
    assert_same({name: ours[name] for name in sorted(ours)}, {name: theirs[name] for name in sorted(theirs)})
    assert other.unused not in fresh.state


def test_before_the_first_step_there_is_no_state_and_none_is_made():
    model = Network()
    optimizer = adamw(model)
    assert gather_optimizer(model, optimizer) == {}
    restore_optimizer(model, optimizer, {})
    assert not optimizer.state


def test_what_is_restored_is_not_changed(trained):
    model, optimizer = trained
    saved = gather_model(model), gather_optimizer(model, optimizer)
    before = copy.deepcopy(saved)
    restore_model(model, saved[0])
    restore_optimizer(model, optimizer, saved[1])
    assert saved[1].keys() == before[1].keys()
    assert_same(dict(saved[0]), dict(before[0]))
    assert_same(saved[1]["state"], before[1]["state"])
    assert saved[1]["param_groups"] == before[1]["param_groups"]


def test_hyperparameters_are_the_runs_own(trained):
    model, optimizer = trained
    saved = gather_optimizer(model, optimizer)
    fresh = adamw(model, lr=0.5)
    before = {key: value for key, value in fresh.param_groups[0].items() if key != "params"}
    restore_optimizer(model, fresh, saved)
    after = {key: value for key, value in fresh.param_groups[0].items() if key != "params"}
    assert after == before and after["lr"] == 0.5 and after["betas"] == (0.8, 0.9)
    assert isinstance(after["betas"], tuple)
    assert all(type(after[key]) is type(before[key]) for key in before)


def test_restoring_takes_no_step(trained):
    model, optimizer = trained
    weights = copy.deepcopy(dict(model.state_dict()))
    fresh = adamw(model)
    restore_optimizer(model, fresh, gather_optimizer(model, optimizer))
    assert_same(dict(model.state_dict()), weights)
    assert all(weight.grad is None for weight in model.parameters())
    assert fresh.state[model.last.bias]["step"] == 3
    assert {moments["step"].device.type for moments in fresh.state.values()} == {"cpu"}


def test_another_network_is_refused(trained):
    model, optimizer = trained
    wide = Network(width=7)
    with pytest.raises((RuntimeError, ValueError, KeyError)):
        restore_model(wide, gather_model(model))
    names = nn.Sequential(nn.Linear(6, 2))
    with pytest.raises((RuntimeError, ValueError, KeyError)):
        restore_model(names, gather_model(model))
    with pytest.raises(ValueError, match="the network has no "):
        restore_optimizer(names, adamw(names), gather_optimizer(model, optimizer))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_seen(trained, value):
    model, _ = trained
    assert all_finite(model) == 1 and all_finite(model).dtype == torch.float32
    model.last.weight.data[1, 2] = value
    assert all_finite(model) == 0


def test_a_plain_tensor_is_whole_and_local():
    tensor = torch.ones(2)
    assert local(tensor) is tensor and whole(tensor) is tensor


# Networks that processes share out


def share_out(accelerator):
    """FSDP 2 on CPUs, which accelerate has no launch for."""
    AcceleratorState._shared_state["distributed_type"] = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    assert accelerator.is_fsdp2
    return accelerator


def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.SiLU(), nn.Linear(5, 3, bias=False), nn.SiLU(), nn.Linear(3, 6))


def averaged_steps(model, average, optimizer, numbers, mine=slice(None)):
    for n in numbers:
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(n))[mine]
        (model(x) - x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        update_average(average, model, 0.5, n)


def sharded_run(start=None, numbers=range(4)):
    """Some steps of a network that is shared out; its states before and after, as process 0 has them."""
    accelerator = share_out(Accelerator(cpu=True))
    rank, model = accelerator.process_index, plain()
    average = average_of(model)
    model, optimizer = accelerator.prepare(model, adamw(model))
    average = prepare_average(average, functools.partial(fsdp2_prepare_model, accelerator))
    if start is not None:
        restore_model(model, start[0])
        restore_model(average, start[1])
        restore_optimizer(model, optimizer, start[2])
    before = copy.deepcopy((gather_model(model), gather_model(average), gather_optimizer(model, optimizer)))
    averaged_steps(model, average, optimizer, numbers, slice(4 * rank, 4 * rank + 4))
    weights = [*model.parameters(), *average.parameters(), *rest_of(average).parameters()]
    sharded = all(isinstance(weight, DTensor) for weight in weights)
    pieces = sum(local(weight).numel() for weight in model.parameters())
    total = sum(whole(weight).numel() for weight in model.parameters())
    after = gather_model(model), gather_model(average), gather_optimizer(model, optimizer)
    finite = [float(accelerator.reduce(all_finite(model), "mean"))]
    if rank == 1:
        local(model[4].bias.data)[-1] = torch.nan
    finite.append(float(accelerator.reduce(all_finite(model), "mean")))
    return {"sharded": sharded, "share": pieces / total, "before": before, "after": after, "finite": finite}


def plain_run(numbers=range(4), start=None):
    model = plain()
    average, optimizer = average_of(model), adamw(model)
    if start is not None:
        restore_model(model, start[0])
        restore_model(average, start[1])
        restore_optimizer(model, optimizer, start[2])
    averaged_steps(model, average, optimizer, numbers)
    return gather_model(model), gather_model(average), gather_optimizer(model, optimizer)


def assert_close(ours, theirs):
    for mine, others in zip(ours, theirs, strict=True):
        mine, others = mine.get("state", mine), others.get("state", others)
        torch.testing.assert_close(dict(mine), dict(others), rtol=1e-4, atol=1e-6)


@pytest.mark.distributed
def test_a_shared_out_network_has_the_states_of_a_plain_one(tmp_path):
    first, second = together(tmp_path, sharded_run)
    assert first["sharded"] and second["sharded"] and first["share"] + second["share"] == 1
    assert 0.3 < first["share"] < 0.7
    assert_close(first["after"], plain_run())
    assert second["after"][:2] == ({}, {}) and not second["after"][2]  # process 0 alone has them
    for tensor in (*first["after"][0].values(), *first["after"][1].values()):
        assert type(tensor) is torch.Tensor and tensor.device.type == "cpu"
    assert first["finite"][0] == second["finite"][0] == 1
    assert first["finite"][1] == second["finite"][1] < 1  # one process's share is not finite


@pytest.mark.distributed
def test_states_go_from_plain_to_shared_out_and_back(tmp_path):
    start = copy.deepcopy(plain_run(range(4)))
    first, _ = together(tmp_path, sharded_run, start, range(4, 6))
    for mine, others in zip(first["before"], start, strict=True):
        assert_same(dict(mine.get("state", mine)), dict(others.get("state", others)))
    assert_close(first["after"], plain_run(range(6)))
    assert_close(plain_run(range(6, 8), copy.deepcopy(first["after"])), plain_run(range(8)))


def plan(folder, **changes):
    values = {
        **{"model": "tiny", "batch_size": 4, "learning_rate": 1e-3, "lr_warmup_steps": 0, "max_steps": 4},
        **{"num_train_timesteps": 50, "beta_end": 0.3, "ema_decay": "0.5,0.9", "shuffle_memory": 32},
        **{
            "log_every": 1,
            "checkpoint_every": 2,
            "sample_every": 2,
            "sample_num_images": 3,
            "sample_steps": 2,
        },
        **{"evaluate_every": 2, "evaluate_num_images": 5, "evaluate_num_evals": 2, "keep_checkpoints": 5},
    }
    return values | changes | {"output_dir": str(folder)}


def train_here(values, fsdp):
    """A real run in this process and those beside it."""
    if fsdp:
        make = hf_ddpm.training.run.make_accelerator
        hf_ddpm.training.run.make_accelerator = lambda config: share_out(make(config))
    try:
        result = train(TrainConfig(**values))
    except ValueError as error:
        return str(error)
    return result.step, result.images


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def column(folder, key):
    return [line[key] for line in log(folder) if key in line]


def facts(folder):
    """What a run says, that a different order of additions changes little."""
    return {key: column(folder, key) for key in ("step", "images", "loss", "grad_norm", "heldout_bpd")}


@pytest.mark.distributed
def test_the_trainer_with_fsdp(tmp_path):
    shared, alone = tmp_path / "shared", tmp_path / "alone"
    assert together(tmp_path, train_here, plan(shared, max_steps=2), True) == [(2, 16)] * 2
    assert together(tmp_path, train_here, plan(shared, max_steps=4), True) == [(4, 32)] * 2
    one = together(tmp_path, train_here, plan(shared, max_steps=6), False, processes=1)
    assert one == [(6, 48)]  # the same steps of 8 images
    together(tmp_path, train_here, plan(alone, max_steps=6, batch_size=8), False, processes=1)

    assert column(shared, "step") == [1, 2, 2, 3, 4, 4, 5, 6, 6]
    torch.testing.assert_close(facts(shared), facts(alone), rtol=1e-3, atol=0)
    ours, theirs = ([load_checkpoint(path) for _, path in list_checkpoints(run)] for run in (shared, alone))
    assert [saved.step for saved in ours] == [2, 4, 6]
    for mine, others in zip(ours, theirs, strict=True):
        pairs = [
            (mine.model, others.model),
            *((mine.averages[d], others.averages[d]) for d in ("0.5", "0.9")),
        ]
        for weights, expected in pairs:
            assert weights.keys() == expected.keys()
            for name in weights:  # a key's bias shifts all logits alike: its gradient is rounding
                if not name.endswith("to_k.bias"):
                    torch.testing.assert_close(weights[name], expected[name], rtol=1e-3, atol=1e-5)
    for name in ("0.5", "0.9"):
        variant = None if name == "0.5" else variant_name(name)
        unet = UNet2DModel.from_pretrained(shared / "unet", variant=variant)
        assert_same(dict(unet.state_dict()), dict(ours[-1].averages[name]))
    for step in (2, 4, 6):
        file = f"samples/step-{step:08d}.png"
        a, b = (np.asarray(Image.open(run / file)).astype(int) for run in (shared, alone))
        assert np.abs(a - b).max() <= 1 and a.std() > 0


@pytest.mark.distributed
def test_channels_last_is_refused_with_fsdp(tmp_path):
    answers = together(tmp_path, train_here, plan(tmp_path / "run", channels_last=True), True)
    assert answers == ["channels_last is True, which FSDP can't share out; allowed with it: false"] * 2
