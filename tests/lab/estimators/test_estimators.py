import collections
import contextlib
import doctest
import inspect
import io
import pickle
import re
from pathlib import Path

import numpy as np
import polars
import pytest
import torch
from scipy import sparse
from sklearn.base import clone
from sklearn.datasets import load_diabetes, load_digits, load_iris, make_classification, make_multilabel_classification
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler, scale
from sklearn.utils import get_tags
from sklearn.utils.estimator_checks import check_estimator

from batchnorm.errors import InputError
from batchnorm.lab.estimators import BatchNormMLPClassifier, BatchNormMLPRegressor
from batchnorm.lab.estimators.sample_weight import SampleWeightedBatchNorm1d, weighted_rows
from batchnorm.nn import BatchNorm1d

unconverged = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")  # short fits, on purpose
PLACEMENTS = ("before", "after", None)


@pytest.fixture(scope="module")
def iris():
    X, y = load_iris(return_X_y=True)
    return scale(X), y


@pytest.fixture(scope="module")
def three_targets():
    X, y = load_diabetes(return_X_y=True)
    X, y = scale(X)[:120], scale(y)[:120]
    return X, np.stack([y, X[:, 0] * X[:, 1], X[:, 2]], 1)


def numbers(estimator):
    """Every parameter and running statistic of the fitted network."""
    return {name: values.numpy() for name, values in estimator.network_.state_dict().items()}


def assert_same(estimator, other, **tolerance):
    ours, theirs = numbers(estimator), numbers(other)
    assert ours.keys() == theirs.keys()
    for name, values in ours.items():
        np.testing.assert_allclose(values, theirs[name], **{"rtol": 0, **tolerance}, err_msg=name)


# scikit-learn's contract


@unconverged
@pytest.mark.parametrize(
    "estimator",
    [
        BatchNormMLPClassifier((20,), learning_rate_init=0.02, max_iter=60),
        BatchNormMLPRegressor((20,), learning_rate_init=0.02, max_iter=60),
    ],
    ids=["classifier", "regressor"],
)
def test_check_estimator_fails_nothing_and_skips_only_what_can_not_be_checked_here(estimator):
    results = check_estimator(estimator, on_fail=None, on_skip=None)
    failed = {result["check_name"]: result["exception"] for result in results if result["status"] == "failed"}
    assert not failed
    assert collections.Counter(result["status"] for result in results)["passed"] > 50
    reasons = [str(result["exception"]) for result in results if result["status"] == "skipped"]
    # scikit-learn's own MLPs have no decision_function either
    allowed = re.compile(r"pandas is not installed|SCIPY_ARRAY_API is not set|does not have a decision_function")
    assert [reason for reason in reasons if not allowed.search(reason)] == []


@pytest.mark.parametrize(
    ("ours", "theirs"), [(BatchNormMLPClassifier, MLPClassifier), (BatchNormMLPRegressor, MLPRegressor)]
)
def test_a_parameter_that_scikit_learn_has_too_has_its_default(ours, theirs):
    ours, theirs = (inspect.signature(estimator).parameters for estimator in (ours, theirs))
    shared = ours.keys() & theirs.keys()
    assert ours.keys() - shared == {"batch_norm", "bn_momentum", "bn_eps", "init_scale"}
    assert {name: ours[name].default for name in shared} == {name: theirs[name].default for name in shared}


def continued_from_the_same_weights(ours, theirs, X, y, sample_weight=None):
    """Fit one epoch each, give ours the weights of theirs, and fit both on from there."""
    for estimator in (ours, theirs):
        estimator.set_params(warm_start=True, max_iter=1).fit(X, y, sample_weight)
    for to, of in zip(ours.coefs_ + ours.intercepts_, theirs.coefs_ + theirs.intercepts_, strict=True):
        to[...] = of
    for estimator in (ours, theirs):
        estimator.set_params(max_iter=15).fit(X, y, sample_weight)


SOLVERS = {
    "sgd": {"solver": "sgd", "momentum": 0.0},
    "heavy ball": {"solver": "sgd", "nesterovs_momentum": False},
    "nesterov": {"solver": "sgd"},
    "adam": {"solver": "adam", "epsilon": 1e-30},  # theirs is added before the bias correction, so none is compared
}


@unconverged
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("solver", SOLVERS)
def test_without_batch_normalization_a_regression_goes_as_scikit_learns(three_targets, solver, weighted):
    X, y = three_targets
    weight = np.linspace(0.2, 3, len(X)) if weighted else None
    shared = {
        "hidden_layer_sizes": (7, 5),
        "activation": "tanh",
        "batch_size": 50,
        "alpha": 0.5,
        "learning_rate_init": 0.01,
        "random_state": 3,
        **SOLVERS[solver],
    }
    ours, theirs = BatchNormMLPRegressor(batch_norm=None, **shared), MLPRegressor(**shared)
    continued_from_the_same_weights(ours, theirs, X, y, weight)
    # 45 steps of rounding, each step of Lipschitz constant near 1: some hundred epsilons, with room
    for our, their in zip(ours.coefs_ + ours.intercepts_, theirs.coefs_ + theirs.intercepts_, strict=True):
        np.testing.assert_allclose(our, their, rtol=0, atol=1e-12)
    assert (ours.n_iter_, ours.t_, ours.n_layers_) == (theirs.n_iter_, theirs.t_, theirs.n_layers_)


@unconverged
@pytest.mark.parametrize("kind", ["binary", "multiclass", "multilabel"])
def test_without_batch_normalization_a_classification_goes_as_scikit_learns(iris, kind):
    X, y = iris
    y = {"binary": y == 1, "multiclass": y, "multilabel": np.stack([y == 1, y > 0], 1).astype(int)}[kind]
    shared = {"hidden_layer_sizes": (6,), "batch_size": 40, "solver": "sgd", "alpha": 0.1, "random_state": 0}
    ours, theirs = BatchNormMLPClassifier(batch_norm=None, **shared), MLPClassifier(**shared)
    continued_from_the_same_weights(ours, theirs, X, y)
    np.testing.assert_allclose(ours.loss_curve_[1:], theirs.loss_curve_[1:], rtol=1e-12)
    np.testing.assert_allclose(ours.predict_proba(X), theirs.predict_proba(X), rtol=1e-11)
    np.testing.assert_array_equal(ours.predict(X), theirs.predict(X))
    assert ours.out_activation_ == theirs.out_activation_
    assert ours.n_outputs_ == theirs.n_outputs_


@unconverged
@pytest.mark.parametrize("weighted", [False, True])
def test_without_batch_normalization_early_stopping_goes_as_scikit_learns(iris, weighted):
    X, y = iris
    weight = np.linspace(0.2, 3, len(X)) if weighted else None
    shared = {"hidden_layer_sizes": (6,), "early_stopping": True, "validation_fraction": 0.3, "random_state": 1}
    ours, theirs = BatchNormMLPClassifier(batch_norm=None, **shared), MLPClassifier(**shared)
    for estimator in (ours, theirs):
        estimator.set_params(solver="sgd", learning_rate_init=0.05)
    continued_from_the_same_weights(ours, theirs, X, y == 1, weight)
    np.testing.assert_allclose(ours.validation_scores_[1:], theirs.validation_scores_[1:], rtol=1e-12)


# Batch normalization


@unconverged
@pytest.mark.parametrize("batch_norm", PLACEMENTS)
def test_held_out_digits_are_recognised(batch_norm):
    X, y = load_digits(return_X_y=True)
    X, X_test, y, y_test = train_test_split(X / 16, y, random_state=0)
    classifier = BatchNormMLPClassifier(
        (32,), batch_norm=batch_norm, learning_rate_init=0.01, max_iter=15, random_state=0
    )
    assert classifier.fit(X, y).score(X_test, y_test) > 0.95


@unconverged
@pytest.mark.parametrize(("batch_norm", "layers"), [("before", 2), ("after", 2), (None, 0)])
def test_batch_norm_says_where_the_layers_stand_and_bn_momentum_and_bn_eps_what_they_are(iris, batch_norm, layers):
    classifier = BatchNormMLPClassifier((5, 4), batch_norm=batch_norm, bn_momentum=0.3, bn_eps=0.01, max_iter=1)
    classifier.fit(*iris)
    norms = [layer for layer in classifier.network_.modules() if isinstance(layer, BatchNorm1d)]
    assert [(norm.momentum, norm.eps) for norm in norms] == [(0.3, 0.01)] * layers
    assert [block.placement for block in classifier.network_.hidden] == [batch_norm] * 2


@unconverged
def test_there_is_no_bias_in_front_of_batch_normalization_and_its_intercept_is_zero(iris):
    before = BatchNormMLPClassifier((5, 4), batch_norm="before", max_iter=2).fit(*iris)
    assert [linear.bias is None for linear in before.network_.linears()] == [True, True, False]
    assert [(b.shape, b.any()) for b in before.intercepts_] == [((5,), False), ((4,), False), ((3,), True)]
    after = BatchNormMLPClassifier((5, 4), batch_norm="after", max_iter=2).fit(*iris)
    assert [(b.shape, b.any()) for b in after.intercepts_] == [((5,), True), ((4,), True), ((3,), True)]
    assert [W.shape for W in before.coefs_] == [W.shape for W in after.coefs_] == [(4, 5), (5, 4), (4, 3)]


@unconverged
def test_a_last_mini_batch_of_one_row_joins_the_one_before(iris):
    X, y = iris
    classifier = BatchNormMLPClassifier((5,), batch_size=30, max_iter=3).fit(X[:121], y[:121])
    assert classifier.network_.hidden[0].norm.num_batches_tracked == 3 * 4
    classifier.fit(X[:122], y[:122])
    assert classifier.network_.hidden[0].norm.num_batches_tracked == 3 * 5


@unconverged
def test_prediction_uses_the_running_statistics_and_leaves_them(iris):
    X, y = iris
    classifier = BatchNormMLPClassifier((5,), max_iter=3, random_state=0).fit(X, y)
    assert not classifier.network_.training
    together = classifier.predict_proba(X)
    before = {name: values.copy() for name, values in numbers(classifier).items()}
    classifier.network_.train()
    np.testing.assert_array_equal(classifier.predict_proba(X), together)
    np.testing.assert_allclose(np.vstack([classifier.predict_proba(row[None]) for row in X]), together, rtol=1e-13)
    for name, values in numbers(classifier).items():
        np.testing.assert_array_equal(values, before[name], err_msg=name)


ONE_STEP = {"solver": "sgd", "momentum": 0.0, "learning_rate_init": 0.5, "random_state": 0, "max_iter": 1}


@unconverged
@pytest.mark.parametrize("batch_norm", PLACEMENTS)
@pytest.mark.parametrize("weighted", [False, True])
def test_alpha_shrinks_the_weights_by_its_share_of_the_rows_and_spares_gamma_beta_and_biases(
    iris, batch_norm, weighted
):
    X, y = iris
    sample_weight = np.linspace(0.5, 4, len(X)) if weighted else None
    classifier = BatchNormMLPClassifier((5, 4), batch_norm=batch_norm, **ONE_STEP)
    start = clone(classifier).set_params(learning_rate_init=1e-300).fit(X, y, sample_weight)  # moves nothing
    free, decayed = (clone(classifier).set_params(alpha=alpha).fit(X, y, sample_weight) for alpha in (0.0, 3.0))
    rows = len(X) if sample_weight is None else sample_weight.sum()
    weights = {f"hidden.{i}.linear.weight" for i in range(2)} | {"output.weight"}
    for name, values in numbers(decayed).items():
        # d/dW alpha/2 * sum(W^2) / rows = alpha * W / rows, and a step goes learning_rate_init down it
        shrinkage = 0.5 * 3.0 * numbers(start)[name] / rows if name in weights else 0.0
        np.testing.assert_allclose(values, numbers(free)[name] - shrinkage, rtol=0, atol=1e-15, err_msg=name)


# Sample weights


@unconverged
@pytest.mark.parametrize("batch_norm", PLACEMENTS)
def test_a_row_of_weight_k_is_k_rows_and_of_weight_0_none(iris, batch_norm):
    X, y = iris
    times = np.arange(len(X)) % 4
    classifier = BatchNormMLPClassifier((5, 4), batch_norm=batch_norm, solver="sgd", random_state=0, max_iter=10)
    classifier.set_params(batch_size=int(times.sum()), shuffle=False)
    repeated = clone(classifier).fit(np.repeat(X, times, axis=0), np.repeat(y, times))
    weighted = classifier.set_params(batch_size=np.count_nonzero(times)).fit(X, y, sample_weight=times)
    assert_same(weighted, repeated, atol=1e-13)


@unconverged
def test_a_fitted_network_holds_no_sample_weights(iris):
    X, y = iris
    network = BatchNormMLPClassifier((5,), max_iter=1).fit(X, y, np.linspace(0.5, 4, len(X))).network_
    network(torch.from_numpy(X))
    z = torch.from_numpy(X) @ network.hidden[0].linear.weight[0]
    norm = network.hidden[0].norm.train()
    norm.momentum = 1.0
    norm(z)
    torch.testing.assert_close(norm.running_mean, z.mean(0))


@unconverged
def test_weights_that_sum_to_one_correct_the_running_variance_by_the_number_of_rows(iris):
    X, y = iris
    classifier = BatchNormMLPClassifier((5, 4), alpha=0.0, solver="sgd", random_state=0, max_iter=10)
    weighted = clone(classifier).fit(X, y, sample_weight=np.full(len(X), 1 / len(X)))
    assert_same(weighted, classifier.fit(X, y), atol=1e-13)


def test_weighted_statistics_of_a_channel_far_from_zero_keep_their_accuracy():
    x = 1e5 + torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    weight = torch.linspace(0.5, 4, 64)
    single, double = SampleWeightedBatchNorm1d(3), SampleWeightedBatchNorm1d(3).double()
    with weighted_rows(single, weight), weighted_rows(double, weight.double()):
        y, exact = single(x), double(x.double())
    # the mean alone, rounded to float32, would be off by up to 1e5 * 2^-24 = 6e-3 standard deviations
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("weight", [-1.0, 0.0])
def test_weights_below_zero_or_all_zero_are_refused(iris, weight):
    X, y = iris
    with pytest.raises(ValueError, match=r"[Ss]ample.weight"):
        BatchNormMLPClassifier((5,)).fit(X, y, sample_weight=np.full(len(X), weight))


# Kinds of data


@unconverged
def test_several_labels_a_row_are_predicted_together():
    X, y = make_multilabel_classification(200, 10, n_classes=4, random_state=0)
    classifier = BatchNormMLPClassifier((32,), batch_size=50, learning_rate_init=0.02, max_iter=100, random_state=0)
    classifier.fit(X, y)
    assert classifier.out_activation_ == "logistic"
    predicted, probability = classifier.predict(X), classifier.predict_proba(X)
    np.testing.assert_array_equal(predicted, (probability > 0.5).astype(int))
    assert (predicted == y).mean() > 0.95
    thin = clone(classifier).fit(X, sparse.csr_array(y)).predict(X)
    np.testing.assert_array_equal(thin.toarray(), predicted)
    assert get_tags(classifier).classifier_tags.multi_label
    step = clone(classifier).partial_fit(X, y, classes=[0, 1, 2, 3])
    np.testing.assert_array_equal(
        step.predict_proba(X), clone(classifier).set_params(max_iter=1).fit(X, y).predict_proba(X)
    )


def test_several_targets_are_regressed_together(three_targets):
    X, y = three_targets
    regressor = BatchNormMLPRegressor((64,), learning_rate_init=0.03, alpha=0.0, tol=1e-3, random_state=0).fit(X, y)
    assert regressor.predict(X).shape == y.shape
    assert regressor.score(X, y) > 0.9
    one = BatchNormMLPRegressor((8,), learning_rate_init=0.03, tol=1e-2, random_state=0).fit(X, y[:, 0])
    assert one.predict(X).shape == (len(X),)


@unconverged
@pytest.mark.parametrize("kind", [sparse.csr_array, sparse.csc_matrix])
def test_sparse_rows_give_what_dense_rows_give(kind):
    X, y = make_classification(60, 12, random_state=0)
    X[np.abs(X) < 0.8] = 0
    classifier = BatchNormMLPClassifier((8,), batch_size=25, max_iter=5, random_state=0)
    weight = np.arange(60) % 3
    dense = clone(classifier).fit(X, y, weight)
    thin = classifier.fit(kind(X), y, weight)
    assert_same(thin, dense)
    np.testing.assert_array_equal(thin.predict_proba(kind(X)), dense.predict_proba(X))


@unconverged
def test_a_fit_computes_in_the_dtype_of_x(three_targets):
    X, y = three_targets
    regressor = BatchNormMLPRegressor((8,), max_iter=20, random_state=0)
    double, single = clone(regressor).fit(X, y), clone(regressor).fit(X.astype(np.float32), y)
    for fitted, dtype in ((double, np.float64), (single, np.float32)):
        assert {n.dtype for n in numbers(fitted).values() if n.dtype != np.int64} == {np.dtype(dtype)}
        assert {n.dtype for n in fitted.coefs_ + fitted.intercepts_} == {np.dtype(dtype)}
        assert fitted.predict(X).dtype == dtype
    np.testing.assert_allclose(single.predict(X), double.predict(X), atol=1e-4)
    whole = clone(regressor).fit((10 * X).astype(int), y)
    assert whole.network_.output.weight.dtype == torch.float64


@unconverged
def test_a_fit_in_float32_starts_from_the_weights_of_float64(iris):
    X, y = iris
    still = BatchNormMLPClassifier((5,), **ONE_STEP).set_params(learning_rate_init=1e-300)
    double, single = clone(still).fit(X, y), clone(still).fit(X.astype(np.float32), y)
    for wide, narrow in zip(double.coefs_, single.coefs_, strict=True):
        np.testing.assert_array_equal(narrow, wide.astype(np.float32))


@unconverged
def test_the_features_of_a_data_frame_are_named(iris):
    X, y = iris
    names = ["a", "b", "c", "d"]
    classifier = BatchNormMLPClassifier((5,), max_iter=2).fit(polars.DataFrame(X, schema=names), y)
    assert list(classifier.feature_names_in_) == names
    with pytest.raises(ValueError, match="feature names"):
        classifier.predict(polars.DataFrame(X, schema=["d", "c", "b", "a"]))


def test_log_probabilities_are_finite_where_probabilities_underflow():
    X = np.array([[-1.0], [1.0]] * 20)
    classifier = BatchNormMLPClassifier((4,), batch_norm=None, random_state=0, learning_rate_init=0.1).fit(
        X, X[:, 0] > 0
    )
    far = 1e4 * X[:2]
    assert (classifier.predict_proba(far) == np.array([[1.0, 0.0], [0.0, 1.0]])).all()
    assert np.isfinite(classifier.predict_log_proba(far)).all()
    np.testing.assert_allclose(classifier.predict_log_proba(X), np.log(classifier.predict_proba(X)), rtol=1e-12)


# Going on


@unconverged
@pytest.mark.parametrize("solver", ["sgd", "adam"])
@pytest.mark.parametrize("pickled", [False, True])
def test_partial_fits_make_a_fit_of_as_many_epochs_also_through_a_pickle(iris, solver, pickled):
    X, y = iris
    classifier = BatchNormMLPClassifier((5,), solver=solver, shuffle=False, batch_size=40, random_state=0, max_iter=6)
    step_by_step = clone(classifier)
    for _ in range(6):
        step_by_step.partial_fit(X, y, classes=[0, 1, 2])
        if pickled:
            step_by_step = pickle.loads(pickle.dumps(step_by_step))
    classifier.fit(X, y)
    assert_same(step_by_step, classifier)
    assert step_by_step.loss_curve_ == classifier.loss_curve_
    assert (step_by_step.n_iter_, step_by_step.t_) == (1, classifier.t_)


@unconverged
def test_warm_start_goes_on_from_the_last_fit(three_targets):
    X, y = three_targets
    regressor = BatchNormMLPRegressor((5,), solver="sgd", momentum=0.0, shuffle=False, random_state=0)
    whole = clone(regressor).set_params(max_iter=10).fit(X, y)
    halves = regressor.set_params(max_iter=5, warm_start=True).fit(X, y).fit(X, y)
    assert_same(halves, whole)
    assert halves.loss_curve_ == whole.loss_curve_
    assert (halves.n_iter_, halves.t_) == (5, 10 * len(X))
    anew = regressor.set_params(warm_start=False).fit(X, y)
    assert anew.loss_curve_ == whole.loss_curve_[:5]


@unconverged
@pytest.mark.parametrize(
    "change", [{"hidden_layer_sizes": (6,)}, {"batch_norm": "after"}, {"activation": "tanh"}, {"bn_momentum": 0.5}]
)
def test_a_fit_that_goes_on_can_not_change_the_network(iris, change):
    classifier = BatchNormMLPClassifier((5,), warm_start=True, max_iter=1).fit(*iris).set_params(**change)
    ((name, value),) = change.items()
    with pytest.raises(InputError, match=rf"{name} is .*; got {re.escape(repr(value))}"):
        classifier.fit(*iris)


@unconverged
def test_classes_are_given_first_and_kept(iris):
    X, y = iris
    classifier = BatchNormMLPClassifier((5,), max_iter=1)
    with pytest.raises(ValueError, match="classes must be passed"):
        classifier.partial_fit(X, y)
    classifier.partial_fit(X[:60], y[:60], classes=[0, 1, 2])
    assert classifier.predict_proba(X).shape == (150, 3)
    with pytest.raises(InputError, match=r"\[0 1 2\]; got \[0 1 2 3\]"):
        classifier.partial_fit(X, np.append(y[:-1], 3))
    warm = BatchNormMLPClassifier((5,), warm_start=True, max_iter=1).fit(X, y)
    with pytest.raises(InputError, match=r"same classes .*\[0 1 2\]; got \[0 1\]"):
        warm.fit(X[:100], y[:100])


# Stopping


def test_a_fit_stops_when_the_loss_no_longer_improves(iris):
    classifier = BatchNormMLPClassifier((5,), tol=0.05, n_iter_no_change=3, learning_rate_init=0.01, random_state=0)
    classifier.fit(*iris)
    losses = np.array(classifier.loss_curve_)
    assert len(losses) == classifier.n_iter_ < classifier.max_iter
    assert (classifier.loss_, classifier.best_loss_) == (losses[-1], losses.min())
    bests = np.minimum.accumulate(losses)
    no_improvement = losses[1:] > bests[:-1] - 0.05
    assert no_improvement[-4:].all()
    assert not any(no_improvement[i : i + 4].all() for i in range(len(no_improvement) - 4))


def test_a_fit_that_has_not_converged_warns(iris):
    with pytest.warns(ConvergenceWarning, match=r"Maximum iterations \(3\) reached") as caught:
        BatchNormMLPClassifier((5,), max_iter=3).fit(*iris)
    assert caught[0].filename == __file__


@unconverged
def test_early_stopping_keeps_the_network_and_statistics_that_were_best_on_the_rows_held_out(iris):
    X, y = iris
    classifier = BatchNormMLPClassifier((5,), early_stopping=True, learning_rate_init=0.03, random_state=2)
    classifier.fit(X, y)
    scores = classifier.validation_scores_
    best = int(np.argmax(scores))
    assert best + 1 < len(scores) == classifier.n_iter_
    assert (classifier.best_validation_score_, classifier.best_loss_) == (scores[best], None)
    assert_same(classifier, clone(classifier).set_params(max_iter=best + 1).fit(X, y))
    with pytest.raises(InputError, match="early_stopping must be False"):
        classifier.partial_fit(X, y)


@unconverged
def test_verbose_prints_each_epoch(iris, capsys):
    classifier = BatchNormMLPClassifier((5,), max_iter=2, early_stopping=True, verbose=True, random_state=0).fit(*iris)
    expected = [
        line
        for i, (loss, score) in enumerate(zip(classifier.loss_curve_, classifier.validation_scores_, strict=True), 1)
        for line in (f"Iteration {i}, loss = {loss:.8f}", f"Validation score: {score:f}")
    ]
    assert capsys.readouterr().out.splitlines() == expected


class InterruptingAtTheThirdLine(io.StringIO):
    def write(self, text):
        if self.getvalue().count("\n") == 2:
            raise KeyboardInterrupt
        return super().write(text)


def test_an_interrupted_fit_warns_and_keeps_what_it_has_learned(iris):
    classifier = BatchNormMLPClassifier((5,), verbose=True)
    with contextlib.redirect_stdout(InterruptingAtTheThirdLine()), pytest.warns(UserWarning, match="interrupted"):
        classifier.fit(*iris)
    assert classifier.n_iter_ == 3
    assert not classifier.network_.training


# Refusals


def test_lbfgs_is_refused_with_the_reason(iris):
    with pytest.raises(InputError, match=r"same function at each evaluation.*got 'lbfgs'"):
        BatchNormMLPClassifier(solver="lbfgs").fit(*iris)


def test_a_single_row_can_not_be_normalised_and_leaves_the_estimator_unfitted(three_targets):
    X, y = three_targets
    regressor = BatchNormMLPRegressor((5,))
    with pytest.raises(InputError, match=r"at least 2 samples .*; got 1 sample"):
        regressor.fit(X[:1], y[:1])
    with pytest.raises(InputError, match=r"at least 2 samples .*; got 1 sample"):
        regressor.fit(X[:3], y[:3], sample_weight=[0, 2, 0])
    assert not hasattr(regressor, "network_")
    with pytest.raises(InputError, match=r"batch_size must be at least 2 .*; got 1"):
        regressor.set_params(batch_size=1).fit(X, y)


@unconverged
def test_a_single_row_can_be_fitted_without_batch_normalization(three_targets):
    X, y = three_targets
    assert BatchNormMLPRegressor((5,), batch_norm=None, max_iter=2).fit(X[:1], y[:1]).predict(X[:1]).shape == (1, 3)


def test_early_stopping_needs_two_rows_held_out(three_targets):
    X, y = three_targets
    with pytest.raises(InputError, match=r"at least 2 rows held out.*; got 1"):
        BatchNormMLPRegressor((5,), early_stopping=True).fit(X[:9], y[:9])


def test_a_loss_that_is_no_longer_finite_stops_the_fit_with_advice(three_targets):
    X, y = three_targets
    regressor = BatchNormMLPRegressor((5,), batch_norm=None, solver="sgd", learning_rate_init=1e6)
    with pytest.raises(
        InputError, match=r"stay finite; take a smaller learning_rate_init, or scale X.*; got loss .* in epoch"
    ):
        regressor.fit(X, y)


@unconverged
def test_a_batch_size_above_the_rows_is_clipped_with_a_warning(iris):
    with pytest.warns(UserWarning, match="batch_size is 151 but there are only 150 rows"):
        BatchNormMLPClassifier((5,), batch_size=151, max_iter=1).fit(*iris)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"batch_norm": "between"}, "batch_norm.*Got 'between'"),
        ({"activation": "gelu"}, "activation.*Got 'gelu'"),
        ({"bn_momentum": 0.0}, "bn_momentum.*Got 0.0"),
        ({"bn_eps": 0.0}, "bn_eps.*Got 0.0"),
        ({"init_scale": -1.0}, "init_scale.*Got -1.0"),
        ({"hidden_layer_sizes": (5, 0)}, r"hidden_layer_sizes must be whole numbers above 0; got \(5, 0\)"),
        ({"hidden_layer_sizes": (5.5,)}, r"hidden_layer_sizes must be whole numbers above 0; got \(5.5,\)"),
    ],
)
def test_parameters_out_of_range_are_refused(iris, parameters, message):
    with pytest.raises(ValueError, match=message):
        BatchNormMLPClassifier(**parameters).fit(*iris)


# Randomness


@unconverged
def test_random_state_decides_everything_and_torchs_own_state_nothing(iris):
    X, y = iris
    classifier = BatchNormMLPClassifier((5,), batch_size=40, max_iter=3)
    first = clone(classifier).set_params(random_state=0).fit(X, y)
    before = torch.get_rng_state()
    torch.set_default_dtype(torch.float16)
    try:
        second = clone(classifier).set_params(random_state=0)
        with torch.no_grad():
            second.fit(X, y)
        assert torch.get_default_dtype() == torch.float16
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), before)
    assert_same(second, first)
    third = clone(classifier).set_params(random_state=1).fit(X, y)
    assert not np.allclose(third.coefs_[0], first.coefs_[0])


@unconverged
@pytest.mark.parametrize(
    ("activation", "bound"), [("relu", (6 / 4) ** 0.5), ("tanh", (6 / 104) ** 0.5), ("logistic", (6 / 104) ** 0.5)]
)
def test_weights_begin_uniform_by_the_rule_of_the_activation_times_init_scale(iris, activation, bound):
    still = BatchNormMLPClassifier(activation=activation, **ONE_STEP).set_params(learning_rate_init=1e-300)
    weights = clone(still).fit(*iris).coefs_[0]
    assert 0.97 * bound < np.abs(weights).max() <= bound  # 0.97^400 = 5e-6: so seldom are all 400 draws smaller
    np.testing.assert_array_equal(still.set_params(init_scale=4.0).fit(*iris).coefs_[0], 4 * weights)


@unconverged
def test_logistic_is_another_name_for_sigmoid(iris):
    classifier = BatchNormMLPClassifier((5,), max_iter=3, random_state=0)
    logistic, sigmoid = (clone(classifier).set_params(activation=name).fit(*iris) for name in ("logistic", "sigmoid"))
    assert_same(logistic, sigmoid)
    assert isinstance(logistic.network_.hidden[0].activation, torch.nn.Sigmoid)


# In scikit-learn's company


@unconverged
def test_a_pickled_classifier_predicts_the_same(iris):
    X, y = iris
    classifier = BatchNormMLPClassifier((5,), max_iter=5, random_state=0).fit(X, y)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(classifier)).predict_proba(X), classifier.predict_proba(X))


@unconverged
def test_a_grid_search_over_a_pipeline_finds_a_placement(iris):
    X, y = load_iris(return_X_y=True)
    classifier = BatchNormMLPClassifier((8,), learning_rate_init=0.05, max_iter=30, random_state=0)
    search = GridSearchCV(
        make_pipeline(StandardScaler(), classifier), {"batchnormmlpclassifier__batch_norm": PLACEMENTS}, cv=3
    )
    search.fit(X, y)
    assert search.best_score_ > 0.93
    assert len(set(search.cv_results_["mean_test_score"])) > 1


def test_the_examples_of_the_page_run():
    failed, attempted = doctest.testfile(str(Path(__file__).parents[3] / "docs/estimators.md"), module_relative=False)
    assert (failed, attempted > 10) == (0, True)
