"""`hf-ddpm publish` as a script."""

from hf_ddpm.cli import publish_command, run

if __name__ == "__main__":
    run(publish_command)
