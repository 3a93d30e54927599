// The decoded latents of a step, as the sum that they are: x' and the layout, which make x.

// A picture with its caption; `place` is undefined where the step has none, and `absent` says why.
function figure({ role, place, caption, small, sign, framed, absent, alt, kind = "" }) {
  const shape =
    place == null
      ? element("div", { class: "empty" }, absent)
      : element("img", { src: pictureUrl(place), alt, decoding: "sync", "data-place": place });
  const classes = [kind, framed && `framed ${role}`].filter(Boolean).join(" ");
  return element(
    "figure",
    { class: classes || null },
    sign && element("span", { class: "sign", "aria-hidden": "true" }, sign),
    shape,
    element("figcaption", {}, math(role, ...caption), small && element("small", {}, small)),
  );
}

function pictureRow(side, stop) {
  const { k, phase, pictures } = stop;
  const nu = plain(side.nu),
    rest = plain(1 - side.nu);
  const mixes = phase === "mixing",
    starts = phase === "start";
  const role = { mixing: "mixed", content: "content", layout: "layout", start: stop.run === "mix" ? "layout" : "" }[
    phase
  ];
  const content = figure({
    role: "content",
    place: phase === "layout" ? undefined : pictures.x_content,
    framed: false,
    kind: "x-content",
    caption: [mixes ? `${nu} ` : "", ...indexed("x′", k)],
    small: "one step under the prompt",
    alt: `x′ at k = ${k}: where the prompt alone would go`,
    absent: starts ? "no step yet" : "the prompt has not begun",
  });
  const layout = figure({
    role: "layout",
    place: phase === "layout" ? undefined : pictures.layout,
    sign: mixes && "+",
    kind: "layout",
    caption: [mixes ? `${rest} ` : "", ...indexed("layout", k)],
    small: "the layout, as noisy as that",
    alt: `layout at k = ${k}: the layout at the same noise level`,
    absent:
      phase === "content"
        ? "no layout is mixed in any more"
        : starts
          ? "no layout yet"
          : "it is being made: x is the layout",
  });
  const small = {
    mixing: "the blend, carried forward",
    content: "x′ itself, carried forward",
    layout: "the layout at this noise level",
    start: stop.run === "mix" ? "where denoising starts" : "noise: where the layout's run starts",
  }[phase];
  const mixed = figure({
    role,
    place: pictures.x,
    sign: mixes ? "=" : null,
    framed: Boolean(role),
    caption: indexed("x", k),
    small,
    kind: "x",
    alt: `x at k = ${k}: ${small}`,
  });
  const expected = figure({
    role: "",
    place: pictures.x0,
    kind: "expected",
    caption: indexed("x̂", 0),
    small: "the clean picture it expects",
    alt: `the predicted clean picture at k = ${k}`,
    absent: "nothing predicted yet",
  });
  const apart = figure({
    role: "",
    place: pictures.apart,
    kind: "apart",
    caption: ["|", ...indexed("x", k), " − ", ...indexed("x′", k), "|"],
    small: pictures.gain > 1 ? `what the blend changed, ${pictures.gain} × brighter` : "what the blend changed",
    alt: `the difference that the blend made at k = ${k}, black where there is none`,
    absent: "nothing was blended",
  });
  return element(
    "div",
    { class: "row" },
    content,
    layout,
    mixed,
    element("span", { class: "divider", "aria-hidden": "true" }),
    expected,
    apart,
  );
}

function guidanceRow(side, stop) {
  const { k, pictures, norms } = stop;
  if (stop.phase === "start") return element("p", { class: "note" }, "The model has not been called yet.");
  const g = plain(side.guidance);
  const prompt = stop.run === "layout" ? side.layoutPrompt : side.prompt;
  const negative = side.parameters.negative;
  return element(
    "div",
    { class: "guide" },
    figure({
      place: pictures.x0_uncond,
      kind: "uncond",
      caption: indexed("ε̂", "∅"),
      small: negative ? `under “${negative}”` : "under the empty prompt",
      alt: `the clean picture of the unconditional prediction at k = ${k}`,
      absent: "at g = 1 it is not needed",
    }),
    figure({
      place: pictures.x0_cond,
      kind: "cond",
      caption: indexed("ε̂", "c"),
      small: `under “${prompt}”`,
      alt: `the clean picture of the conditional prediction at k = ${k}`,
    }),
    figure({
      place: pictures.x0,
      kind: "guided",
      caption: ["ε̂"],
      small: `guided, g = ${g}`,
      alt: `the clean picture of the guided prediction at k = ${k}`,
    }),
    element(
      "div",
      { class: "said" },
      element(
        "p",
        {},
        math(
          "",
          "ε̂ = ",
          ...indexed("ε̂", "∅"),
          " + ",
          "g",
          " (",
          ...indexed("ε̂", "c"),
          " − ",
          ...indexed("ε̂", "∅"),
          ")",
        ),
      ),
      norms.e_apart == null
        ? null
        : element(
            "p",
            {},
            `The two differ by ${digits((100 * norms.e_apart) / norms.e_uncond)} % of the first's norm; `,
            `guidance goes ${g} times that far, to a norm of ${digits(norms.e)}.`,
          ),
    ),
  );
}

const pictureFrames = frames("pictures");
const guidanceFrames = frames("guided");

function showPictures(position) {
  SIDES.forEach((side, i) => {
    const stop = stopAt(side, position);
    const elsewhere = isThere(side, position)
      ? []
      : [element("p", { class: "elsewhere" }, `has no step k = ${position.k}; shown at k = ${stop.k}`)];
    pictureFrames[i].replaceChildren(...elsewhere, pictureRow(side, stop));
    guidanceFrames[i].replaceChildren(guidanceRow(side, stop));
  });
}
