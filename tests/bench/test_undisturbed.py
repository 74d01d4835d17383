"""The state in which the load generator measures, and that it ends with the measurement."""

import gc
import os
import subprocess
import sys

from pdserve.bench.undisturbed import POLICY, allowed, undisturbed

FLAG = os.SCHED_RESET_ON_FORK
ASK = "import os; print(os.sched_getscheduler(0))"


def test_real_time_and_no_collector_only_within() -> None:
    before = os.sched_getscheduler(0) & ~FLAG
    with undisturbed():
        assert not gc.isenabled()
        within = os.sched_getscheduler(0) & ~FLAG
        child = subprocess.run([sys.executable, "-c", ASK], capture_output=True, check=True)
    assert within == (POLICY if allowed() else before)
    assert int(child.stdout) == os.SCHED_OTHER
    assert gc.isenabled()
    assert os.sched_getscheduler(0) & ~FLAG == before
