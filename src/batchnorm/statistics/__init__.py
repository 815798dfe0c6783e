"""Running statistics: exact moments, recalibration, pooling over processes, adaptation and tests for a shift."""

from batchnorm.statistics.adapt import Adaptation, adapt
from batchnorm.statistics.moments import Moments
from batchnorm.statistics.pool import pool_running_stats
from batchnorm.statistics.recalibrate import Recalibration, recalibrate
from batchnorm.statistics.shift import Shift, detect_shift
from batchnorm.statistics.snapshot import Snapshot, restore, snapshot

__all__ = [
    "Adaptation",
    "Moments",
    "Recalibration",
    "Shift",
    "Snapshot",
    "adapt",
    "detect_shift",
    "pool_running_stats",
    "recalibrate",
    "restore",
    "snapshot",
]
