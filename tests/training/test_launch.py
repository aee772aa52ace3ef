"""How a run is executed: precision, layout, compilation, worker processes, several processes."""

import functools

import numpy as np
import pytest
import torch
from accelerate import PartialState
from PIL import Image

from hf_ddpm import DDPMPipeline, TrainConfig, load_stream, train
from hf_ddpm.training.checkpoint import load_checkpoint
from tests.launching import forked
from tests.training.helpers import (
    Conv,
    assert_same,
    by_hand,
    checkpoint,
    drawn,
    log,
    refused,
    small,
    weights,
)


def test_bfloat16_keeps_float32_where_it_counts(tmp_path):
    seen = set()

    class Watched(Conv):
        def forward(self, x_t, t):
            answer = self.conv(x_t)
            seen.add((x_t.dtype, answer.dtype))
            return answer

    model = Watched()
    train(small(tmp_path, mixed_precision="bf16"), model)
    assert seen == {(torch.float32, torch.bfloat16)}
    assert model(torch.zeros(1, 1, 8, 8), None).dtype == torch.float32  # given back without the autocast
    saved = load_checkpoint(checkpoint(tmp_path, 3))
    moments = [value for state in saved.optimizer["optimizer"]["state"].values() for value in state.values()]
    for tensor in (*saved.model.values(), *saved.averages["0.9999"].values(), *moments):
        assert tensor.dtype == torch.float32


def test_noise_near_t_0_in_bfloat16(tmp_path):
    """The network sees √ᾱ_t x_0 + √(1 − ᾱ_t) ε in float32, where bfloat16 would round all of ε away."""
    seen = []

    class Watched(Conv):
        def forward(self, x_t, t):
            seen.append((x_t.double(), t))
            return self.conv(x_t)

    config = small(tmp_path, mixed_precision="bf16", batch_size=64, max_steps=20, shuffle_memory=0)
    train(config, Watched())
    x_t, t = (torch.cat(parts) for parts in zip(*seen, strict=True))
    stream = load_stream("digits").batches(64)
    x_0 = torch.cat([next(stream) for _ in range(20)]).double() / 127.5 - 1
    draws = [drawn(config.seed, position, (1, 8, 8)) for position in range(len(x_0))]
    assert t.tolist() == [step for step, *_ in draws] and (t < 10).sum() > 5
    alpha_bar = torch.from_numpy(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))[t].view(-1, 1, 1, 1)
    eps = torch.stack([noise for _, noise, _ in draws]).double()
    wanted = alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * eps
    torch.testing.assert_close(x_t, wanted, rtol=0, atol=1e-6)


def test_precisions_in_one_process(tmp_path, monkeypatch):
    train(small(tmp_path / "no"), Conv())
    train(small(tmp_path / "bf16", mixed_precision="bf16"), Conv())
    train(small(tmp_path / "none"), Conv())
    assert log(tmp_path / "none") == log(tmp_path / "no") != log(tmp_path / "bf16")
    np.testing.assert_allclose(log(tmp_path / "bf16"), log(tmp_path / "no"), rtol=0.02)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # as accelerate launch says it
    train(small(tmp_path / "launch"), Conv())
    assert log(tmp_path / "launch") == log(tmp_path / "bf16")
    assert TrainConfig.load(tmp_path / "launch" / "train_config.json").mixed_precision == "bf16"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    assert "mixed_precision is 'fp8'" in refused(small(tmp_path / "fp8"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device can do it")
def test_float16_on_a_cpu_is_refused(tmp_path):
    text = refused(small(tmp_path, mixed_precision="fp16"))
    assert text == "mixed_precision is 'fp16', but the device is a CPU; allowed there: no, bf16"


@pytest.mark.parametrize(
    ("option", "dropout"),
    [("gradient_checkpointing", 0.1), ("channels_last", 0.0)],  # which drops other neurons in its layout
)
def test_options_that_change_nothing_but_cost(tmp_path, option, dropout):
    plan = {"channels": 3, "dropout": dropout}
    train(small(tmp_path / "without", **plan))
    train(small(tmp_path / "with", **plan, **{option: True}))
    np.testing.assert_allclose(log(tmp_path / "with"), log(tmp_path / "without"), rtol=1e-4)
    assert DDPMPipeline.from_pretrained(tmp_path / "with").image_shape == (3, 8, 8)


def test_channels_last_and_checkpointing_are_in_force(tmp_path):
    seen = set()

    class Watched(Conv):
        def enable_gradient_checkpointing(self):
            seen.add("checkpointing")

        def forward(self, x_t, t):
            seen.add(x_t.is_contiguous(memory_format=torch.channels_last) and not x_t.is_contiguous())
            seen.add(self.conv.weight.is_contiguous(memory_format=torch.channels_last))
            return self.conv(x_t)

    train(small(tmp_path, channels=3, channels_last=True, gradient_checkpointing=True), Watched(3))
    assert seen == {"checkpointing", True}


def test_checkpointing_of_a_network_without_it(tmp_path):
    text = refused(small(tmp_path, gradient_checkpointing=True), Conv())
    assert text == "gradient_checkpointing is True, which Conv doesn't have"


def test_compiled_plumbing(tmp_path, monkeypatch):
    """All but the code generator: under autocast, the names of saved weights, going on."""
    plan = {"max_steps": 2, "mixed_precision": "bf16"}
    train(small(tmp_path / "without", **plan), Conv())
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    train(small(tmp_path / "with", **plan, compile=True), Conv())
    np.testing.assert_allclose(log(tmp_path / "with"), log(tmp_path / "without"), rtol=1e-3)
    assert weights(tmp_path / "with", 2).keys() == weights(tmp_path / "without", 2).keys()
    assert train(small(tmp_path / "with", **plan | {"max_steps": 3}, compile=True), Conv()).step == 3


@pytest.mark.slow
def test_compiled_for_real(tmp_path):
    """With generated C++ code, which takes minutes to build for a U-Net and seconds to run."""
    plan = {"max_steps": 2, "batch_size": 2}
    train(small(tmp_path / "without", **plan))
    train(small(tmp_path / "with", **plan, compile=True))
    np.testing.assert_allclose(log(tmp_path / "with"), log(tmp_path / "without"), rtol=1e-4)
    assert DDPMPipeline.from_pretrained(tmp_path / "with").image_shape == (1, 8, 8)


def test_a_worker_process_changes_nothing(tmp_path):
    plan = {"horizontal_flip": True, "max_steps": 4, "checkpoint_every": 2}
    train(small(tmp_path / "0", **plan), Conv())
    train(small(tmp_path / "1", **plan, num_workers=1), Conv())
    assert log(tmp_path / "1") == log(tmp_path / "0")
    assert_same(weights(tmp_path / "1", 4), weights(tmp_path / "0", 4))


def test_processes_that_were_not_joined(tmp_path, monkeypatch):
    PartialState(cpu=True)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")  # accelerate has this process in its books already, as the only one
    text = refused(small(tmp_path / "run"))
    assert text.startswith("the launch started 2 processes, but accelerate sees 1; ")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ("SLURM_STEP_NUM_TASKS=2", "SLURM_STEP_NUM_TASKS is 2, but this process works alone"),
        ("OMPI_COMM_WORLD_SIZE=2", "OMPI_COMM_WORLD_SIZE is 2, but this process works alone"),
        (
            "ACCELERATE_MIXED_PRECISION=no MASTER_ADDR=127.0.0.1 MASTER_PORT=29500",
            "asked for several processes and started one; add --multi_gpu",
        ),
        ("ACCELERATE_USE_FSDP=true", "the launch asks for FSDP, which accelerate doesn't do here (it is NO)"),
    ],
)
def test_a_launch_that_is_not_what_was_asked_for(tmp_path, monkeypatch, environment, words):
    PartialState(cpu=True)  # alone, as it is in such a launch
    for name, value in (word.split("=") for word in environment.split()):
        monkeypatch.setenv(name, value)
    assert words in refused(small(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


SCRIPT = """
import gc, sys, torch
import hf_ddpm.training.run
from hf_ddpm import TrainConfig, create_model, train
from accelerate import PartialState
from torch.nn.parallel import DistributedDataParallel

make_batches = hf_ddpm.training.run.make_batches
seen = []

def watched(*args):
    for batch in make_batches(*args):
        seen.append(batch.images[batch.present])
        yield batch

destroy, left = torch.distributed.destroy_process_group, []

def destroying(*args):
    left.extend(thing for thing in gc.get_objects() if isinstance(thing, DistributedDataParallel))
    destroy(*args)

hf_ddpm.training.run.make_batches, torch.distributed.destroy_process_group = watched, destroying
torch.manual_seed(0)
model = create_model("tiny")
train(TrainConfig.load(sys.argv[1]), model)
facts = {"weights": model.state_dict(), "images": torch.cat(seen), "left": len(left)}
torch.save(facts, f"{sys.argv[2]}/rank{PartialState().process_index}.pt")
"""


@pytest.mark.distributed
def test_two_processes(tmp_path):
    run = tmp_path / "run"
    plan = {"sample_every": 3, "sample_num_images": 3, "sample_steps": 2, "horizontal_flip": True}
    config = small(run, batch_size=4, **plan)
    (tmp_path / "config.json").write_text(config.to_json())
    (tmp_path / "script.py").write_text(SCRIPT)
    done = forked([tmp_path / "script.py", tmp_path / "config.json", tmp_path], tmp_path / "launch")
    assert (tmp_path / "rank1.pt").exists(), done.stderr

    assert load_checkpoint(checkpoint(run, 3)).state["num_processes"] == 2, done.stderr
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    assert_same(dict(ranks[0]["weights"]), dict(ranks[1]["weights"]))
    assert_same(weights(run, 3), dict(ranks[0]["weights"]))
    both = {image.numpy().tobytes() for rank in ranks for image in rank["images"]}
    assert len(both) == 24  # no image twice
    # DDP as the last owner of its process group destroys it under Python's lock, which now and then deadlocks
    assert [rank["left"] for rank in ranks] == [0, 0]

    losses, model, average, _ = by_hand(config, images_per_step=8)
    np.testing.assert_allclose(log(run), np.array(losses).mean(1), rtol=1e-5)
    # A key's bias shifts all logits alike: its gradient is rounding, which Adam scales up to a whole step.
    moved = [name for name in average if not name.endswith("to_k.bias")]
    for ours, bare in ((weights(run, 3), model.state_dict()), (weights(run, 3, "ema_0.9999"), average)):
        pairs = ({name: side[name].float() for name in moved} for side in (ours, bare))
        torch.testing.assert_close(*pairs, rtol=1e-4, atol=1e-6)
    assert log(run, "images") == [8, 16, 24]

    pipeline = DDPMPipeline.from_pretrained(run)
    images = [pipeline(1, [torch.Generator().manual_seed(i)], 2).images[0] for i in range(3)]
    grid = np.asarray(Image.open(run / "samples" / "step-00000003.png")).astype(int)
    for place, image in zip(((4, 4), (4, 104), (104, 4)), images, strict=True):
        large = np.asarray(image.convert("RGB").resize((96, 96), Image.Resampling.NEAREST))
        assert np.abs(grid[place[0] : place[0] + 96, place[1] : place[1] + 96] - large).max() <= 1
    assert done.stderr.count("train: step 3/3") == 1  # one line a step, of process 0
