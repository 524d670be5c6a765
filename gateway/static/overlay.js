// Draws an action on its screenshot: rings for points, an arrow for a swipe. Every mark is drawn three times, each time
// thinner (dark, light, ink), so that it is visible on any background.
import { COORDINATES } from "./actions.js";

const LAYERS = [["dark", 2.6], ["light", 1.9], ["ink", 1.1]];

function shape(name, attributes) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  return node;
}

/** The pixel of a point on a screen of width x height, rounded down as phone agents do. */
export const toPixel = ([x, y], { width, height }) => [
  Math.floor((x / COORDINATES) * width),
  Math.floor((y / COORDINATES) * height),
];

/** Replaces the content of `svg` by the marks of `action` (null: none) on a screen of `size`. */
export function draw(svg, action, size) {
  svg.replaceChildren();
  svg.setAttribute("viewBox", `0 0 ${size.width} ${size.height}`);
  if (!action) return;
  const unit = Math.max(2, Math.min(size.width, size.height) / 150); // marks scale with the screen
  if (action.element) svg.append(...rings(action.name, toPixel(action.element, size), unit));
  if (action.start) svg.append(...arrow(toPixel(action.start, size), toPixel(action.end, size), unit));
}

function rings(name, [cx, cy], unit) {
  const radii = name === "Double Tap" ? [5, 9] : [7];
  const dot = name === "Long Press" ? 4 : 1.2;
  const ripple = shape("circle", { class: "ripple", cx, cy, r: 7 * unit, "stroke-width": unit });
  const lines = LAYERS.flatMap(([layer, width]) =>
    radii.map((r) => shape("circle", { class: layer, cx, cy, r: r * unit, "stroke-width": width * unit })),
  );
  const dots = LAYERS.map(([layer, width]) =>
    shape("circle", { class: `${layer} solid`, cx, cy, r: (dot + (width - 1) / 2) * unit }),
  );
  return [ripple, ...lines, ...dots];
}

function arrow([x1, y1], [x2, y2], unit) {
  const angle = Math.atan2(y2 - y1, x2 - x1);
  const barb = (turn) => [x2 - 8 * unit * Math.cos(angle + turn), y2 - 8 * unit * Math.sin(angle + turn)];
  const d = `M${x1} ${y1}L${x2} ${y2}M${barb(-0.55)}L${x2} ${y2}L${barb(0.55)}`;
  const lines = LAYERS.map(([layer, width]) => shape("path", { class: layer, d, "stroke-width": width * unit }));
  const starts = LAYERS.map(([layer, width]) =>
    shape("circle", { class: `${layer} solid`, cx: x1, cy: y1, r: (2 + (width - 1) / 2) * unit }),
  );
  return [...lines, ...starts];
}
