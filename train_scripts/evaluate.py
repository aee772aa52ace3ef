"""`hf-ddpm evaluate` as a script; also `accelerate launch train_scripts/evaluate.py ...`."""

from hf_ddpm.cli import evaluate_command, run

if __name__ == "__main__":
    run(evaluate_command)
