"""Who feeds whom in a model: the data flow between its modules and functions, read block by block."""

from batchnorm.surgery.graph.blocks import Block, is_block
from batchnorm.surgery.graph.dataflow import Dataflow, Step, Unknown, has_hooks
from batchnorm.surgery.graph.reading import read_dataflow

__all__ = ["Block", "Dataflow", "Step", "Unknown", "has_hooks", "is_block", "read_dataflow"]
