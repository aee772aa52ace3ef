"""`make demo`: train on the embedded digits, save, reload, sample, and say how good it is."""

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from sklearn.linear_model import LogisticRegression

import hf_ddpm
from hf_ddpm import DDPMPipeline, TrainConfig, load_stream, train
from hf_ddpm.cli import run
from hf_ddpm.evaluation.config import EvaluationConfig
from hf_ddpm.evaluation.evaluate import evaluate
from hf_ddpm.generation.grids import image_grid, save_image
from hf_ddpm.generation.pipeline import count_images
from hf_ddpm.runtime.arguments import Parser, number, path
from hf_ddpm.runtime.progress import progress

CONFIG = Path(__file__).parent / "configs" / "digits.toml"
NUM_IMAGES = 64
SAMPLING_STEPS = 250  # of the 1000: the picture is as good, and there sooner
CONFIDENT = 0.9
CLASSIFIER_C = 10  # the most accurate on the held-out digits among 0.3, 1, 3, 10 and 30


def digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """The real digits of a split, (N, 64) in [0, 1], and their labels."""
    images = torch.cat(list(load_stream("digits", split).batches(256, epochs=1)))
    file = next((Path(hf_ddpm.__file__).parent / "data" / "digits").glob(f"{split}-*.parquet"))
    return images.flatten(1).numpy() / 255, pq.read_table(file, columns=["label"])["label"].to_numpy()


def clear_share(classifier: LogisticRegression, images: np.ndarray) -> float:
    """Share of the images, (N, 64) in [0, 1], to which the classifier gives one class more than 0.9."""
    return float((classifier.predict_proba(images).max(1) > CONFIDENT).mean())


def demo(argv: Sequence[str], prog: str) -> None:
    """Run the demo, or go on with one that was interrupted."""
    parser = Parser(prog, __doc__ or "")
    parser.add_argument(
        "--out", type=path, default="runs/digits", metavar="DIR", help="folder of the run [runs/digits]"
    )
    parser.add_argument(
        "--max-seconds", type=number, metavar="S", help="exit code 1 if the demo takes longer"
    )
    args = parser.parse(argv)
    start, out = time.perf_counter(), Path(args.out)

    print(f"training on the embedded digits ({CONFIG.name}): some minutes on 2 cores", flush=True)
    result = train(TrainConfig.load(CONFIG, output_dir=out))
    trained = time.perf_counter()

    pipeline = DDPMPipeline.from_pretrained(out)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    with progress("sample", NUM_IMAGES, "image", True) as bar:
        options = {"return_dict": False, "callback_on_step_end": count_images(bar)}
        samples = pipeline(NUM_IMAGES, generator, SAMPLING_STEPS, "np", **options)[0]
    picture = save_image(image_grid(pipeline.numpy_to_pil(samples)), out / "demo.png")

    classifier = LogisticRegression(C=CLASSIFIER_C, max_iter=2000).fit(*digits("train"))
    test_images, test_labels = digits("test")
    accuracy, floor = classifier.score(test_images, test_labels), clear_share(classifier, test_images)
    share = clear_share(classifier, samples.reshape(NUM_IMAGES, -1))

    report = evaluate(EvaluationConfig(model=str(out), dataset="digits", overwrite=True))
    bits, held_out = report["bits_per_dim"], report["data"]["num_images"]
    total, rate, distortion = (bits[key]["value"] for key in ("bpd", "rate_bpd", "distortion_bpd"))
    seconds = time.perf_counter() - start

    print(f"""
picture         {picture}
pipeline        {out}   (DDPMPipeline.from_pretrained({str(out)!r}))
grids, log      {out / "samples"}, {out / "log.jsonl"}
training        step {result.step}, {result.images} images, {trained - start:.0f} s
whole demo      {seconds:.0f} s
clear digits    {share:.0%} of {NUM_IMAGES} samples; {floor:.0%} of the real test digits
                clear: one class has p > {CONFIDENT}, by a logistic regression trained on the real digits
                ({accuracy:.1%} right on the test digits)
bits/dim        {total:.3f} +- {bits["bpd"]["stderr"]:.3f} of {held_out} held-out digits (an upper bound):
                {rate:.3f} rate + {distortion:.3f} distortion; {out / "evaluation.json"} has more""")
    if args.max_seconds is not None and seconds > args.max_seconds:
        raise RuntimeError(f"the demo took {seconds:.0f} s, more than {args.max_seconds:.0f} s")


if __name__ == "__main__":
    run(demo)
