"use strict";
// Sorts a table by the column whose header is pressed; what is undefined stays last in either direction.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const headers = [...table.querySelectorAll("thead th[data-column]")];
  for (const header of headers) {
    header.querySelector("button").addEventListener("click", () => {
      const column = Number(header.dataset.column);
      const descending = header.getAttribute("aria-sort") === "ascending";
      const sign = descending ? -1 : 1;
      const numeric = header.classList.contains("number");
      const keyed = [...body.rows].map((row) => {
        const cell = row.cells[column];
        // The number a cell begins with; an interval may follow it. NaN for n/a.
        return { row, key: numeric ? Number.parseFloat(cell.textContent) : cell.textContent };
      });
      keyed.sort((a, b) => {
        if (!numeric) return sign * a.key.localeCompare(b.key, undefined, { numeric: true });
        if (Number.isNaN(a.key) || Number.isNaN(b.key)) return Number.isNaN(a.key) - Number.isNaN(b.key);
        return sign * (a.key - b.key);
      });
      body.append(...keyed.map((entry) => entry.row));
      for (const other of headers) other.removeAttribute("aria-sort");
      header.setAttribute("aria-sort", descending ? "descending" : "ascending");
    });
  }
}
