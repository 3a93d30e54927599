// The lines of the loop, as they stand in the file, and which of them ran.

function listing({ name, file, lines }) {
  const rows = lines.map(({ number, pieces }) =>
    element(
      "li",
      { "data-line": number },
      element("span", { class: "number", "aria-hidden": "true" }, String(number)),
      ...pieces.map(([role, text]) => (role ? element("span", { class: role }, text) : text)),
    ),
  );
  return element(
    "div",
    { class: "listing", tabindex: 0, role: "region", "aria-label": `${name} in ${file}` },
    element("ol", {}, ...rows),
  );
}

// The layout's own run has a loop of its own.
const LOOPS = { mix: "mix", layout: "trajectory" };
const listings = {};
for (const run of ["layout", "mix"]) {
  if (!SIDES.some((side) => side.stops.some((stop) => stop.run === run))) continue;
  listings[run] = listing(DATA.source[LOOPS[run]]);
  byId("source").append(listings[run]);
}

function showSource(position) {
  const stops = SIDES.map((side) => stopAt(side, position));
  for (const [run, list] of Object.entries(listings)) {
    const here = stops.filter((stop) => stop.run === run);
    const phases = here.map((stop) => DATA.source[LOOPS[run]].phases[stop.phase]);
    list.className = `listing phase-${here[0]?.phase ?? "none"}`;
    for (const row of list.querySelectorAll("li")) {
      const line = Number(row.dataset.line);
      const marked = phases.some((phase) => phase.marked === line);
      row.className = [phases.some((phase) => phase.ran.includes(line)) && "ran", marked && "marked"]
        .filter(Boolean)
        .join(" ");
      if (marked) row.setAttribute("aria-current", "step");
      else row.removeAttribute("aria-current");
    }
  }
}
