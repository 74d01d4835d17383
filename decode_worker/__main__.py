"""`python -P -m pdserve.decode_worker [--accept-prompts]`: one decode or colocated worker."""

import sys

from pdserve.cluster.records import Role
from pdserve.worker.assembly import Assembly, Context
from pdserve.worker.shell import main

ACCEPT_PROMPTS = "--accept-prompts"


def compose(context: Context) -> Assembly:
    """Imported on the loading thread, so that the record is in Redis before torch is loaded."""
    from pdserve.decode_worker.compose import compose

    return compose(context)


if __name__ == "__main__":
    role = Role.COLOCATED if ACCEPT_PROMPTS in sys.argv else Role.DECODE
    sys.exit(main([text for text in sys.argv[1:] if text != ACCEPT_PROMPTS], role, compose))
