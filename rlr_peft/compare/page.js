"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const list = document.getElementById("cards");
  const cards = [...list.children];
  const find = (id) => document.getElementById(id);
  const chosen = (id) => (find(id) ? Number(find(id).value) : 0);

  const scoresOf = (card) => {
    const pair = data.pairs[card.dataset.index];
    const [before, after] = [pair.base[chosen("reward")], pair.adapters[chosen("adapter")][chosen("reward")]];
    return { before, after, gain: after - before };
  };

  // What comes first; ties stay as they were drawn.
  const orders = {
    loss: (card) => scoresOf(card).gain,
    gain: (card) => -scoresOf(card).gain,
    low: (card) => scoresOf(card).after,
    drawn: () => 0,
  };

  const showScores = () => {
    const decimals = data.decimals[chosen("reward")];
    const text = (value, sign = "") => sign + Math.abs(value).toFixed(decimals);
    for (const card of cards) {
      const { before, after, gain } = scoresOf(card);
      const signed = (value) => text(value, value < 0 ? "\u2212" : "");
      card.querySelector(".values").textContent = `${signed(before)} \u2192 ${signed(after)}`;
      const mark = card.querySelector(".gain");
      const shown = Number(gain.toFixed(decimals));
      const least = `less than ${(10 ** -decimals).toFixed(decimals)}`; // changed, but not in the digits that are shown
      mark.textContent = gain !== 0 && shown === 0 ? least : text(shown, shown > 0 ? "\u25b2 +" : shown < 0 ? "\u25bc \u2212" : "= ");
      mark.className = `gain ${shown > 0 ? "up" : shown < 0 ? "down" : ""}`;
    }
  };

  const showAdapter = () => {
    const index = chosen("adapter");
    for (const image of list.querySelectorAll(".after")) image.hidden = Number(image.dataset.adapter) !== index;
    for (const tag of list.querySelectorAll(".tag.right")) tag.textContent = data.adapters[index];
  };

  const sort = () => {
    const key = orders[find("order").value];
    const keys = new Map(cards.map((card) => [card, key(card)]));
    const place = (card) => Number(card.dataset.index);
    list.append(...[...cards].sort((a, b) => keys.get(a) - keys.get(b) || place(a) - place(b)));
  };

  const filter = () => {
    const words = find("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const card of cards) {
      const prompt = data.pairs[card.dataset.index].prompt.toLowerCase();
      card.hidden = !words.every((word) => prompt.includes(word));
      shown += card.hidden ? 0 : 1;
    }
    find("none").hidden = shown > 0;
    find("count").textContent = `${shown} of ${cards.length}`;
  };

  const split = (slider) => {
    slider.closest(".pair").style.setProperty("--split", `${slider.value}%`);
    slider.setAttribute("aria-valuetext", `${slider.value} % base`);
  };

  const view = () => {
    if (!find("view")) return; // of videos there is only one
    const isSlider = find("view").value === "slider";
    list.classList.toggle("slider", isSlider);
    list.classList.toggle("apart", !isSlider);
    find("all-sliders").hidden = !isSlider;
  };

  const showFull = (card) => {
    const images = [card.querySelector(".before"), card.querySelector(".after:not([hidden])")];
    const names = ["base", data.adapters[chosen("adapter")]];
    find("full").querySelectorAll("figure").forEach((figure, index) => {
      const image = figure.querySelector("img");
      [image.src, image.alt] = [images[index].src, images[index].alt];
      const score = index ? scoresOf(card).after : scoresOf(card).before;
      figure.querySelector("figcaption").textContent = `${names[index]}, ${score.toFixed(data.decimals[chosen("reward")])}`;
    });
    find("full").querySelector(".both").classList.toggle("small", card.querySelector(".pair").classList.contains("small"));
    find("full").showModal();
  };

  const on = (id, kind, act) => find(id) && find(id).addEventListener(kind, act);
  on("adapter", "change", () => { showAdapter(); showScores(); sort(); });
  on("reward", "change", () => { showScores(); sort(); });
  on("order", "change", sort);
  on("filter", "input", filter);
  on("view", "change", view);
  on("all", "input", () => {
    for (const slider of list.querySelectorAll(".split")) {
      slider.value = find("all").value;
      split(slider);
    }
  });
  list.addEventListener("click", (event) => event.target.classList.contains("enlarge") && showFull(event.target.closest(".card")));
  on("full", "click", (event) => event.target === find("full") && find("full").close()); // beside the images
  list.addEventListener("input", (event) => event.target.classList.contains("split") && split(event.target));

  // Browsers keep what was chosen over a reload.
  showAdapter();
  showScores();
  filter();
  sort();
  view();
  for (const slider of list.querySelectorAll(".split")) split(slider);
})();
