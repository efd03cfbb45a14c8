"""What does a person type, and what is printed? click and rich live here alone."""

from skillvec.cli.commands import main as main
