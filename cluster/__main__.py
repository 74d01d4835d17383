"""`python -P -m pdserve.cluster`: the `pdserve` command, wherever its script lies."""

import sys

from pdserve.cluster.main import main

if __name__ == "__main__":
    sys.exit(main())
