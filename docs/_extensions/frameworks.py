"""Empty modules in place of the frameworks that the callbacks need.

The reference shows the callbacks, and a callback needs its framework only when it runs. Without
their installation, which takes minutes, the site is built in a minute.
"""

from __future__ import annotations

import sys
from types import ModuleType

from sphinx.application import Sphinx

NAMES = {
    "accelerate": (),
    "accelerate.optimizer": ("AcceleratedOptimizer",),
    "lightning": (),
    "lightning.pytorch": ("Callback",),
    "lightning.pytorch.strategies": ("DeepSpeedStrategy",),
    "transformers": (),
    "transformers.trainer_callback": ("CallbackHandler", "TrainerCallback"),
    "transformers.trainer_utils": ("PREFIX_CHECKPOINT_DIR",),
}


def setup(app: Sphinx) -> dict[str, bool]:
    for module, names in NAMES.items():
        empty = ModuleType(module)
        for name in names:
            setattr(empty, name, type(name, (), {}))
        sys.modules[module] = empty
    return {"parallel_read_safe": True}
