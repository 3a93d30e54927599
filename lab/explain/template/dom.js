// Small helpers that make elements. Text always becomes a text node, so that a prompt stays text whatever it holds. An
// element that stands somewhere already is copied, so that a formula can be used twice.

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === true) made.setAttribute(name, "");
    else if (value !== false && value != null) made.setAttribute(name, value);
  }
  const given = children.flat().filter((child) => child != null && child !== false);
  made.append(...given.map((child) => (child.parentNode ? child.cloneNode(true) : child)));
  return made;
}

const byId = (id) => document.getElementById(id);

// A name with an index below: indexed("x", 17), indexed("x′", 17).
function indexed(name, index) {
  return [name, element("sub", {}, String(index))];
}

// A formula, in the colour of its role: content, layout, mixed or none.
function math(role, ...parts) {
  return element("span", { class: role ? `math c-${role}` : "math" }, ...parts);
}

// A number with three digits that count.
function digits(value) {
  if (value == null) return "–";
  if (value === 0) return "0";
  const size = Math.floor(Math.log10(Math.abs(value)));
  if (size < -3 || size > 5) return value.toExponential(1).replace("-", "−");
  return value.toFixed(Math.max(0, 2 - size)).replace("-", "−");
}

// A number as it was given, without what binary fractions add to it.
const plain = (value) => String(typeof value === "number" ? Number(value.toPrecision(7)) : value).replace("-", "−");
