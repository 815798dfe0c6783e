"""Statistics that hold: pooled exactly, put right over a loader, shared by processes, set aside and put back."""

from batchnorm.statistics.moments import Moments
from batchnorm.statistics.pool import pool_running_stats
from batchnorm.statistics.recalibrate import recalibrate
from batchnorm.statistics.snapshot import Snapshot, restore, snapshot

__all__ = ["Moments", "Snapshot", "pool_running_stats", "recalibrate", "restore", "snapshot"]
