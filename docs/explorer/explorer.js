// Click a pixel, see its kernels: a network of involutions in onnxruntime-web, without a server.
"use strict";

const { layers, size, mean, std, classes, examples } = window.NETWORK;
const SCALE = 10; // of the large canvas, in its pixels per pixel of the image
const CELL = 84; // side of a kernel's canvas
const RED = [178, 24, 43], BLUE = [33, 102, 172]; // of positive and negative weights
const at = (id) => document.getElementById(id);

let session; // of onnxruntime
let grey = new Uint8Array(size * size); // the image
let maps = null; // the network's outputs for it
let pixel = [size / 2, size / 2];
let drawing = false; // whether the pointer draws instead of choosing a pixel

function bytes(base64) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(base64); // browsers since 2025, many times faster
  const text = atob(base64), found = new Uint8Array(text.length);
  for (let index = 0; index < text.length; index++) found[index] = text.charCodeAt(index);
  return found;
}

function say(text, error = false) {
  at("status").textContent = text;
  at("status").className = error ? "error" : "";
}

async function start() {
  if (!window.ort || !window.ORT_WASM) {
    say("onnxruntime-web is missing beside this page: make docs fetches it where the npm registry can be reached.", true);
    return;
  }
  // As blobs, because a page that was opened as a file must not fetch its neighbours.
  const blob = (content, type) => URL.createObjectURL(new Blob([bytes(content)], { type }));
  ort.env.wasm.numThreads = 1;
  ort.env.wasm.wasmPaths = { mjs: blob(window.ORT_WASM.mjs, "text/javascript") };
  ort.env.wasm.wasmBinary = bytes(window.ORT_WASM.wasm).buffer;
  session = await ort.InferenceSession.create(bytes(window.NETWORK.onnx), { executionProviders: ["wasm"] });
  examples.forEach(addExample);
  await show(bytes(examples[3]));
}

function addExample(content, digit) {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = size;
  canvas.tabIndex = 0;
  canvas.title = `digit ${digit}`;
  paint(canvas.getContext("2d"), bytes(content));
  const choose = () => show(bytes(content));
  canvas.addEventListener("click", choose);
  canvas.addEventListener("keydown", (event) => event.key === "Enter" && choose());
  at("examples").append(canvas);
}

function paint(context, values) {
  const data = context.createImageData(size, size);
  values.forEach((value, index) => data.data.set([value, value, value, 255], 4 * index));
  context.putImageData(data, 0, 0);
}

// One forward pass of an image of size x size grey bytes; its kernel maps are kept for every later click.
async function show(values) {
  grey = values;
  const plane = Float32Array.from(values, (value) => (value / 255 - mean) / std);
  const input = new Float32Array(3 * plane.length);
  for (let channel = 0; channel < 3; channel++) input.set(plane, channel * plane.length);
  const begun = performance.now();
  maps = await session.run({ images: new ort.Tensor("float32", input, [1, 3, size, size]) });
  drawScores(maps.logits.data);
  drawAll();
  at("save").disabled = false;
  say(`${(performance.now() - begun).toFixed(0)} ms for the network`);
}

function drawScores(logits) {
  const largest = Math.max(...logits);
  const powers = Array.from(logits, (logit) => Math.exp(logit - largest));
  const total = powers.reduce((sum, one) => sum + one);
  const scores = powers.map((power, index) => [classes[index], power / total]).sort((a, b) => b[1] - a[1]);
  at("scores").replaceChildren(
    ...scores.slice(0, 5).map(([name, score]) => {
      const row = document.createElement("div");
      const bar = document.createElement("i");
      bar.style.width = `${100 * score}%`;
      row.append(name, bar, `${(100 * score).toFixed(1)} %`);
      return row;
    }),
  );
}

// The nearest whole number, and the even one of two, as in Python.
function nearest(value) {
  const found = Math.round(value);
  return found - value === 0.5 && found % 2 ? found - 1 : found;
}

// The output position of a layer nearest to the centre of a pixel, along one axis.
function position(layer, coordinate) {
  return Math.min(Math.max(0, nearest(coordinate / (layer.jump * layer.stride))), layer.size - 1);
}

// Where the footprint of a position begins, and its length, in pixels of the image.
function footprint(layer, place) {
  const step = layer.dilation * layer.jump;
  const left = Math.floor((layer.dilation * (layer.kernel - 1)) / 2);
  return [0.5 + (place * layer.stride - left) * layer.jump - step / 2, layer.kernel * step];
}

// The K x K weights of a group at a position of an output [1, G, K, K, size, size].
function kernelAt(layer, group, column, row) {
  const data = maps[layer.name].data, { kernel, size: side } = layer;
  const weights = [];
  for (let tap = 0; tap < kernel * kernel; tap++) {
    weights.push(data[((group * kernel * kernel + tap) * side + row) * side + column]);
  }
  return weights;
}

function drawAll() {
  const sections = layers.map((layer) => {
    const [column, row] = pixel.map((coordinate) => position(layer, coordinate));
    const heading = document.createElement("h2");
    const stride = layer.stride > 1 ? ` stride ${layer.stride}` : "";
    heading.textContent = `${layer.name}: ${layer.kernel}x${layer.kernel}${stride}, position ${column},${row}`;
    const cells = document.createElement("div");
    for (let group = 0; group < layer.groups; group++) {
      const canvas = document.createElement("canvas");
      canvas.width = canvas.height = CELL;
      canvas.title = `group ${group}`;
      drawKernel(canvas.getContext("2d"), layer, kernelAt(layer, group, column, row), column, row);
      cells.append(canvas);
    }
    return [heading, cells];
  });
  at("kernels").replaceChildren(...sections.flat());
  drawImage();
}

function source() {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = size;
  paint(canvas.getContext("2d"), grey);
  return canvas;
}

function drawImage() {
  const context = at("image").getContext("2d");
  context.imageSmoothingEnabled = false;
  context.drawImage(source(), 0, 0, SCALE * size, SCALE * size);
  context.lineWidth = 1.5;
  context.strokeStyle = "#ffa000";
  for (const layer of layers) {
    const [[left, width], [top, height]] = pixel.map((coordinate) => footprint(layer, position(layer, coordinate)));
    context.strokeRect(SCALE * left, SCALE * top, SCALE * width, SCALE * height);
  }
  context.strokeStyle = "red";
  context.strokeRect(SCALE * pixel[0], SCALE * pixel[1], SCALE, SCALE);
}

// Weights over the part of the image that they multiply. Colours follow the square root, as in involution show.
function drawKernel(context, layer, weights, column, row) {
  const [[left, width], [top]] = [column, row].map((place) => footprint(layer, place));
  const ratio = CELL / width, side = CELL / layer.kernel;
  context.fillStyle = "black";
  context.fillRect(0, 0, CELL, CELL);
  context.imageSmoothingEnabled = false;
  context.drawImage(source(), -left * ratio, -top * ratio, size * ratio, size * ratio);
  const largest = Math.max(1e-12, ...weights.map(Math.abs));
  weights.forEach((weight, tap) => {
    const strength = Math.sqrt(Math.abs(weight) / largest);
    const end = weight > 0 ? RED : BLUE;
    const colour = end.map((value) => Math.round(255 + strength * (value - 255)));
    context.fillStyle = `rgba(${colour.join(",")},${0.4 + 0.5 * strength})`;
    context.fillRect((tap % layer.kernel) * side, Math.floor(tap / layer.kernel) * side, side, side);
  });
}

// The pixel of the image under the pointer.
function under(event) {
  const box = at("image").getBoundingClientRect();
  const place = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
  return place.map((share) => Math.min(Math.max(0, Math.floor(share * size)), size - 1));
}

at("image").addEventListener("pointerdown", (event) => {
  if (!maps) return;
  if (drawing) {
    ink(...under(event));
  } else {
    pixel = under(event);
    drawAll();
  }
});
at("image").addEventListener("pointermove", (event) => {
  if (drawing && maps && event.buttons) ink(...under(event));
});
at("image").addEventListener("pointerup", () => drawing && maps && show(grey));

// A soft dot, as wide as the strokes of the scans.
function ink(x, y) {
  for (let row = 0; row < size; row++) {
    for (let column = 0; column < size; column++) {
      const value = 255 * Math.min(1, Math.max(0, 2.6 - Math.hypot(column - x, row - y)) / 1.6);
      grey[row * size + column] = Math.max(grey[row * size + column], value);
    }
  }
  drawImage();
}

at("pen").addEventListener("click", () => {
  drawing = !drawing;
  at("pen").setAttribute("aria-pressed", drawing);
  if (!maps) return;
  if (drawing) {
    grey = new Uint8Array(size * size);
    drawImage();
    say("Draw a digit with the pointer; press the button again to choose pixels.");
  } else {
    show(grey);
  }
});

// The centre square of a picture, in grey levels.
at("file").addEventListener("change", async (event) => {
  const [file] = event.target.files;
  event.target.value = ""; // so that the same file can be opened again
  if (!file || !session) return;
  let picture;
  try {
    picture = await createImageBitmap(file);
  } catch {
    say(`${file.name} cannot be read as a picture.`, true);
    return;
  }
  const side = Math.min(picture.width, picture.height);
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = size;
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(picture, (picture.width - side) / 2, (picture.height - side) / 2, side, side, 0, 0, size, size);
  const { data } = context.getImageData(0, 0, size, size);
  await show(Uint8Array.from({ length: size * size }, (_, i) =>
    Math.round(0.299 * data[4 * i] + 0.587 * data[4 * i + 1] + 0.114 * data[4 * i + 2])));
});

// The image above all kernels, as one PNG.
at("save").addEventListener("click", () => {
  const cells = [...at("kernels").querySelectorAll("div")].map((row) => [...row.children]);
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(SCALE * size, ...cells.map((row) => row.length * (CELL + 4)));
  canvas.height = SCALE * size + cells.length * (CELL + 4) + 4;
  const context = canvas.getContext("2d");
  context.fillStyle = "white";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(at("image"), 0, 0);
  cells.forEach((row, line) =>
    row.forEach((cell, index) => context.drawImage(cell, index * (CELL + 4), SCALE * size + 4 + line * (CELL + 4))));
  const link = document.createElement("a");
  link.download = `kernels_x${pixel[0]}_y${pixel[1]}.png`;
  link.href = canvas.toDataURL("image/png");
  link.click();
});

start().catch((error) => say(`The network cannot run in this browser: ${error.message}`, true));
