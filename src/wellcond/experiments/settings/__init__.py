"""The experiments, a file for each."""

from wellcond.experiments.grid import Setting
from wellcond.experiments.settings.keep_learning import KeepLearning

SETTINGS: dict[str, type[Setting]] = {setting.name: setting for setting in (KeepLearning,)}
