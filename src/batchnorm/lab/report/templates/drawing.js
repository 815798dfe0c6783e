const { labels, seconds, figures } = JSON.parse(document.getElementById("drawings").textContent);
const DASH = { none: "dash", before: "solid", after: "dot", raw: "dashdot", normalized: "solid", theory: "solid", pair: "solid", descent: "solid" };
const SYMBOL = { none: "circle", before: "square", after: "diamond", descent: "circle" };
const WIDTH = { theory: 1.25, pair: 1.25 };
const BOUND = { "at least": "triangle-up-open", "at most": "triangle-down-open", minimum: "star" };
const NARROW = 420;
const MARGIN = 40;
const CHARACTER = 6.5;
const MANY = 40;
const PALE = 0.4;
const hidden = new Set();
const printing = () => root.classList.contains("printing");
const fine = matchMedia("(pointer: fine)").matches;
const root = document.documentElement;
const css = (name) => getComputedStyle(root).getPropertyValue(name).trim();
const numbers = (color) => [1, 3, 5].map((i) => parseInt(color.slice(i, i + 2), 16));
const mixed = (color, paper, part) => `rgb(${numbers(color).map((value, i) => Math.round(part * value + (1 - part) * numbers(paper)[i]))})`;
const shade = (color, alpha) => color + Math.round(alpha * 255).toString(16).padStart(2, "0");

const timeOf = (axis, state) => (axis.time === "chosen" ? state.time || "steps" : axis.time);
const scaleOf = (axis, state) => (axis.switch ? state[axis.switch] || axis.scale : axis.scale);
const chosen = (series, state, any = []) => Object.entries(series.choice || {}).every(([name, option]) => any.includes(name) || state[name] === option);
const shown = (figure, series) => !(hidden.has(series.group) && figure.groups.includes(series.group));

function shapeOf(plot, state) {
  const free = (spec) => plot.series.flatMap((series) => Object.keys(series.choice || {})).filter((name) => !spec.fixed_over.includes(name));
  return JSON.stringify([plot.x, plot.y].map((spec) => [scaleOf(spec, state), timeOf(spec, state), [...new Set(free(spec))].map((name) => state[name])]));
}

function contours(surface) {
  const logs = surface.levels.map(Math.log10);
  const floor = logs[0] - 1;
  const color = css("--" + surface.group);
  return {
    type: "contour", x: surface.x, y: surface.y, z: surface.above.map((row) => row.map((value) => Math.max(floor, Math.log10(value)))),
    autocontour: false, contours: { start: logs[0], end: logs[logs.length - 1], size: (logs[logs.length - 1] - logs[0]) / (logs.length - 1) },
    zmin: logs[0], zmax: logs[logs.length - 1], colorscale: [[0, mixed(color, css("--paper"), 0.04)], [1, mixed(color, css("--paper"), 0.42)]],
    line: { width: 0.75, color: mixed(color, css("--paper"), 0.7) }, showscale: false, hoverinfo: "skip",
  };
}

function traces(figure, plot) {
  const state = figure.state;
  const time = timeOf(plot.x, state);
  const drawn = plot.surface ? [contours(plot.surface)] : [];
  for (const series of plot.series) {
    if (!shown(figure, series) || !chosen(series, state)) continue;
    const factor = time === "seconds" ? seconds[series.group] : 1;
    const limit = state.limit ? state.limit(plot) : Infinity;
    const kept = series.x.map((x, i) => i).filter((i) => series.x[i] * factor <= limit);
    const pick = (values) => kept.map((i) => values[i]);
    const x = kept.map((i) => (series.x[i] === null ? null : series.x[i] * factor));
    const color = shade(css("--" + series.group), series.faint ? PALE : 1);
    if (series.low) {
      const known = kept.map((_, i) => i).filter((i) => series.low[kept[i]] !== null && series.high[kept[i]] !== null);
      const back = [...known].reverse();
      drawn.push({
        x: known.map((i) => x[i]).concat(back.map((i) => x[i])),
        y: known.map((i) => series.low[kept[i]]).concat(back.map((i) => series.high[kept[i]])),
        fill: "toself", fillcolor: shade(css("--" + series.group), 0.16), mode: "lines", line: { width: 0 }, hoverinfo: "skip",
      });
    }
    const marks = series.marks && pick(series.marks);
    drawn.push({
      x, y: pick(series.y), text: series.text && pick(series.text),
      mode: [series.line ? "lines" : "", marks ? "markers" : ""].filter(Boolean).join("+"),
      line: { color: color, width: series.faint ? 1.5 : WIDTH[series.group] || 2.5, dash: DASH[series.group] },
      marker: {
        color: color, size: marks && marks.length > MANY ? 5 : series.line ? 6 : 9, line: { color: color, width: marks && marks.length > MANY ? 0 : 2 },
        symbol: (marks || []).map((mark) => BOUND[mark] || SYMBOL[series.group] + (mark === "beyond" ? "-open" : "")),
      },
      name: labels[series.group], connectgaps: false, hoverinfo: series.faint || WIDTH[series.group] ? "skip" : undefined,
      hovertemplate: series.text ? "%{text}<extra></extra>" : series.line ? "%{y:.4g}" : "%{x:.3g}, %{y:.3g}<extra></extra>",
    });
  }
  return drawn;
}

function extent(figure, plots, name) {
  const ends = [Infinity, -Infinity];
  const positive = plots.every((plot) => scaleOf(plot[name], figure.state) === "log"); // which has no place for 0
  for (const plot of plots) {
    for (const series of plot.series) {
      if (!shown(figure, series) || !chosen(series, figure.state, plot[name].fixed_over)) continue;
      const factor = name === "x" && timeOf(plot.x, figure.state) === "seconds" ? seconds[series.group] : 1;
      for (const values of name === "x" ? [series.x] : [series.y, series.low || [], series.high || []]) {
        for (const value of values) {
          if (value === null || (positive && value <= 0)) continue;
          ends[0] = Math.min(ends[0], value * factor);
          ends[1] = Math.max(ends[1], value * factor);
        }
      }
    }
  }
  return ends;
}

function logTicks(low, high, narrow) {
  const most = narrow ? 6 : 8;
  const from = Math.floor(Math.log10(low));
  const to = Math.ceil(Math.log10(high));
  const make = (digits, every) => {
    const values = [];
    for (let power = from; power <= to; power += 1) {
      if (power % every === 0) for (const digit of digits) values.push(Number(`${digit}e${power}`));
    }
    return values.filter((value) => value >= low * 0.99 && value <= high * 1.01);
  };
  const tries = [make([1, 2, 3, 4, 5, 6, 7, 8, 9], 1), make([1, 2, 5], 1), ...[1, 2, 3, 5, 10, 20].map((every) => make([1], every))];
  const tickvals = tries.find((values) => values.length <= most) || [];
  const label = (value) => (value >= 1e5 || value < 1e-3 ? `10<sup>${Math.round(Math.log10(value))}</sup>` : String(value));
  return { tickvals, ticktext: tickvals.map(label) };
}

function apart(plot, width, scale) {
  const spec = plot.x;
  const along = scale === "log" ? Math.log10 : Number;
  const [low, high] = spec.range.map(along);
  const column = MARGIN + CHARACTER * Math.max(4, ...(plot.y.ticks || []).map((tick) => tick[1].length));
  const at = (tick) => ((along(tick[0]) - low) / (high - low)) * (width - column);
  const kept = [];
  for (const tick of [...spec.ticks].reverse()) {
    const last = kept[0];
    if (!last || Math.abs(at(last) - at(tick)) > ((last[1].length + tick[1].length) / 2) * CHARACTER + 4) kept.unshift(tick);
  }
  return kept;
}

function axis(figure, plot, name, place) {
  const spec = plot[name];
  const state = figure.state;
  const scale = scaleOf(spec, state);
  const time = timeOf(spec, state);
  const narrow = place.clientWidth < NARROW;
  const last = place._fullLayout && place.shape === shapeOf(plot, state) ? place._fullLayout[name + "axis"] : {};
  const made = {
    type: scale, title: { text: time === "seconds" ? "seconds of one thread" : spec.title, standoff: 10, font: { size: printing() ? 10 : 13 } },
    gridcolor: css("--grid"), linecolor: css("--rule"), zeroline: false, automargin: true, ticks: "outside",
    tickcolor: css("--rule"), ticklen: 4, autorange: !spec.range, exponentformat: "power", fixedrange: !fine,
    tickfont: { size: printing() ? 10 : narrow ? 11 : 13 },
  };
  if (spec.equal) Object.assign(made, { scaleanchor: name === "x" ? "y" : "x", constrain: "domain" });
  const [low, high] = extent(figure, spec.shared ? figure.plots : [plot], name);
  if ((spec.shared || spec.fixed_over.length) && low < high) Object.assign(made, { autorange: false, range: [low - 0.04 * (high - low), high + 0.04 * (high - low)] });
  if (scale === "log" && !spec.ticks && low < high) {
    const [from, to] = last.range && !last.autorange ? last.range.map((end) => 10 ** end) : spec.range || [low, high];
    Object.assign(made, logTicks(Math.min(from, to), Math.max(from, to), narrow));
  }
  if (spec.ticks && spec.ticks.length) {
    const ticks = name === "x" ? apart(plot, place.clientWidth, scale) : spec.ticks;
    Object.assign(made, { tickvals: ticks.map((t) => t[0]), ticktext: ticks.map((t) => t[1]), tickangle: 0 });
  }
  if (spec.range) made.range = scale === "log" ? spec.range.map(Math.log10) : [...spec.range];
  return made;
}

function referenceLines(plot, state) {
  const shapes = [];
  const annotations = [];
  for (const line of plot.lines) {
    const other = line.axis === "x" ? "y" : "x";
    const log = scaleOf(plot[line.axis], state) === "log";
    const left = line.axis === "y" && plot.x.time;
    shapes.push({
      type: "line", layer: "below", line: { color: css("--quiet"), width: 1, dash: line.beyond ? "solid" : "4px,3px" },
      [line.axis + "0"]: line.value, [line.axis + "1"]: line.value, [other + "0"]: 0, [other + "1"]: 1, [other + "ref"]: "paper",
    });
    if (line.beyond) shapes.push({
      type: "rect", layer: "below", line: { width: 0 }, fillcolor: shade(css("--quiet"), 0.12),
      [line.axis + "0"]: line.value, [line.axis + "1"]: plot[line.axis].range[1], [other + "0"]: 0, [other + "1"]: 1, [other + "ref"]: "paper",
    });
    if (line.label) annotations.push({
      text: line.label, showarrow: false, font: { size: printing() ? 10 : 12, color: css("--quiet") },
      bgcolor: shade(css("--paper"), 0.75),
      [line.axis]: log ? Math.log10(line.value) : line.value, [other]: left ? 0 : 1, [other + "ref"]: "paper",
      xanchor: line.axis === "x" || left ? "left" : "right", yanchor: line.axis === "x" ? "top" : "bottom", xshift: line.axis === "x" ? 3 : 0,
    });
  }
  return { shapes, annotations };
}

function draw(figure) {
  figure.plots.forEach((plot, i) => {
    const place = figure.places[i];
    const layout = {
      ...referenceLines(plot, figure.state), xaxis: axis(figure, plot, "x", place), yaxis: axis(figure, plot, "y", place), uirevision: shapeOf(plot, figure.state),
      font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: css("--ink") },
      margin: { l: 8, r: 14, t: 12, b: 8 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      showlegend: false, hovermode: plot.x.time ? "x unified" : "closest", dragmode: fine ? "zoom" : false,
      hoverlabel: { bgcolor: css("--raised"), bordercolor: css("--rule"), font: { color: css("--ink"), size: 13 } },
    };
    if (printing()) Object.assign(layout, { width: place.clientWidth, height: place.clientHeight });
    if (figure.state.ranges) {
      Object.assign(layout.xaxis, { range: figure.state.ranges[i].x, autorange: false });
      Object.assign(layout.yaxis, { range: figure.state.ranges[i].y, autorange: false });
    }
    place.shape = layout.uirevision;
    Plotly.react(place, traces(figure, plot), layout, { displayModeBar: false, responsive: true });
  });
}
