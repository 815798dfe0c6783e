const REPLAY_SECONDS = 3;
const PLAY_SECONDS = 5;
const still = matchMedia("(prefers-reduced-motion: reduce)");

function replay(figure, button) {
  if (!figure.places.every((place) => place._fullLayout)) return;
  const ends = figure.plots.map((plot) => extent(figure, [plot], "x"));
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
  frame(began);
}

function press(group, pressed) {
  for (const button of group) button.setAttribute("aria-pressed", String(button === pressed));
}

function slide(figure, input) {
  const { options } = figure.controls.find((control) => control.name === input.dataset.slider);
  const bar = input.parentElement;
  const play = bar.querySelector(".play");
  const last = options.length - 1;
  let timer = null;
  const move = (to) => {
    const [option, label] = options[to];
    input.value = to;
    input.setAttribute("aria-valuetext", label);
    bar.querySelector("output").textContent = label;
    figure.state[input.dataset.slider] = option;
    draw(figure);
  };
  const name = () => { play.textContent = still.matches ? "Next" : timer === null ? "Play" : "Pause"; };
  const stop = () => {
    clearInterval(timer);
    timer = null;
    name();
  };
  const next = () => (Number(input.value) === last ? 0 : Number(input.value) + 1);
  const start = () => {
    if (Number(input.value) === last) move(0);
    timer = setInterval(() => {
      move(next());
      if (Number(input.value) === last) stop();
    }, (PLAY_SECONDS * 1000) / last);
    name();
  };
  input.addEventListener("input", () => {
    stop();
    move(Number(input.value));
  });
  play.addEventListener("click", () => {
    if (still.matches) move(next());
    else if (timer === null) start();
    else stop();
  });
  still.addEventListener("change", stop);
  name();
}

for (const figure of figures) {
  const element = document.getElementById("figure-" + figure.key);
  figure.state = Object.fromEntries(figure.controls.map(({ name, options, start }) => [name, options[start][0]]));
  figure.places = [...element.querySelectorAll(".plot")];
  for (const button of element.querySelectorAll("[data-control]")) {
    button.addEventListener("click", () => {
      figure.state[button.dataset.control] = button.dataset.value;
      press(button.parentElement.children, button);
      draw(figure);
    });
  }
  for (const input of element.querySelectorAll("[data-slider]")) slide(figure, input);
  const again = element.querySelector(".replay");
  if (again) again.addEventListener("click", () => replay(figure, again));
}

for (const key of document.querySelectorAll(".key")) {
  key.addEventListener("click", () => {
    const group = key.dataset.group;
    hidden.has(group) ? hidden.delete(group) : hidden.add(group);
    for (const same of document.querySelectorAll(`.key[data-group="${group}"]`)) same.setAttribute("aria-pressed", String(!hidden.has(group)));
    figures.forEach(draw);
  });
}

async function drawAll() {
  for (const figure of figures) {
    draw(figure);
    for (const place of figure.places) place.on("plotly_relayout", () => draw(figure));
    await new Promise((resume) => setTimeout(resume)); // so that the page can be read and scrolled meanwhile
  }
  root.dataset.figures = "drawn";
}

drawAll();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => figures.forEach(draw));

function print(on) { // figures of a size that fits the paper and in colors of the paper, before it is laid out
  root.classList.toggle("printing", on);
  figures.forEach(draw);
}
addEventListener("beforeprint", () => print(true));
addEventListener("afterprint", () => print(false));
matchMedia("print").addEventListener("change", ({ matches }) => print(matches));
