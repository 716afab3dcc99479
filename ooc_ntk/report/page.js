// Draws the figures in the colours of the light or the dark, and again when the reader's preference changes.
(() => {
  "use strict";
  const data = JSON.parse(document.getElementById("figures").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const views = [];
  let round = 0;

  // Colours are whole strings of the figures' properties and columns; each is put in the place of the light one.
  const coloured = (value) => {
    if (typeof value === "string") return value.length === 7 ? data.dark[value] ?? value : value;
    if (Array.isArray(value)) return value.map(coloured);
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([key, each]) => [key, coloured(each)]));
  };

  const draw = async () => {
    const mine = ++round;
    const root = document.documentElement;
    root.dataset.drawn = "";
    for (const view of views.splice(0)) view.remove();
    for (const item of data.items) {
      const place = document.getElementById(item.target_id);
      place.replaceChildren();
      const found = await Bokeh.embed.embed_item(dark.matches ? coloured(item) : structuredClone(item));
      if (mine !== round) return;
      views.push(...(found.roots ?? [found]));
    }
    root.dataset.drawn = dark.matches ? "dark" : "light";
  };

  dark.addEventListener("change", draw);
  draw();
})();
