"""Import the package whole, before pytest imports its files one by one.

It would set each as an attribute of its parent, and the module ``batchnorm.kernels`` in the place of the function.
"""

import batchnorm
import batchnorm.surgery  # noqa: F401
