"""`hf-ddpm interpolate` as a script."""

from hf_ddpm.cli import interpolate_command, run

if __name__ == "__main__":
    run(interpolate_command)
