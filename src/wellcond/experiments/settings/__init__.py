"""The experiments, a file for each."""

from wellcond.experiments.grid import Setting
from wellcond.experiments.settings.after_training import AfterTraining
from wellcond.experiments.settings.classify import Classify
from wellcond.experiments.settings.cost import Cost
from wellcond.experiments.settings.denoise import Denoise
from wellcond.experiments.settings.differentiability import Differentiability
from wellcond.experiments.settings.harder import BatchNorm, Plain, ViT
from wellcond.experiments.settings.keep_learning import KeepLearning
from wellcond.experiments.settings.learning_rates import LearningRates
from wellcond.experiments.settings.least_squares import LeastSquares
from wellcond.experiments.settings.memorise import Memorise

SETTINGS: dict[str, type[Setting]] = {
    setting.name: setting
    for setting in (
        *(Denoise, Classify, LeastSquares, Differentiability, Cost),
        *(KeepLearning, LearningRates, Memorise, Plain, BatchNorm, ViT, AfterTraining),
    )
}
