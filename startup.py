"""The heavy libraries, imported with the garbage collector off: they make millions of objects, and none is garbage.

To be imported before anything else of a command that loads a model.
"""

import gc

gc.disable()
try:
    import torch  # noqa: F401
    import transformers.modeling_utils  # noqa: F401  what every model's own module imports
finally:
    gc.freeze()  # nor are they looked through again
    gc.enable()
