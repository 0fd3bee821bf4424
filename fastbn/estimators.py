"""fastbn's trainer with scikit-learn's conventions: a classifier, a regressor, and a scaler for streams.

What the two networks have in common, and where they differ from scikit-learn's MLPClassifier and MLPRegressor:

- Batch normalization, before or after each hidden layer's activation (Ioffe and Szegedy 2015, section 3.2 has it
  before), dropout after both. ReLU and leaky ReLU after it are computed in its pass over memory.
- X of float32 is computed on in float32, all else in float64, in `fit` and afterwards.
- The loss is a mean over the rows of a batch. `alpha` adds alpha·W to the gradient of each weight matrix W (torch's
  weight decay; MLPClassifier divides alpha by the number of rows in the batch), or with solver="adamw" shrinks W by
  lr·alpha. Biases and batch normalization's parameters do not decay, and `loss_` does not have the penalty in it.
- A row's weight is how often it counts: in the loss and in the batch's mean and variance alike. Weights are divided by
  their mean over the rows given. Rows of weight 0 are as if they were not there, and in a single batch (batch_size at
  least the number of rows) an integer weight does what repeating the row does.
- A single row has no variance: a last batch of one row is left out, and the next epoch leaves out another. With
  batch_norm=True, one row to fit (`partial_fit` too) and batch_size=1 are refused.
- Running statistics weigh a new batch by 0.1, and by 1/k while there have been fewer than 10 batches, so that what
  they start from is gone after the first. The running variance is the population's.
- Ctrl-C is heard between two steps: the network is always that of a whole one. `fit` then warns and returns, as
  MLPClassifier's does; `partial_fit` raises KeyboardInterrupt, so that the loop around it ends too.
- What gives the network its form (`hidden_layer_sizes`, `activation`, `batch_norm`, `norm_position`,
  `virtual_batch_size`, `dropout`) cannot change in a fit that goes on from another.
- An integer `random_state` fixes everything, bit for bit, for any number of fastbn's threads.

scikit-learn is imported here and nowhere else in fastbn.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any, Self

import numpy as np

from . import checks, nn
from .functional import batch_norm
from .ghost import GhostBatchNorm
from .masked import masked_batch_norm_backward, masked_batch_norm_forward
from .nn.activations import Activation, LeakyReLU
from .nn.dropout import Dropout
from .nn.interrupt import Interrupt
from .nn.losses import MSELoss
from .nn.optimizers import AdamW
from .nn.run import gradients
from .nn.schedules import constant, cosine, exponential
from .pieces import parts
from .statistics import Moments

try:
    from sklearn.base import (
        BaseEstimator,
        ClassifierMixin,
        OneToOneFeatureMixin,
        RegressorMixin,
        TransformerMixin,
        is_classifier,
    )
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.metrics import accuracy_score, r2_score
    from sklearn.model_selection import train_test_split
    from sklearn.utils import check_random_state
    from sklearn.utils.class_weight import compute_sample_weight
    from sklearn.utils.multiclass import check_classification_targets, unique_labels
    from sklearn.utils.validation import (
        _check_sample_weight,
        check_is_fitted,
        check_non_negative,
        column_or_1d,
        validate_data,
    )
except ImportError as error:
    text = checks.needs("fastbn.estimators", "scikit-learn, 1.6 or later", "sklearn")
    raise ImportError(text, name="sklearn") from error

__all__ = ["BatchNormMLPClassifier", "BatchNormMLPRegressor", "StreamingStandardScaler"]

Array = np.ndarray[Any, np.dtype[Any]]

FLOATS = (np.float64, np.float32)
ROWS = 4096  # that go through the network together in predict
STRUCTURE = ("hidden_layer_sizes", "activation", "batch_norm", "norm_position", "virtual_batch_size", "dropout")
TINY = float(np.finfo(np.float64).tiny)


# ---- the network ----


class _BatchNorm(nn.BatchNorm):
    """`nn.BatchNorm` whose rows may have weights, and whose running statistics forget what they start from."""

    row_weights: Array | None = None
    most_rows: int | None = None  # that are normalized together; None: all

    def _rate(self, batches: int | None) -> float:
        return max(super()._rate(batches), 1 / ((batches or 0) + 1))

    def __call__(self, x: Array, residual: Any = None, *, out: Array | None = None) -> Array:
        if self.row_weights is None:
            return super().__call__(x, residual, out=out)
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None
        y = self._y.lend(x.shape, x.dtype)
        self._saved = []
        for part in parts(len(x), self.most_rows or len(x), 2):
            weights = self.row_weights[part]
            _, saved = masked_batch_norm_forward(
                x[part], weights * (len(weights) / weights.sum()), self.weight, self.bias, eps=self.eps,
                activation=self.activation, negative_slope=self.negative_slope, out=y[part],
            )  # fmt: skip
            self._saved.append((part, saved))
            rate = self._rate(self.num_batches_tracked)
            self.running_mean += rate * (saved.mean - self.running_mean)
            self.running_var += rate * (saved.var - self.running_var)
            self.num_batches_tracked += 1
        return y

    def backward(self, dy: Array, *, out: Array | None = None, out_residual: Array | None = None) -> Array:
        if self.row_weights is None:
            return super().backward(dy, out=out, out_residual=out_residual)
        dx = self._dx.lend(dy.shape, dy.dtype)
        self.grad_weight, self.grad_bias = np.zeros_like(self.weight), np.zeros_like(self.bias)
        for part, saved in self._saved:
            _, grad_weight, grad_bias = masked_batch_norm_backward(dy[part], saved, out=dx[part])
            self.grad_weight += grad_weight
            self.grad_bias += grad_bias
        return dx


class _GhostBatchNorm(_BatchNorm, GhostBatchNorm):
    """The same, in virtual batches."""

    def __init__(self, num_features: int, **options: Any) -> None:
        super().__init__(num_features, **options)
        self.most_rows = self.virtual_batch_size


ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "logistic": nn.Sigmoid, "leaky_relu": LeakyReLU}


def _infer(network: nn.Sequential, x: Array) -> Array:
    """What the network gives in eval mode, in new memory: the layers' own buffers are left alone, for other threads."""
    for layer in network.layers:
        if isinstance(layer, nn.Linear):
            x = np.matmul(x, layer.weight.T)
            if layer.bias is not None:
                np.add(x, layer.bias, out=x)
        elif isinstance(layer, nn.BatchNorm):
            x = batch_norm(
                x, layer.running_mean, layer.running_var, layer.weight, layer.bias, eps=layer.eps,
                activation=layer.activation, negative_slope=layer.negative_slope, out=x,
            )  # fmt: skip
        elif isinstance(layer, Activation):
            y = np.empty_like(x)
            layer.function(x, y)
            x = y
    return x


# ---- the estimators ----


class _BatchNormMLP(BaseEstimator):  # type: ignore[misc]
    """What classifier and regressor share. A subclass says what its targets, its loss and its score are."""

    n_outputs_: int
    _best: tuple[float, dict[str, Array]] | None = None  # the best validation score of a fit, and its network

    def __init__(
        self,
        hidden_layer_sizes: Any = (100,),
        *,
        activation: str = "relu",
        batch_norm: bool = True,
        norm_position: str = "before",
        virtual_batch_size: int | None = None,
        dropout: float = 0.0,
        solver: str = "adam",
        alpha: float = 0.0001,
        batch_size: int | str = "auto",
        learning_rate: str = "constant",
        learning_rate_init: float = 0.001,
        learning_rate_decay: float = 0.97,
        max_iter: int = 200,
        tol: float = 0.0001,
        n_iter_no_change: int = 10,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        warm_start: bool = False,
        momentum: float = 0.9,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-8,
        random_state: Any = None,
        verbose: bool = False,
    ) -> None:
        self.hidden_layer_sizes = hidden_layer_sizes
        self.activation = activation
        self.batch_norm = batch_norm
        self.norm_position = norm_position
        self.virtual_batch_size = virtual_batch_size
        self.dropout = dropout
        self.solver = solver
        self.alpha = alpha
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.learning_rate_init = learning_rate_init
        self.learning_rate_decay = learning_rate_decay
        self.max_iter = max_iter
        self.tol = tol
        self.n_iter_no_change = n_iter_no_change
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.warm_start = warm_start
        self.momentum = momentum
        self.beta_1 = beta_1
        self.beta_2 = beta_2
        self.epsilon = epsilon
        self.random_state = random_state
        self.verbose = verbose

    def _check_parameters(self) -> None:
        checks.hidden_layer_sizes(self.hidden_layer_sizes)
        checks.choice("activation", self.activation, tuple(ACTIVATIONS))
        checks.choice("norm_position", self.norm_position, ("before", "after"))
        checks.choice("solver", self.solver, ("sgd", "momentum", "rmsprop", "adam", "adamw"))
        checks.choice("learning_rate", self.learning_rate, ("constant", "exponential", "cosine"))
        for name in ("batch_norm", "early_stopping", "warm_start"):
            checks.flag(name, getattr(self, name))
        for name in ("max_iter", "n_iter_no_change"):
            checks.positive(name, getattr(self, name))
        checks.ghost_size(self.virtual_batch_size)
        checks.batch_size(self.batch_size)
        for name in ("alpha", "tol"):
            checks.number_in(name, getattr(self, name), 0)
        for name in ("dropout", "momentum", "beta_1", "beta_2"):
            checks.number_in(name, getattr(self, name), 0, 1, below=True)
        for name in ("learning_rate_init", "epsilon"):
            checks.number_in(name, getattr(self, name), 0, above=True)
        checks.number_in("learning_rate_decay", self.learning_rate_decay, 0, 1, above=True)
        checks.number_in("validation_fraction", self.validation_fraction, 0, 1, above=True, below=True)

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Train on a data set; with ``warm_start=True`` go on from what an earlier fit left, with a new optimizer.

        Parameters
        ----------
        X : array-like, shape (n_samples, n_features)
        y : array-like, shape (n_samples,) or, for a regressor, (n_samples, n_outputs)
        sample_weight : array-like, shape (n_samples,), optional
            How often each row counts; at least 0.

        Returns
        -------
        self

        Raises
        ------
        TypeError, ValueError
            Naming the argument, what it was and what it must be. Also where training ends in NaN or infinity.

        Notes
        -----
        Ctrl-C ends training after the step at hand, with scikit-learn's warning; the epoch that it cuts short counts as
        one, with the rows that were seen. A second Ctrl-C (or a KeyboardInterrupt where the program handles Ctrl-C
        itself) in the middle of an epoch takes the network back to where that epoch began.
        """
        self._check_parameters()
        again = self.warm_start and self._goes_on()
        X, y = self._read(X, y, reset=not again)
        target = self._targets(y, again)
        return self._learn(X, y, target, sample_weight, again, incremental=False)

    def _goes_on(self) -> bool:
        """Whether there is a network to go on with, which must then be what the parameters say."""
        if not hasattr(self, "network_"):
            return False
        checks.same_structure(self._structure_asked(), self._structure)
        return True

    def _structure_asked(self) -> dict[str, Any]:
        asked = {name: getattr(self, name) for name in STRUCTURE}
        return asked | {"hidden_layer_sizes": tuple(checks.hidden_layer_sizes(self.hidden_layer_sizes))}

    def _read(self, X: Any, y: Any, *, reset: bool) -> tuple[Array, Array]:
        raise NotImplementedError

    def _targets(self, y: Array, again: bool) -> Array:
        """What the loss takes; sets `n_outputs_` or checks it."""
        raise NotImplementedError

    def _weights(self, X: Array, y: Array, sample_weight: Any, incremental: bool) -> Array | None:
        """float64 weights, not all alike, or None."""
        if sample_weight is None:
            return None
        weights: Array = _check_sample_weight(sample_weight, X, dtype=np.float64)
        check_non_negative(weights, "sample_weight")
        return weights

    def _learn(self, X: Array, y: Array, target: Array, sample_weight: Any, again: bool, *, incremental: bool) -> Self:
        weights = self._weights(X, y, sample_weight, incremental)
        if weights is not None:
            there = weights > 0
            checks.weights_leave(int(np.count_nonzero(there)))
            if not there.all():
                X, y, target, weights = X[there], y[there], target[there], weights[there]
            weights = None if (weights == weights[0]).all() else weights * (len(weights) / weights.sum())
        if self.batch_norm:
            checks.enough_rows(len(X), self._batch_size(len(X)))
        interrupted = False
        with Interrupt() as interrupt:
            if not again:
                self._start(X.dtype)
            else:
                X = X.astype(self._dtype, copy=False)
            if target.dtype.kind == "f":
                target = target.astype(self._dtype, copy=False)
            if not (again and incremental):
                self._optimizer = self._new_optimizer()
                self._epoch = 0
            self.n_iter_ = 0
            self.loss_ = self.loss_curve_[-1] if self.loss_curve_ else float("nan")
            self._unimproved = 0
            held_out = None
            if self.early_stopping and not incremental:
                X, held_out, target, weights = self._split(X, y, target, weights)
                if self.batch_norm:
                    checks.enough_rows(len(X), self._batch_size(len(X)))
            try:
                self._epochs(X, target, weights, held_out, 1 if incremental else self.max_iter, interrupt)
                if interrupt.asked:
                    raise KeyboardInterrupt
            except KeyboardInterrupt:
                interrupt.closing = interrupted = True
                if incremental:
                    raise
            finally:
                for layer in self.network_.layers:
                    layer.eval()
                    if isinstance(layer, _BatchNorm):
                        layer.row_weights = None
            if self._best is not None:
                self.network_.load_state_dict(self._best[1])
        if interrupted:
            warnings.warn("Training interrupted by user.", stacklevel=3)
        checks.finite_network(self.network_.state_dict())
        return self

    def _start(self, dtype: np.dtype[Any]) -> None:
        """A new network, and nothing learned."""
        seed = check_random_state(self.random_state).randint(np.iinfo(np.int32).max)
        weights, self._order, noise = map(np.random.default_rng, np.random.SeedSequence(seed).spawn(3))
        self._dtype = dtype
        init = "he" if self.activation in ("relu", "leaky_relu") else "glorot"
        layers: list[Any] = []
        width = self.n_features_in_
        for size in checks.hidden_layer_sizes(self.hidden_layer_sizes):
            layers.append(nn.Linear(width, size, init=init, rng=weights, dtype=dtype))
            after = self.norm_position == "after"
            fused = self.batch_norm and not after and self.activation in ("relu", "leaky_relu")
            activation = [] if fused else [ACTIVATIONS[self.activation]()]
            norm: list[Any] = []
            if self.batch_norm:
                options = {"activation": self.activation if fused else None, "unbiased": False, "dtype": dtype}
                if self.virtual_batch_size is None:
                    norm = [_BatchNorm(size, **options)]
                else:
                    norm = [_GhostBatchNorm(size, virtual_batch_size=self.virtual_batch_size, **options)]
            layers += activation + norm if after else norm + activation
            if self.dropout:
                layers.append(Dropout(self.dropout, rng=noise))
            width = size
        layers.append(nn.Linear(width, self.n_outputs_, init="glorot", rng=weights, dtype=dtype))
        self.network_ = nn.Sequential(*layers)
        self._structure = self._structure_asked()
        self.t_ = 0
        self.loss_curve_: list[float] = []
        self.best_loss_: float | None = None
        self.validation_scores_: list[float] | None = None
        self.best_validation_score_: float | None = None

    def _batch_size(self, rows: int) -> int:
        return min(200 if isinstance(self.batch_size, str) else self.batch_size, rows)

    def _new_optimizer(self) -> nn.Optimizer:
        options: dict[str, Any] = {"weight_decay": self.alpha}
        if self.solver in ("adam", "adamw"):
            kind: Any = nn.Adam if self.solver == "adam" else AdamW
            options |= {"betas": (self.beta_1, self.beta_2), "eps": self.epsilon}
        elif self.solver == "rmsprop":
            kind = nn.RMSprop
            options["eps"] = self.epsilon
        else:
            kind = nn.SGD
            options["momentum"] = self.momentum if self.solver == "momentum" else 0.0
        optimizer: nn.Optimizer = kind(self.network_, self.learning_rate_init, **options)
        optimizer.decay_vectors = False
        return optimizer

    def _split(self, X: Array, y: Array, target: Array, weights: Array | None) -> tuple[Any, ...]:
        """The rows to train on, and those to validate on."""
        train, test = train_test_split(
            np.arange(len(X)), test_size=self.validation_fraction, stratify=y if is_classifier(self) else None,
            random_state=int(self._order.integers(2**31)),
        )  # fmt: skip
        validation = X[test], y[test], None if weights is None else weights[test]
        return X[train], validation, target[train], None if weights is None else weights[train]

    def _epochs(
        self, X: Array, target: Array, weights: Array | None, held_out: Any, epochs: int, interrupt: Interrupt
    ) -> None:
        self._best = None
        network, optimizer, loss = self.network_, self._optimizer, self._new_loss()
        batches = nn.Batches(X, target, self._batch_size(len(X)), sample_weight=weights, rng=self._order)
        norms = [layer for layer in network.layers if isinstance(layer, _BatchNorm)]
        schedule: Any = {
            "constant": constant,
            "exponential": partial(exponential, gamma=self.learning_rate_decay),
            "cosine": partial(cosine, steps=self.max_iter),
        }[self.learning_rate]
        network.train()
        for _ in range(epochs):
            optimizer.lr = self.learning_rate_init * schedule(self._epoch)
            total, seen = 0.0, 0
            before = network.state_dict()
            try:
                for x, wanted, *row_weights in batches:
                    for norm in norms:
                        norm.row_weights = row_weights[0] if row_weights else None
                    value, _ = gradients(network, loss, x, wanted, *row_weights)
                    optimizer.step()
                    total += len(x) * value
                    seen += len(x)
                    if interrupt.asked:
                        break
            except KeyboardInterrupt:  # in the middle of a step, perhaps
                interrupt.closing = True
                network.load_state_dict(before)
                self._optimizer = self._new_optimizer()
                raise
            self._epoch += 1
            self.n_iter_ += 1
            self.t_ += seen
            self.loss_ = total / seen
            self.loss_curve_.append(self.loss_)
            if self.verbose:
                print(f"Iteration {self.n_iter_}, loss = {self.loss_:.8f}")
            if (self._settled(held_out) and epochs > 1) or interrupt.asked:
                return
        if epochs > 1 and self.learning_rate == "constant":  # a schedule has its end there
            warnings.warn(
                f"Maximum iterations ({self.max_iter}) reached and the optimization hasn't converged yet.",
                ConvergenceWarning,
                stacklevel=4,
            )

    def _settled(self, held_out: Any) -> bool:
        """Whether validation score, or loss, have not improved for long enough; keeps the best network so far."""
        if held_out is None:
            best = np.inf if self.best_loss_ is None else self.best_loss_
            improved = self.loss_ <= best - self.tol
            self.best_loss_ = min(best, self.loss_)
        else:
            X, y, weights = held_out
            outputs = self._outputs(X)
            score = self._score(y, outputs, weights) if np.isfinite(outputs).all() else -np.inf
            self.validation_scores_ = [*(self.validation_scores_ or []), score]
            best = -np.inf if self._best is None else self._best[0]
            improved = score >= best + self.tol
            if self._best is None or score > best:
                self._best = score, self.network_.state_dict()
                self.best_validation_score_ = score
            if self.verbose:
                print(f"Validation score: {score:.6f}")
        self._unimproved = 0 if improved else self._unimproved + 1
        if self._unimproved <= self.n_iter_no_change:
            return False
        if self.verbose:
            what = "Training loss" if held_out is None else "Validation score"
            print(f"{what} did not improve more than tol={self.tol:f} for {self.n_iter_no_change} consecutive epochs.")
        return True

    def _new_loss(self) -> Any:
        raise NotImplementedError

    def _score(self, y: Array, outputs: Array, weights: Array | None) -> float:
        raise NotImplementedError

    def _outputs(self, X: Array) -> Array:
        """The network's outputs for X, of its dtype, shape (n_samples, n_outputs)."""
        outputs = np.empty((len(X), self.n_outputs_), self._dtype)
        for start in range(0, len(X), ROWS):
            outputs[start : start + ROWS] = _infer(self.network_, X[start : start + ROWS])
        return outputs

    def _forward(self, X: Any) -> Array:
        check_is_fitted(self)
        X = validate_data(self, X, dtype=FLOATS, order="C", reset=False)
        return self._outputs(X.astype(self._dtype, copy=False))

    def _partial(self, X: Array, y: Array, target: Array, sample_weight: Any, again: bool) -> Self:
        checks.endless("early_stopping", self.early_stopping, self.early_stopping)
        checks.endless("learning_rate", self.learning_rate, self.learning_rate == "cosine")
        return self._learn(X, y, target, sample_weight, again, incremental=True)


_PARAMETERS = """hidden_layer_sizes : int or sequence of int
        The width of each hidden layer; empty: no hidden layer, and then no batch normalization either.
    activation : {"relu", "tanh", "logistic", "leaky_relu"}
        leaky_relu's slope under 0 is 0.01.
    batch_norm : bool
        Whether each hidden layer has batch normalization.
    norm_position : {"before", "after"}
        The activation.
    virtual_batch_size : int, optional
        Most rows that are normalized together ("ghost" batches: see `fastbn.ghost`); None: the batch.
    dropout : float from 0 to 1
        The share of each hidden layer's outputs that a training step sets to 0.
    solver : {"sgd", "momentum", "rmsprop", "adam", "adamw"}
    alpha : float
        Weight decay (see the module), of L2 for all solvers but adamw.
    batch_size : int or "auto"
        "auto": min(200, n_samples).
    learning_rate : {"constant", "exponential", "cosine"}
        From epoch to epoch: as it is; times `learning_rate_decay`; or along half a wave of the cosine to 0 at
        `max_iter`.
    learning_rate_init, learning_rate_decay : float
    max_iter : int
        Most epochs.
    tol, n_iter_no_change : float, int
        Training ends after more than `n_iter_no_change` epochs in succession whose loss was not less than the best by
        `tol` (with `early_stopping`: whose validation score was not greater).
    early_stopping : bool
        Whether to hold out `validation_fraction` of the rows, validate on them after each epoch, and end with the
        network that was best there.
    validation_fraction : float
    warm_start : bool
        Whether `fit` goes on from what an earlier one left, which must have had the same form of network.
    momentum, beta_1, beta_2, epsilon : float
        Of the solvers that have them.
    random_state : int, RandomState or None
        Of the first weights, the order of the rows, dropout and the rows held out.
    verbose : bool
        Whether to print each epoch's loss."""

_ATTRIBUTES = """network_ : fastbn.nn.Sequential
        In eval mode.
    n_features_in_, feature_names_in_
    n_outputs_ : int
    n_iter_ : int
        Epochs of the last fit, one that Ctrl-C cut short included.
    t_ : int
        Rows seen in training.
    loss_, best_loss_ : float
        Of the last epoch; of the best (None with early stopping).
    loss_curve_ : list of float
        Of every epoch, of earlier fits too where there was a warm start or `partial_fit`.
    validation_scores_, best_validation_score_ : list of float, float
        None without early stopping."""


class BatchNormMLPClassifier(ClassifierMixin, _BatchNormMLP):  # type: ignore[misc]
    __doc__ = f"""A multi-layer perceptron with batch normalization that classifies, in scikit-learn's manner.

    Softmax and cross-entropy over one output a class, also for two classes. See the head of `fastbn.estimators` for
    what all its options do.

    Parameters
    ----------
    {_PARAMETERS}
    class_weight : dict or "balanced", optional
        Class → weight, which multiplies `sample_weight`; "balanced": n_samples / (n_classes · rows of the class).

    Attributes
    ----------
    classes_ : ndarray
    {_ATTRIBUTES}

    References
    ----------
    Ioffe and Szegedy (2015), "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate
    Shift".
    """

    classes_: Array

    def __init__(
        self,
        hidden_layer_sizes: Any = (100,),
        *,
        activation: str = "relu",
        batch_norm: bool = True,
        norm_position: str = "before",
        virtual_batch_size: int | None = None,
        dropout: float = 0.0,
        solver: str = "adam",
        alpha: float = 0.0001,
        batch_size: int | str = "auto",
        learning_rate: str = "constant",
        learning_rate_init: float = 0.001,
        learning_rate_decay: float = 0.97,
        max_iter: int = 200,
        tol: float = 0.0001,
        n_iter_no_change: int = 10,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        warm_start: bool = False,
        momentum: float = 0.9,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-8,
        random_state: Any = None,
        verbose: bool = False,
        class_weight: Any = None,
    ) -> None:
        super().__init__(
            hidden_layer_sizes, activation=activation, batch_norm=batch_norm, norm_position=norm_position,
            virtual_batch_size=virtual_batch_size, dropout=dropout, solver=solver, alpha=alpha, batch_size=batch_size,
            learning_rate=learning_rate, learning_rate_init=learning_rate_init,
            learning_rate_decay=learning_rate_decay, max_iter=max_iter, tol=tol, n_iter_no_change=n_iter_no_change,
            early_stopping=early_stopping, validation_fraction=validation_fraction, warm_start=warm_start,
            momentum=momentum, beta_1=beta_1, beta_2=beta_2, epsilon=epsilon, random_state=random_state,
            verbose=verbose,
        )  # fmt: skip
        self.class_weight = class_weight

    def partial_fit(self, X: Any, y: Any, classes: Any = None, sample_weight: Any = None) -> Self:
        """One epoch over a part of a stream, from where the last call, or `fit`, left network and optimizer.

        Parameters
        ----------
        X, y, sample_weight
            As for `fit`; at least two rows with batch_norm=True.
        classes : array-like, optional
            All classes of the stream; needed at the first call.

        Returns
        -------
        self
        """
        self._check_parameters()
        again = self._goes_on()
        classes = None if classes is None else unique_labels(classes)
        checks.classes(classes, self.classes_ if again else None)
        X, y = self._read(X, y, reset=not again)
        if not again:
            self.classes_ = classes
        self.n_outputs_ = len(self.classes_)
        return self._partial(X, y, self._targets(y, again=True), sample_weight, again)

    def predict(self, X: Any) -> Array:
        """The class of each row, shape (n_samples,).

        Parameters
        ----------
        X : array-like, shape (n_samples, n_features)
        """
        outputs = self._forward(X)
        labels: Array = self.classes_[outputs.argmax(axis=1)]
        return labels

    def predict_proba(self, X: Any) -> Array:
        """The probability of each class, in the order of `classes_`: float64, shape (n_samples, n_classes).

        Parameters
        ----------
        X : array-like, shape (n_samples, n_features)
        """
        return np.exp(self.predict_log_proba(X))

    def predict_log_proba(self, X: Any) -> Array:
        """The logarithm of `predict_proba`, also where that is 0.

        Parameters
        ----------
        X : array-like, shape (n_samples, n_features)
        """
        logits = self._forward(X).astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
        return logits

    def _read(self, X: Any, y: Any, *, reset: bool) -> tuple[Array, Array]:
        X, y = validate_data(self, X, y, dtype=FLOATS, order="C", reset=reset)
        check_classification_targets(y)
        return np.asarray(X), np.asarray(y)

    def _targets(self, y: Array, again: bool) -> Array:
        if not again:
            self.classes_ = np.unique(y)
            self.n_outputs_ = len(self.classes_)
        checks.known_classes(y, self.classes_)
        return np.searchsorted(self.classes_, y)

    def _weights(self, X: Array, y: Array, sample_weight: Any, incremental: bool) -> Array | None:
        weights = super()._weights(X, y, sample_weight, incremental)
        if self.class_weight is None:
            return weights
        if incremental:
            checks.class_weight_of_part(self.class_weight)
        checks.class_weight(self.class_weight)
        of_classes: Array = compute_sample_weight(self.class_weight, y)
        return of_classes if weights is None else weights * of_classes

    def _new_loss(self) -> nn.SoftmaxCrossEntropy:
        return nn.SoftmaxCrossEntropy()

    def _score(self, y: Array, outputs: Array, weights: Array | None) -> float:
        return float(accuracy_score(y, self.classes_[outputs.argmax(axis=1)], sample_weight=weights))


class BatchNormMLPRegressor(RegressorMixin, _BatchNormMLP):  # type: ignore[misc]
    __doc__ = f"""A multi-layer perceptron with batch normalization for regression, in scikit-learn's manner.

    The loss is the mean squared error over rows and outputs. y is taken as it is: scale it where it is far from 0 and
    1. See the head of `fastbn.estimators` for what all its options do.

    Parameters
    ----------
    {_PARAMETERS}

    Attributes
    ----------
    {_ATTRIBUTES}

    References
    ----------
    Ioffe and Szegedy (2015), "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate
    Shift".
    """

    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """One epoch over a part of a stream, from where the last call, or `fit`, left network and optimizer.

        Parameters
        ----------
        X, y, sample_weight
            As for `fit`; at least two rows with batch_norm=True.

        Returns
        -------
        self
        """
        self._check_parameters()
        again = self._goes_on()
        X, y = self._read(X, y, reset=not again)
        return self._partial(X, y, self._targets(y, again), sample_weight, again)

    def predict(self, X: Any) -> Array:
        """The value of each row, shape (n_samples,), or (n_samples, n_outputs) where `fit` had several.

        Parameters
        ----------
        X : array-like, shape (n_samples, n_features)
        """
        outputs = self._forward(X)
        return outputs.ravel() if self.n_outputs_ == 1 else outputs

    def _read(self, X: Any, y: Any, *, reset: bool) -> tuple[Array, Array]:
        X, y = validate_data(self, X, y, dtype=FLOATS, order="C", multi_output=True, y_numeric=True, reset=reset)
        if y.ndim == 2 and y.shape[1] == 1:
            y = column_or_1d(y, warn=True)
        return np.asarray(X), np.asarray(y)

    def _targets(self, y: Array, again: bool) -> Array:
        target = y.reshape(len(y), -1).astype(np.float64, copy=False)
        if again:
            checks.fitted_shape("outputs", target.shape[1], self.n_outputs_)
        self.n_outputs_ = target.shape[1]
        return target

    def _new_loss(self) -> MSELoss:
        return MSELoss()

    def _score(self, y: Array, outputs: Array, weights: Array | None) -> float:
        return float(r2_score(y.reshape(outputs.shape), outputs, sample_weight=weights))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags


# ---- the scaler ----


class StreamingStandardScaler(OneToOneFeatureMixin, TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """scikit-learn's StandardScaler on `fastbn.Moments` and fastbn's kernels: (x - mean) / std, feature by feature.

    Statistics are taken in float64 whatever X is, and the mean that is taken from float32 data keeps its low part: a
    feature whose mean is a million times its deviation comes out as exactly as one around 0.

    NaN and infinity are refused, and so is sparse data. There are no sample weights.

    Parameters
    ----------
    copy : bool
        Whether `transform` leaves X as it is; else it writes to X, where X is a writeable array of float32 or float64.
    with_mean, with_std : bool
        Whether to take away the mean; whether to divide by the standard deviation.

    Attributes
    ----------
    mean_ : ndarray of float64, shape (n_features,), or None
        None where neither mean nor deviation is asked for.
    var_, scale_ : ndarray of float64, shape (n_features,), or None
        The population's variance, and its root; None with ``with_std=False``. Where the deviation is less than ten
        float64 units in the last place of the mean, the feature is constant but for rounding, and its scale is 1.
    n_samples_seen_ : int
    n_features_in_, feature_names_in_

    References
    ----------
    Chan, Golub and LeVeque (1983): see `fastbn.Moments`.
    """

    _moments: Moments

    def __init__(self, *, copy: bool = True, with_mean: bool = True, with_std: bool = True) -> None:
        self.copy = copy
        self.with_mean = with_mean
        self.with_std = with_std

    def fit(self, X: Any, y: Any = None) -> Self:
        """Take the statistics of X, and forget those of earlier calls.

        Parameters
        ----------
        X : array-like, shape (n_samples, n_features)
        y : None

        Returns
        -------
        self
        """
        return self._update(X, first=True)

    def partial_fit(self, X: Any, y: Any = None) -> Self:
        """Take in the statistics of one more chunk. It does not matter how a data set is cut into chunks.

        Parameters
        ----------
        X : array-like, shape (n_samples, n_features)
        y : None

        Returns
        -------
        self
        """
        return self._update(X, first=not hasattr(self, "n_samples_seen_"))

    def _update(self, X: Any, *, first: bool) -> Self:
        for name in ("copy", "with_mean", "with_std"):
            checks.flag(name, getattr(self, name))
        X = validate_data(self, X, dtype=FLOATS, reset=first)
        moments: Moments = Moments.none(X.shape[1]) if first else self._moments
        self._moments = moments.update(np.asarray(X))
        self.n_samples_seen_ = moments.count
        self.mean_ = moments.mean.copy() if self.with_mean or self.with_std else None
        self.var_ = self.scale_ = None
        if self.with_std:
            self.var_ = moments.var()
            std = np.sqrt(self.var_)
            self.scale_ = np.where(std <= 10 * np.finfo(np.float64).eps * np.abs(moments.mean), 1.0, std)
        return self

    def transform(self, X: Any, copy: bool | None = None) -> Array:
        """(X - mean_) / scale_, of X's dtype if that is float32 or float64, else float64.

        Parameters
        ----------
        X : array-like, shape (n_samples, n_features)
        copy : bool, optional
            Instead of the scaler's own.

        Returns
        -------
        ndarray, shape (n_samples, n_features)
        """
        X, out = self._data(X, copy)
        none = np.zeros(self.n_features_in_)
        scale = None if self.scale_ is None else 1 / self.scale_
        return batch_norm(X, self.mean_ if self.with_mean else none, none + 1, scale, eps=TINY, out=out)

    def inverse_transform(self, X: Any, copy: bool | None = None) -> Array:
        """X · scale_ + mean_: what `transform` undoes.

        Parameters
        ----------
        X : array-like, shape (n_samples, n_features)
        copy : bool, optional
            Instead of the scaler's own.

        Returns
        -------
        ndarray, shape (n_samples, n_features)
        """
        X, out = self._data(X, copy)
        none = np.zeros(self.n_features_in_)
        return batch_norm(X, none, none + 1, self.scale_, self.mean_ if self.with_mean else None, eps=TINY, out=out)

    def _data(self, X: Any, copy: bool | None) -> tuple[Array, Array | None]:
        """X, and where to write."""
        check_is_fitted(self)
        copy = checks.flag("copy", self.copy if copy is None else copy)
        X = np.asarray(validate_data(self, X, dtype=FLOATS, force_writeable=not copy, reset=False))
        return X, None if copy else X

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags
