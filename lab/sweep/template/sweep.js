// The page of a sweep: a table over two axes, filters for all, and a dialog with one cell.

const { axes: AXES, cells: CELLS, side: SIDE } = JSON.parse(byId("data").textContent);
const VARIED = AXES.map((_, i) => i).filter((i) => AXES[i].values.length > 1);
const NONE = -1;
const shown = AXES.map((axis, i) => new Set(axis.values.map((_, value) => value)));
const across = byId("across"),
  down = byId("down"),
  one = byId("one");
let order = [], // the cells on the table, row by row
  open = 0; // the one in the dialog, a place in `order`

// ------------------------------------------------------------------------------------------------------ the choices

const title = (i) => AXES[i].name.replaceAll("_", "-");
const inTable = (i) => i === Number(across.value) || i === Number(down.value);

// At first: the two innermost axes but for the seeds, whose first one stands for all.
function firstAxes() {
  const named = VARIED.filter((i) => AXES[i].name !== "seed");
  const chosen = named.length ? named : VARIED;
  return [chosen.at(-1) ?? NONE, chosen.at(-2) ?? NONE];
}

function fillSelect(select, value) {
  const options = [NONE, ...VARIED].map((i) => element("option", { value: i }, i === NONE ? "nothing" : title(i)));
  select.replaceChildren(...options);
  select.value = value;
}

// A value without its axis' name, which stands above it.
const short = (i, j) => AXES[i].labels[j].replace(`${title(i)} `, "");

function filterOf(i) {
  const boxes = AXES[i].values.map((value, j) => {
    const box = element("input", { type: "checkbox", "data-axis": i, "data-value": j });
    return element("label", {}, box, element("span", {}, short(i, j)));
  });
  const all = element("button", { type: "button", "aria-label": `all of ${title(i)}` }, "all");
  const first = element("button", { type: "button", "aria-label": `only the first of ${title(i)}` }, "first");
  all.addEventListener("click", () => choose(i, AXES[i].values.keys()));
  first.addEventListener("click", () => choose(i, [0]));
  return element(
    "fieldset",
    {},
    element("legend", {}, title(i)),
    element("div", { class: "choices" }, all, first, ...boxes),
  );
}

function choose(i, values) {
  shown[i] = new Set(values);
  draw();
}

// An axis that comes onto the table shows all its values; one that leaves it, its first.
function changeAxes(before) {
  for (const i of VARIED) {
    const was = before.includes(i);
    if (inTable(i) && !was) shown[i] = new Set(AXES[i].values.keys());
    if (!inTable(i) && was) shown[i] = new Set([0]);
  }
  draw();
}

// -------------------------------------------------------------------------------------------------------- the table

const isShown = (cell) => cell.at.every((value, i) => shown[i].has(value));
const describe = (cell) => VARIED.map((i) => AXES[i].labels[cell.at[i]]).join(", ") || AXES.find((a) => a.name === "prompt").labels[0];

function tile(cell, place) {
  const inside = cell.picture
    ? element("img", { src: `data:image/jpeg;base64,${cell.picture}`, alt: describe(cell) })
    : element("span", { class: "none" }, `${cell.status}: ${describe(cell)}`);
  const button = element("button", { type: "button", class: "tile", "data-place": place }, inside);
  button.addEventListener("click", () => show(place));
  return button;
}

function draw() {
  const [x, y] = [Number(across.value), Number(down.value)];
  const valuesOf = (i) => (i === NONE ? [null] : [...AXES[i].values.keys()].filter((value) => shown[i].has(value)));
  const key = (cell) => `${y === NONE ? "" : cell.at[y]} ${x === NONE ? "" : cell.at[x]}`;
  const places = new Map();
  for (const cell of CELLS.filter(isShown)) {
    if (!places.has(key(cell))) places.set(key(cell), []);
    places.get(key(cell)).push(cell);
  }
  order = [];
  const head = element(
    "tr",
    {},
    y === NONE ? null : element("td", {}),
    ...valuesOf(x).map((value) => (x === NONE ? null : element("th", { scope: "col" }, AXES[x].labels[value]))),
  );
  const rows = valuesOf(y).map((row) => {
    const cells = valuesOf(x).map((column) => {
      const here = places.get(`${row ?? ""} ${column ?? ""}`) ?? [];
      const tiles = here.map((cell) => tile(cell, order.push(cell) - 1));
      return element("td", {}, element("div", { class: "several" }, ...tiles));
    });
    return element("tr", {}, y === NONE ? null : element("th", { scope: "row" }, AXES[y].labels[row]), ...cells);
  });
  byId("grid").replaceChildren(element("table", {}, element("thead", {}, head), element("tbody", {}, ...rows)));
  for (const box of document.querySelectorAll("#filters input"))
    box.checked = shown[Number(box.dataset.axis)].has(Number(box.dataset.value));
  const fixed = VARIED.filter((i) => !inTable(i) && shown[i].size === 1).map((i) => AXES[i].labels[[...shown[i]][0]]);
  byId("count").textContent =
    `${order.length} of ${CELLS.length} cells` + (fixed.length ? `, with ${fixed.join(", ")}.` : ".");
}

// Arrow keys go from picture to picture, as they stand.
const MOVES = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
byId("grid").addEventListener("keydown", (event) => {
  const move = MOVES[event.key],
    from = event.target.closest(".tile");
  if (!move || !from || event.altKey || event.ctrlKey || event.metaKey) return;
  event.preventDefault();
  const beside = from[move[0] > 0 ? "nextElementSibling" : "previousElementSibling"];
  if (move[0] && beside) return beside.focus();
  const cell = from.closest("td"),
    row = cell.parentElement;
  const tiles = move[0]
    ? (move[0] > 0 ? cell.nextElementSibling : cell.previousElementSibling)?.querySelectorAll(".tile")
    : (move[1] > 0 ? row.nextElementSibling : row.previousElementSibling)?.children[
        [...row.children].indexOf(cell)
      ]?.querySelectorAll(".tile");
  if (tiles?.length) tiles[move[0] < 0 ? tiles.length - 1 : 0].focus();
});

// --------------------------------------------------------------------------------------------------------- one cell

function show(place) {
  open = place;
  const cell = order[open];
  byId("one-title").textContent = describe(cell);
  byId("large").replaceChildren(
    cell.picture
      ? element("img", { src: `data:image/jpeg;base64,${cell.picture}`, alt: describe(cell) })
      : element("p", { class: "note" }, `${cell.status}: ${cell.reason}`),
  );
  byId("options").replaceChildren(
    ...AXES.map((axis, i) =>
      element("div", {}, element("dt", {}, title(i)), element("dd", {}, axis.values[cell.at[i]])),
    ),
    cell.file ? element("div", {}, element("dt", {}, "file"), element("dd", {}, cell.file)) : null,
  );
  byId("command").textContent = cell.command;
  byId("copied").textContent = "";
  byId("batch").textContent = cell.batch
    ? `Its UNet calls, each with so many pictures: ${cell.batch}. In batches of another size a picture may differ by ` +
      "one grey level."
    : "";
  byId("before").disabled = open === 0;
  byId("after").disabled = open === order.length - 1;
  if (!one.open) one.showModal();
}

const step = (by) => show(Math.max(0, Math.min(order.length - 1, open + by)));
byId("before").addEventListener("click", () => step(-1));
byId("after").addEventListener("click", () => step(1));
byId("close").addEventListener("click", () => one.close());
one.addEventListener("keydown", (event) => {
  if (event.target.closest("pre") || event.altKey || event.ctrlKey || event.metaKey) return;
  if (event.key === "ArrowLeft") step(-1);
  if (event.key === "ArrowRight") step(1);
});
one.addEventListener("close", () => document.querySelector(`[data-place="${open}"]`)?.focus());

byId("copy").addEventListener("click", async () => {
  const command = byId("command");
  try {
    await navigator.clipboard.writeText(command.textContent);
    byId("copied").textContent = "copied";
  } catch {
    getSelection().selectAllChildren(command); // where a file may not write to the clipboard
    byId("copied").textContent = "selected: copy it with Ctrl+C";
  }
});

// --------------------------------------------------------------------------------------------------------- the start

const failed = CELLS.filter((cell) => !cell.picture);
byId("failed").hidden = !failed.length;
byId("reasons").append(
  ...failed.map((cell) => element("li", {}, element("b", {}, describe(cell)), `: ${cell.status}, ${cell.reason}`)),
);
const [x, y] = firstAxes();
fillSelect(across, x);
fillSelect(down, y);
byId("filters").append(...VARIED.map(filterOf));
for (const i of VARIED) if (!inTable(i)) shown[i] = new Set([0]);
byId("filters").addEventListener("change", (event) => {
  const { axis, value } = event.target.dataset;
  shown[axis][event.target.checked ? "add" : "delete"](Number(value));
  draw();
});
for (const select of [across, down]) {
  let before = [x, y];
  select.addEventListener("focus", () => (before = [Number(across.value), Number(down.value)]));
  select.addEventListener("change", () => {
    const other = select === across ? down : across;
    if (other.value === select.value) other.value = NONE;
    changeAxes(before);
    before = [Number(across.value), Number(down.value)];
  });
}
byId("turn").addEventListener("click", () => {
  [across.value, down.value] = [down.value, across.value];
  draw();
});
const side = byId("side");
side.max = 2 * SIDE;
side.value = Math.min(SIDE, 112);
const resize = () => document.documentElement.style.setProperty("--side", `${side.value}px`);
side.addEventListener("input", resize);
resize();
draw();
