// Draws the histograms of the layer that is chosen, from the data in the page.
(function () {
  const samples = JSON.parse(document.getElementById("samples").textContent);
  const choice = document.getElementById("layer");
  const place = document.getElementById("histograms");
  const space = "http://www.w3.org/2000/svg";

  function element(name, attributes, text) {
    const made = document.createElementNS(space, name);
    for (const key in attributes) made.setAttribute(key, attributes[key]);
    if (text !== undefined) made.textContent = text;
    return made;
  }

  function draw(title, found) {
    const figure = document.createElement("figure");
    const caption = document.createElement("figcaption");
    caption.textContent = title;
    figure.appendChild(caption);
    const width = 300, height = 120, most = Math.max(...found.counts);
    const svg = element("svg", { width: width, height: height + 16, role: "img", "aria-label": title });
    const step = width / found.counts.length;
    found.counts.forEach(function (count, index) {
      const tall = (count / most) * height;
      svg.appendChild(element("rect", { x: index * step, y: height - tall, width: Math.max(step - 1, 1), height: tall }));
    });
    svg.appendChild(element("line", { x1: 0, x2: width, y1: height, y2: height }));
    svg.appendChild(element("text", { x: 0, y: height + 12 }, Number(found.low.toPrecision(3))));
    svg.appendChild(element("text", { x: width, y: height + 12, "text-anchor": "end" }, Number(found.high.toPrecision(3))));
    figure.appendChild(svg);
    return figure;
  }

  function show() {
    const sample = samples[choice.value];
    place.replaceChildren(draw("weights of the source", sample.weights), draw("errors (output − source)", sample.errors));
    if (sample.scales) place.appendChild(draw("scales", sample.scales));
  }

  choice.addEventListener("change", show);
  // A cell of the heat map and a row of the table say which layer they are.
  document.addEventListener("click", function (event) {
    const about = event.target.closest("[data-layer]");
    const option = about && Array.from(choice.options).find((option) => option.textContent === about.dataset.layer);
    if (!option) return;
    choice.value = option.value;
    show();
    choice.scrollIntoView({ block: "nearest" });
    place.scrollIntoView({ block: "nearest" });
  });
  show();
})();
