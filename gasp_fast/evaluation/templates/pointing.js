"use strict";
(() => {
  const NOWHERE = 0xffff;
  const FRAME_WIDTH = 480, FIRST_WIDTH = 760; // pixels of a canvas
  const TRUTH = "#2e9bf0", ANSWER = "#111111", WRONG = "#ff7a1a";
  const data = JSON.parse(document.getElementById("pointing-data").textContent);
  const first = document.getElementById("first");
  const state = { sequence: 0, kind: data.kind, layer: data.layer, view: "one", x: 0.5, y: 0.5, held: false };
  let cells = []; // of the shown sequence: {model, frame, canvas, caption}
  let rows = []; // of each model, the text beside its name
  let waiting = false;

  // ---- data ------------------------------------------------------------------------------------------------------

  const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const words = (text) => new Uint16Array(bytes(text).buffer);
  const grid = ([columns, rows, left, top, right, bottom]) => ({ columns, rows, left, top, right, bottom });

  for (const sequence of data.sequences) {
    for (const model of sequence.models) {
      model.grids = model.grids.map(grid);
      model.truth = words(model.truth); // [tokens of the first frame, later frames]
      model.matches = words(model.matches); // rows of anchor, later frame, true token
    }
  }

  const decoded = new Map();

  /** Features of the chosen kind and layer; decoded when they are needed first. */
  function features(model) {
    const stored = model.features[state.kind][state.layer];
    if (!decoded.has(stored)) {
      decoded.set(stored, {
        queries: new Int8Array(bytes(stored.queries).buffer),
        keys: new Int8Array(bytes(stored.keys).buffer),
        scale: stored.scale,
        best: words(stored.best), // [tokens of the first frame, later frames]
      });
    }
    return decoded.get(stored);
  }

  /** The token of a grid under a point, in shares of the frame's size; -1 outside. */
  function tokenAt(g, x, y) {
    const column = Math.floor(((x - g.left) / (g.right - g.left)) * g.columns);
    const row = Math.floor(((y - g.top) / (g.bottom - g.top)) * g.rows);
    return column >= 0 && column < g.columns && row >= 0 && row < g.rows ? row * g.columns + column : -1;
  }

  /** The rectangle of a token in shares of the frame's size. */
  function rectangle(g, token) {
    const width = (g.right - g.left) / g.columns, height = (g.bottom - g.top) / g.rows;
    const left = g.left + (token % g.columns) * width, top = g.top + Math.floor(token / g.columns) * height;
    return { left, top, width, height, x: left + width / 2, y: top + height / 2 };
  }

  function isRight(g, answer, truth) {
    const dx = (answer % g.columns) - (truth % g.columns);
    const dy = Math.floor(answer / g.columns) - Math.floor(truth / g.columns);
    return dx * dx + dy * dy <= data.radius * data.radius;
  }

  /** Matching probabilities of a token in a later frame, relative to the highest. */
  function heat(model, temperature, token, frame) {
    const { queries, keys, scale } = features(model);
    const components = scale.length;
    const query = scale.map((one, c) => (one * queries[token * components + c]) / temperature);
    const start = model.grids.slice(1, frame + 1).reduce((sum, g) => sum + g.columns * g.rows, 0);
    const g = model.grids[frame + 1];
    const logits = new Float64Array(g.columns * g.rows);
    for (let j = 0; j < logits.length; j++) {
      const at = (start + j) * components;
      let sum = 0;
      for (let c = 0; c < components; c++) sum += query[c] * keys[at + c];
      logits[j] = sum;
    }
    const most = logits.reduce((a, b) => Math.max(a, b), -Infinity);
    return logits.map((one) => Math.exp(one - most));
  }

  // ---- drawing ---------------------------------------------------------------------------------------------------

  /** The frames of a sequence in colour and in grey, decoded once. */
  async function load(sequence) {
    sequence.loaded ??= Promise.all(
      sequence.images.map(async (text) => {
        const image = new Image();
        image.src = `data:image/jpeg;base64,${text}`;
        await image.decode();
        const grey = document.createElement("canvas");
        grey.width = image.naturalWidth;
        grey.height = image.naturalHeight;
        const context = grey.getContext("2d", { willReadFrequently: true });
        context.drawImage(image, 0, 0);
        const pixels = context.getImageData(0, 0, grey.width, grey.height);
        for (let i = 0; i < pixels.data.length; i += 4) {
          const level = 0.3 * pixels.data[i] + 0.59 * pixels.data[i + 1] + 0.11 * pixels.data[i + 2];
          pixels.data.fill(0.8 * level + 30, i, i + 3);
        }
        context.putImageData(pixels, 0, 0);
        return { colour: image, grey };
      }),
    );
    sequence.frames_loaded = await sequence.loaded;
  }

  function blank(canvas, picture) {
    const context = canvas.getContext("2d");
    context.drawImage(picture, 0, 0, canvas.width, canvas.height);
    return context;
  }

  function stroke(context, colour, width, path) {
    for (const [style, line] of [["#ffffff", width + 3], [colour, width]]) {
      context.strokeStyle = style;
      context.lineWidth = line;
      context.beginPath();
      path();
      context.stroke();
    }
  }

  function drawSquare(context, r) {
    const { width: w, height: h } = context.canvas;
    stroke(context, ANSWER, 4, () => context.rect(r.left * w, r.top * h, r.width * w, r.height * h));
  }

  function drawRing(context, r) {
    const { width: w, height: h } = context.canvas;
    const size = Math.max(11, 0.75 * Math.max(r.width * w, r.height * h));
    stroke(context, TRUTH, 4, () => context.arc(r.x * w, r.y * h, size, 0, 2 * Math.PI));
  }

  function drawDot(context, r, size) {
    const { width: w, height: h } = context.canvas;
    context.beginPath();
    context.arc(r.x * w, r.y * h, size, 0, 2 * Math.PI);
    context.fillStyle = TRUTH;
    context.fill();
    context.strokeStyle = "#ffffff";
    context.lineWidth = 2;
    context.stroke();
  }

  function drawCross(context, r, truth) {
    const { width: w, height: h } = context.canvas;
    const x = r.x * w, y = r.y * h;
    context.strokeStyle = "rgba(0, 0, 0, 0.55)";
    context.lineWidth = 1.5;
    context.beginPath();
    context.moveTo(x, y);
    context.lineTo(truth.x * w, truth.y * h);
    context.stroke();
    stroke(context, WRONG, 3.5, () => {
      context.moveTo(x - 6, y - 6);
      context.lineTo(x + 6, y + 6);
      context.moveTo(x - 6, y + 6);
      context.lineTo(x + 6, y - 6);
    });
  }

  function drawHeat(context, g, probabilities) {
    const { width: w, height: h } = context.canvas;
    probabilities.forEach((p, token) => {
      if (p < 0.02) return;
      const r = rectangle(g, token);
      const green = Math.round(216 - 190 * p), blue = Math.round(77 - 50 * p);
      context.fillStyle = `rgba(${Math.round(255 - 40 * p)}, ${green}, ${blue}, ${0.85 * Math.sqrt(p)})`;
      context.fillRect(r.left * w, r.top * h, r.width * w + 0.5, r.height * h + 0.5);
    });
  }

  // ---- what is shown ---------------------------------------------------------------------------------------------

  const later = (sequence, frame) => sequence.frames[frame + 1] - sequence.frames[0];
  const away = (gap) => `${gap < 0 ? "−" : "+"}${Math.abs(gap)} frame${Math.abs(gap) === 1 ? "" : "s"}`;
  const place = (g, token) => `row ${Math.floor(token / g.columns) + 1}, column ${(token % g.columns) + 1}`;

  /** Of the points of the evaluation: how many a model finds, in one later frame or in all. */
  function found(model, frame = null) {
    const { best } = features(model), frames = model.grids.length - 1;
    let right = 0, all = 0;
    for (let m = 0; m < model.matches.length; m += 3) {
      const [anchor, of, truth] = model.matches.subarray(m, m + 3);
      if (frame !== null && of !== frame) continue;
      all += 1;
      right += isRight(model.grids[of + 1], best[anchor * frames + of], truth);
    }
    return { right, all };
  }

  const percent = ({ right, all }) => (all ? `${Math.round((100 * right) / all)} %` : "–");

  function drawFirst(sequence) {
    const context = blank(first, sequence.frames_loaded[0].colour);
    const model = sequence.models[0], g = model.grids[0];
    const anchors = new Set();
    for (let m = 0; m < model.matches.length; m += 3) anchors.add(model.matches[m]);
    const one = state.view === "one";
    context.globalAlpha = one ? 0.55 : 1;
    for (const anchor of anchors) drawDot(context, rectangle(g, anchor), one ? 4 : 7);
    context.globalAlpha = 1;
    const token = tokenAt(g, state.x, state.y);
    if (one && token >= 0) drawSquare(context, rectangle(g, token));
    const words = one ? (token < 0 ? "no token here" : place(g, token)) : `${anchors.size} points of the evaluation`;
    document.getElementById("first-caption").textContent =
      `first frame, number ${sequence.frames[0]} of ${sequence.scene}: ${words}${state.held ? " (held)" : ""}`;
    first.setAttribute("aria-label", `First frame: ${words}. Arrow keys move, Page Up and Page Down change the layer.`);
  }

  /** One token of the first frame: heat, answer and truth. Returns whether the answer is right; null if unknown. */
  function drawOne(context, model, temperature, frame) {
    const g = model.grids[frame + 1], frames = model.grids.length - 1;
    const token = tokenAt(model.grids[0], state.x, state.y);
    if (token < 0) return { words: "no token there", right: null };
    const answer = features(model).best[token * frames + frame], truth = model.truth[token * frames + frame];
    drawHeat(context, g, heat(model, temperature, token, frame));
    if (truth !== NOWHERE) drawRing(context, rectangle(g, truth));
    drawSquare(context, rectangle(g, answer));
    const right = truth === NOWHERE ? null : isRight(g, answer, truth);
    const verdict = right === null ? "true position hidden or unknown" : `true ${place(g, truth)}: ${right ? "right" : "wrong"}`;
    return { words: `answer ${place(g, answer)}; ${verdict}`, right };
  }

  function drawAll(context, model, frame) {
    const g = model.grids[frame + 1], frames = model.grids.length - 1, { best } = features(model);
    for (const wanted of [false, true]) {
      for (let m = 0; m < model.matches.length; m += 3) {
        const [anchor, of, truth] = model.matches.subarray(m, m + 3);
        const answer = best[anchor * frames + of];
        if (of !== frame || isRight(g, answer, truth) !== wanted) continue;
        if (wanted) drawDot(context, rectangle(g, answer), 7);
        else drawCross(context, rectangle(g, answer), rectangle(g, truth));
      }
    }
  }

  function draw() {
    waiting = false;
    const sequence = data.sequences[state.sequence];
    if (!sequence.frames_loaded) return;
    drawFirst(sequence);
    const counts = data.models.map(() => ({ right: 0, all: 0 }));
    for (const { model, frame, canvas, caption, number } of cells) {
      const context = blank(canvas, sequence.frames_loaded[frame + 1][state.view === "one" ? "grey" : "colour"]);
      const gap = away(later(sequence, frame)), name = data.models[number].name;
      caption.className = "";
      if (state.view === "all") {
        drawAll(context, model, frame);
        const share = percent(found(model, frame));
        caption.textContent = `${gap}: ${share} right`;
        canvas.setAttribute("aria-label", `${name}, ${gap}: ${share} of the points right`);
        continue;
      }
      const { words, right } = drawOne(context, model, data.models[number].temperature, frame);
      canvas.setAttribute("aria-label", `${name}, ${gap}: ${words}`);
      caption.textContent = `${gap}: ${right === null ? "– hidden or unknown" : right ? "✓ right" : "✗ wrong"}`;
      if (right === null) continue;
      caption.className = right ? "right" : "wrong";
      counts[number].all += 1;
      counts[number].right += right;
    }
    sequence.models.forEach((model, number) => {
      const { right, all } = found(model);
      rows[number].textContent = `finds ${right} of ${all} points of this sequence (${percent({ right, all })})`;
    });
    showVerdict(counts);
  }

  function showVerdict(counts) {
    const lines = data.models.map(({ name }, number) => {
      const { right, all } = counts[number], line = document.createElement("span");
      line.textContent = all ? `${name}: right in ${right} of ${all} frames` : `${name}: true position hidden or unknown`;
      line.className = all && right === all ? "right" : all && right === 0 ? "wrong" : "";
      return line;
    });
    document.getElementById("verdict").replaceChildren(...(state.view === "one" ? lines : []));
  }

  function redraw() {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(draw);
  }

  // ---- choices ---------------------------------------------------------------------------------------------------

  function element(name, parent, text = "", className = "") {
    const one = document.createElement(name);
    if (className) one.className = className;
    one.textContent = text;
    parent.append(one);
    return one;
  }

  function choices(id, options, chosen, choose) {
    const parent = document.getElementById(id);
    options.forEach(([value, text]) => {
      const label = element("label", parent, "", "choice"), input = element("input", label);
      input.type = "radio";
      input.name = id;
      input.value = value;
      input.checked = value === chosen;
      input.addEventListener("change", () => choose(value));
      element("span", label, text);
    });
  }

  /** Rows of canvases for a sequence, and the token at which the models differ most. */
  async function showSequence(number) {
    state.sequence = number;
    state.held = false;
    const sequence = data.sequences[number], parent = document.getElementById("answers");
    const height = (width) => Math.round((width * sequence.size[1]) / sequence.size[0]);
    parent.replaceChildren();
    cells = [];
    rows = [];
    sequence.models.forEach((model, index) => {
      const row = element("div", parent, "", "model");
      rows.push(element("span", element("h3", row, data.models[index].name)));
      const frames = element("div", row, "", "frames");
      for (let frame = 0; frame < sequence.frames.length - 1; frame++) {
        const figure = element("figure", frames), canvas = element("canvas", figure);
        canvas.width = FRAME_WIDTH;
        canvas.height = height(FRAME_WIDTH);
        canvas.setAttribute("role", "img");
        cells.push({ model, frame, canvas, caption: element("figcaption", figure), number: index });
      }
    });
    first.width = FIRST_WIDTH;
    first.height = height(FIRST_WIDTH);
    pointAt(mostTelling(sequence));
    await load(sequence);
    redraw();
  }

  /** The token that the last model finds most often and the first one least; of several, the one seen most often. */
  function mostTelling(sequence) {
    const score = new Map();
    sequence.models.forEach((model, index) => {
      const { best } = features(model), frames = model.grids.length - 1;
      const weight = (index === sequence.models.length - 1) - (sequence.models.length > 1 && index === 0);
      for (let m = 0; m < model.matches.length; m += 3) {
        const [anchor, of, truth] = model.matches.subarray(m, m + 3);
        const { x, y } = rectangle(model.grids[0], anchor), key = `${x.toFixed(4)} ${y.toFixed(4)}`;
        const one = score.get(key) ?? { x, y, value: 0 };
        one.value += weight * isRight(model.grids[of + 1], best[anchor * frames + of], truth) + 0.01;
        score.set(key, one);
      }
    });
    return [...score.values()].reduce((a, b) => (b.value > a.value ? b : a), { x: 0.5, y: 0.5, value: -Infinity });
  }

  function pointAt({ x, y }) {
    state.x = x;
    state.y = y;
    redraw();
  }

  function showLayers() {
    const { layers } = data.kinds[state.kind], slider = document.getElementById("layer");
    slider.max = layers.length - 1;
    const distance = layers.map((one) => Math.abs(one - state.layer));
    slider.value = distance.indexOf(Math.min(...distance));
    chooseLayer();
  }

  function chooseLayer() {
    const { layers } = data.kinds[state.kind], slider = document.getElementById("layer");
    state.layer = layers[slider.value];
    document.getElementById("layer-number").textContent = state.layer;
    slider.setAttribute("aria-valuetext", `layer ${state.layer}`);
    redraw();
  }

  // ---- pointer and keys ------------------------------------------------------------------------------------------

  function follow(event) {
    const box = first.getBoundingClientRect();
    const share = (value) => Math.min(Math.max(value, 0), 0.999999);
    pointAt({ x: share((event.clientX - box.left) / box.width), y: share((event.clientY - box.top) / box.height) });
  }

  first.addEventListener("pointermove", (event) => state.held || follow(event));
  first.addEventListener("pointerdown", (event) => {
    if (event.pointerType === "mouse") state.held = !state.held;
    follow(event);
  });
  first.addEventListener("keydown", (event) => {
    const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const slider = document.getElementById("layer");
    if (event.key in steps) {
      const g = data.sequences[state.sequence].models[0].grids[0];
      const [dx, dy] = steps[event.key], token = Math.max(tokenAt(g, state.x, state.y), 0);
      const column = Math.min(Math.max((token % g.columns) + dx, 0), g.columns - 1);
      const row = Math.min(Math.max(Math.floor(token / g.columns) + dy, 0), g.rows - 1);
      state.held = true; // or the resting pointer takes the token back
      pointAt(rectangle(g, row * g.columns + column));
    } else if (event.key === "PageUp" || event.key === "PageDown") {
      slider.value = Number(slider.value) + (event.key === "PageUp" ? 1 : -1);
      chooseLayer();
    } else {
      return;
    }
    event.preventDefault();
  });
  document.getElementById("layer").addEventListener("input", chooseLayer);

  const names = data.sequences.map(({ scene, frames }, n) => [n, `${n + 1}: ${scene}, ${away(Math.max(...frames) - frames[0])}`]);
  choices("sequence", names, 0, showSequence);
  const kinds = Object.entries(data.kinds).map(([kind, { name }]) => [kind, name]);
  choices("kind", kinds, state.kind, (kind) => { state.kind = kind; showLayers(); });
  choices("view", [["one", "one token"], ["all", "all points"]], "one", (view) => { state.view = view; redraw(); });
  showLayers();
  showSequence(0);
})();
