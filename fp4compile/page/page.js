"use strict";
// A mark's tip, with the pointer or the keyboard.
const tip = document.getElementById("tip");
function show(mark, x, y) {
  tip.textContent = mark.dataset.tip;
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(8, Math.min(x + 12, innerWidth - box.width - 8))}px`;
  tip.style.top = `${y + box.height + 24 > innerHeight ? y - box.height - 12 : y + 16}px`;
}
document.addEventListener("pointermove", (event) => {
  const mark = event.target.closest?.("[data-tip]");
  if (mark) show(mark, event.clientX, event.clientY);
  else tip.hidden = true;
});
document.addEventListener("focusin", (event) => {
  const mark = event.target.closest?.("[data-tip]");
  if (!mark) return;
  const box = mark.getBoundingClientRect();
  show(mark, box.right, box.top);
});
document.addEventListener("focusout", () => { tip.hidden = true; });

// The table: sorted by a click on a heading, filtered by name.
const table = document.getElementById("weights");
const body = table.tBodies[0];
function key(row, column) {
  const cell = row.cells[column];
  const text = cell.dataset.value ?? cell.textContent.trim();
  return text !== "" && !isNaN(text) ? Number(text) : text;
}
[...table.tHead.rows[0].cells].forEach((heading, column) => {
  heading.addEventListener("click", () => {
    const down = heading.ariaSort === "ascending";
    for (const other of table.tHead.rows[0].cells) other.ariaSort = null;
    heading.ariaSort = down ? "descending" : "ascending";
    const rows = [...body.rows].sort((a, b) => {
      const [x, y] = [key(a, column), key(b, column)];
      return (x < y ? -1 : x > y ? 1 : 0) * (down ? -1 : 1);
    });
    body.append(...rows);
  });
});
document.getElementById("filter").addEventListener("input", (event) => {
  for (const row of body.rows) row.hidden = !row.cells[0].textContent.includes(event.target.value);
});
document.getElementById("download").addEventListener("click", () => {
  const link = document.createElement("a");
  const data = document.getElementById("data").textContent;
  link.href = URL.createObjectURL(new Blob([data], { type: "application/json" }));
  link.download = "fp4_report.json";
  link.click();
});
