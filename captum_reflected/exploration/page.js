"use strict";
(async () => {
  const find = (id) => document.getElementById(id);
  const all = (selector) => [...document.querySelectorAll(selector)];

  // -- what the file holds ---------------------------------------------------------------

  const data = JSON.parse(find("data").textContent);
  const [rows, columns] = data.grid;
  const tokens = rows * columns;

  // zlib in base64. The bytes are little-endian, as those of every machine with a browser are.
  const unpack = async (text, Type) => {
    const packed = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Type(await new Response(stream).arrayBuffer());
  };

  // The square-root scale of relevance between patches.
  const SQUARES = Float32Array.from({ length: 256 }, (_, level) => (level / 255) ** 2);

  const unpackFlow = async (flow) => {
    if (flow === null) return null;
    const [levels, low, high, own] = await Promise.all([
      unpack(flow.levels, Uint8Array),
      unpack(flow.low, Float32Array),
      unpack(flow.high, Float32Array),
      unpack(flow.own, Float32Array),
    ]);
    const across = Math.ceil(columns / flow.block);
    const receivers = across * Math.ceil(rows / flow.block);
    const least = Math.min(...high);
    const span = Math.max(...high) - least;
    // The receiving block of a patch.
    const block = (token) =>
      Math.floor(Math.floor(token / columns) / flow.block) * across +
      Math.floor((token % columns) / flow.block);
    const red = (from, into) => SQUARES[levels[from * receivers + block(into)]];
    return {
      own,
      // How much one patch flows into another one.
      value: (from, into) => low[from] + (high[from] - low[from]) * red(from, into),
      // How far a patch is shown in the reflected image of another one (Figure 4: red times green).
      mask: (from, into) => (span > 0 ? (red(from, into) * (high[from] - least)) / span : 0),
    };
  };

  const unpackMap = async (map) => {
    const levels = await unpack(map.levels, Uint8Array);
    return Float32Array.from(levels, (level) => map.low + ((map.high - map.low) * level) / 255);
  };

  const unpackClass = async (one) => ({
    ...one,
    scores: await unpack(one.scores, Float32Array),
    flow: await unpackFlow(one.flow),
    outputRows: await Promise.all(one.outputRows.map(unpackMap)),
    maps: await Promise.all(one.maps.map(unpackMap)),
    orders: await Promise.all(one.orders.map((order) => unpack(order, Uint16Array))),
  });

  const loadPicture = async (address) => {
    const picture = new Image();
    picture.src = address;
    await picture.decode();
    return picture;
  };

  const [photo, blurred, colors, classes, layers] = await Promise.all([
    loadPicture(data.photo),
    loadPicture(data.blurred),
    unpack(JSON.parse(find("colors").textContent), Uint8Array),
    Promise.all(data.classes.map(unpackClass)),
    data.layers && Promise.all(data.layers.map(unpackFlow)),
  ]);
  const lastLayer = classes[0].outputRows.length - 1;
  const ground = `rgb(${data.ground.join(" ")})`;

  // -- what is chosen --------------------------------------------------------------------

  const state = {
    class: 0,
    method: 0,
    view: "map",
    // Until a view is chosen: the map, and while a patch is pointed at, what it flows into.
    browsing: true,
    layer: lastLayer,
    curve: "deletion",
    step: Math.round((data.counts.length - 1) / 4),
    patch: classes[0].orders[0][0],
    held: false,
  };
  // What the row of layers shows: what the photo does, or else the last view that has layers.
  let lastFlow = "into";

  const FLOWS = ["into", "from", "output"];
  // Relevance between patches after a layer, or null where the page does not hold it.
  const flowAfter = (layer) => {
    if (layer === lastLayer) return classes[state.class].flow;
    return state.class === 0 && layers ? layers[layer] : null;
  };

  // Only what has reached the output is there after each layer for every class.
  const layerView = () => (lastLayer > 0 && flowAfter(0) === null ? "output" : lastFlow);

  // The values of a view for the pointed patch, one for each patch; null where there are none.
  const valuesOf = (view, layer) => {
    const one = classes[state.class];
    if (view === "map") return one.maps[state.method];
    if (view === "output") return one.outputRows[layer];
    const flow = flowAfter(layer);
    if (flow === null) return null;
    return Float32Array.from({ length: tokens }, (_, other) => {
      if (other === state.patch) return 0; // what a patch keeps would outshine the rest
      return view === "into" ? flow.value(state.patch, other) : flow.value(other, state.patch);
    });
  };

  const largest = (values) => values.reduce((most, value) => Math.max(most, value), 0);
  const smallest = (values) => values.reduce((least, value) => Math.min(least, value), Infinity);

  // Brightness from 0 to 1, and the values at both ends.
  const brightness = (view, values, top = largest(values)) => {
    const low = view === "map" ? Math.max(smallest(values), 0) : 0;
    const span = top - low;
    const light = values.map((value) => {
      const share = span > 0 ? Math.min(Math.max((value - low) / span, 0), 1) : 0;
      return view === "map" ? share : Math.sqrt(share);
    });
    return { light, low, top, isCut: smallest(values) < low };
  };

  // -- pictures --------------------------------------------------------------------------

  // One pixel for each patch, from a function that gives its red, green, blue and alpha.
  const gridPicture = (pixel) => {
    const canvas = new OffscreenCanvas(columns, rows);
    const context = canvas.getContext("2d");
    const image = context.createImageData(columns, rows);
    for (let token = 0; token < tokens; token++) image.data.set(pixel(token), 4 * token);
    context.putImageData(image, 0, 0);
    return canvas;
  };

  const fit = (canvas) => {
    const width = Math.max(1, Math.round(canvas.clientWidth * devicePixelRatio));
    const height = Math.max(1, Math.round((width * photo.naturalHeight) / photo.naturalWidth));
    if (canvas.width !== width || canvas.height !== height) {
      canvas.width = width;
      canvas.height = height;
    }
    return canvas.getContext("2d");
  };

  const enlarge = (context, picture, smooth) => {
    context.imageSmoothingEnabled = smooth;
    context.drawImage(picture, 0, 0, context.canvas.width, context.canvas.height);
  };

  const heatColor = (light) => {
    const place = 3 * Math.round(255 * light);
    return colors.subarray(place, place + 3);
  };

  // The photo in grey, lit where the values are high.
  const paintLight = (context, light) => {
    const { width, height } = context.canvas;
    enlarge(context, photo, true);
    context.globalCompositeOperation = "saturation";
    context.fillStyle = "#808080";
    context.fillRect(0, 0, width, height);
    context.globalCompositeOperation = "source-over";
    context.fillStyle = "rgb(0 0 0 / .6)";
    context.fillRect(0, 0, width, height);
    context.globalCompositeOperation = "screen"; // adds light, so that the photo stays visible
    enlarge(context, gridPicture((token) => [...heatColor(light[token]), 235]), false);
    context.globalCompositeOperation = "source-over";
  };

  // The photo as far as the mask shows it, over a colour or another picture.
  const paintMasked = (context, mask, under) => {
    const { width, height } = context.canvas;
    const shown = new OffscreenCanvas(width, height).getContext("2d");
    enlarge(shown, gridPicture((token) => [0, 0, 0, Math.round(255 * mask(token))]), false);
    shown.globalCompositeOperation = "source-in";
    enlarge(shown, photo, true);
    if (under === null) {
      context.fillStyle = ground;
      context.fillRect(0, 0, width, height);
    } else {
      enlarge(context, under, true);
    }
    context.drawImage(shown.canvas, 0, 0);
  };

  const paintGrid = (context) => {
    const { width, height } = context.canvas;
    context.lineWidth = 1;
    context.strokeStyle = "rgb(255 255 255 / .13)";
    context.beginPath();
    for (let row = 1; row < rows; row++) {
      const y = Math.round((row * height) / rows) + 0.5;
      context.moveTo(0, y);
      context.lineTo(width, y);
    }
    for (let column = 1; column < columns; column++) {
      const x = Math.round((column * width) / columns) + 0.5;
      context.moveTo(x, 0);
      context.lineTo(x, height);
    }
    context.stroke();
  };

  const paintOutline = (context) => {
    const { width, height } = context.canvas;
    const x = ((state.patch % columns) * width) / columns;
    const y = (Math.floor(state.patch / columns) * height) / rows;
    const line = Math.max(1.5, Math.min(3 * devicePixelRatio, width / 160));
    for (const [color, size] of [["#000", 2.2 * line], [state.held ? "#5ab0ff" : "#fff", line]]) {
      context.strokeStyle = color;
      context.lineWidth = size;
      context.strokeRect(x, y, width / columns, height / rows);
    }
  };

  // Returns the scale of the values, if the view has values.
  const paintView = (canvas, view) => {
    const context = fit(canvas);
    context.clearRect(0, 0, canvas.width, canvas.height);
    let scale = null;
    if (view === "photo") {
      enlarge(context, photo, true);
    } else if (view === "reflected") {
      const flow = classes[state.class].flow;
      if (flow === null) return null;
      paintMasked(context, (token) => flow.mask(state.patch, token), null);
    } else {
      const values = valuesOf(view, canvas.id === "stage" ? state.layer : lastLayer);
      if (values === null) return null;
      scale = brightness(view, values);
      paintLight(context, scale.light);
    }
    if (canvas.id === "stage") paintGrid(context);
    paintOutline(context);
    return scale;
  };

  // -- words -----------------------------------------------------------------------------

  const methodTitle = () => data.methods[state.method];
  const percent = (share) => `${(100 * share).toFixed(1)}\u00a0%`;
  const short = (value) => (value === 0 ? "0" : Number(value.toPrecision(3)).toString());
  const score = (logit) => logit.toFixed(2).replace("-", "\u2212");
  const ordinal = (number) => {
    const teen = number % 100 > 10 && number % 100 < 14;
    return number + ((!teen && { 1: "st", 2: "nd", 3: "rd" }[number % 10]) || "th");
  };
  const patchName = (token, column = "column") =>
    `row ${Math.floor(token / columns) + 1}, ${column} ${(token % columns) + 1}`;
  // A name such as ReflectedRelevance may break between its words.
  const breakable = (name) => name.replace(/([a-z])(?=[A-Z])/g, "$1\u200b");
  const ABSENT = "not stored for this class";

  // Said when the pointer rests; nothing is said before the reader has done anything.
  let announcement = null;
  const announce = (text) => {
    if (announcement !== null) clearTimeout(announcement);
    const first = announcement === null;
    announcement = setTimeout(() => { if (!first) find("says").textContent = text; }, 250);
  };

  const BETWEEN_PATCHES = ["into", "from", "reflected"];
  const viewTexts = Object.fromEntries(
    BETWEEN_PATCHES.map((view) => [view, find(`text-${view}`).textContent]),
  );

  // Whether a view needs relevance between patches that the page does not hold for this class.
  const isMissing = (view) =>
    BETWEEN_PATCHES.includes(view) && classes[state.class].flow === null;

  const writeFacts = () => {
    const one = classes[state.class];
    const logit = one.scores[state.patch];
    const rank = 1 + one.scores.reduce((count, other) => count + (other > logit), 0);
    const place = 1 + one.orders[state.method].indexOf(state.patch);
    find("fact-patch").textContent = patchName(state.patch, "col.");
    find("fact-patch-more").textContent = `of ${rows} × ${columns}`;
    find("fact-place").textContent = `${ordinal(place)} of ${tokens}`;
    find("fact-place-more").textContent = breakable(methodTitle());
    find("fact-score").textContent = `scores\u00a0${score(logit)}`;
    find("fact-score-more").textContent = `${ordinal(rank)} of ${tokens}`;
    find("text-map").textContent = breakable(methodTitle());
    find("lead-class").textContent = one.name;
    find("lead-share").textContent = percent(one.probability);
    const into = valuesOf("into", lastLayer);
    const goal = into === null ? "" : ` It flows most into ${patchName(into.indexOf(largest(into)))}.`;
    announce(
      `Patch ${patchName(state.patch)}: ${ordinal(place)} of ${tokens} in the map of ${methodTitle()}. ` +
        `Its reflected image scores ${score(logit)}, ${ordinal(rank)} of ${tokens}.${goal}` +
        (state.held ? " Held." : ""),
    );
  };

  const VIEW_NAMES = {
    photo: "The photo",
    into: "Flow out of this patch",
    from: "Flow into this patch",
    output: "Flow into the output",
    reflected: "Reflected image of this patch",
  };
  const viewName = (view) => (view === "map" ? `Final map of ${methodTitle()}` : VIEW_NAMES[view]);

  // What the photo shows, for somebody who sees it for the first time.
  const viewMeaning = (view) => {
    const one = classes[state.class];
    if (view === "photo") return "As the model receives it.";
    if (view === "into") return "Bright: where most of the outlined patch arrives.";
    if (view === "from") return "Bright: what gives most to the outlined patch.";
    if (view === "output") return `Bright: what gives most to the model’s answer, ${one.name}.`;
    if (view === "map") return `Bright: what speaks most for ${one.name}.`;
    let most = 0;
    for (let other = 0; other < tokens; other++) most = Math.max(most, one.flow.mask(state.patch, other));
    return (
      `At most ${percent(most)} of any patch is shown. ` +
      `Score ${score(one.scores[state.patch])}; whole photo ${score(one.logit)}.`
    );
  };

  const writeScale = (scale) => {
    const isEarly = FLOWS.includes(state.view) && state.layer < lastLayer;
    const after = isEarly ? `, after layer ${data.firstLayer + state.layer + 1}` : "";
    find("scale-name").textContent = viewName(state.view) + after;
    find("stage-text").textContent = viewMeaning(state.view);
    find("ramp").parentElement.classList.toggle("absent", scale === null);
    if (scale === null) return;
    find("scale-low").textContent = (scale.isCut ? "≤ " : "") + short(scale.low);
    find("scale-high").textContent = short(scale.top);
  };

  // -- the parts of the page -------------------------------------------------------------

  const stage = find("stage");
  const layerCanvases = all(".layer canvas");

  const paintPatch = () => {
    for (const canvas of all("[data-view]")) {
      paintView(canvas, canvas.dataset.view);
      canvas.classList.toggle("absent", isMissing(canvas.dataset.view));
    }
    writeScale(paintView(stage, state.view));
    writeFacts();
  };

  const paintLayers = () => {
    const view = layerView();
    const last = valuesOf(view, lastLayer);
    const top = last === null ? 0 : largest(last);
    layerCanvases.forEach((canvas, layer) => {
      canvas.width = columns;
      canvas.height = rows;
      const values = valuesOf(view, layer);
      if (values === null) return;
      const { light } = brightness(view, values, top);
      const isPatch = (token) => view !== "output" && token === state.patch;
      const picture = gridPicture((token) =>
        isPatch(token) ? [90, 176, 255, 255] : [...heatColor(light[token]), 255],
      );
      canvas.getContext("2d").drawImage(picture, 0, 0);
    });
    const choice = view === lastFlow
      ? "Choose a layer to see it on the photo."
      : `Between patches: ${layers ? `stored for ${classes[0].name} only` : "not stored, see below"}.`;
    find("layers-text").textContent = `${viewName(view)}, after each layer. ${choice}`;
  };

  const paintTest = () => {
    const one = classes[state.class];
    const count = data.counts[state.step];
    const inserts = state.curve === "insertion";
    const highest = new Set(one.orders[state.method].subarray(0, count));
    paintMasked(
      fit(find("test-picture")),
      (token) => Number(highest.has(token) === inserts),
      inserts ? blurred : null,
    );
    const curve = one[state.curve][state.method];
    const done = inserts ? "inserted" : "deleted";
    find("test-probability").textContent = percent(curve[state.step]);
    find("test-text").textContent = `for ${one.name}, with the ${count} highest of ${tokens} patches ${done}`;
    const slider = find("count");
    slider.value = state.step;
    slider.setAttribute(
      "aria-valuetext",
      `${count} of ${tokens} patches ${done}: probability ${percent(curve[state.step])}`,
    );
    paintCurve(one, curve, done);
  };

  const element = (parent, name, attributes, text) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    parent.append(made);
    return made;
  };

  // Under a curve, as a share of the area of the frame.
  const area = (curve) =>
    curve.slice(1).reduce((sum, value, step) => {
      const share = (data.counts[step + 1] - data.counts[step]) / tokens;
      return sum + (share * (value + curve[step])) / 2;
    }, 0);

  const paintCurve = (one, curve, done) => {
    const box = find("curve");
    const [width, height, left, right, top, bottom] = [box.clientWidth, 200, 48, 0, 8, 8];
    const curves = one[state.curve];
    const most = curves.flat().reduce((high, value) => Math.max(high, value), 0);
    const limit = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5].find((step) => most <= step) ?? 1;
    const x = (count) => left + ((width - left - right) * count) / tokens;
    const y = (value) => top + (height - top - bottom) * (1 - value / limit);
    const points = (values) => values.map((value, step) => `${x(data.counts[step])},${y(value)}`).join(" ");
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.setAttribute("aria-hidden", "true");
    for (const share of [0, 0.5, 1]) {
      const level = y(limit * share);
      element(svg, "line", { class: "axis", x1: left, x2: width - right, y1: level, y2: level });
      const text = `${Number((100 * limit * share).toPrecision(2))}\u00a0%`;
      element(svg, "text", { class: "tick", x: left - 8, y: level + 4, "text-anchor": "end" }, text);
    }
    find("axis-name").textContent = `patches ${done}`;
    curves.forEach((values, method) => {
      if (method !== state.method) element(svg, "polyline", { class: "other", points: points(values) });
    });
    element(svg, "polyline", { class: "line", points: points(curve) });
    curve.forEach((value, step) => {
      element(svg, "circle", { class: "dot", cx: x(data.counts[step]), cy: y(value), r: 2.5 });
    });
    const here = { x: x(data.counts[state.step]), y: y(curve[state.step]) };
    element(svg, "line", { class: "drop", x1: here.x, x2: here.x, y1: here.y, y2: y(0) });
    element(svg, "circle", { class: "here", cx: here.x, cy: here.y, r: 7 });
    box.replaceChildren(svg);
    box.setAttribute("aria-label", `Probability while patches are ${done}, area under the curve ${percent(area(curve))}`);
    const better = state.curve === "insertion" ? "higher" : "lower";
    find("curve-text").textContent = `Area under the curve, ${better} is better${curves.length > 1 ? "; grey: the other methods" : ""}:`;
    find("areas").replaceChildren(...curves.map((values, method) => {
      const entry = document.createElement("li");
      entry.textContent = `${data.methods[method]}\u00a0${percent(area(values))}`;
      entry.classList.toggle("chosen", method === state.method);
      return entry;
    }));
  };

  // -- events ----------------------------------------------------------------------------

  const waiting = new Set();
  const paint = (...parts) => {
    if (waiting.size === 0) {
      requestAnimationFrame(() => {
        const now = [...waiting];
        waiting.clear();
        for (const part of now) part();
      });
    }
    for (const part of parts) waiting.add(part);
  };

  const point = (patch) => {
    if (state.browsing && state.view === "map" && !isMissing(lastFlow)) showView(lastFlow);
    else if (patch === state.patch) return;
    state.patch = patch;
    paint(paintPatch, paintLayers);
  };

  const hold = (held) => {
    state.held = held;
    paint(paintPatch);
    find("hint").hidden = held;
    find("hint-held").hidden = !held;
  };

  const patchAt = (event) => {
    const box = stage.getBoundingClientRect();
    const along = (offset, size, count) =>
      Math.min(count - 1, Math.max(0, Math.floor((offset / size) * count)));
    return (
      along(event.clientY - box.top, box.height, rows) * columns +
      along(event.clientX - box.left, box.width, columns)
    );
  };

  const leave = () => {
    if (state.browsing && !state.held) showView("map");
  };

  // The finger on the photo. One that moves up or down first scrolls the page, and chooses nothing.
  let finger = null;
  stage.addEventListener("pointerdown", ({ pointerType, clientX, clientY }) => {
    finger = pointerType === "touch" ? { x: clientX, y: clientY, slides: false } : null;
  });
  stage.addEventListener("pointermove", (event) => {
    if (finger) {
      const across = Math.abs(event.clientX - finger.x);
      finger.slides = finger.slides || across > Math.abs(event.clientY - finger.y);
      if (!finger.slides) return;
      if (!state.held) hold(true); // what it slid to stays when it is lifted
    } else if (state.held) {
      return;
    }
    point(patchAt(event));
  });
  stage.addEventListener("pointerleave", leave);
  // A click of a mouse, or a tap.
  stage.addEventListener("click", (event) => {
    const patch = patchAt(event);
    hold(!(state.held && patch === state.patch));
    point(patch);
    if (finger) leave();
  });

  const MOVES = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  MOVES.Home = [0, -columns];
  MOVES.End = [0, columns];
  stage.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const move = MOVES[event.key];
    if (move) {
      const clip = (place, count) => Math.min(count - 1, Math.max(0, place));
      const row = clip(Math.floor(state.patch / columns) + move[0], rows);
      point(row * columns + clip((state.patch % columns) + move[1], columns));
    } else if (event.key === "Enter" || event.key === " ") {
      hold(!state.held);
    } else if (event.key === "Escape") {
      hold(false);
    } else {
      return;
    }
    event.preventDefault();
  });

  const choose = (name, act) => {
    for (const input of all(`input[name=${name}]`)) {
      input.addEventListener("change", () => act(input.value));
    }
  };
  const check = (name, value) => {
    find("page").querySelector(`input[name=${name}][value="${value}"]`).checked = true;
  };
  // Leaves a layer and views that are not there for the chosen class.
  const useWhatIsStored = () => {
    for (const view of BETWEEN_PATCHES) {
      find(`text-${view}`).textContent = isMissing(view) ? ABSENT : viewTexts[view];
      find(`text-${view}`).parentElement.querySelector("input").disabled = isMissing(view);
    }
    if (isMissing(state.view)) {
      state.view = lastFlow = "output";
      check("view", "output");
    }
    if (state.view !== "output" && flowAfter(state.layer) === null) {
      state.layer = lastLayer;
      check("layer", lastLayer);
    }
  };
  const showView = (view) => {
    check("view", view);
    setView(view);
  };
  const setView = (view) => {
    state.view = view;
    if (FLOWS.includes(view)) lastFlow = view;
    useWhatIsStored();
    paint(paintPatch, paintLayers);
  };
  choose("class", (value) => {
    state.class = Number(value);
    useWhatIsStored();
    paint(paintPatch, paintLayers, paintTest);
  });
  choose("method", (value) => {
    state.method = Number(value);
    showView("map");
    paint(paintTest);
  });
  choose("view", (view) => {
    state.browsing = false;
    setView(view);
  });
  choose("layer", (value) => {
    state.layer = Number(value);
    state.browsing = false;
    showView(layerView());
  });
  choose("curve", (value) => {
    state.curve = value;
    paint(paintTest);
  });
  find("count").addEventListener("input", (event) => {
    state.step = Number(event.target.value);
    paint(paintTest);
  });

  // -- start -----------------------------------------------------------------------------

  find("loading").hidden = true;
  find("page").hidden = false;
  const ramp = find("ramp").getContext("2d");
  for (let place = 0; place < 256; place++) {
    ramp.fillStyle = `rgb(${heatColor(place / 255).join(" ")})`;
    ramp.fillRect(place, 0, 1, 1);
  }
  new ResizeObserver(() => paint(paintPatch, paintTest)).observe(find("page"));
  paintPatch();
  paintLayers();
  paintTest();

  // For the console: the values that the pictures show.
  window.explorer = Object.freeze({
    state,
    relevance: (from, into, layer = lastLayer) => {
      const flow = flowAfter(layer);
      return flow && (from === into ? flow.own[from] : flow.value(from, into));
    },
    mask: (token) => Array.from({ length: tokens }, (_, other) => classes[state.class].flow.mask(token, other)),
    values: (view, layer = lastLayer) => Array.from(valuesOf(view, layer)),
    scores: () => Array.from(classes[state.class].scores),
    readyAfter: performance.now(),
  });
})().catch((error) => {
  const problem = document.getElementById("problem");
  problem.hidden = false;
  problem.textContent =
    `This page cannot be shown: ${error}. It needs a browser of 2023 or newer ` +
    "(Chrome 80, Firefox 113, Safari 16.4).";
  console.error(error);
});
