"use strict";
(() => {
  const { labels, seconds, figures } = JSON.parse(document.getElementById("drawings").textContent);
  const DASH = { none: "dash", before: "solid", after: "dot" };
  const SYMBOL = { none: "circle", before: "square", after: "diamond" };
  const BOUND = { "at least": "triangle-up-open", "at most": "triangle-down-open" };
  const REPLAY_SECONDS = 3;
  const NARROW = 420;
  const MARGIN = 40;
  const CHARACTER = 6.5;
  const hidden = new Set();
  const fine = matchMedia("(pointer: fine)").matches;
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const shade = (colour, alpha) => colour + Math.round(alpha * 255).toString(16).padStart(2, "0");

  const timeOf = (axis, state) => (axis.time === "chosen" ? state.time || "steps" : axis.time);
  const scaleOf = (axis, state) => (axis.switch ? state[axis.switch] || axis.scale : axis.scale);

  const shapeOf = (plot, state) => JSON.stringify([plot.x, plot.y].map((spec) => [scaleOf(spec, state), timeOf(spec, state), spec.shared && state.unit]));

  function traces(plot, state) {
    const time = timeOf(plot.x, state);
    const drawn = [];
    for (const series of plot.series) {
      if (!visible(series, state)) continue;
      const factor = time === "seconds" ? seconds[series.arm] : 1;
      const limit = state.limit ? state.limit(plot) : Infinity;
      const kept = series.x.map((x, i) => i).filter((i) => series.x[i] * factor <= limit);
      const pick = (values) => kept.map((i) => values[i]);
      const x = kept.map((i) => series.x[i] * factor);
      const colour = css("--" + series.arm);
      if (series.low) {
        const known = kept.map((_, i) => i).filter((i) => series.low[kept[i]] !== null && series.high[kept[i]] !== null);
        const back = [...known].reverse();
        drawn.push({
          x: known.map((i) => x[i]).concat(back.map((i) => x[i])),
          y: known.map((i) => series.low[kept[i]]).concat(back.map((i) => series.high[kept[i]])),
          fill: "toself", fillcolor: shade(colour, 0.16), mode: "lines", line: { width: 0 }, hoverinfo: "skip",
        });
      }
      const marks = series.marks && pick(series.marks);
      drawn.push({
        x, y: pick(series.y), text: series.text && pick(series.text),
        mode: [series.line ? "lines" : "", marks ? "markers" : ""].filter(Boolean).join("+"),
        line: { color: colour, width: 2.5, dash: DASH[series.arm] },
        marker: {
          color: colour, size: series.line ? 6 : 9, line: { color: colour, width: 2 },
          symbol: (marks || []).map((mark) => BOUND[mark] || SYMBOL[series.arm] + (mark === "beyond" ? "-open" : "")),
        },
        name: labels[series.arm], hovertemplate: series.text ? "%{text}<extra></extra>" : "%{y:.4g}",
        connectgaps: false,
      });
    }
    return drawn;
  }

  const visible = (series, state) => !hidden.has(series.arm) && (!series.choice || series.choice === (state.unit || "1"));

  function extent(plots, name, state) {
    const ends = [Infinity, -Infinity];
    for (const plot of plots) {
      for (const series of plot.series.filter((some) => visible(some, state))) {
        const factor = name === "x" && timeOf(plot.x, state) === "seconds" ? seconds[series.arm] : 1;
        for (const values of name === "x" ? [series.x] : [series.y, series.low || [], series.high || []]) {
          for (const value of values) {
            if (value === null) continue;
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

  function apart(plot, width) {
    const spec = plot.x;
    const [low, high] = spec.range.map(Math.log10);
    const column = MARGIN + CHARACTER * Math.max(4, ...(plot.y.ticks || []).map((tick) => tick[1].length));
    const at = (tick) => ((Math.log10(tick[0]) - low) / (high - low)) * (width - column);
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
      type: scale, title: { text: time === "seconds" ? "seconds of one thread" : spec.title, standoff: 10, font: { size: 13 } },
      gridcolor: css("--grid"), linecolor: css("--rule"), zeroline: false, automargin: true, ticks: "outside",
      tickcolor: css("--rule"), ticklen: 4, autorange: !spec.range, exponentformat: "power", fixedrange: !fine,
      tickfont: { size: narrow ? 11 : 13 }, 
    };
    const [low, high] = extent(spec.shared ? figure.plots : [plot], name, state);
    if (spec.shared && low < high) Object.assign(made, { autorange: false, range: [low - 0.04 * (high - low), high + 0.04 * (high - low)] });
    if (scale === "log" && !spec.ticks && low < high) {
      const [from, to] = last.range && !last.autorange ? last.range.map((end) => 10 ** end) : spec.range || [low, high];
      Object.assign(made, logTicks(Math.min(from, to), Math.max(from, to), narrow));
    }
    if (spec.ticks && spec.ticks.length) {
      const ticks = name === "x" ? apart(plot, place.clientWidth) : spec.ticks;
      Object.assign(made, { tickvals: ticks.map((t) => t[0]), ticktext: ticks.map((t) => t[1]), tickangle: 0 });
    }
    if (spec.range) made.range = scale === "log" ? spec.range.map(Math.log10) : [...spec.range];
    return made;
  }

  function rules(plot, state) {
    const shapes = [];
    const annotations = [];
    for (const rule of plot.rules) {
      const other = rule.axis === "x" ? "y" : "x";
      const log = scaleOf(plot[rule.axis], state) === "log";
      const left = rule.axis === "y" && plot.x.time;
      shapes.push({
        type: "line", layer: "below", line: { color: css("--quiet"), width: 1, dash: rule.beyond ? "solid" : "4px,3px" },
        [rule.axis + "0"]: rule.value, [rule.axis + "1"]: rule.value, [other + "0"]: 0, [other + "1"]: 1, [other + "ref"]: "paper",
      });
      if (rule.beyond) shapes.push({
        type: "rect", layer: "below", line: { width: 0 }, fillcolor: shade(css("--quiet"), 0.12),
        [rule.axis + "0"]: rule.value, [rule.axis + "1"]: plot[rule.axis].range[1], [other + "0"]: 0, [other + "1"]: 1, [other + "ref"]: "paper",
      });
      if (rule.label) annotations.push({
        text: rule.label, showarrow: false, font: { size: 12, color: css("--quiet") },
        bgcolor: shade(css("--paper"), 0.75),
        [rule.axis]: log ? Math.log10(rule.value) : rule.value, [other]: left ? 0 : 1, [other + "ref"]: "paper",
        xanchor: rule.axis === "x" || left ? "left" : "right", yanchor: rule.axis === "x" ? "top" : "bottom", xshift: rule.axis === "x" ? 3 : 0,
      });
    }
    return { shapes, annotations };
  }

  function draw(figure) {
    figure.plots.forEach((plot, i) => {
      const place = figure.places[i];
      const layout = {
        ...rules(plot, figure.state), xaxis: axis(figure, plot, "x", place), yaxis: axis(figure, plot, "y", place), uirevision: shapeOf(plot, figure.state),
        font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: css("--ink") },
        margin: { l: 8, r: 14, t: 12, b: 8 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
        showlegend: false, hovermode: plot.x.time ? "x unified" : "closest", dragmode: fine ? "zoom" : false,
        hoverlabel: { bgcolor: css("--raised"), bordercolor: css("--rule"), font: { color: css("--ink"), size: 13 } },
      };
      if (figure.state.ranges) {
        Object.assign(layout.xaxis, { range: figure.state.ranges[i].x, autorange: false });
        Object.assign(layout.yaxis, { range: figure.state.ranges[i].y, autorange: false });
      }
      place.shape = layout.uirevision;
      Plotly.react(place, traces(plot, figure.state), layout, { displayModeBar: false, responsive: true });
    });
  }

  function replay(figure, button) {
    const ends = figure.plots.map((plot) => extent([plot], "x", figure.state));
    figure.state.ranges = figure.places.map(({ _fullLayout: now }) => ({ x: [...now.xaxis.range], y: [...now.yaxis.range] }));
    const began = performance.now();
    button.disabled = true;
    const frame = (now) => {
      const part = Math.min(1, (now - began) / 1000 / REPLAY_SECONDS);
      figure.state.limit = (plot) => {
        const [first, last] = ends[figure.plots.indexOf(plot)];
        return scaleOf(plot.x, figure.state) === "log" ? first * (last / first) ** part : first + (last - first) * part;
      };
      if (part === 1) {
        delete figure.state.limit;
        delete figure.state.ranges;
        button.disabled = false;
      }
      draw(figure);
      if (part < 1) requestAnimationFrame(frame);
    };
    requestAnimationFrame(frame);
  }

  function press(group, chosen) {
    for (const button of group) button.setAttribute("aria-pressed", String(button === chosen));
  }

  for (const figure of figures) {
    const element = document.getElementById("figure-" + figure.key);
    figure.state = {};
    figure.places = [...element.querySelectorAll(".plot")];
    for (const button of element.querySelectorAll("[data-control]")) {
      button.addEventListener("click", () => {
        figure.state[button.dataset.control] = button.dataset.value;
        press(button.parentElement.children, button);
        draw(figure);
      });
    }
    const again = element.querySelector(".replay");
    if (again) again.addEventListener("click", () => replay(figure, again));
    draw(figure);
    for (const place of figure.places) place.on("plotly_relayout", () => draw(figure));
  }

  for (const key of document.querySelectorAll(".key")) {
    key.addEventListener("click", () => {
      const arm = key.dataset.arm;
      hidden.has(arm) ? hidden.delete(arm) : hidden.add(arm);
      for (const same of document.querySelectorAll(`.key[data-arm="${arm}"]`)) same.setAttribute("aria-pressed", String(!hidden.has(arm)));
      figures.forEach(draw);
    });
  }
  for (const query of ["(prefers-color-scheme: dark)", "print"]) {
    matchMedia(query).addEventListener("change", () => figures.forEach(draw));
  }
})();
