"""`python -P -m pdserve.prefill_worker`: one prefill worker."""

import sys

from pdserve.cluster.records import Role
from pdserve.worker.shell import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], Role.PREFILL))
