"""Import the package whole, before pytest imports its files one by one.

It would set each as an attribute of its parent, and the modules ``batchnorm.kernels`` and ``batchnorm.surgery.fold`` in
the place of the functions.
"""

import batchnorm
import batchnorm.surgery  # noqa: F401
