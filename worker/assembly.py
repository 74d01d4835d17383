"""What `compose` is given, and what it makes: an engine with both ends of the transfer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pdserve.cluster.records import ModelInfo
from pdserve.cluster.settings import WorkerSettings
from pdserve.engine.grammar import Grammars
from pdserve.engine.loop import Engine, StepOutcome
from pdserve.protocol.measures import Measures


@dataclass(frozen=True, slots=True)
class Context:
    """What the process gives to `compose`."""

    settings: WorkerSettings
    epoch: int
    sink: Callable[[StepOutcome], None]
    progress: Callable[[float, str], None]
    """progress(share, what): called from the loading thread."""


@dataclass(frozen=True, slots=True)
class Assembly:
    """A loaded worker, not yet started."""

    engine: Engine
    model: ModelInfo
    grammars: Grammars
    transports: tuple[str, ...]
    traffic: Callable[[], tuple[int, int, int]]
    """KV bytes (in, out, out early) so far; see `WorkerStatus`."""
    measures: Callable[[], Measures]
    """What else routers show."""
    routes: Callable[[], dict[str, str]]
    """Source → the transport over which its blocks last came."""
    speeds: Callable[[], dict[str, dict[str, float]]]
    """Source → transport → bytes per second, where measured."""
    begin_epoch: Callable[[int], None]
    """Become another incarnation: the tickets so far end."""
    close: Callable[[], None]
    """Free what the transfer and the pool hold; after the engine has stopped."""
