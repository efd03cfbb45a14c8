"""`hf skillvec VERB ...` is `skillvec VERB ...`, and says so in its help."""

from skillvec.cli import main as skillvec


def main() -> None:
    """Run the command line of skillvec under the name that the user has typed."""
    skillvec(prog_name="hf skillvec")
