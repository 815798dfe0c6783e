"use strict";

/** Nonlinearities g and their derivatives, as functions of the argument. */
const ACTIVATIONS = {
  identity: { g: (v) => v, slope: () => 1 },
  sigmoid: { g: (v) => 1 / (1 + Math.exp(-v)), slope: (v) => { const s = 1 / (1 + Math.exp(-v)); return s * (1 - s); } },
  tanh: { g: Math.tanh, slope: (v) => 1 - Math.tanh(v) ** 2 },
  relu: { g: (v) => (v > 0 ? v : 0), slope: (v) => (v > 0 ? 1 : 0) },
};

/**
 * Calculate every number of batch normalization of one neuron, before and after its nonlinearity.
 *
 * `given` has features (m pairs), weights (2), bias, gamma, beta, eps, momentum, activation, batches (how often the
 * running statistics have seen this mini-batch), and optionally single (a pair, at inference), target (m) and
 * learningRate. The function is pure; a number that is too large for the arithmetic becomes Infinity or NaN.
 */
function calculate(given) {
  const { g, slope } = ACTIVATIONS[given.activation];
  const { gamma, beta, eps } = given;
  const neuron = ([x1, x2]) => given.weights[0] * x1 + given.weights[1] * x2 + given.bias;
  const sum = (values) => values.reduce((total, value) => total + value, 0);

  function moments(values) {
    const m = values.length;
    const near = sum(values) / m;
    const d = values.map((value) => value - near);
    // One double can't hold the mean of values far from 0. The rest is kept separately, so that a constant has variance 0.
    const rest = sum(d) / m;
    return { near, rest, mean: near + rest, var: sum(d.map((part) => part * part)) / m - rest * rest };
  }

  function normalize(values, { near, rest }, variance, end) {
    const sd = Math.sqrt(variance + eps);
    const zHat = values.map((value) => (value - near - rest) / sd);
    const y = zHat.map((value) => gamma * value + beta);
    return { zHat, y, output: y.map(end) };
  }

  function running(batch) {
    let last = { mean: 0, var: 1 };
    let now = last;
    for (let seen = 0; seen < given.batches; seen += 1) {
      last = now;
      now = {
        mean: last.mean + given.momentum * (batch.mean - last.mean),
        var: last.var + given.momentum * (batch.unbiasedVar - last.var),
      };
    }
    return { ...now, sd: Math.sqrt(now.var), last };
  }

  function gradientStep({ zHat, y, output }, end, endSlope) {
    const m = y.length;
    const loss = (outputs) => sum(outputs.map((o, i) => (o - given.target[i]) ** 2)) / m;
    const dy = y.map((value, i) => (2 / m) * (output[i] - given.target[i]) * endSlope(value));
    const gradient = { gamma: sum(dy.map((part, i) => part * zHat[i])), beta: sum(dy) };
    const next = { gamma: gamma - given.learningRate * gradient.gamma, beta: beta - given.learningRate * gradient.beta };
    const newOutput = zHat.map((value) => end(next.gamma * value + next.beta));
    return { gradient, next, loss: loss(output), newLoss: loss(newOutput) };
  }

  function layer(input, single, end, endSlope) {
    const m = input.length;
    const { near, rest, mean, var: variance } = moments(input);
    const batch = { input, mean, var: variance, sd: Math.sqrt(variance), unbiasedVar: (variance * m) / (m - 1) };
    const training = normalize(input, { near, rest }, variance, end);
    const kept = running(batch);
    const infer = (values) => normalize(values, { near: kept.mean, rest: 0 }, kept.var, end);
    const alone = single === null ? null : infer([single]);
    return {
      ...batch,
      ...training,
      running: kept,
      inference: infer(input),
      single: alone && { input: single, zHat: alone.zHat[0], y: alone.y[0], output: alone.output[0] },
      step: given.target ? gradientStep(training, end, endSlope) : null,
    };
  }

  const z = given.features.map(neuron);
  const single = given.single ? neuron(given.single) : null;
  return {
    z,
    bound: Math.sqrt(z.length - 1),
    single,
    before: layer(z, single, g, slope),
    after: layer(z.map(g), single === null ? null : g(single), (y) => y, () => 1),
  };
}
