"""Three CNN-pruning papers under one protocol.

data -> model -> score -> plan -> shrink -> recover -> report
"""

__version__ = "0.1.0"
