// What the page was made of: plain data, written by lab/explain/page.py.

const DATA = JSON.parse(byId("data").textContent);
const SIDES = DATA.sides;
const TWO = SIDES.length === 2;
const LETTERS = ["A", "B"];

const pictureUrl = (place) => `data:image/jpeg;base64,${DATA.pictures[place]}`;

// How far along a position (run, k) is, to compare two of them: the layout's run first, then from noise to clean.
const along = ({ run, k }) => (run === "mix" ? 1e6 : 0) - k;

// The step that a side shows at a position: its own of that (run, k), or else the one it is at by then.
function stopAt(side, position) {
  const reached = side.stops.filter((stop) => along(stop) <= along(position));
  return reached.at(-1) ?? side.stops[0];
}

const isThere = (side, position) => side.stops.some((stop) => stop.run === position.run && stop.k === position.k);

const PHASES = {
  layout: "along the layout prompt",
  mixing: "mixing",
  content: "content alone",
};

function phaseName(stop) {
  if (stop.phase !== "start") return PHASES[stop.phase];
  return stop.run === "layout" ? "start: noise" : "start: the layout, noised";
}

// The options in which two sides differ, as text: "nu 0.5".
function differing(side) {
  if (!TWO) return [];
  const other = SIDES[1 - SIDES.indexOf(side)];
  const names = [...new Set([...Object.keys(side.parameters), ...Object.keys(other.parameters)])];
  const same = (name) => JSON.stringify(side.parameters[name]) === JSON.stringify(other.parameters[name]);
  return names.filter((name) => !same(name)).sort();
}

function written(value) {
  if (value == null) return "–";
  if (Array.isArray(value)) return value.join(" × ");
  if (typeof value === "object")
    return Object.entries(value)
      .map(([word, s]) => `${word} = ${plain(s)}`)
      .join(", ");
  return typeof value === "number" ? plain(value) : String(value);
}

// A line that says which of two sides this is; nothing where there is one.
function sideName(side) {
  if (!TWO) return null;
  const parts = differing(side).map((name) => `${name} ${written(side.parameters[name])}`);
  return element(
    "p",
    { class: "name" },
    element("span", { class: "badge" }, LETTERS[SIDES.indexOf(side)]),
    parts.join(", ") || "the same options",
  );
}

// A frame per side within a section, with its name, and the place for what the section shows.
function frames(section) {
  const into = byId(section);
  return SIDES.map((side) => {
    const place = element("div", {});
    into.append(element("div", { class: "side" }, sideName(side), place));
    return place;
  });
}
