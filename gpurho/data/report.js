"use strict";
(() => {
  const data = JSON.parse(document.getElementById("report-data").textContent);
  const SVG = "http://www.w3.org/2000/svg";

  // Values of a panel's picture: its colours, looked up in the scale that the page draws it with.
  function reader(panel) {
    const image = panel.querySelector("image.strip");
    const picture = new Image();
    const state = { pixels: null, width: 0 };
    picture.addEventListener("load", () => {
      const canvas = document.createElement("canvas");
      canvas.width = state.width = picture.naturalWidth;
      canvas.height = picture.naturalHeight;
      const context = canvas.getContext("2d", { willReadFrequently: true });
      context.drawImage(picture, 0, 0);
      state.pixels = context.getImageData(0, 0, canvas.width, canvas.height).data;
    });
    picture.src = image.href.baseVal;
    const colors = new Map(data.palettes[panel.dataset.name].map((color, i) => [color, i]));
    const low = Number(panel.dataset.low);
    const high = Number(panel.dataset.high);
    const log = panel.dataset.log === "1";
    const digits = Math.max(0, Math.ceil(-Math.log10((high - low) / colors.size)));
    return (frame, column, row) => {
      if (!state.pixels) return null;
      const at = 4 * ((frame * Number(panel.dataset.rows) + row) * state.width + column);
      if (state.pixels[at + 3] === 0) return null;
      const color = (state.pixels[at] << 16) | (state.pixels[at + 1] << 8) | state.pixels[at + 2];
      const level = colors.get(color);
      if (level === undefined) return null;
      const top = level === colors.size - 1 && panel.dataset.clipped === "1";
      const part = level / (colors.size - 1);
      const value = log ? (low * (high / low) ** part).toPrecision(2) : (low + (high - low) * part).toFixed(digits);
      return (top ? "> " : "") + value;
    };
  }

  function circle(values, radius) {
    const [x, y, kind, atom] = values;
    const element = document.createElementNS(SVG, "circle");
    element.setAttribute("class", "kind" + (kind % 4));
    element.setAttribute("cx", x);
    element.setAttribute("cy", y);
    element.setAttribute("r", radius);
    const title = document.createElementNS(SVG, "title");
    title.textContent = data.symbols[kind] + " " + atom;
    element.append(title);
    return element;
  }

  for (const view of data.views) {
    const box = document.getElementById(view.id);
    const panels = [...box.querySelectorAll("svg.panel")];
    const slider = box.querySelector("input");
    const output = box.querySelector("output");
    const probe = box.querySelector(".probe");
    const readers = panels.map(reader);
    let frame = Number(slider.value);

    const show = () => {
      frame = Number(slider.value);
      output.textContent = view.texts[frame];
      slider.setAttribute("aria-valuetext", view.texts[frame]);
      probe.textContent = "";
      for (const panel of panels) {
        panel.querySelector("image.strip").setAttribute("y", String(-frame * Number(panel.dataset.rows)));
        panel.setAttribute("aria-label", panel.dataset.alt + view.texts[frame]);
        if (view.atoms) {
          const group = panel.querySelector("g.atoms");
          group.replaceChildren(...view.atoms[frame].map((values) => circle(values, view.radius)));
        }
      }
    };
    slider.addEventListener("input", show);
    slider.disabled = false;
    show();

    const look = (event) => {
      const panel = event.currentTarget;
      const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(panel.getScreenCTM().inverse());
      const [a, b, c, d, e, f] = view.matrix;
      const pixel = point.matrixTransform(new DOMMatrix([a, b, c, d, e, f]).inverse());
      const column = Math.floor(pixel.x);
      const row = Math.floor(pixel.y);
      const [columns, rows] = view.pixels;
      if (column < 1 || row < 1 || column > columns || row > rows) {
        probe.textContent = "";
        return;
      }
      const found = readers.map((read) => read(frame, column, row));
      if (found[0] === null) return;
      const x = ((point.x - view.corner[0]) / view.factor).toFixed(1);
      const y = ((view.corner[1] - point.y) / view.factor).toFixed(1);
      probe.textContent =
        `${found[0]}${found.length > 1 && found[1] !== null ? " ± " + found[1] : ""} ${data.unit}` +
        ` at (${x}, ${y}) Å`.replaceAll("-", "−");
    };
    for (const panel of panels) {
      panel.addEventListener("pointermove", look);
      panel.addEventListener("pointerdown", look);
      panel.addEventListener("pointerleave", () => { probe.textContent = ""; });
    }
  }
})();
