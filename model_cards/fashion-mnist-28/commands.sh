# From the root of a clone, after `make install` and `apt-get install dataset-fashion-mnist`
set -e
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS=1
MODEL=model_cards/fashion-mnist-28
TWO="torchrun --standalone --nproc_per_node 2"

[ -d data/fashion-mnist ] || python train_scripts/convert_idx.py /usr/share/datasets/fashion-mnist data/fashion-mnist
$TWO train_scripts/train.py --config train_scripts/configs/fashion-mnist.toml
python train_scripts/make_cards.py --add runs/fashion-mnist $MODEL --half-weights --license apache-2.0
cp runs/fashion-mnist/log.jsonl $MODEL

$TWO train_scripts/evaluate.py $MODEL data/fashion-mnist --overwrite --num-images 2000 --num-samples 1000 \
    --sampling-steps 250 --extractor train_scripts/classifiers/fashion-mnist --nearest-dataset data/fashion-mnist
hf-ddpm sweep $MODEL data/fashion-mnist --steps 10,20 --schedulers ddpm,ddim,dpm-solver++,unipc \
    --extractor train_scripts/classifiers/fashion-mnist
$TWO train_scripts/sample.py $MODEL --num-images 64 --seed 0 --overwrite --out runs/fashion-samples
cp runs/fashion-samples/grid.png $MODEL/samples.png
python -c "
from pathlib import Path
from hf_ddpm import DDPMPipeline
from hf_ddpm.pictures import progressive_generation
sheet = progressive_generation(DDPMPipeline.from_pretrained('$MODEL'), num_images=4, num_columns=10)
sheet.save(Path('$MODEL/progressive.png'))"
hf-ddpm interpolate $MODEL data/fashion-mnist:test:28 data/fashion-mnist:test:22 --t 250,500,750 --overwrite \
    --out $MODEL/interpolation.png
make cards
