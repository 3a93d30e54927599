// The slider, the bar of phases, the buttons and the keys.

const POSITIONS = DATA.positions;
const LAST = POSITIONS.length - 1;
const slider = byId("slider"),
  play = byId("play");
const WAIT = 350; // milliseconds per step while playing
let at = 0,
  timer = null,
  whenMoved = () => {};

const fraction = (i) => (LAST ? i / LAST : 0);
const placeOf = (run, k) => POSITIONS.findIndex((position) => position.run === run && position.k === k);

// The phases of a side as stretches of the slider: where each ends, and what it is.
function phasesOf(side) {
  const found = [];
  for (const stop of side.stops) {
    const end = placeOf(stop.run, stop.k);
    if (stop.phase === "start") {
      if (end > 0) found.push({ phase: found.length ? found.at(-1).phase : "none", end });
    } else if (found.length && found.at(-1).phase === stop.phase) found.at(-1).end = end;
    else found.push({ phase: stop.phase, end });
  }
  return found;
}

const SEGMENTS = { layout: "layout prompt’s own run", mixing: "mixing", content: "content", none: "" };

function track(side) {
  let begin = 0;
  const segments = phasesOf(side).map(({ phase, end }) => {
    const width = 100 * (fraction(end) - fraction(begin));
    begin = end;
    const segment = element("div", { class: `segment ${phase}` }, width > 12 ? SEGMENTS[phase] : "");
    segment.style.width = `${width}%`;
    return segment;
  });
  return element("div", { class: "track", "aria-hidden": "true" }, ...segments);
}

function mark(i, label, spoken, row) {
  const button = element("button", { type: "button", class: row ? "second" : null, "aria-label": spoken }, ...label);
  button.style.left = `${100 * fraction(i)}%`;
  button.style.transform = `translateX(${-100 * fraction(i)}%)`;
  button.addEventListener("click", () => moveTo(i));
  return button;
}

function marksOf(side, row) {
  const who = RULERS.length === 2 ? `${LETTERS[row]}: ` : "";
  const first = side.stops[0];
  const found = [];
  if (first.run === "layout")
    found.push(mark(placeOf("layout", first.k), [`${who}T = ${side.T}`], `${who}go to T = ${side.T}, noise`, row));
  const names =
    side.Kmax === side.Kmin
      ? [["Kmax", "max"]]
      : [
          ["Kmax", "max"],
          ["Kmin", "min"],
        ];
  for (const [key, below] of names) {
    const i = placeOf("mix", side[key]);
    if (i < 0) continue;
    const label = [
      who,
      element("var", {}, "K"),
      element("sub", {}, below),
      ` = ${side[key]}${key === "Kmax" ? ` of T = ${side.T}` : ""}`,
    ];
    found.push(mark(i, label, `${who}go to K ${below} = ${side[key]}`, row));
  }
  return found;
}

// Two sides with the same marks share one row of them.
const ruler = (side) => [side.T, side.Kmax, side.Kmin, side.stops[0].run].join();
const RULERS = SIDES.filter((side) => !TWO || side === SIDES[0] || ruler(side) !== ruler(SIDES[0]));

if (TWO) document.body.classList.add("two");
if (RULERS.length === 2) document.body.classList.add("two-rulers");
slider.max = LAST;
byId("bar").append(...SIDES.map(track));
byId("marks").append(...RULERS.flatMap(marksOf));

function describe(position) {
  const names = SIDES.map((side) => phaseName(stopAt(side, position)));
  return {
    k: `k = ${position.k}`,
    phase: names.every((name) => name === names[0])
      ? names[0]
      : names.map((name, i) => `${LETTERS[i]}: ${name}`).join("; "),
  };
}

function moveTo(i, spoken = true) {
  at = Math.max(0, Math.min(LAST, i));
  const position = POSITIONS[at],
    { k, phase } = describe(position);
  slider.value = at;
  slider.setAttribute("aria-valuetext", `${k}, ${phase}`);
  byId("readout").replaceChildren(element("b", {}, k), phase);
  byId("previous").disabled = at === 0;
  byId("next").disabled = at === LAST;
  if (spoken) byId("live").textContent = `${k}, ${phase}`;
  whenMoved(position);
}

function stopPlaying() {
  clearInterval(timer);
  timer = null;
  play.setAttribute("aria-pressed", "false");
  play.setAttribute("aria-label", "Play");
}

function startPlaying() {
  if (at === LAST) moveTo(0, false);
  play.setAttribute("aria-pressed", "true");
  play.setAttribute("aria-label", "Pause");
  timer = setInterval(() => {
    moveTo(at + 1, false); // not spoken: steps come faster than speech
    if (at === LAST) stopPlaying();
  }, WAIT);
}

function step(by) {
  stopPlaying();
  moveTo(at + by);
}

slider.addEventListener("input", () => {
  stopPlaying();
  moveTo(Number(slider.value), false); // a slider speaks for itself
});
byId("previous").addEventListener("click", () => step(-1));
byId("next").addEventListener("click", () => step(1));
play.addEventListener("click", () => (timer ? stopPlaying() : startPlaying()));

const KEYS = { ArrowLeft: () => step(-1), ArrowRight: () => step(1), Home: () => step(-LAST), End: () => step(LAST) };
document.addEventListener("keydown", (event) => {
  if (event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
  const within = event.target.closest("input, select, textarea, .listing");
  if (within && !(event.key === " " && within === slider)) return; // they have uses of their own for these keys
  if (event.key === " " && !event.target.closest("button")) {
    event.preventDefault();
    play.click();
  } else if (KEYS[event.key]) {
    event.preventDefault();
    KEYS[event.key]();
  }
});
