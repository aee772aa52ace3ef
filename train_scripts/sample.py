"""`hf-ddpm sample` as a script; also `accelerate launch train_scripts/sample.py ...`."""

from hf_ddpm.cli import run, sample_command

if __name__ == "__main__":
    run(sample_command)
