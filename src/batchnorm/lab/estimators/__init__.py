"""scikit-learn estimators: multilayer perceptrons with batch normalization after each hidden layer."""

from batchnorm.extras import needs

with needs("an estimator"):
    from batchnorm.lab.estimators.classifier import BatchNormMLPClassifier
    from batchnorm.lab.estimators.regressor import BatchNormMLPRegressor

__all__ = ["BatchNormMLPClassifier", "BatchNormMLPRegressor"]
