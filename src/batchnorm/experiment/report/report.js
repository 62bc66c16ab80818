"use strict";
// Draws the figures of the page from the JSON beside it, and draws them again when paper or width change.
(function () {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const root = document.documentElement;
  const touch = window.matchMedia("(pointer: coarse)");
  const config = {
    displaylogo: false,
    displayModeBar: window.matchMedia("(hover: hover)").matches ? "hover" : false,
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
    plotlyServerURL: "",
    showSendToCloud: false,
  };

  // A color written as the name of a CSS variable follows the paper: light, dark or print.
  function inked(value, key, css) {
    if (Array.isArray(value)) return value.map((item) => inked(item, key, css));
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, inked(v, k, css)]));
    }
    const named = typeof value === "string" && /color$/.test(key) && value.startsWith("--");
    return named ? css.getPropertyValue(value).trim() : value;
  }

  function draw(box) {
    const css = getComputedStyle(root);
    const figure = inked(figures[box.dataset.figure], "", css);
    const narrow = box.clientWidth < 520;
    const layout = figure.layout;
    layout.font.family = css.fontFamily;
    layout.width = box.clientWidth;
    layout.height = box.clientHeight;
    // A finger that scrolls the page must not be caught by a figure.
    layout.dragmode = touch.matches ? false : "zoom";
    if (narrow) {
      layout.font.size = 12;
      for (const trace of figure.data) if (trace.type === "heatmap") trace.textfont.size = 10;
    }
    return Plotly.react(box, figure.data, layout, config);
  }

  const boxes = Array.from(document.querySelectorAll("[data-figure]"));
  const drawAll = () => boxes.forEach(draw);
  drawAll();

  // Only a new width needs a new figure; a phone changes its height whenever the address bar slides away.
  const watcher = new ResizeObserver((entries) => {
    for (const { target } of entries) if (target.clientWidth !== target.layout.width) draw(target);
  });
  boxes.forEach((box) => watcher.observe(box));
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  window.addEventListener("beforeprint", () => {
    root.classList.add("printing");
    drawAll();
  });
  window.addEventListener("afterprint", () => {
    root.classList.remove("printing");
    drawAll();
  });
})();
