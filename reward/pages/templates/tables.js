// Sort tables by a click on a header, and filter the rows of the leaderboard. Without it they are plain tables.
"use strict";
const missingLast = (a, b) => (a === "") - (b === "");

function compare(a, b) {
  const [x, y] = [Number(a), Number(b)];
  return Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b, undefined, { numeric: true }) : x - y;
}

function keyOf(row, column) {
  const cell = row.cells[column];
  return cell.dataset.key ?? cell.textContent.trim();
}

function sort(table, column, direction) {
  const sign = direction === "ascending" ? 1 : -1;
  const rows = [...table.tBodies[0].rows].map((row) => [keyOf(row, column), row]);
  rows.sort(([a], [b]) => missingLast(a, b) || sign * compare(a, b));
  table.tBodies[0].append(...rows.map(([, row]) => row));
}

for (const table of document.querySelectorAll("table.sortable")) {
  const headers = [...table.tHead.rows[0].cells];
  headers.forEach((header, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...header.childNodes);
    header.append(button);
    button.addEventListener("click", () => {
      const first = header.dataset.first ?? "descending";
      const other = first === "ascending" ? "descending" : "ascending";
      const direction = header.getAttribute("aria-sort") === first ? other : first;
      for (const one of headers) one.removeAttribute("aria-sort");
      header.setAttribute("aria-sort", direction);
      sort(table, column, direction);
    });
  });
}

const form = document.querySelector(".filters");
if (form) {
  const rows = [...document.querySelectorAll("table.board tbody tr")];
  const update = () => {
    const [words, experiment, verdict] = ["text", "experiment", "verdict"].map(
      (name) => form.elements[name]?.value ?? "",
    );
    let shown = 0;
    for (const row of rows) {
      row.hidden = !(
        row.textContent.toLowerCase().includes(words.toLowerCase()) &&
        (!experiment || row.dataset.experiment === experiment) &&
        (!verdict || row.dataset.verdicts.split(" ").includes(verdict))
      );
      shown += !row.hidden;
    }
    form.querySelector("output").value = `${shown} of ${rows.length} arms`;
  };
  form.addEventListener("input", update);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
  update();
}
