"""Chooses among the configurations of `pdserve.kernels.configs` by measuring, when a worker starts.

Never in the path of a request, never on the CPU. What was found is kept in the user's cache folder,
in a file whose name follows from the GPU, the versions and the sources of the kernels, so that a
later start measures only what is missing. `PDSERVE_TUNING=off` leaves everything at the table's
first entries.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import statistics
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from pdserve.kernels import configs, dispatch
from pdserve.kernels.checks import KernelError
from pdserve.kernels.configs import Config
from pdserve.kernels.user_cache import cache_folder

log = logging.getLogger(__name__)

ENVIRONMENT = "PDSERVE_TUNING"
WORDS = ("on", "off")
RUNS = 15
"""Timed runs of a configuration, after WARM ones; the median counts."""
WARM = 3
BUSY_CYCLES = 2_000_000
"""Of the device before each run: a millisecond, for the host to launch what a run launches."""
MARGIN = 0.98
"""Another configuration than the first must be faster than this share of its time."""

Run = Callable[[], torch.Tensor]
Timer = Callable[[Run], float]
"""Seconds that a run takes."""


@dataclass(frozen=True, slots=True)
class Trial:
    """An operation with inputs of the size that it will meet."""

    operation: str
    """A key of `configs.TABLE`."""
    shape: tuple[object, ...]
    """The class of shapes that the choice is for, as `configs.chosen` is asked."""
    run: Run
    """Calls the operation: this is what is timed."""
    check: Run | None = None
    """What must not depend on the configuration by a single bit; None: the run's result."""

    @property
    def name(self) -> str:
        return " ".join(map(str, (self.operation, *self.shape)))

    def result(self) -> torch.Tensor:
        return (self.check or self.run)().clone()

    @property
    def public(self) -> str:
        """The operation's name in `dispatch.MODULES`."""
        return self.operation.partition(" ")[0]


def wanted() -> bool:
    """Whether the environment lets us measure. Raises KernelError for a word that means nothing."""
    word = os.environ.get(ENVIRONMENT, "on")
    if word not in WORDS:
        raise KernelError(f"{ENVIRONMENT} must be {' or '.join(WORDS)}, not {word!r}.")
    return word == "on"


def tune(
    trials: Iterable[Trial], *, key: str, timer: Timer, folder: Path | None = None
) -> dict[str, Config]:
    """Settle every trial's configuration for this process; returns them by name.

    key: what results depend on besides (see `fingerprint`); folder: default the user's cache. One
    that cannot be read or written costs the measurement, and a sentence in the log, as does a
    trial that fails, which leaves the table's first entry. Several processes may do this at once:
    the last one's file stays, and every one is whole. It is written after each trial, so that a
    start that is cut short has not measured for nothing.
    """
    path = _path(folder, key)
    known = {} if path is None else _read(path)
    found = {}
    for trial in trials:
        config = known.get(trial.name)
        try:
            if config not in configs.TABLE[trial.operation] or not _use(trial, config):
                config = _fastest(trial, timer)
            _use(trial, config)
            trial.run()  # compiled and loaded now, not by the first request
        except Exception as error:  # whatever it is, requests can do without
            log.warning("%s was not measured: %s: %s", trial.name, type(error).__name__, error)
            _use(trial, configs.TABLE[trial.operation][0])
            continue
        found[trial.name] = config
        log.info("%s: %s", trial.name, _text(config))
        if path is not None and known.get(trial.name) != config:
            known[trial.name] = config
            _write(path, known)
    return found


def cuda_seconds(run: Run) -> float:
    """The median time of a run on the current CUDA device, launches aside: the device is kept busy
    until they are in line."""
    for _ in range(WARM):
        run()
    times = []
    for _ in range(RUNS):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(BUSY_CYCLES)
        first.record()
        run()
        last.record()
        last.synchronize()
        times.append(float(first.elapsed_time(last)) / 1000)
    return statistics.median(times)


def fingerprint() -> str:
    """Everything that a measurement on the current CUDA device depends on, as a text; which
    implementations there were to choose among, too."""
    import triton

    sources = hashlib.blake2b(digest_size=12)
    for path in sorted(Path(__file__).parent.glob("*")):
        if path.suffix == ".cu" or path.name.startswith(("triton_", "cuda_", "configs", "trials")):
            sources.update(path.name.encode() + path.read_bytes())
    name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    words = (name, capability, triton.__version__, torch.__version__, sources.hexdigest())
    return "\n".join(map(str, (*words, dispatch.candidates())))


def _fastest(trial: Trial, timer: Timer) -> Config:
    """The first entry that runs says what the bits are and what the others have to beat. Raises
    KernelError if none runs."""
    best: Config | None = None
    expected = torch.empty(0)
    least = limit = float("inf")
    for config in configs.TABLE[trial.operation]:
        if not _use(trial, config):
            continue
        try:
            result = trial.result()
            seconds = timer(trial.run)
        except Exception as error:  # too much shared memory, no CuPy, …: whatever it says
            log.info("%s: %s does not run here: %s", trial.name, _text(config), error)
            continue
        if best is None:
            best, expected, least, limit = config, result, seconds, seconds * MARGIN
        elif not torch.equal(result, expected):
            log.info("%s: %s gives other bits and is left out", trial.name, _text(config))
        elif seconds < min(least, limit):
            best, least = config, seconds
    if best is None:
        raise KernelError(f"None of the configurations of {trial.name} runs on this GPU.")
    return best


def _use(trial: Trial, config: Config) -> bool:
    """False for CUDA C++ where CuPy is missing or PDSERVE_KERNELS has a say."""
    is_cuda = config == configs.CUDA
    if len(dispatch.MODULES.get(trial.public, {})) > 1:
        settled = dispatch.settle(trial.public, "cuda" if is_cuda else "triton")
        if is_cuda:
            return settled
    configs.settle(trial.operation, trial.shape, config)
    return True


def _path(folder: Path | None, key: str) -> Path | None:
    digest = hashlib.blake2b(key.encode(), digest_size=12).hexdigest()
    try:
        return cache_folder(folder) / f"tuning-{digest}.json"
    except OSError as error:
        log.warning("Measured kernel configurations cannot be kept: %s.", error)
        return None


def _read(path: Path) -> dict[str, Config]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        log.warning("%s cannot be read (%s): measuring again.", path, error)
        return {}
    try:
        known = json.loads(text)
    except ValueError:
        known = None
    if not isinstance(known, dict):
        log.warning("%s is damaged: measuring again.", path)
        return {}
    return known


def _write(path: Path, found: dict[str, Config]) -> None:
    """Under another name first, so that what lies under the final name is always whole."""
    try:
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            target = Path(scratch) / path.name
            target.write_text(json.dumps(found, indent=1, sort_keys=True), encoding="utf-8")
            target.replace(path)
    except OSError as error:
        log.warning("%s cannot be written (%s): the next start measures again.", path, error)


def _text(config: Config) -> str:
    return ", ".join(f"{name} {value}" for name, value in config.items())
