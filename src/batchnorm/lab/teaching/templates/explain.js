"use strict";
(() => {
  const { names, target, start, kept } = JSON.parse(document.getElementById("start").textContent);
  const count = start.features.length;
  const STAGES = ["raw", "normalized", "scaled and shifted"];
  const FORMULAS = {
    identity: "identity(v) = v", sigmoid: "sigmoid(v) = 1 / (1 + e⁻ᵛ)", tanh: "tanh(v) = (eᵛ − e⁻ᵛ) / (eᵛ + e⁻ᵛ)", relu: "relu(v) = max(0, v)",
  };
  const PLAY_SECONDS = 4;
  const PAUSE_SECONDS = 1.2;
  const SPOKEN_AFTER = 600;
  const OUTLIER = 4;

  const initial = {
    w1: start.weights[0], w2: start.weights[1], b: start.bias, gamma: start.gamma, beta: start.beta, eps: start.eps,
    activation: start.activation, batches: start.batches, neurons: 100,
    placement: "before", stage: 0, swapped: String(count - 1), other: "ordinary", "other.0": 0, "other.1": 0,
  };
  start.features.forEach((pair, i) => pair.forEach((value, j) => { initial[`features.${i}.${j}`] = value; }));
  if (target) start.target.forEach((value, i) => { initial[`target.${i}`] = value; });
  rowAt(start.features, 1).forEach((value, j) => { initial[`single.${j}`] = value; });

  let state = { ...initial };
  let figures;

  /* The page shows a function of the state alone. */

  const rowsOf = (values) => start.features.map((_, i) => [values[`features.${i}.0`], values[`features.${i}.1`]]);

  /** Return the row at a distance from the mean of the rows, in standard deviations, with as many decimals as they have. */
  function rowAt(rows, deviations) {
    return [0, 1].map((j) => {
      const values = rows.map((row) => row[j]);
      const mean = values.reduce((sum, value) => sum + value, 0) / values.length;
      const sd = Math.sqrt(values.reduce((sum, value) => sum + (value - mean) ** 2, 0) / values.length) || 1;
      const decimals = Math.max(...values.map((value) => (String(value).split(".")[1] || "").length), -Math.floor(Math.log10(sd)));
      return Number((mean + deviations * sd).toFixed(Math.min(Math.max(decimals, 0), 15)));
    });
  }

  function otherRow(values) {
    const rows = rowsOf(values);
    if (values.other === "ordinary") return rowAt(rows, -1);
    if (values.other === "outlier") return rowAt(rows, -OUTLIER);
    return values.other === "same" ? rows[values.swapped] : [values["other.0"], values["other.1"]];
  }

  function derive(values) {
    const features = rowsOf(values);
    const given = {
      ...start, features, weights: [values.w1, values.w2], bias: values.b, gamma: values.gamma, beta: values.beta, eps: values.eps,
      activation: values.activation, batches: values.batches, single: [values["single.0"], values["single.1"]],
      target: target && start.target.map((_, i) => values[`target.${i}`]),
    };
    const other = otherRow(values);
    return { features, other, base: calculate(given), swapped: calculate({ ...given, features: features.map((row, i) => (i === Number(values.swapped) ? other : row)) }) };
  }

  const finite = (value) => (typeof value === "number" ? Number.isFinite(value) : value === null || typeof value !== "object" || Object.values(value).every(finite));

  /* Numbers as text. */

  const minus = (text) => text.replace(/-/g, "−");
  const short = (value) => minus(String(Number(value.toPrecision(7))));
  const wrap = (text) => (text.startsWith("−") ? `(${text})` : text);
  const signed = (text) => (text.startsWith("−") ? ` − ${text.slice(1)}` : ` + ${text}`);
  const less = (text) => (text.startsWith("−") ? ` + ${text.slice(1)}` : ` − ${text}`);

  /** Write numbers with the same number of decimals, so that they line up; the largest shows `digits` digits. */
  function column(values, digits = 5) {
    const largest = Math.max(...values.map(Math.abs));
    if (largest > 0 && !(largest >= 1e-2 && largest < 10 ** (digits + 1))) return values.map((value) => (value ? minus(value.toExponential(2)) : "0"));
    const whole = largest > 0 ? Math.floor(Math.log10(largest)) + 1 : 1;
    let decimals = Math.max(digits - whole, 0);
    while (decimals > 0 && values.every((value) => value.toFixed(decimals).endsWith("0"))) decimals -= 1;
    return values.map((value) => minus(value.toFixed(decimals).replace(/^-(0(\.0*)?)$/, "$1")));
  }

  /* The page. */

  const outs = new Map();
  for (const element of document.querySelectorAll("[data-out]")) outs.set(element.dataset.out, [...(outs.get(element.dataset.out) || []), element]);
  function out(key, text) {
    for (const element of outs.get(key) || []) if (element.textContent !== text) element.textContent = text;
  }
  const each = (key, texts) => texts.forEach((text, i) => out(`${key}.${i}`, text));

  const assumed = (path) => start.assumed.includes(path) && state[path] === initial[path];
  const where = (path) => {
    const [kind, row, j] = path.split(".");
    return `${kind === "target" ? target : names[j]} of row ${Number(row) + 1}`;
  };
  const marked = (path) => short(state[path]) + (assumed(path) ? "?" : "");

  function neuronSum(x1, x2) {
    const first = `${wrap(short(state.w1))} · ${wrap(x1)}`;
    return `${first}${signed(short(state.w2))} · ${wrap(x2)}${signed(short(state.b))}`;
  }

  function showRows({ base }) {
    each("z", column(base.z));
    each("z.sum", base.z.map((_, i) => neuronSum(marked(`features.${i}.0`), marked(`features.${i}.1`))));
    const left = start.assumed.filter(assumed);
    for (const mark of document.querySelectorAll("[data-mark]")) {
      const path = mark.dataset.mark;
      mark.hidden = !assumed(path);
      document.getElementById(path).setAttribute("aria-label", where(path) + (assumed(path) ? ", assumed" : ""));
    }
    const note = document.getElementById("assumptions");
    if (note) note.hidden = left.length === 0;
    out("assumed", left.map(where).join(", "));
    const rows = left.filter((path) => path.startsWith("target")).map((path) => Number(path.split(".")[1]) + 1);
    out("step.assumed", rows.length ? ` t is assumed in row ${rows.join(", ")}.` : "");
  }

  /** Return mean (with as many decimals as the values), variance and standard deviation of a mini-batch as text. */
  function statistics(layer) {
    const [mean] = column([layer.mean, ...layer.input]);
    const [variance, sd] = column([layer.var, layer.sd]);
    return { mean, variance, sd };
  }

  /** Write √(σ² + ε) without a possible line break. */
  const root = (variance) => `√(${variance}\u00a0+\u00a0${short(state.eps)})`;

  function showLayer(placement, layer, z) {
    const input = column(layer.input);
    const { mean, variance, sd } = statistics(layer);
    const zHat = column(layer.zHat);
    const y = column(layer.y);
    const parts = column(layer.input.map((value) => value - layer.mean));
    const g = state.activation;
    out(`${placement}.mean`, mean);
    out(`${placement}.mean.sum`, `(${input[0]}${input.slice(1).map(signed).join("")}) / ${count}`);
    out(`${placement}.var`, variance);
    out(`${placement}.var.sum`, `(${parts.map((part) => `${wrap(part)}²`).join(" + ")}) / ${count}`);
    out(`${placement}.sd`, sd);
    out(`${placement}.sd.sum`, `√${variance}`);
    each(`${placement}.zHat`, zHat);
    each(`${placement}.zHat.sum`, input.map((value) => `(${value}${less(mean)}) / ${root(variance)}`));
    each(`${placement}.y`, y);
    each(`${placement}.y.sum`, zHat.map((value) => `${wrap(short(state.gamma))} · ${wrap(value)}${signed(short(state.beta))}`));
    if (placement === "before") {
      each("before.output", column(layer.output));
      each("before.output.sum", y.map((value) => `${g}(${value})`));
    } else {
      each("after.input", input);
      each("after.input.sum", column(z).map((value) => `${g}(${value})`));
    }
    const sizes = layer.zHat.map(Math.abs);
    const largest = sizes.indexOf(Math.max(...sizes));
    out(`${placement}.bound`, `The values do not fall into a fixed range such as [−1, 1]: for m = ${count} rows |ẑ|\u00a0≤\u00a0√(m\u00a0−\u00a01) = ${column([figures.base.bound])[0]}. The largest here is ${column([sizes[largest]])[0]}, of row ${largest + 1}.`);
    out(`now.${placement}.mean`, mean);
    out(`now.${placement}.sd`, sd);
    each(`now.${placement}.zHat`, zHat);
  }

  const plus = (text) => (text.startsWith("−") || !/[1-9]/.test(text) ? text : `+${text}`);

  /** Show two states and their difference; return whether each row differs. */
  function compare(key, was, is) {
    const shown = column([...was, ...is]);
    const change = column(is.map((value, i) => value - was[i]));
    each(`${key}.was`, shown.slice(0, was.length));
    each(`${key}.is`, shown.slice(was.length));
    each(`${key}.change`, change.map(plus));
    return was.map((value, i) => Math.abs(is[i] - value) > 1e-9);
  }

  function showSwap({ base, swapped, other }) {
    const [was, is] = [base[state.placement], swapped[state.placement]];
    const row = Number(state.swapped);
    for (const key of ["mean", "sd"]) {
      const [before, after, difference] = column([was[key], is[key], is[key] - was[key]]);
      out(`swap.was.${key}`, before);
      out(`swap.is.${key}`, after);
      out(`swap.change.${key}`, plus(difference));
    }
    const changed = compare("swap", was.zHat, is.zHat).filter((some, i) => some && i !== row).length;
    const taken = names.map((name, j) => `${name} ${marked(`features.${row}.${j}`)}`).join(", ");
    const put = names.map((name, j) => `${name} ${short(other[j])}`).join(", ");
    out("swap.caption", `Row ${row + 1} (${taken}) swapped for ${put}; batch norm ${state.placement} the nonlinearity`);
    const rest = count - 1;
    out("swap.says", changed === 0
      ? `This swap changes neither the mean nor the variance, and so not ẑ in the other ${rest} rows.`
      : `${changed === rest ? `All ${rest}` : `${changed} of the ${rest}`} remaining rows have another ẑ, although their own numbers are the same.`);
    for (const line of document.querySelectorAll("[data-row]")) line.classList.toggle("swapped", Number(line.dataset.row) === row);
  }

  function showInference({ base }) {
    const layer = base[state.placement];
    const { running } = layer;
    const [mean, lastMean, batchMean] = column([running.mean, running.last.mean, layer.mean]);
    const [variance, lastVar, batchVar] = column([running.var, running.last.var, layer.unbiasedVar]);
    const update = (last, batch) => `${last} + ${short(start.momentum)} · (${batch}${less(last)})`;
    const begun = state.batches === 0;
    out("running.mean", mean);
    out("running.mean.sum", begun ? "at the start" : update(lastMean, batchMean));
    out("running.var", variance);
    out("running.var.sum", begun ? "at the start" : update(lastVar, batchVar));
    out("running.unbiased", batchVar);
    compare("inference", layer.zHat, layer.inference.zHat);
    out("inference.caption", `Batch norm ${state.placement} the nonlinearity; at inference after ${state.batches} ${state.batches === 1 ? "batch" : "batches"}`);

    const one = layer.single;
    const g = state.activation;
    const [z] = column([base.single]);
    const [zHat] = column([one.zHat]);
    const [y] = column([one.y]);
    const pre = neuronSum(short(state["single.0"]), short(state["single.1"]));
    const before = state.placement === "before";
    const [input] = column([one.input]);
    out("single.input.name", before ? "z" : `a = ${g}(z)`);
    out("single.input.sum", before ? pre : `${g}(${pre})`);
    out("single.input", input);
    out("single.zHat.sum", `(${before ? z : input}${less(mean)}) / ${root(variance)}`);
    out("single.zHat", zHat);
    out("single.y.sum", `${wrap(short(state.gamma))} · ${wrap(zHat)}${signed(short(state.beta))}`);
    out("single.y", y);
    out("single.output.sum", before ? `${g}(${y})` : "y");
    out("single.output", column([one.output])[0]);
  }

  function showKept({ base }) {
    const { step } = base[state.placement];
    out("kept.gamma", short(state.gamma));
    out("kept.beta", short(state.beta));
    out("kept.mean", outs.get("running.mean")[0].textContent);
    out("kept.var", outs.get("running.var")[0].textContent);
    const numbers = kept.numbers_per_neuron;
    out("kept.says", `${state.neurons} · ${numbers} = ${state.neurons * numbers} numbers, ${state.neurons * kept.learned.length} of them learned; and one count of the batches seen.`);
    if (!step) return;
    const [gamma, beta, gammaNew, betaNew] = column([state.gamma, state.beta, step.next.gamma, step.next.beta]);
    const [gammaGradient, betaGradient] = column([step.gradient.gamma, step.gradient.beta]);
    const [loss, lossNew] = column([step.loss, step.newLoss]);
    out("step.gamma", gamma);
    out("step.gamma.gradient", gammaGradient);
    out("step.gamma.new", gammaNew);
    out("step.beta", beta);
    out("step.beta.gradient", betaGradient);
    out("step.beta.new", betaNew);
    out("step.loss", loss);
    out("step.loss.new", lossNew);
  }

  /* The strip. */

  const strip = document.getElementById("strip");
  const LINES = [58, 160, 262];
  const HEIGHT = 316;
  const EDGE = 18;
  const RADIUS = 10;

  function svg(parent, tag, attributes, text) {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, typeof value === "number" ? value.toFixed(2) : value);
    if (text !== undefined) element.textContent = text;
    parent.append(element);
  }

  function ticks(low, high, most) {
    const rough = (high - low) / most;
    const power = 10 ** Math.floor(Math.log10(rough));
    const gap = [1, 2, 5, 10].map((digit) => digit * power).find((size) => size >= rough);
    const found = [];
    for (let n = Math.ceil(low / gap); n * gap <= high; n += 1) found.push(n * gap);
    return found;
  }

  /** Return the level above its line of each point, so that points at the same position do not hide each other. */
  function levels(positions) {
    const order = positions.map((_, i) => i).sort((i, j) => positions[i] - positions[j] || i - j);
    const found = positions.map(() => 0);
    order.forEach((i, at) => {
      const near = order.slice(0, at).filter((j) => positions[i] - positions[j] < 2 * RADIUS).map((j) => found[j]);
      while (near.includes(found[i])) found[i] += 1;
    });
    return found;
  }

  function showStrip({ base }) {
    const layer = base[state.placement];
    const sets = [layer.input, layer.zHat, layer.y];
    const scale = Math.abs(state.gamma) * layer.sd / Math.sqrt(layer.var + state.eps);
    const means = [layer.mean, 0, state.beta];
    const sds = [layer.sd, layer.sd / Math.sqrt(layer.var + state.eps), scale];
    const symbol = state.placement === "before" ? "z" : "a";
    const width = strip.clientWidth || 640;
    const ends = [...sets.flat(), ...means.flatMap((mean, i) => [mean - sds[i], mean + sds[i]]), -base.bound, base.bound];
    const [low, high] = [Math.min(...ends), Math.max(...ends)];
    const at = (value) => EDGE + ((value - low) / (high - low)) * (width - 2 * EDGE);
    strip.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    strip.replaceChildren();

    const marks = ticks(low, high, Math.max(3, width / 90));
    const labels = column(marks);
    marks.forEach((mark, i) => {
      svg(strip, "line", { class: Math.abs(mark) < 1e-9 * (high - low) ? "zero" : "grid", x1: at(mark), x2: at(mark), y1: 24, y2: HEIGHT - 26 });
      svg(strip, "text", { class: "tick", x: at(mark), y: HEIGHT - 8, "text-anchor": "middle" }, labels[i]);
    });
    const titles = [`raw: ${state.placement === "before" ? "z" : `a = ${state.activation}(z)`}`, `normalized: ẑ = (${symbol} − μ) / √(σ² + ε)`, "scaled and shifted: y = γ · ẑ + β"];
    LINES.forEach((y, i) => {
      svg(strip, "rect", { class: "band", x: at(means[i] - sds[i]), width: Math.max(at(means[i] + sds[i]) - at(means[i] - sds[i]), 0), y: y - 5, height: 10, rx: 5 });
      svg(strip, "line", { class: "line", x1: 0, x2: width, y1: y, y2: y });
      svg(strip, "line", { class: "mean", x1: at(means[i]), x2: at(means[i]), y1: y - 14, y2: y + 14 });
    });
    for (const end of [-base.bound, base.bound]) svg(strip, "line", { class: "bound", x1: at(end), x2: at(end), y1: LINES[1] - 22, y2: LINES[1] + 22 });

    const positions = sets.map((set) => set.map(at));
    const heights = positions.map((set, line) => levels(set).map((level) => LINES[line] - level * 1.6 * RADIUS));
    positions[0].forEach((_, i) => svg(strip, "polyline", { class: "way", points: LINES.map((_, line) => `${positions[line][i].toFixed(2)},${heights[line][i].toFixed(2)}`).join(" ") }));
    LINES.forEach((y, i) => svg(strip, "text", { class: "title", x: 0, y: y - 32 }, titles[i]));
    positions.forEach((set, line) => set.forEach((x, i) => {
      svg(strip, "circle", { class: "ghost", cx: x, cy: heights[line][i], r: RADIUS - 1 });
      svg(strip, "text", { class: "ghost-number", x, y: heights[line][i] + 4, "text-anchor": "middle" }, String(i + 1));
    }));
    const from = Math.min(Math.floor(state.stage), 1);
    const part = state.stage - from;
    const between = (pair, i) => pair[from][i] + part * (pair[from + 1][i] - pair[from][i]);
    positions[0].forEach((_, i) => {
      svg(strip, "circle", { class: `point ${state.placement}`, cx: between(positions, i), cy: between(heights, i), r: RADIUS });
      svg(strip, "text", { class: "number", x: between(positions, i), y: between(heights, i) + 4, "text-anchor": "middle" }, String(i + 1));
    });

    const { mean, sd } = statistics(layer);
    const [beta, deviation] = column([state.beta, scale]);
    out("strip.says", `Raw, the ${count} points have mean ${mean} and standard deviation ${sd}. Normalized, they have mean 0 and standard deviation ${column([sds[1]], 7)[0]}${layer.var > 0 ? ", which is 1 apart from ε" : ""}; scaled by γ and shifted by β, mean ${beta} and standard deviation ${deviation}.`);
    const percent = Math.round(part * 100);
    const words = percent === 0 || percent === 100 ? STAGES[from + percent / 100] : `${percent}% from ${STAGES[from]} to ${STAGES[from + 1]}`;
    out("stage", words);
    document.getElementById("stage-slider").setAttribute("aria-valuetext", words);
  }

  /* Changes. */

  const said = document.getElementById("said");
  let speaking;
  function say(text) {
    clearTimeout(speaking);
    speaking = setTimeout(() => { said.textContent = text; }, SPOKEN_AFTER);
  }
  function summary() {
    const layer = figures.base[state.placement];
    const { mean, sd } = statistics(layer);
    return `Batch norm ${state.placement} the nonlinearity: mean ${mean}, standard deviation ${sd}, normalized ${column(layer.zHat).join(", ")}.`;
  }
  const spoken = {
    other: () => outs.get("swap.says")[0].textContent,
    swapped: () => outs.get("swap.says")[0].textContent,
    single: () => `At inference the new row has z hat ${outs.get("single.zHat")[0].textContent}.`,
    batches: () => `Running mean ${outs.get("running.mean")[0].textContent}, running variance ${outs.get("running.var")[0].textContent}.`,
    neurons: () => outs.get("kept.says")[0].textContent,
    stage: () => "",
  };

  const reduced = matchMedia("(prefers-reduced-motion: reduce)");
  const narrow = matchMedia("screen and (max-width: 64rem)");
  const inputs = [...document.querySelectorAll("[data-path]")];
  const sliders = [...document.querySelectorAll("[data-slides]")];
  const buttons = [...document.querySelectorAll("[data-choice]")];
  const stageSlider = document.getElementById("stage-slider");
  const activation = document.getElementById("activation");

  const typed = (path) => (/^(features|target|other|single)\./.test(path) ? String(state[path]) : String(Number(state[path].toPrecision(9))));
  const position = (slider) => {
    const value = state[slider.dataset.slides];
    return "power" in slider.dataset ? Math.log10(value) : value;
  };

  /** Show the state in the controls; an invalid input keeps its text and its message until it is corrected. */
  function showControls() {
    for (const input of inputs) {
      const stale = input.value === "" || Number(input.value) !== state[input.dataset.path];
      if (stale && !input.hasAttribute("aria-invalid")) input.value = typed(input.dataset.path);
    }
    for (const slider of sliders) {
      slider.value = position(slider);
      if ("power" in slider.dataset) slider.setAttribute("aria-valuetext", short(state[slider.dataset.slides]));
    }
    for (const button of buttons) button.setAttribute("aria-pressed", String(String(state[button.dataset.choice]) === button.dataset.value));
    stageSlider.value = state.stage;
    activation.value = state.activation;
  }

  function show() {
    out("g", state.activation);
    out("g.formula", FORMULAS[state.activation]);
    showRows(figures);
    showLayer("before", figures.base.before, figures.base.z);
    showLayer("after", figures.base.after, figures.base.z);
    showSwap(figures);
    showInference(figures);
    showKept(figures);
    const layer = figures.base[state.placement];
    const { mean, sd } = statistics(layer);
    out("brief", `μ ${mean}   σ ${sd}`);
    showControls();
    fit();
  }

  /** Adapt to the width of the page: draw the strip, and let the keyboard scroll the tables that are too wide. */
  function fit() {
    showStrip(figures);
    for (const region of document.querySelectorAll(".scroll")) {
      if (region.scrollWidth > region.clientWidth) region.setAttribute("tabindex", "0");
      else region.removeAttribute("tabindex");
    }
  }

  /** Apply a change unless its figures would not be finite; return whether it was applied. */
  function change(values, about) {
    const next = { ...state, ...values };
    const found = derive(next);
    if (!finite(found)) return false;
    [next["other.0"], next["other.1"]] = found.other;
    [state, figures] = [next, found];
    show();
    const speak = spoken[about] || summary;
    const text = speak();
    if (text) say(text);
    return true;
  }

  function complain(path, sentence) {
    const input = document.getElementById(path);
    const problem = document.getElementById(`${path}-problem`);
    if (sentence) input.setAttribute("aria-invalid", "true");
    else input.removeAttribute("aria-invalid");
    problem.hidden = !sentence;
    problem.textContent = sentence || "";
    if (sentence) say(`${input.dataset.name}: ${sentence}`);
  }

  function wrong(input, path) {
    const value = Number(input.value);
    const last = `The figures keep ${typed(path)}.`;
    if (input.validity.badInput) return `Must be a number; this is not one. ${last}`;
    if (input.value.trim() === "") return `Must be a number; it is empty. ${last}`;
    if (!Number.isFinite(value)) return `Must be a number; this is too large. ${last}`;
    if (path === "eps" && !(value > 0)) return `Must be above 0; got ${short(value)}. ${last}`;
    if (path === "batches" && !(Number.isInteger(value) && value >= 0 && value <= 10000)) return `Must be a whole number from 0 to 10000; got ${short(value)}. ${last}`;
    if (path === "neurons" && !(Number.isInteger(value) && value >= 1 && value <= 1e9)) return `Must be a whole number from 1 to 1000000000; got ${short(value)}. ${last}`;
    return null;
  }

  function take(path, value, more) {
    const about = path.split(".")[0];
    const values = { [path]: value, ...more };
    if (about === "other") Object.assign(values, { [path === "other.0" ? "other.1" : "other.0"]: state[path === "other.0" ? "other.1" : "other.0"], other: "typed" });
    const taken = change(values, about);
    complain(path, taken ? null : `Must be closer to 0; with ${short(value)} the figures are too large to calculate. They keep ${typed(path)}.`);
    if (taken) showControls();
  }

  for (const input of inputs) {
    const { path } = input.dataset;
    input.addEventListener("input", () => {
      const sentence = wrong(input, path);
      if (sentence) complain(path, sentence);
      else take(path, Number(input.value));
    });
  }
  for (const slider of sliders) {
    slider.addEventListener("input", () => {
      const value = Number(slider.value);
      take(slider.dataset.slides, "power" in slider.dataset ? Number((10 ** value).toPrecision(3)) : value);
    });
  }
  activation.addEventListener("change", () => change({ activation: activation.value }) || showControls());

  let frame;
  const play = document.getElementById("play");
  function stop() {
    cancelAnimationFrame(frame);
    frame = undefined;
    play.textContent = "Play";
  }
  const showStage = (stage) => change({ stage }, "stage");

  play.addEventListener("click", () => {
    if (frame !== undefined) return stop();
    const began = performance.now();
    play.textContent = "Stop";
    const half = PLAY_SECONDS / 2;
    const ease = (part) => part * part * (3 - 2 * part);
    const step = (now) => {
      const seconds = (now - began) / 1000;
      const stages = [seconds / half, (seconds - half - PAUSE_SECONDS) / half].map((part) => ease(Math.min(1, Math.max(0, part))));
      const stage = stages[0] + stages[1];
      showStage(reduced.matches ? Math.floor(stage) : stage);
      if (stage < 2) frame = requestAnimationFrame(step);
      else stop();
    };
    showStage(0);
    frame = requestAnimationFrame(step);
    return undefined;
  });
  stageSlider.addEventListener("input", () => { stop(); showStage(Number(stageSlider.value)); });
  for (const button of buttons) {
    button.addEventListener("click", () => {
      const { choice, value } = button.dataset;
      if (choice === "stage") stop();
      if (choice === "other" || choice === "swapped") for (const path of ["other.0", "other.1"]) complain(path, null);
      change({ [choice]: choice === "stage" ? Number(value) : value }, choice);
    });
  }

  document.getElementById("reset").addEventListener("click", () => {
    stop();
    for (const input of inputs) complain(input.dataset.path, null);
    for (const input of inputs) input.value = "";
    change(initial);
    say("Everything is reset.");
  });
  const step = document.getElementById("step");
  if (step) step.addEventListener("click", () => {
    const { next, newLoss } = figures.base[state.placement].step;
    for (const path of ["gamma", "beta"]) complain(path, null);
    if (change(next)) say(`gamma ${short(state.gamma)}, beta ${short(state.beta)}, loss ${column([newLoss])[0]}.`);
  });

  const panel = document.getElementById("panel");
  const fold = () => { panel.open = !narrow.matches; };
  narrow.addEventListener("change", fold);
  fold();
  new ResizeObserver(fit).observe(strip);
  change({});
  clearTimeout(speaking);
})();
