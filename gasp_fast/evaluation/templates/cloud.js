"use strict";
(() => {
  const TURN = 0.25; // radians a second
  const FAR = 3.2; // from the eye to the middle of the cloud
  const FOCUS = 1.45; // focal length, in heights of the canvas
  const canvas = document.getElementById("cloud");
  const context = canvas.getContext("2d", { willReadFrequently: true }); // in memory: we write all of its pixels
  const data = JSON.parse(document.getElementById("cloud-data").textContent);
  const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const points = Float32Array.from(new Uint16Array(bytes(data.points).buffer), (one) => one / 32767.5 - 1);
  const colours = bytes(data.colours);
  const { width, height } = canvas;
  const image = context.createImageData(width, height), pixels = new Uint32Array(image.data.buffer);
  const depth = new Float32Array(width * height);
  const packed = new Uint32Array(points.length / 3);
  for (let i = 0; i < packed.length; i++) {
    packed[i] = (255 << 24) | (colours[3 * i + 2] << 16) | (colours[3 * i + 1] << 8) | colours[3 * i]; // little-endian
  }

  const state = { yaw: 0, pitch: -0.15, zoom: 1, turning: true, visible: true, before: 0 };
  state.turning = !matchMedia("(prefers-reduced-motion: reduce)").matches;
  let waiting = false;

  /** Rows of the rotation by yaw about the vertical axis, then by pitch about the horizontal one. */
  function rotation() {
    const c = Math.cos(state.yaw), s = Math.sin(state.yaw), d = Math.cos(state.pitch), t = Math.sin(state.pitch);
    return [c, 0, s, t * s, d, -t * c, -d * s, t, d * c];
  }

  function draw(now) {
    waiting = false;
    if (state.turning && state.before) state.yaw += TURN * Math.min((now - state.before) / 1000, 0.1);
    state.before = state.turning ? now : 0;
    const turn = rotation(), focus = FOCUS * height * state.zoom;
    drawPoints(turn, focus);
    context.putImageData(image, 0, 0);
    drawLines(turn, focus);
    if (state.turning && state.visible) redraw();
  }

  /** Each point covers a few pixels, unless something nearer does. */
  function drawPoints([a, b, c, d, e, f, g, h, k], focus) {
    pixels.fill(0);
    depth.fill(Infinity);
    for (let i = 0, at = 0; i < packed.length; i++, at += 3) {
      const x = points[at], y = points[at + 1], z = points[at + 2];
      const away = g * x + h * y + k * z + FAR;
      if (away < 0.05) continue;
      const left = Math.round(width / 2 + (focus * (a * x + b * y + c * z)) / away);
      const top = Math.round(height / 2 + (focus * (d * x + e * y + f * z)) / away);
      const size = Math.min(6, Math.max(2, Math.round((0.0032 * focus) / away)));
      for (let row = Math.max(top, 0); row < Math.min(top + size, height); row++) {
        for (let column = Math.max(left, 0); column < Math.min(left + size, width); column++) {
          const pixel = row * width + column;
          if (away < depth[pixel]) {
            depth[pixel] = away;
            pixels[pixel] = packed[i];
          }
        }
      }
    }
  }

  /** Cameras, over the points. */
  function drawLines([a, b, c, d, e, f, g, h, k], focus) {
    context.strokeStyle = "#ffb000";
    context.lineWidth = 1.5;
    context.beginPath();
    for (const ends of data.lines) {
      const seen = ends.map(([x, y, z]) => {
        const away = g * x + h * y + k * z + FAR;
        const right = (focus * (a * x + b * y + c * z)) / away, down = (focus * (d * x + e * y + f * z)) / away;
        return { away, x: width / 2 + right, y: height / 2 + down };
      });
      if (seen.some(({ away }) => away < 0.05)) continue;
      context.moveTo(seen[0].x, seen[0].y);
      context.lineTo(seen[1].x, seen[1].y);
    }
    context.stroke();
  }

  function redraw() {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(draw);
  }

  function turnBy(right, down) {
    state.turning = false;
    state.yaw += right;
    state.pitch = Math.min(Math.max(state.pitch + down, -1.5), 1.5);
    redraw();
  }

  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    turnBy(0, 0);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (event.buttons) turnBy(-event.movementX / 150, -event.movementY / 150);
  });
  canvas.addEventListener("keydown", (event) => {
    const turns = { ArrowLeft: [0.1, 0], ArrowRight: [-0.1, 0], ArrowUp: [0, 0.1], ArrowDown: [0, -0.1] };
    const zooms = { "+": 1.15, "-": 1 / 1.15 };
    if (event.key in turns) {
      turnBy(...turns[event.key]);
    } else if (event.key in zooms) {
      state.zoom = Math.min(Math.max(state.zoom * zooms[event.key], 0.3), 6);
      redraw();
    } else if (event.key === " ") {
      state.turning = !state.turning;
      redraw();
    } else {
      return;
    }
    event.preventDefault();
  });
  new IntersectionObserver(([entry]) => {
    state.visible = entry.isIntersecting;
    state.before = 0;
    redraw();
  }).observe(canvas);
  redraw();
})();
