"""The worked example in plain text, for a terminal of 80 columns."""

from __future__ import annotations

from batchnorm.lab.teaching.figures import Figures, LayerFigures, OtherBatch, RunningFigures
from batchnorm.text import format_column, format_table, wrap

__all__ = ["worked_text"]

MAX_NAME = 12


def worked_text(f: Figures) -> list[str]:
    """Return the lines of a worked example, section by section."""
    g = f.neuron.activation
    sections = [
        ("The mini-batch and the neuron", _neuron(f)),
        (f"Before the nonlinearity: z -> z_hat -> y -> {g}(y)", _before(f)),
        (f"After the nonlinearity: z -> {g}(z) -> z_hat -> y", _after(f)),
        ("One gradient step on gamma and beta", _step(f)),
        ("The running statistics, for inference", _running(f)),
        ("One row in two batches, and at inference", _one_row(f)),
        ("Numbers that the layer keeps", _kept(f)),
    ]
    lines = ["Batch normalization of one neuron, number by number"]
    for number, (title, body) in enumerate(sections, 1):
        lines += ["", f"{number}. {title}", "", *body]
    return lines


def _wrapped(sentences: str) -> list[str]:
    return wrap(sentences, first="  ", rest="  ")


def _short(name: str) -> str:
    return name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 2]}.."


def _signed(number: float, digits: int) -> str:
    return f"{'-' if number < 0 else '+'} {abs(number):.{digits}g}"


def _row_numbers(f: Figures) -> list[str]:
    return [str(row.row) for row in f.rows]


def _cells(f: Figures, name: str, values: list[float]) -> list[str]:
    """Return a column of the data, with a question mark after each assumed value."""
    marks = ["?" if name in row.assumed else " " for row in f.rows]
    cells = format_column(values, digits=7)
    return [cell + mark for cell, mark in zip(cells, marks, strict=True)] if "?" in marks else cells


def _neuron(f: Figures) -> list[str]:
    neuron = f.neuron
    (w1, w2), b, (sd1, sd2) = neuron.weights, neuron.bias, neuron.feature_sd
    x1, x2 = (_short(name) for name in f.features)
    values = zip(*(row.features for row in f.rows), strict=True)
    columns = [_cells(f, name, list(v)) for name, v in zip(f.features, values, strict=True)]
    header = ["row", x1, x2]
    if f.target is not None:
        header.append(_short(f.target))
        columns.append(_cells(f, f.target, [row.target for row in f.rows if row.target is not None]))
    lines = [
        f"  z11 = w1 * {x1} + w2 * {x2} + b",
        f"      = {w1:.4g} * {x1} {_signed(w2, 4)} * {x2} {_signed(b, 6)}",
        "",
        *format_table([*header, "z11"], [_row_numbers(f), *columns, format_column(neuron.z)]),
        "",
    ]
    assumed = [f"{_short(name)} of row {row.row}" for row in f.rows for name in row.assumed]
    if assumed:
        lines += _wrapped(
            f"? marks an assumption, not a known value: {', '.join(assumed)}. Numbers calculated from it are "
            "assumptions too."
        )
        lines.append("")
    if f.remarks:
        lines += [line for remark in f.remarks for line in _wrapped(remark)]
        lines.append("")
    lines += _wrapped(f"The features differ in scale: sd {sd1:.4g} for {x1}, {sd2:.4g} for {x2}.")
    if neuron.chosen_by_us:
        lines += _wrapped(
            "w1, w2 and b are our choice; training would learn them. w = 1/sd, rounded to a power of ten, so that "
            "neither feature outweighs the other; b brings z near 0."
        )
    return lines


def _statistics(f: Figures, layer: LayerFigures, name: str) -> list[str]:
    figures = format_column([layer.mean, layer.var, layer.sd])
    formulas = [f"mean      mu    = 1/m sum {name}_i", f"variance  var   = 1/m sum ({name}_i - mu)^2"]
    formulas.append("sd        sigma = sqrt(var)")
    left, right = max(map(len, formulas)), max(map(len, figures))
    return [
        *(f"  {formula:{left}}  = {figure:>{right}}" for formula, figure in zip(formulas, figures, strict=True)),
        "",
        f"  z_hat = ({name} - mu) / sqrt(var + eps)   eps = {f.eps:g}",
        f"  y     = gamma * z_hat + beta         at the start gamma = {layer.gamma:g}, beta = {layer.beta:g}",
        "",
    ]


def _before(f: Figures) -> list[str]:
    layer, m = f.before, len(f.rows)
    columns = [format_column(values) for values in (layer.input, layer.z_hat, layer.y, layer.output)]
    return [
        *_statistics(f, layer, "z"),
        *format_table(["row", "z", "z_hat", "y", f"{f.neuron.activation}(y)"], [_row_numbers(f), *columns]),
        "",
        *_wrapped(
            "z_hat does not depend on b, because mu contains b too. Its mean is 0 and its sd 1, apart from eps, but it "
            f"has no fixed range such as [-1, 1]: for m rows |z_hat| <= sqrt(m-1), which is {f.bound:.5g} for m = {m}; "
            f"the largest here is {max(map(abs, layer.z_hat)):.5g}."
        ),
    ]


def _after(f: Figures) -> list[str]:
    layer = f.after
    columns = [format_column(values) for values in (f.before.input, layer.input, layer.z_hat, layer.y)]
    return [
        f"  a = {f.neuron.activation}(z) is normalized instead of z.",
        "",
        *_statistics(f, layer, "a"),
        *format_table(["row", "z", "a", "z_hat", "y"], [_row_numbers(f), *columns]),
    ]


def _step(f: Figures) -> list[str]:
    steps = [layer.step for layer in (f.before, f.after) if layer.step is not None]
    if f.target is None:
        return _wrapped("No target was given, so there is no loss, no gradient and no step.")
    assumed = [str(row.row) for row in f.rows if f.target in row.assumed]
    values = [value for s in steps for value in (s.gamma.value, s.beta.value, s.loss.value)]
    gradients = [value for s in steps for value in (s.gamma.gradient, s.beta.gradient, None)]
    new = [value for s in steps for value in (s.gamma.new, s.beta.new, s.loss.new)]
    return [
        *_wrapped(
            f"The loss is the mean squared error of the neuron's output o against t = {_short(f.target)}, as if the "
            "neuron were the whole network." + (f" t is assumed in row {', '.join(assumed)}." if assumed else "")
        ),
        "",
        f"  L = 1/m sum (o_i - t_i)^2        o = {f.neuron.activation}(y) before, o = y after",
        "  dL/dgamma = sum dL/dy_i * z_hat_i      dL/dbeta = sum dL/dy_i",
        f"  new = value - learning rate * gradient      learning rate = {f.learning_rate:g}",
        "",
        *format_table(
            ["placement", "", "value", "gradient", "new"],
            [
                ["before", "", "", "after", "", ""],
                ["gamma", "beta", "L"] * 2,
                format_column(values),
                format_column(gradients),
                format_column(new),
            ],
        ),
    ]


def _running(f: Figures) -> list[str]:
    states = [*f.before.running, *f.after.running]
    return [
        *_wrapped(
            f"new running = running + {f.momentum:g} * (batch's - running), with the unbiased variance "
            f"var * m / (m - 1): {f.before.unbiased_var:.5g} before, {f.after.unbiased_var:.5g} after."
        ),
        "",
        *format_table(
            ["placement", "batches seen", "running mean", "running var", "sd"],
            [
                ["before", "", "", "after", "", ""],
                [str(state.batches) for state in states],
                format_column([state.mean for state in states]),
                format_column([state.var for state in states]),
                format_column([state.sd for state in states]),
            ],
        ),
        "",
        *_wrapped("They start at 0 and 1. Here the same batch is seen each time; in training, a new one each time."),
    ]


def _one_row(f: Figures) -> list[str]:
    count, last = len(f.rows), f.before.running[-1]
    states: list[LayerFigures | OtherBatch | RunningFigures] = [f.before, f.other_batch, last]
    cases = [
        f"batch of rows 1 to {count}",
        f"batch of rows 1 to {count - 1}",
        f"inference, {last.batches} batches later",
    ]
    return [
        *_wrapped(
            f"Row 1 has z = {f.neuron.z[0]:.5g} in every batch. In training its z_hat depends on the other rows of the "
            "batch; at inference it depends on the running statistics alone. Before the nonlinearity:"
        ),
        "",
        *format_table(
            ["row 1 in", "mean", "sd", "z_hat"],
            [
                cases,
                format_column([state.mean for state in states]),
                format_column([state.sd for state in states]),
                format_column([state.z_hat[0] for state in states]),
            ],
        ),
    ]


def _kept(f: Figures) -> list[str]:
    numbers = f.kept.numbers_per_neuron
    return _wrapped(
        f"{numbers} numbers per neuron: gamma and beta, learned by gradient, and the running mean and variance, not "
        f"learned but averaged over the batches. A hidden layer of 100 neurons keeps {100 * numbers}, and one count "
        "of the batches it has seen."
    )
