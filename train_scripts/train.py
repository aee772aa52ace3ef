"""`hf-ddpm train` as a script; also `accelerate launch train_scripts/train.py ...`."""

from hf_ddpm.cli import run, train_command

if __name__ == "__main__":
    run(train_command)
