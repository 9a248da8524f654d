"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const find = (id) => document.getElementById(id);
  const make = (name, attributes = {}, text = "") => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.textContent = text;
    return element;
  };

  // About `count` round numbers between two.
  const ticks = (low, high, count) => {
    const rough = (high - low) / count;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].find((factor) => factor * power >= rough) * power;
    const found = [];
    for (let value = Math.ceil(low / step) * step; value <= high + step * 1e-6; value += step) found.push(value);
    return { step, found };
  };
  const label = (value, step) => value.toFixed(Math.max(0, -Math.floor(Math.log10(step) + 1e-9)));
  const short = (value) => (Math.abs(value) >= 1e4 ? value.toFixed(0) : String(Number(value.toPrecision(3))));

  const WIDE = 1.96; // standard errors to each side of a 95 % interval
  const draw = (panel, curve) => {
    const svg = panel.querySelector("svg");
    const [width, height] = [svg.clientWidth, svg.clientHeight];
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.replaceChildren();
    const points = curve.points;
    const steps = points.map((point) => point[0]);
    const [first, last] = [steps[0], Math.max(steps.at(-1), steps[0] + 1)];
    let low = Math.min(...points.map(([, mean, error]) => mean - WIDE * error));
    let high = Math.max(...points.map(([, mean, error]) => mean + WIDE * error));
    if (high - low < 1e-9 * Math.max(1, Math.abs(high))) [low, high] = [low - 0.5, high + 0.5];
    const rows = ticks(low, high, 5);
    const left = 10 + 7.2 * Math.max(...rows.found.map((value) => label(value, rows.step).length));
    const x = (step) => left + ((step - first) / (last - first)) * (width - left - 12);
    const y = (value) => 8 + ((high - value) / (high - low)) * (height - 34);
    const path = (pairs) => "M" + pairs.map(([a, b]) => `${a.toFixed(1)} ${b.toFixed(1)}`).join("L");
    for (const value of rows.found) {
      svg.append(make("line", { class: "grid", x1: left, x2: width - 12, y1: y(value), y2: y(value) }));
      svg.append(make("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, label(value, rows.step)));
    }
    const columns = ticks(first, last, Math.max(2, Math.floor(width / 90)));
    for (const step of columns.found.filter(Number.isInteger)) {
      svg.append(make("text", { x: x(step), y: height - 6, "text-anchor": "middle" }, step));
    }
    const edge = (sign) => points.map(([step, mean, error]) => [x(step), y(mean + sign * WIDE * error)]);
    if (points.some((point) => point[2] > 0)) {
      svg.append(make("path", { class: "band", d: path([...edge(1), ...edge(-1).reverse()]) + "Z" }));
    }
    const window = Math.min(50, Math.max(5, Math.floor(points.length / 10)));
    const smooth = points.map((_, end) => {
      const part = points.slice(Math.max(0, end + 1 - window), end + 1);
      return part.reduce((sum, point) => sum + point[1], 0) / part.length;
    });
    svg.append(make("path", { class: "raw", d: path(points.map(([step, mean]) => [x(step), y(mean)])) }));
    svg.append(make("path", { class: "mean", d: path(smooth.map((mean, i) => [x(steps[i]), y(mean)])) }));
    const here = make("line", { class: "here", y1: 8, y2: height - 26, visibility: "hidden" });
    const dot = make("circle", { class: "dot", r: 4 });
    svg.append(here, dot);

    const say = (index, isHere) => {
      const [step, mean, error] = points[index];
      // Two digits of the interval, and all numbers to the same place.
      const decimals = Math.max(0, 1 - Math.floor(Math.log10(WIDE * error)));
      const hasInterval = error > 0 && decimals < 7;
      const say = (value) => (hasInterval ? value.toFixed(decimals) : short(value));
      const interval = hasInterval ? ` \u00b1 ${say(WIDE * error)}` : "";
      panel.querySelector("output").textContent =
        `update ${Math.round(step)}: ${say(mean)}${interval}, running mean ${say(smooth[index])}`;
      dot.setAttribute("cx", x(step));
      dot.setAttribute("cy", y(smooth[index]));
      here.setAttribute("x1", x(step));
      here.setAttribute("x2", x(step));
      here.setAttribute("visibility", isHere ? "visible" : "hidden");
    };
    svg.onpointermove = (event) => {
      const place = event.clientX - svg.getBoundingClientRect().left;
      const distances = steps.map((step) => Math.abs(x(step) - place));
      say(distances.indexOf(Math.min(...distances)), true);
    };
    svg.onpointerleave = () => say(points.length - 1, false);
    say(points.length - 1, false);
  };

  const colors = ["--accent", "--adapter-1", "--adapter-3"];
  const panels = data.curves.map((curve, index) => {
    const panel = document.createElement("figure");
    panel.className = "panel";
    panel.style.setProperty("--color", `var(${colors[index % colors.length]})`);
    const [title, output] = [document.createElement("h3"), document.createElement("output")];
    title.textContent = curve.name;
    panel.append(title, output, make("svg", { role: "img", "aria-label": curve.name }));
    find("panels").append(panel);
    return panel;
  });
  if (!panels.length) find("panels").textContent = "They begin with the first update.";
  const drawAll = () => panels.forEach((panel, index) => draw(panel, data.curves[index]));
  drawAll();
  addEventListener("resize", drawAll);

  // The image that is looked at stays over a reload, but where it is the newest, the newest stays.
  const slider = find("frame");
  if (slider) {
    const cards = [...document.querySelectorAll(".card")];
    const show = (frame) => {
      slider.value = frame;
      const text = data.frames[frame] ? `after update ${data.frames[frame]}` : "the base, before training";
      find("when").textContent = text;
      slider.setAttribute("aria-valuetext", text);
      cards.forEach((card, index) => {
        card.querySelector(".shown").src = data.images[frame][index] ?? "";
        const strip = card.querySelector(".strip");
        [...strip.children].forEach((button, i) => button.setAttribute("aria-current", i === frame));
        const chosen = strip.children[frame];
        strip.scrollLeft = chosen.offsetLeft - strip.offsetLeft - (strip.clientWidth - chosen.offsetWidth) / 2;
      });
      sessionStorage.setItem("frame", frame === data.frames.length - 1 ? "newest" : frame);
    };
    slider.max = data.frames.length - 1;
    cards.forEach((card, index) => {
      card.querySelector(".shown").onload = ({ target }) =>
        target.classList.toggle("small", Math.max(target.naturalWidth, target.naturalHeight) <= 128);
      data.frames.forEach((step, frame) => {
        const [button, image] = [document.createElement("button"), document.createElement("img")];
        Object.assign(image, { src: data.images[frame][index] ?? "", alt: "", loading: "lazy" });
        button.type = "button";
        button.append(image, step || "base");
        button.setAttribute("aria-label", step ? `after update ${step}` : "the base");
        button.onclick = () => show(frame);
        card.querySelector(".strip").append(button);
      });
    });
    const kept = sessionStorage.getItem("frame") ?? "newest";
    show(kept === "newest" ? data.frames.length - 1 : Math.min(Number(kept), data.frames.length - 1));
    slider.addEventListener("input", () => show(Number(slider.value)));
  }

  if (!data.live) return;
  const RELOAD = 10; // seconds
  const age = () => Date.now() / 1000 - data.written;
  let isHeld = false;
  addEventListener("pointerdown", () => { isHeld = true; });
  addEventListener("pointerup", () => { isHeld = false; });
  const sayIfSilent = () => {
    if (age() > data.silent) {
      find("silent").hidden = false;
      find("silent").textContent =
        `No news for ${Math.round(age() / 60)} min: the run has been killed, or does something that takes long.`;
    }
  };
  sayIfSilent();
  setInterval(() => {
    sayIfSilent();
    if (!isHeld && !document.hidden) location.reload();
  }, RELOAD * 1000);
})();
