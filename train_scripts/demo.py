"""The demo of `make demo`: train on the embedded digits, save, reload, sample, and say how many digits are clear."""

import argparse
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression

from hf_ddpm import DDPMPipeline, TrainConfig, load_stream, train
from hf_ddpm.cli import run
from hf_ddpm.plots import image_grid, save_image

CONFIG = Path(__file__).parent / "configs" / "digits.toml"
CONFIDENT = 0.9
CLASSIFIER_C = 10  # best accuracy on the held-out digits among 0.3, 1, 3, 10, 30


def pixels(split: str) -> tuple[np.ndarray, np.ndarray]:
    """The real digits of a split as (N, 64) in [0, 1], and their labels."""
    import pyarrow.parquet as pq

    import hf_ddpm

    folder = Path(hf_ddpm.__file__).parent / "digits"
    labels = pq.read_table(next(folder.glob(f"{split}-*.parquet")), columns=["label"])["label"].to_numpy()
    images = torch.cat(list(load_stream("digits", split).batches(256, epochs=1)))
    return images.flatten(1).numpy() / 255, labels


def confident_share(classifier: LogisticRegression, images: np.ndarray) -> float:
    """Share of the images, (N, 64) in [0, 1], to which the classifier gives one class more than 0.9."""
    return float((classifier.predict_proba(images).max(1) > CONFIDENT).mean())


def demo(argv: list[str], prog: str) -> None:
    """Run the demo, or go on with one that was interrupted."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument("--out", default="runs/digits", metavar="DIR", help="folder of the run [runs/digits]")
    parser.add_argument("--max-seconds", type=float, metavar="S", help="exit code 1 if the demo takes longer")
    args = parser.parse_args(argv)
    start, out = time.perf_counter(), Path(args.out)

    print(f"Training on the embedded digits ({CONFIG.name}); about two minutes on 2 cores.", flush=True)
    result = train(TrainConfig.load(CONFIG, output_dir=out))
    trained = time.perf_counter()

    pipeline = DDPMPipeline.from_pretrained(out)
    pipeline.set_progress_bar_config(desc="sample", mininterval=0.5 if sys.stderr.isatty() else 15.0)
    samples = np.asarray(pipeline(64, torch.Generator().manual_seed(1), output_type="np", return_dict=False)[0])
    grid = save_image(image_grid(pipeline.numpy_to_pil(samples)), out / "demo.png")

    train_pixels, train_labels = pixels("train")
    test_pixels, test_labels = pixels("test")
    classifier = LogisticRegression(C=CLASSIFIER_C, max_iter=2000).fit(train_pixels, train_labels)
    accuracy = classifier.score(test_pixels, test_labels)
    share, floor = confident_share(classifier, samples.reshape(64, -1)), confident_share(classifier, test_pixels)
    seconds = time.perf_counter() - start

    print(f"\npicture         {grid}")
    print(f"pipeline        {out}   (DDPMPipeline.from_pretrained({os.fspath(out)!r}))")
    print(f"grids, log      {out / 'samples'}, {out / 'log.jsonl'}")
    print(f"training        step {result.step}, {result.images} images, {trained - start:.0f} s")
    print(f"whole demo      {seconds:.0f} s")
    print(f"clear digits    {share:.0%} of 64 samples (real test digits: {floor:.0%}), by a logistic regression")
    print(f"                that is right on {accuracy:.1%} of the real test digits: share with p > {CONFIDENT}")
    if args.max_seconds is not None and seconds > args.max_seconds:
        raise RuntimeError(f"the demo took {seconds:.0f} s, more than {args.max_seconds:.0f} s")


if __name__ == "__main__":
    run(demo)
