"use strict";
// Charts, the table, and the animations on one clock. `PAGE` holds charts, and strategies by card.
(function () {
  const page = JSON.parse(document.getElementById("data").textContent);
  const still = window.matchMedia("(prefers-reduced-motion: reduce)").matches;

  for (const [name, spec] of Object.entries(page.charts || {})) {
    const place = document.getElementById("chart-" + name);
    const config = { background: "transparent", view: { stroke: null } };
    vegaEmbed(place, Object.assign({}, spec, { background: null }), {
      actions: false, renderer: "svg", config: config,
    }).then(function () { place.dataset.drawn = "yes"; });
  }

  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = Array.from(table.querySelectorAll("thead th"));
    heads.forEach(function (head, column) {
      head.querySelector("button").addEventListener("click", function () {
        const up = head.getAttribute("aria-sort") === "descending";
        heads.forEach(function (other) { other.removeAttribute("aria-sort"); });
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        const body = table.tBodies[0];
        const value = function (row) {
          const cell = row.cells[column];
          if (!cell || cell.dataset.value === "") return null;
          const number = Number(cell.dataset.value);
          return Number.isNaN(number) ? cell.dataset.value : number;
        };
        const rows = Array.from(body.rows).sort(function (a, b) {
          const x = value(a), y = value(b);
          if (x === null || y === null) return (x === null) - (y === null);
          return (x < y ? -1 : x > y ? 1 : 0) * (up ? 1 : -1);
        });
        rows.forEach(function (row) { body.appendChild(row); });
      });
    });
  }

  const cards = page.cards || [];
  const play = document.getElementById("play");
  if (!cards.length || !play) return;
  const slider = document.getElementById("clock");
  const shown = document.getElementById("shown");
  const modes = Array.from(document.querySelectorAll("input[name=clock-of]"));
  const speeds = document.getElementById("speed");
  let moment = 0, playing = !still, before = null;

  function mode() { return modes.find(function (one) { return one.checked; }).value; }
  // The clock runs on a logarithm: one evaluation and a hundred are both to be seen.
  function ends(card, unit) { return unit === "time" ? card.milliseconds : card.nfe; }
  function range(unit) {
    const all = cards.map(function (card) { return ends(card, unit); });
    return [Math.min.apply(null, all) / 2, Math.max.apply(null, all)];
  }
  function now(unit) {
    const [low, high] = range(unit);
    return low * Math.pow(high / low, moment);
  }

  for (const card of cards) {
    card.place = document.getElementById("card-" + card.name);
    card.at = -2;
    if (card.texts) continue;
    card.picture = new Image();
    card.picture.onload = function () { card.at = -2; draw(); };
    card.picture.src = card.frames;
  }

  function frameAt(card, spent) {
    let frame = -1;
    for (let i = 0; i < card.evaluated.length; i++) if (card.evaluated[i] <= spent + 1e-9) frame = i;
    return frame;
  }

  function draw() {
    const unit = mode(), value = now(unit);
    shown.textContent = unit === "time" ? value.toPrecision(2) + " ms" : Math.floor(value) + " evaluations";
    slider.value = String(Math.round(1000 * moment));
    for (const card of cards) {
      const spent = unit === "time" ? (value / card.milliseconds) * card.nfe : value;
      const frame = frameAt(card, spent);
      if (frame === card.at) continue;
      card.at = frame;
      card.place.dataset.frame = String(frame);
      if (card.texts) {
        card.place.textContent = frame < 0 ? "" : card.texts[frame];
        continue;
      }
      if (!card.picture.complete || !card.picture.naturalWidth) { card.at = -2; continue; }
      const size = card.picture.naturalWidth, context = card.place.getContext("2d");
      card.place.width = card.place.height = size;
      context.fillStyle = "#606060";
      context.fillRect(0, 0, size, size);
      if (frame >= 0) context.drawImage(card.picture, 0, frame * size, size, size, 0, 0, size, size);
    }
  }

  function label() { play.textContent = playing ? "Pause" : "Play"; }
  function tick(stamp) {
    if (playing && before !== null) {
      moment += ((stamp - before) / 12000) * Number(speeds.value);
      if (moment >= 1) { moment = 1; playing = false; label(); }
      draw();
    }
    before = stamp;
    window.requestAnimationFrame(tick);
  }
  play.addEventListener("click", function () {
    if (!playing && moment >= 1) moment = 0;
    playing = !playing;
    label();
  });
  slider.addEventListener("input", function () {
    playing = false;
    label();
    moment = Number(slider.value) / 1000;
    draw();
  });
  modes.forEach(function (one) { one.addEventListener("change", draw); });
  if (still) moment = 1;
  label();
  draw();
  window.requestAnimationFrame(tick);
})();
