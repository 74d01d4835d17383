"""`pdserve bench`: one word chooses the measurement, the rest are its options."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pdserve.bench import check, compare, diff, peers, profile, serve

HELP = """\
usage: pdserve bench COMMAND [OPTION ...]

  serve URL   load on any OpenAI-compatible server, and what came of it
  compare     the same load on several topologies, and who wins; an HTML report
  peers       pdserve and vLLM on this machine, the same load
  profile     how long things take at workers of this machine, for `pdserve simulate`
  diff A B    two stored runs side by side, if they may be compared
  check       whether the load generator tells the truth on this machine

`pdserve bench COMMAND --help` lists the options of a command with their units and defaults.
"""
COMMANDS = {
    "serve": serve.main,
    "compare": compare.main,
    "check": check.main,
    "diff": diff.main,
    "peers": peers.main,
    "profile": profile.main,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    command, options = (words[0], words[1:]) if words else ("", [])
    if command in ("", "-h", "--help", "help"):
        print(HELP, end="")
        return 0 if command else serve.EXIT_USAGE
    if command not in COMMANDS:
        known = ", ".join(COMMANDS)
        print(
            f"pdserve bench: error: unknown command {command!r}; one of {known}.", file=sys.stderr
        )
        return serve.EXIT_USAGE
    return COMMANDS[command](options)


if __name__ == "__main__":
    sys.exit(main())
