"""`python -m hf_ddpm COMMAND ...`, the same as `hf-ddpm COMMAND ...`."""

from hf_ddpm.cli import main

if __name__ == "__main__":
    main()
