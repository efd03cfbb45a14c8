"""`python -m skillvec` is the command line."""

from skillvec.cli import main

main()
