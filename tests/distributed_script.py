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

import hf_ddpm.training.trainer as trainer
from hf_ddpm import TrainConfig
from hf_ddpm.cli import run
from hf_ddpm.data.pixels import image_digest
from hf_ddpm.training.log import Record


def main(argv, prog):
    config, notes, *stop = argv
    make_batches, advance, save_grid = trainer.make_batches, Record.advance, Record.save_grid
    rank = int(os.environ.get("RANK", 0))

    def noting(*args):
        with (Path(notes) / f"rank{rank}.jsonl").open("a") as file:
            for batch in make_batches(*args):
                digests = [(image_digest(image), image_digest(image.flip(-1))) for image in batch.images]
                slots = zip(batch.positions, digests, batch.present.tolist(), strict=True)
                line = [[p, own, min(own, mirror), here] for p, (own, mirror), here in slots]
                file.write(json.dumps(line) + "\n")
                yield batch

    def tell(place):
        if rank == int(stop[0]) and place == stop[2]:
            os.kill(os.getpid(), getattr(signal, stop[1]))

    def stopping(self, step):
        advance(self, step)
        tell(str(step))

    def stopping_in_grid(self, *args):
        tell("grid")
        save_grid(self, *args)

    held, update = {}, trainer.update_average

    def watching(average, model, decay, step):
        update(average, model, decay, step)
        held.update({"model": model, decay: average})

    trainer.make_batches, trainer.update_average = noting, watching
    if stop:
        Record.advance, Record.save_grid = stopping, stopping_in_grid
    result = trainer.train(TrainConfig.load(config))
    digest = hashlib.sha256()
    for network in held.values():
        for weight in network.state_dict().values():
            digest.update(weight.numpy().tobytes())
    (Path(notes) / f"weights{rank}").write_text(f"{len(held)} networks {digest.hexdigest()}")
    print(f"rank {rank} done at step {result.step}", flush=True)


if __name__ == "__main__":
    run(main)
