"""How a program runs: options, processes, signals, progress, messages and the disk. It knows no diffusion."""
