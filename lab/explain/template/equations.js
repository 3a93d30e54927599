// One step as equations, with this step's numbers put in. The samplers are those of scheduler.py.

// One line: what it is called, the formula, the same with numbers, and the norm of the result.
function equation(name, formula, putIn, norm, marked = false) {
  return element(
    "li",
    { class: marked ? "marked" : null },
    element("span", { class: "step-name" }, name),
    element("span", { class: "math" }, ...formula),
    putIn && element("span", { class: "math put-in" }, ...putIn),
    norm && element("span", { class: "norm" }, ...norm),
  );
}

const normOf = (name, value) => ["‖", math("", ...name), "‖ ", element("b", {}, digits(value))];
const abar = (k) => indexed("ᾱ", k);
const root = (value) => digits(Math.sqrt(value));

function predictionLines(side, stop) {
  const before = stop.k + 1,
    a = stop.abarBefore,
    n = stop.norms;
  const x = indexed("x", before);
  const lines = [];
  const e = side.prediction === "epsilon" ? "ε̂" : "v̂";
  if (n.e_uncond == null) {
    lines.push(equation(`the model at t = ${stop.t}`, [e, " = ", ...indexed(e, "c")], null, normOf([e], n.e)));
  } else {
    const g = plain(side.guidance);
    lines.push(
      equation(
        `the model at t = ${stop.t}, with guidance`,
        [e, " = ", ...indexed(e, "∅"), " + g (", ...indexed(e, "c"), " − ", ...indexed(e, "∅"), ")"],
        ["norms: ", digits(n.e_uncond), " and ", g, " × ", digits(n.e_apart)],
        normOf([e], n.e),
      ),
    );
  }
  const clean = indexed("x̂", 0);
  if (side.prediction === "epsilon") {
    lines.push(
      equation(
        "the clean latent that this implies",
        [...clean, " = (", ...x, " − √(1 − ", ...abar(before), ") ε̂) / √", ...abar(before)],
        ["= (", ...x, " − ", root(1 - a), " ε̂) / ", root(a)],
        normOf(clean, n.x0),
      ),
    );
  } else {
    lines.push(
      equation(
        "the clean latent that this implies",
        [...clean, " = √", ...abar(before), " ", ...x, " − √(1 − ", ...abar(before), ") v̂"],
        ["= ", root(a), " ", ...x, " − ", root(1 - a), " v̂"],
        normOf(clean, n.x0),
      ),
    );
  }
  const made =
    stop.run === "layout" ? math("layout", ...indexed("x", stop.k)) : math("content", ...indexed("x′", stop.k));
  const size = normOf(stop.run === "layout" ? indexed("x", stop.k) : indexed("x′", stop.k), n.x_content);
  const isLayout = stop.run === "layout";
  if (side.sampler === "ddim" && side.eta === 0) {
    const hat = side.prediction === "epsilon" ? "ε̂" : "ε̂(v̂)";
    lines.push(
      equation(
        "one DDIM step",
        [made, " = √", ...abar(stop.k), " ", ...clean, " + √(1 − ", ...abar(stop.k), ") ", hat],
        ["= ", root(stop.abar), " ", ...clean, " + ", root(1 - stop.abar), " ", hat],
        size,
        isLayout,
      ),
    );
  } else {
    const name =
      side.sampler === "ddpm"
        ? "one DDPM step, which adds fresh noise"
        : `one DDIM step with η = ${plain(side.eta)}, which adds fresh noise`;
    lines.push(equation(name, [made, " = step(", ...x, ", ", ...clean, ", ", e, ", noise)"], null, size, isLayout));
  }
  return lines;
}

function layoutLine(side, k, signal, norm, marked) {
  const name = math("layout", ...indexed("layout", k));
  if (side.layoutPrompt != null) {
    return equation(
      "the layout at the same noise level",
      [name, " = the layout prompt's own ", ...indexed("x", k)],
      null,
      normOf(indexed("layout", k), norm),
      marked,
    );
  }
  if (k === 0) {
    return equation(
      "the layout at the same noise level",
      [name, " = ", ...indexed("x", 0), " of the layout's picture"],
      null,
      normOf(indexed("layout", k), norm),
      marked,
    );
  }
  return equation(
    "the layout at the same noise level",
    [name, " = √", ...abar(k), " ", ...indexed("x", 0), " + √(1 − ", ...abar(k), ") ε"],
    ["= ", root(signal), " ", ...indexed("x", 0), " + ", root(1 - signal), " ε"],
    normOf(indexed("layout", k), norm),
    marked,
  );
}

function equations(side, stop) {
  const { k, phase, norms } = stop;
  const x = math(phase === "content" ? "content" : "mixed", ...indexed("x", k));
  const content = math("content", ...indexed("x′", k)),
    layout = math("layout", ...indexed("layout", k));
  let lines;
  if (phase === "start" && stop.run === "layout") {
    lines = [
      equation(
        "the layout's run begins with the noise",
        [math("layout", ...indexed("x", k)), " = ε"],
        null,
        normOf(indexed("x", k), norms.x),
        true,
      ),
    ];
  } else if (phase === "start") {
    lines = [
      layoutLine(side, k, stop.abar, norms.x, false),
      equation(
        "the mix begins with it",
        [math("mixed", ...indexed("x", k)), " = ", layout],
        null,
        normOf(indexed("x", k), norms.x),
        true,
      ),
    ];
  } else if (phase === "layout") {
    lines = predictionLines(side, stop);
  } else if (phase === "mixing") {
    lines = [
      ...predictionLines(side, stop),
      layoutLine(side, k, stop.abar, norms.layout, false),
      equation(
        "the mixture",
        [x, " = ν ", content, " + (1 − ν) ", layout],
        ["= ", plain(side.nu), " ", content, " + ", plain(1 - side.nu), " ", layout],
        normOf(indexed("x", k), norms.x),
        true,
      ),
    ];
  } else {
    lines = [
      ...predictionLines(side, stop),
      equation(
        "mixing has ended: the content is alone",
        [x, " = ", content],
        null,
        normOf(indexed("x", k), norms.x),
        true,
      ),
    ];
  }
  return element("ol", { class: `equations phase-${phase}` }, ...lines);
}

const equationFrames = frames("equations");

function showEquations(position) {
  SIDES.forEach((side, i) => equationFrames[i].replaceChildren(equations(side, stopAt(side, position))));
}
