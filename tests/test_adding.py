"""CONTRIBUTING.md's table: each thing is added in a copy of the package, and used from training to loading.

A copy is edited in the files that the row of the table names, and in no other. Then a fresh interpreter
trains the `tiny` network on the digits with the new thing, loads what was saved, samples and scores it.
"""

import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_ddpm import DDPMPipeline, TrainConfig, train

ROOT = Path(__file__).parents[1]


def rows() -> dict[str, list[str]]:
    """What can be added, and the files that the table names for it."""
    table = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("| to add a ... |")[2]
    lines = [line.split("|") for line in table.partition("\n\n")[0].splitlines()[2:]]
    return {cells[1].strip(): re.findall(r"`([\w/]+\.\w+)`", cells[2]) for cells in lines}


ROWS = rows()

# What every script below begins with. A run of 3 steps on a chain of 20; what it saved, sampled and scored.
USE = """
import json
import sys
from pathlib import Path

import torch

import hf_ddpm
from hf_ddpm import DDPMPipeline, TrainConfig, train
from hf_ddpm.evaluation.config import EvaluationConfig
from hf_ddpm.evaluation.evaluate import evaluate

assert Path(hf_ddpm.__file__).parent == Path("hf_ddpm").resolve(), hf_ddpm.__file__
found = {}


def trained(**changes):
    options = {"dataset": "digits", "model": "tiny", "output_dir": "run", "num_train_timesteps": 20}
    options |= {"beta_end": 0.5, "max_steps": 3, "batch_size": 8, "lr_warmup_steps": 0, "sample_every": 0}
    train(TrainConfig.load(None, **options | changes))
    return DDPMPipeline.from_pretrained("run" if "output_dir" not in changes else changes["output_dir"])


def used(name, **changes):
    pipeline = trained(output_dir=name, **changes)
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(2, torch.Generator().manual_seed(0), output_type="pt").images
    assert drawn.shape == (2, 1, 8, 8) and drawn.isfinite().all()
    report = evaluate(EvaluationConfig(model=name, dataset="digits", num_images=4, num_evals_per_image=4))
    found[name] = {"bpd": report["bits_per_dim"]["bpd"]["value"]}
    return pipeline


"""


def add_and_run(tmp_path: Path, added: dict[str, dict[str, tuple[str, str]]], script: str) -> dict:
    """Edit a copy of the package, run the script in it, and return what it found.

    Args:
        tmp_path: folder of the copy.
        added: for each row of the table, the files to edit, and in each a line and what is put in its place.
        script: Python, after `USE`; it fills the dict `found`.
    """
    shutil.copytree(ROOT / "hf_ddpm", tmp_path / "hf_ddpm", ignore=shutil.ignore_patterns("__pycache__"))
    for row, edits in added.items():
        code = [file for file in ROWS[row] if file.endswith(".py")]
        assert set(code) <= set(edits), f"the table names a file that needs no edit: {row}"
        others = set(edits) - set(code)
        assert len(others) == ("that acts on it" in row_text(row)), f"the table doesn't name {others}"
        for file, (line, new) in edits.items():
            text = (tmp_path / file).read_text(encoding="utf-8")
            assert text.count(line) == 1, (file, line)
            (tmp_path / file).write_text(text.replace(line, new), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", USE + script + "\nPath('found.json').write_text(json.dumps(found))"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((tmp_path / "found.json").read_text())


def row_text(row: str) -> str:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return next(line for line in text.splitlines() if line.startswith(f"| {row} |"))


def test_the_table_says_how_many_files():
    assert {row: len(files) for row, files in ROWS.items()} == {
        "beta schedule": 1,
        "prediction type": 2,  # with the page of the mathematics
        "variance type": 2,  # with it too
        "objective": 1,
        "sampler": 1,
        "network": 2,
        "data source": 1,
        "option of `train`": 1,  # and the file that acts on it
        "option of `evaluate`": 1,  # likewise
    }


NETWORK = {
    "hf_ddpm/models/networks.py": (
        "NETWORKS: dict[str, type[ModelMixin]] = {\n",
        """
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput


class OneConvolution(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, sample_size=8, in_channels=1, out_channels=1):
        super().__init__()
        self.layer = torch.nn.Conv2d(in_channels, out_channels, 3, padding=1)

    def forward(self, sample, timestep, return_dict=True):
        answer = self.layer(sample)
        return UNet2DOutput(sample=answer) if return_dict else (answer,)


NETWORKS: dict[str, type[ModelMixin]] = {
    "OneConvolution": OneConvolution,
""",
    ),
    "hf_ddpm/models/presets.py": (
        "PRESETS: dict[str, dict[str, Any]] = {\n",
        "PRESETS: dict[str, dict[str, Any]] = {\n"
        '    "one": {"_class_name": "OneConvolution", "in_channels": 1, "out_channels": 1},\n',
    ),
}
SOURCE = {
    "hf_ddpm/data/sources.py": (
        "    name = os.fsdecode(source)\n",
        """    name = os.fsdecode(source)
    if name == "stripes":
        images = [[[255 * ((i + x) % 2) for x in range(8)] for _ in range(8)] for i in range(16)]
        features = datasets.Features({"image": Array2D((8, 8), "uint8")})
        dataset = datasets.Dataset.from_dict({"image": images}, features).to_iterable_dataset()
        return Source(name, split, "stream", [], features, dataset)
""",
    ),
}
SAMPLER = {
    "hf_ddpm/generation/samplers.py": (
        '    "ddim": diffusers.DDIMScheduler,\n',
        '    "ddim": diffusers.DDIMScheduler,\n    "ddim-parallel": diffusers.DDIMParallelScheduler,\n',
    ),
}
TRAIN_OPTION = {
    "hf_ddpm/config.py": (
        "    weight_decay: float = option(",
        '    amsgrad: bool = option(False, "AdamW with the largest second moment")\n'
        "    weight_decay: float = option(",
    ),
    "hf_ddpm/training/network.py": (
        "        eps=config.adam_epsilon,\n",
        "        eps=config.adam_epsilon,\n        amsgrad=config.amsgrad,\n",
    ),
}
EVALUATE_OPTION = {
    "hf_ddpm/evaluation/config.py": (
        "    pilot_images: int = option(",
        '    decoder_evals: int | None = option(None, "evaluations spent on L_0", least=1)\n'
        "    pilot_images: int = option(",
    ),
    "hf_ddpm/evaluation/bits_per_dim.py": (
        "        num_evals_per_image=config.num_evals_per_image,\n",
        "        num_evals_per_image=config.num_evals_per_image,\n"
        "        num_decoder_evals=config.decoder_evals,\n",
    ),
}


def test_add_what_programs_are_made_of(tmp_path):
    """A network, a data source, a sampler, an option of `train` and one of `evaluate`: one interpreter."""
    script = """
from hf_ddpm.cli import main
from hf_ddpm.generation.sample import sample

network = used("network", model="one").unet
assert type(network).__name__ == "OneConvolution" and len(network.state_dict()) == 2

used("source", dataset="stripes")
assert json.loads(Path("source/train_config.json").read_text())["dataset"] == "stripes"

sample("network", 2, "drawn", steps=5, scheduler="ddim-parallel")
found["sampler"] = sorted(path.name for path in Path("drawn").glob("0*.png"))

main(["train", "--dataset", "digits", "--model", "tiny", "--output-dir", "option", "--max-steps", "1",
      "--batch-size", "4", "--amsgrad", "true", "--sample-every", "0", "--lr-warmup-steps", "0"])
found["option of train"] = json.loads(Path("option/train_config.json").read_text())["amsgrad"]
state = next(Path("option/checkpoints").iterdir())
moments = str(torch.load(next(state.glob("optimizer*")), weights_only=True))
assert "max_exp_avg_sq" in moments

for number in ("1", "4"):
    main(["evaluate", "network", "digits", "--num-images", "4", "--num-evals-per-image", "6", "--overwrite",
          "--decoder-evals", number])
    report = json.loads(Path("network/evaluation.json").read_text())
    found[f"evaluated with {number}"] = report["bits_per_dim"]["distortion_bpd"]["value"]
"""
    added = {"network": NETWORK, "data source": SOURCE, "sampler": SAMPLER}
    added |= {"option of `train`": TRAIN_OPTION, "option of `evaluate`": EVALUATE_OPTION}
    found = add_and_run(tmp_path, added, script)
    assert found["network"]["bpd"] > 0 and found["source"]["bpd"] > 0
    assert found["sampler"] == ["00000.png", "00001.png"]
    assert found["option of train"] is True
    assert found["evaluated with 1"] != found["evaluated with 4"]


SCHEDULE = {
    "hf_ddpm/schedules.py": (
        '    "constant": Schedule(',
        '    "geometric": Schedule(lambda t, start, end: torch.tensor(np.geomspace(start, end, t))),\n'
        '    "constant": Schedule(',
    ),
}
PREDICTION = {
    "hf_ddpm/parametrization.py": (
        '    "mean": Parametrization(',
        '    "flow": Parametrization(lambda process: -_one(process), _one, in_diffusers=False),\n'
        '    "mean": Parametrization(',
    ),
}
VARIANCE = {
    "hf_ddpm/variances.py": (
        '    "learned_range": Variance(',
        """    "halfway": Variance(
        lambda process: (process.log_fixed_small + process.log_fixed_large) / 2,
        lambda process: (process.sigma_small * process.sigma_large).sqrt(),
        in_diffusers=False,
    ),
    "learned_factor": Variance(
        from_output=lambda process, v, t: wide(v) + process.at(t, v, "log_betas")[0], in_diffusers=False
    ),
    "learned_range": Variance(""",
    ),
}
OBJECTIVE = {
    "hf_ddpm/objectives.py": (
        "OBJECTIVES: dict[str, Callable[[Choices], Objective]] = {\n",
        """def absolute_loss(process, model, x_0, t, noise):
    output = model(process.q_sample(x_0, noise, t), process.timesteps_at(t))
    return 10 * (output - noise).abs().flatten(1).mean(1)


OBJECTIVES: dict[str, Callable[[Choices], Objective]] = {
    "absolute": lambda how: Objective(absolute_loss),
""",
    ),
}


def test_add_what_is_learned(tmp_path):
    """A beta schedule, a prediction type, two variance types and an objective, in one interpreter."""
    script = """
import numpy as np

from hf_ddpm.likelihood import bound_term
from hf_ddpm.parametrization import from_x0_eps

x, e = torch.zeros(2, 1, 8, 8), torch.randn(2, 1, 8, 8)

betas = used("schedule", beta_schedule="geometric").scheduler.process.betas
assert np.allclose(betas, np.geomspace(1e-4, 0.5, 20), rtol=1e-12)

process = used("prediction", prediction_type="flow").process
assert torch.allclose(from_x0_eps(process, "flow", x, e, 3), e - x)

scheduler = used("variance", variance_type="halfway").scheduler
assert scheduler.variance_type == "halfway"
drawn = {}
for kind in ("fixed_small", "halfway", "fixed_large"):
    scheduler.variance_type = kind
    drawn[kind] = scheduler.step(0 * e, 7, e, generator=torch.Generator().manual_seed(0)).prev_sample
low, high = process.sigma_small[7], process.sigma_large[7]
part = ((low * high).sqrt() - low) / (high - low)
assert 0.1 < part < 0.9
middle = torch.lerp(drawn["fixed_small"], drawn["fixed_large"], part.item())
assert torch.allclose(drawn["halfway"], middle, atol=1e-6)
table = (process.posterior_variance * process.betas).sqrt().log()
scored = [bound_term(process, None, x, 7, e, variance_type=v, model_output=0 * e) for v in ("halfway", table)]
assert torch.allclose(scored[0].nats, scored[1].nats)

pipeline = used("learned", variance_type="learned_factor", objective="bound")
assert pipeline.unet.config.out_channels == 2

used("objective", objective="absolute")
found["config"] = json.loads(Path("objective/train_config.json").read_text())["objective"]
lines = Path("objective/log.jsonl").read_text().splitlines()
found["loss"] = next(line["loss"] for line in map(json.loads, lines) if "loss" in line)
"""
    added = {"beta schedule": SCHEDULE, "prediction type": PREDICTION}
    added |= {"variance type": VARIANCE, "objective": OBJECTIVE}
    found = add_and_run(tmp_path, added, script)
    runs = ("schedule", "prediction", "variance", "learned", "objective")
    assert all(math.isfinite(found[name]["bpd"]) for name in runs)
    assert found["config"] == "absolute" and found["loss"] > 4  # no other objective begins above 2


def huber(process, model, x_0, t, noise):
    output = model(process.q_sample(x_0, noise, t), process.timesteps_at(t))
    return torch.nn.functional.huber_loss(output, noise, reduction="none").flatten(1).mean(1)


def test_an_objective_needs_no_file(tmp_path):
    options = {"dataset": "digits", "model": "tiny", "max_steps": 2, "batch_size": 4, "lr_warmup_steps": 0}
    config = TrainConfig(output_dir=str(tmp_path / "run"), num_train_timesteps=20, beta_end=0.5, **options)
    result = train(config, objective=huber)
    square = train(dataclasses.replace(config, output_dir=str(tmp_path / "square")))
    assert result.loss < 0.6 * square.loss  # the Huber loss is at most half of the square
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "run")
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(2, torch.Generator().manual_seed(0), output_type="pt").images
    assert drawn.shape == (2, 1, 8, 8) and drawn.isfinite().all()
    learned = dataclasses.replace(config, variance_type="learned_range", objective="bound")
    with pytest.raises(ValueError, match="learned_range"):  # which this objective doesn't train
        train(dataclasses.replace(learned, output_dir=str(tmp_path / "other")), objective=huber)
