"""`python -P -m pdserve.prefill_worker`: one prefill worker."""

import sys

from pdserve.cluster.records import Role
from pdserve.worker.assembly import Assembly, Context
from pdserve.worker.shell import main


def compose(context: Context) -> Assembly:
    """Imported on the loading thread, so that the record is in Redis before torch is loaded."""
    from pdserve.prefill_worker.compose import compose

    return compose(context)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], Role.PREFILL, compose))
