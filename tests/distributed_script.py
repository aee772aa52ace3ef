"""A training run that notes which images each process was given, and may be told to stop at a step.

    python distributed_script.py config.json NOTES [RANK SIGNAL STEP|grid]

Each process adds to NOTES/rank<r>.jsonl a line per micro-step: for each slot its position, a digest of the
image there, one that its mirror image shares, and whether there is an image. At its end it writes a digest of
its weights and averages to NOTES/weights<r>.
"""

import hashlib
import json
import os
import signal
from pathlib import Path

import hf_ddpm.training.run
from hf_ddpm import TrainConfig, train
from hf_ddpm.cli import run
from hf_ddpm.data.pixels import image_digest
from hf_ddpm.training.sample_grids import SampleGrids


def main(argv, prog):
    config, notes, *stop = argv
    make_batches, save_grid = hf_ddpm.training.run.make_batches, SampleGrids.save
    rank, held = int(os.environ.get("RANK", 0)), {}

    def noting(*args):
        with (Path(notes) / f"rank{rank}.jsonl").open("a") as file:
            for batch in make_batches(*args):
                digests = [(image_digest(image), image_digest(image.flip(-1))) for image in batch.images]
                slots = zip(batch.positions, digests, batch.present.tolist(), strict=True)
                line = [[p, own, min(own, mirror), here] for p, (own, mirror), here in slots]
                file.write(json.dumps(line) + "\n")
                yield batch

    def tell(place):
        if stop and rank == int(stop[0]) and place == stop[2]:
            os.kill(os.getpid(), getattr(signal, stop[1]))

    def after_step(training):
        held.update({"model": training.model, **training.averages})
        tell(str(training.step))

    def stopping_in_grid(self, *args):
        tell("grid")
        save_grid(self, *args)

    hf_ddpm.training.run.make_batches, SampleGrids.save = noting, stopping_in_grid
    result = train(TrainConfig.load(config), after_step=after_step)
    digest = hashlib.sha256()
    for network in held.values():
        for weight in network.state_dict().values():
            digest.update(weight.numpy().tobytes())
    (Path(notes) / f"weights{rank}").write_text(f"{len(held)} networks {digest.hexdigest()}")
    print(f"rank {rank} done at step {result.step}", flush=True)


if __name__ == "__main__":
    run(main)
