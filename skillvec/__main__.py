"""`python -m skillvec` is the command line."""

from skillvec.cli.commands import main

main()
