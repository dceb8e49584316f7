"""`python -m redraft.cli`, for launchers that start modules (torchrun, accelerate)."""

from redraft.cli import main

main()
