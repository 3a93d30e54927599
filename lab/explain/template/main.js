// The page: what stays the same, then the first step.

function quoted(text) {
  return element("span", { class: "quote" }, `“${text}”`);
}

function recipe(side) {
  const layout = element("img", {
    src: pictureUrl(side.layoutPicture),
    alt: side.layoutPrompt == null ? "the layout's picture" : "the layout prompt's picture",
  });
  const result = element("img", { src: pictureUrl(side.result), alt: "the mix" });
  const sign = (text) => element("span", { class: "sign", "aria-hidden": "true" }, text);
  const named =
    side.layoutPrompt == null
      ? layout
      : element("figure", {}, layout, element("figcaption", {}, quoted(side.layoutPrompt)));
  return element(
    "div",
    { class: "side" },
    sideName(side),
    element("div", { class: "recipe" }, named, sign("+"), quoted(side.prompt), sign("="), result),
  );
}

function optionsTable(side) {
  const apart = differing(side);
  const rows = Object.keys(side.parameters)
    .sort()
    .map((name) =>
      element(
        "tr",
        { class: apart.includes(name) ? "differs" : null },
        element("th", { scope: "row" }, name),
        element("td", {}, written(side.parameters[name])),
      ),
    );
  return element("table", { class: "options" }, element("tbody", {}, ...rows));
}

// Ten moments of the mix, each a picture that can be chosen.
function strip(side) {
  const stops = side.stops.filter((stop) => stop.run === "mix" && stop.pictures.x0 != null);
  const count = Math.min(10, stops.length);
  const moments = Array.from(
    { length: count },
    (_, i) => stops[Math.round((i * (stops.length - 1)) / Math.max(1, count - 1))],
  );
  return element(
    "div",
    { class: "strip" },
    ...moments.map((stop) => {
      const button = element(
        "button",
        { type: "button", "data-k": stop.k },
        element("img", { src: pictureUrl(stop.pictures.x0), alt: "" }),
        element("span", {}, `k = ${stop.k}`),
      );
      button.addEventListener("click", () => step(placeOf("mix", stop.k) - at));
      return button;
    }),
  );
}

function showStrip(position) {
  for (const moments of document.querySelectorAll(".strip")) {
    const reached = [...moments.children].filter(
      (button) => position.run === "mix" && Number(button.dataset.k) >= position.k,
    );
    for (const button of moments.children) {
      if (button === reached.at(-1)) button.setAttribute("aria-current", "step");
      else button.removeAttribute("aria-current");
    }
  }
}

frames("strip").forEach((frame, i) => frame.append(strip(SIDES[i])));
byId("summary").append(...SIDES.map(recipe));
frames("options").forEach((frame, i) => frame.append(optionsTable(SIDES[i])));

whenMoved = (position) => {
  showStrip(position);
  showPictures(position);
  showSource(position);
  showEquations(position);
  showWords(position);
};
controls.addEventListener("change", () => showWords(POSITIONS[at]));
moveTo(Math.min(LAST, POSITIONS.findIndex((position) => position.run === "mix") + 1), false);
