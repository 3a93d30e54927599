// Word maps: what each place of the picture takes from a word, drawn over the picture.

const CHOICES = {
  half: [
    ["cond", "conditional"],
    ["weighted", "conditional, times s"],
    ["uncond", "unconditional"],
  ],
  steps: [
    ["this", "this step"],
    ["all", "average of all steps"],
  ],
};

// The cells of all maps of a half as bytes, decoded once.
const unpacked = new Map();
function cellsOf(maps) {
  if (!unpacked.has(maps))
    unpacked.set(
      maps,
      Uint8Array.from(atob(maps.cells), (c) => c.charCodeAt(0)),
    );
  return unpacked.get(maps);
}

// One map: its height, width and numbers, and its lowest and highest. `row` counts the steps that are kept, the average
// last.
function mapOf(maps, row, size, group) {
  const groups = maps.groups.length;
  const perRow = maps.sizes.reduce((sum, [height, width]) => sum + height * width * groups, 0);
  let start = row * perRow;
  for (let i = 0; i < size; i += 1) start += maps.sizes[i][0] * maps.sizes[i][1] * groups;
  const [height, width] = maps.sizes[size];
  const peak = maps.peaks[(row * maps.sizes.length + size) * groups + group];
  const cells = cellsOf(maps).subarray(start + group * height * width, start + (group + 1) * height * width);
  const values = Float32Array.from(cells, (c) => (c / 255) * peak);
  return { height, width, values, low: Math.min(...values), high: peak };
}

// From cool to nothing to warm, for -1 .. 1; the strength is how much of it covers the picture.
function heat(value) {
  const v = Math.min(1, Math.abs(value));
  const colour = value >= 0 ? [255, 205 - 150 * v, 60 - 40 * v] : [90 - 60 * v, 200 - 110 * v, 255];
  return [...colour, 0.9 * v];
}

// The map over the picture in grey, both drawn large: its lowest value covers nothing, its highest the most.
function paint(canvas, map, sign, picture) {
  const [width, height] = [canvas.width, canvas.height];
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const small = new ImageData(map.width, map.height);
  map.values.forEach((value, i) => {
    const [r, g, b, a] = heat(map.high > map.low ? (sign * (value - map.low)) / (map.high - map.low) : 0);
    small.data.set([r, g, b, 255 * a], 4 * i);
  });
  const layer = new OffscreenCanvas(map.width, map.height);
  layer.getContext("2d").putImageData(small, 0, 0);
  context.globalCompositeOperation = "source-over";
  context.filter = "grayscale(1) brightness(0.7) contrast(0.8)";
  context.drawImage(picture, 0, 0, width, height);
  context.filter = "none";
  context.imageSmoothingEnabled = true;
  context.imageSmoothingQuality = "high";
  context.drawImage(layer, 0, 0, width, height);
}

// Pictures that canvases are drawn from, each decoded once.
const bitmaps = new Map();
async function bitmap(place) {
  if (!bitmaps.has(place)) {
    const image = new Image();
    image.src = pictureUrl(place);
    bitmaps.set(
      place,
      image.decode().then(() => image),
    );
  }
  return bitmaps.get(place);
}

function choice(name, legend, options, chosen) {
  const radios = options.map(([value, text]) =>
    element(
      "label",
      {},
      element("input", { type: "radio", name, value, checked: value === chosen }),
      element("span", {}, text),
    ),
  );
  return element("fieldset", {}, element("legend", {}, legend), element("div", { class: "choices" }, ...radios));
}

const sizesOf = (side) =>
  Object.values(side.maps)
    .flatMap((run) => Object.values(run.halves))
    .flatMap((half) => half.sizes.map((size) => size[2]));
const sizeNames = [...new Set(SIDES.flatMap(sizesOf))];
const sizeText = (name) => (name === "all" ? "together" : name.replace("x", " × "));
const controls = byId("controls");
controls.append(
  choice("half", "Half of the guidance", CHOICES.half, "cond"),
  choice("steps", "Steps", CHOICES.steps, "this"),
  choice(
    "size",
    "Layers",
    sizeNames.map((name) => [name, sizeText(name)]),
    "all",
  ),
);
const chosenOf = (name) => controls.elements[name].value;

function wordCaption(group, map, s, half) {
  const lines = [`${digits(s * map.low)} to ${digits(s * map.high)}`];
  if (half === "weighted") lines.unshift(`s = ${plain(group.s)}`);
  if (group.kind === "place") lines.unshift(`here: ${group.there}`);
  return element(
    "figcaption",
    {},
    element("span", { class: "label" }, group.word),
    ...lines.map((line) => element("small", {}, line)),
  );
}

const mapFrames = frames("maps");
let drawing = 0; // so that a step that is left before its pictures are decoded draws nothing

async function showWords(position) {
  const half = chosenOf("half"),
    ofAll = chosenOf("steps") === "all";
  const mine = (drawing += 1);
  const rows = await Promise.all(
    SIDES.map(async (side) => {
      const stop = stopAt(side, position);
      const run = side.maps[stop.run],
        maps = run?.halves[half === "weighted" ? "cond" : half];
      if (!maps)
        return element(
          "p",
          { class: "note" },
          run ? "This half was not computed: guidance 1 does not need it." : "This trace has no maps here.",
        );
      if (stop.phase === "start" && !ofAll)
        return element("p", { class: "note" }, "The model has not been called yet, so nothing was attended to.");
      const row = ofAll ? run.steps.length : run.steps.indexOf(stop.k);
      const size = Math.max(
        0,
        maps.sizes.findIndex(([, , name]) => name === chosenOf("size")),
      );
      const picture = await bitmap(
        ofAll ? (stop.run === "layout" ? side.layoutPicture : side.result) : stop.pictures.x0,
      );
      const figures = maps.groups.map((group, i) => {
        if (!group.tokens.length) return null;
        const map = mapOf(maps, row, size, i),
          s = half === "weighted" ? group.s : 1;
        const canvas = element("canvas", {
          width: picture.naturalWidth,
          height: picture.naturalHeight,
          role: "img",
          "aria-label": `where the picture attends to ${group.word}`,
          "data-word": group.word,
          "data-kind": group.kind,
        });
        paint(canvas, map, Math.sign(s), picture);
        return element(
          "figure",
          { class: group.kind === "word" ? null : "other" },
          canvas,
          wordCaption(group, map, s, half),
        );
      });
      return element("div", { class: "words" }, ...figures);
    }),
  );
  if (mine === drawing) mapFrames.forEach((frame, i) => frame.replaceChildren(rows[i]));
}
