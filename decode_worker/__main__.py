"""`python -P -m pdserve.decode_worker [--accept-prompts]`: one decode or colocated worker."""

import sys

from pdserve.cluster.records import Role
from pdserve.worker.shell import main

ACCEPT_PROMPTS = "--accept-prompts"


if __name__ == "__main__":
    role = Role.COLOCATED if ACCEPT_PROMPTS in sys.argv else Role.DECODE
    sys.exit(main([text for text in sys.argv[1:] if text != ACCEPT_PROMPTS], role))
