#!/usr/bin/env bash
# click 8.5.1: a command keeps the help options of the first context that it met, for the rest of the process.
#
# A group that says help_option_names=["-h", "--help"] gives them to its commands by the context. A command that was used
# once without its group (in a test, by a generator of documentation) has made its help option then, keeps it, and refuses
# -h in the group from then on.
#
# Seen with click 8.5.1, Python 3.11:
#   group verb -h: exit 0
#   after verb --help without the group, group verb -h: exit 2, No such option '-h'.
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet click==8.5.1
cat > "$place/show.py" <<'PYTHON'
import click
from click.testing import CliRunner


def make():
    group = click.Group("group", context_settings={"help_option_names": ["-h", "--help"]})
    verb = click.Command("verb")
    group.add_command(verb)
    return group, verb


group, verb = make()
print("group verb -h: exit", CliRunner().invoke(group, ["verb", "-h"]).exit_code)
group, verb = make()
CliRunner().invoke(verb, ["--help"])
done = CliRunner().invoke(group, ["verb", "-h"])
said = done.output.splitlines()[-1].removeprefix("Error: ")
print(f"after verb --help without the group, group verb -h: exit {done.exit_code}, {said}")
PYTHON
"$place/venv/bin/python" "$place/show.py" | tee "$place/seen"
printf '%s\n' "group verb -h: exit 0" \
    "after verb --help without the group, group verb -h: exit 2, No such option '-h'." | diff "$place/seen" -
