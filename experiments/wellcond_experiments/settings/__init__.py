"""The experiments, one file per experiment."""

from wellcond_experiments.grid import Setting
from wellcond_experiments.settings.after_training import AfterTraining
from wellcond_experiments.settings.classify import Classify
from wellcond_experiments.settings.cost import Cost
from wellcond_experiments.settings.critic import Critic
from wellcond_experiments.settings.denoise import Denoise
from wellcond_experiments.settings.differentiability import Differentiability
from wellcond_experiments.settings.harder import BatchNorm, Plain, ViT
from wellcond_experiments.settings.keep_learning import KeepLearning
from wellcond_experiments.settings.learning_rates import LearningRates
from wellcond_experiments.settings.least_squares import LeastSquares
from wellcond_experiments.settings.loss_spikes import LossSpikes
from wellcond_experiments.settings.memorise import Memorise
from wellcond_experiments.settings.transformer import Transformer

SETTINGS: dict[str, type[Setting]] = {
    setting.name: setting
    for setting in (
        *(Denoise, Classify, LeastSquares, Differentiability, Cost),
        *(KeepLearning, LearningRates, Memorise, Plain, BatchNorm, ViT, AfterTraining),
        *(LossSpikes, Transformer, Critic),
    )
}
