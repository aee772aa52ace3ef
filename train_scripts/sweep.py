"""`hf-ddpm sweep` as a script; also `accelerate launch train_scripts/sweep.py ...`."""

from hf_ddpm.cli import run, sweep_command

if __name__ == "__main__":
    run(sweep_command)
