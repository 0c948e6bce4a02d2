// Filter the documents of a page by outcome and by text. Without it, all are shown.
"use strict";
const form = document.querySelector(".filters");
const samples = [...document.querySelectorAll(".sample")];
const texts = samples.map((sample) => sample.textContent.toLowerCase());
const chips = [...form.querySelectorAll("button[data-outcome]")];
const search = form.querySelector("input");

function update() {
  const chip = chips.find((one) => one.getAttribute("aria-pressed") === "true");
  const words = search.value.toLowerCase();
  let shown = 0;
  samples.forEach((sample, number) => {
    const fits = !chip.dataset.outcome || sample.dataset.outcome === chip.dataset.outcome;
    sample.hidden = !(fits && texts[number].includes(words));
    shown += !sample.hidden;
  });
  form.querySelector("output").value = `${shown} shown`;
}

function press(chip) {
  for (const other of chips) other.setAttribute("aria-pressed", String(other === chip));
  update();
}

for (const chip of chips) chip.addEventListener("click", () => press(chip));
search.addEventListener("input", update);
form.addEventListener("submit", (event) => event.preventDefault());
form.hidden = false;
// A link may ask for an outcome: #lost.
press(chips.find((chip) => `#${chip.dataset.outcome}` === location.hash) ?? chips[0]);
