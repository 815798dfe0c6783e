"""The worked example of one neuron, as text and as an interactive page."""

from batchnorm.extras import needs

with needs("the worked example"):
    import jinja2  # noqa: F401 (the files of this folder need both)
    import polars  # noqa: F401
