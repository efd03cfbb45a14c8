"""What does a person type, and what is printed? click and rich live here alone."""

from skillvec.cli import about as about  # whose commands `main` has too
from skillvec.cli import trials as trials
from skillvec.cli.commands import main as main
