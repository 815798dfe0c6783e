"""scikit-learn estimators: multilayer perceptrons with batch normalization after each hidden layer."""

from batchnorm.estimators.classifier import BatchNormMLPClassifier
from batchnorm.estimators.regressor import BatchNormMLPRegressor

__all__ = ["BatchNormMLPClassifier", "BatchNormMLPRegressor"]
