"use strict";
// Draws the tables and plots of the data in the page. Whatever comes from a run is written as text.
const DATA = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const FILTERS = ["wave", "arm", "seed", "state", "text"], SWITCHES = ["metric", "axis"];
const COLOURS = ["#0969da", "#cf6a00", "#1a7f37", "#c4372c", "#8250df", "#9a6700", "#bf3989", "#57606a",
  "#4d7c0f", "#0e7490"];
const DASHES = ["solid", "dot", "dash", "dashdot"];
const VERDICTS = {better: "#1a7f37", worse: "#c4372c", "inside noise": "#57606a", undecided: "#a8b0b8"};
const FONT = {family: 'system-ui, "DejaVu Sans", sans-serif', size: 12, color: "#1f2328"};
const CONFIG = {displaylogo: false, responsive: true, displayModeBar: "hover",
  modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d"]};

function element(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined && text !== null) made.textContent = text;
  if (className) made.className = className;
  return made;
}

// Plotly takes a few tags for markup and would draw the rest of a name without them.
const plain = (text) => String(text ?? "").replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const known = (value) => typeof value === "number" && Number.isFinite(value);
const fixed = (value, digits = 4) => (known(value) ? value.toFixed(digits) : "");
const signed = (value) => (known(value) ? (value < 0 ? "" : "+") + value.toFixed(4) : "");
const whole = (value) => (known(value) ? Math.round(value).toLocaleString("en-US") : "");
const range = (pair) => (pair ? `${signed(pair[0])} to ${signed(pair[1])}` : "");
const column = (value) => (value ? `${signed(value[0])} (${value[1]} ${value[2]})` : "");

const ARMS = [...new Set(DATA.runs.map((run) => run.arm))];
function line(arm) {
  if (arm === "control") return {color: "#1f2328", width: 2.4};
  const place = ARMS.filter((name) => name !== "control").indexOf(arm);
  return {color: COLOURS[place % COLOURS.length], width: 1.4,
    dash: DASHES[Math.floor(place / COLOURS.length) % DASHES.length]};
}

function draw(target, traces, layout) {
  const box = typeof target === "string" ? $(target) : target;
  if (!traces.length) {
    if (box.data) Plotly.purge(box);
    box.replaceChildren(element("p", "Nothing to draw for this choice yet."));
    box.classList.add("empty");
    return;
  }
  if (box.classList.contains("empty")) box.replaceChildren();
  box.classList.remove("empty");
  const shape = {font: FONT, paper_bgcolor: "#fff", plot_bgcolor: "#fff", hovermode: "closest",
    margin: {l: 64, r: 20, t: 32, b: 56}, ...layout};
  for (const axis of ["xaxis", "yaxis"])
    shape[axis] = {gridcolor: "#eaeef2", linecolor: "#d0d7de", zeroline: false, automargin: true, ...shape[axis]};
  Plotly.react(box, traces, shape, CONFIG);
}

// Filters

function remember() {
  const now = Object.fromEntries([...FILTERS, ...SWITCHES].map((id) => [id, $(id).value]));
  try { sessionStorage.setItem("report", JSON.stringify({...now, top: window.scrollY})); } catch { /* private */ }
}

function recall() {
  try { return JSON.parse(sessionStorage.getItem("report")) || {}; } catch { return {}; }
}

function fill(id, values) {
  const box = $(id), all = element("option", "all");
  all.value = "";
  box.replaceChildren(all, ...values.map((value) => {
    const option = element("option", value);
    option.value = value;
    return option;
  }));
}

function chosen() {
  const want = Object.fromEntries(FILTERS.map((id) => [id, $(id).value]));
  const text = want.text.toLowerCase();
  return DATA.runs.filter((run) => ["wave", "arm", "seed", "state"].every(
    (name) => !want[name] || String(run[name]) === want[name])
    && (!text || [run.run_id, run.change, run.message, run.hypothesis].join(" ").toLowerCase().includes(text)));
}

const inWave = (name) => !$("wave").value || $("wave").value === name;

// Tables

function row(cells, tag = "td") {
  const made = element("tr");
  for (const [text, className] of cells) made.append(element(tag, text, className));
  return made;
}

function makeTable(heads, rows) {
  const table = element("table"), head = element("thead"), body = element("tbody"), box = element("div");
  head.append(row(heads, "th"));
  body.append(...rows.map((cells) => row(cells)));
  table.append(head, body);
  box.className = "scroll";
  box.append(table);
  return box;
}

const COLUMNS = [
  ["run", (r) => r.run_id], ["wave", (r) => r.wave], ["arm", (r) => r.arm], ["seed", (r) => r.seed, whole, 1],
  ["state", (r) => r.state], ["change", (r) => r.change], ["bpb", (r) => r.val_bpb, fixed, 1],
  ["before packing", (r) => r.prequant_val_bpb, fixed, 1], ["held-out", (r) => r.held_out_val_bpb, fixed, 1],
  ["train loss", (r) => r.train_loss, fixed, 1], ["steps", (r) => r.steps, whole, 1],
  ["tokens", (r) => r.tokens, whole, 1], ["ms a step", (r) => r.step_ms && r.step_ms.median, (v) => fixed(v, 1), 1],
  ["seconds", (r) => r.train_seconds, (v) => fixed(v, 1), 1],
  ["progress", (r) => r.progress, (v) => fixed(v, 3), 1], ["mean LR", (r) => r.mean_lr_scale, (v) => fixed(v, 3), 1],
  ["bytes", (r) => r.total_bytes, whole, 1], ["message", (r) => r.message],
];
let sorting = null; // [column, descending]; as in the file until a head is clicked

function runsTable(runs) {
  const head = element("tr"), body = $("runs").tBodies[0];
  COLUMNS.forEach(([name, , , number], place) => {
    const button = element("button", name + (sorting && sorting[0] === place ? (sorting[1] ? " ▾" : " ▴") : ""));
    button.type = "button";
    button.onclick = () => {
      sorting = sorting && sorting[0] === place ? [place, !sorting[1]] : [place, false];
      runsTable(chosen());
    };
    const cell = element("th", undefined, number ? "number" : "");
    cell.append(button);
    head.append(cell);
  });
  $("runs").tHead.replaceChildren(head);
  const order = [...runs];
  if (sorting) {
    const read = COLUMNS[sorting[0]][1], way = sorting[1] ? -1 : 1;
    const nothing = (value) => value === null || value === undefined || value === "";
    order.sort((a, b) => {
      const [x, y] = [read(a), read(b)];
      if (nothing(x) || nothing(y)) return nothing(x) - nothing(y);
      return way * (known(x) && known(y) ? x - y : String(x).localeCompare(String(y)));
    });
  }
  body.replaceChildren(...order.map((run) => row(COLUMNS.map(([name, read, show, number]) => {
    const value = read(run), text = name === "seed" ? value : show ? show(value) : value;
    const wide = ["message", "change"].includes(name) && value ? "wide" : "";
    return [text, number ? "number" : name === "state" ? String(value).replace(/\W/g, "") : wide];
  }))));
  $("shown").textContent = `${runs.length} of ${DATA.runs.length} runs`;
}

// Waves

function summaries() {
  const box = $("summaries");
  box.replaceChildren();
  for (const wave of DATA.waves.filter((wave) => inWave(wave.name))) {
    box.append(element("h3", wave.name), element("p", wave.question || ""));
    for (const group of DATA.groups.filter((group) => group.wave === wave.name)) {
      for (const [name, text] of [["Counts ", group.counts], ["Regime ", group.regime], ["Noise ", group.noise]]) {
        const fact = element("p", undefined, "facts");
        fact.append(element("b", name), text);
        box.append(fact);
      }
    }
    if (wave.unreadable) box.append(element("p", `${wave.unreadable} unreadable line(s) were skipped.`, "facts"));
  }
  if (!box.children.length) box.append(element("p", "No results yet.", "empty"));
}

function effectTraces(effects) {
  const names = effects.map((e) => plain(e.arm)), traces = [];
  const segment = (key, width) => {
    for (const [verdict, color] of Object.entries(VERDICTS)) {
      const x = [], y = [];
      effects.forEach((e, place) => {
        if (e[key] && e.verdict === verdict) { x.push(...e[key], null); y.push(names[place], names[place], null); }
      });
      if (x.length) traces.push({x, y, mode: "lines", line: {color, width}, hoverinfo: "skip", showlegend: false});
    }
  };
  segment("family", 1.2);
  segment("interval", 5);
  const dots = effects.flatMap((e, place) => e.pairs.map(([seed, value]) => [value, names[place], seed, e.verdict]));
  traces.push({x: dots.map((d) => d[0]), y: dots.map((d) => d[1]), mode: "markers", showlegend: false,
    marker: {size: 6, color: "#fff", line: {width: 1.2, color: dots.map((d) => VERDICTS[d[3]])}},
    text: dots.map((d) => `seed ${d[2]}`), hovertemplate: "%{y}, %{text}: %{x:+.4f}<extra></extra>"});
  traces.push({x: effects.map((e) => e.mean), y: names, mode: "markers", showlegend: false,
    marker: {symbol: "diamond", size: 9, color: effects.map((e) => VERDICTS[e.verdict])},
    text: effects.map((e) => `${e.verdict}, n ${e.n}<br>${plain(e.change)}<br>${plain(e.hypothesis)}`),
    hovertemplate: "%{y}: %{x:+.4f}<br>%{text}<extra></extra>"});
  return traces;
}

function effectsOf(group, box) {
  const plot = element("div"), shown = group.effects.filter((e) => known(e.mean));
  box.append(element("h3", group.title), plot);
  const band = {type: "rect", yref: "paper", y0: 0, y1: 1, x0: -group.floor, x1: group.floor, line: {width: 0},
    fillcolor: "#d0d7de", opacity: 0.5, layer: "below"};
  const zero = {type: "line", yref: "paper", y0: 0, y1: 1, x0: 0, x1: 0, line: {color: "#24292f", width: 1}};
  const ends = shown.flatMap((e) => [...e.pairs.map((pair) => pair[1]), ...(e.family || [])]);
  const low = Math.min(...ends, -group.floor), high = Math.max(...ends, group.floor), pad = 0.05 * (high - low) || 0.01;
  draw(plot, shown.length ? effectTraces(shown) : [], {height: 130 + 26 * shown.length, shapes: [band, zero],
    xaxis: {title: {text: "bpb less the control's", standoff: 8}, hoverformat: "+.4f", range: [low - pad, high + pad]},
    yaxis: {type: "category", autorange: "reversed", categoryorder: "array",
      categoryarray: shown.map((e) => plain(e.arm)), ticks: ""}});
  const heads = ["arm", "change", "n", "difference", "SD", "95 %", "family-wise", "p", "verdict", "same steps",
    "same time", "hypothesis"];
  const numbers = [2, 3, 4, 5, 6, 7, 9, 10];
  box.append(makeTable(heads.map((head, place) => [head, numbers.includes(place) ? "number" : ""]),
    group.effects.map((e) => [e.arm, e.change, e.n, signed(e.mean), fixed(e.sd), range(e.interval), range(e.family),
      known(e.p) ? (e.p < 0.001 ? "<0.001" : e.p.toFixed(3)) : "", e.verdict, column(e.same_steps),
      column(e.same_time), e.hypothesis].map((text, place) => [text, numbers.includes(place) ? "number"
      : place === 8 ? e.verdict.split(" ")[0] : [1, 11].includes(place) && text ? "wide" : ""]))));
  box.append(element("p", group.note, "note"));
  for (const t of group.trends) {
    const values = t.levels.map((level, place) => `${level}: ${signed(t.means[place])}`).join(", ");
    box.append(element("p", `${t.knob} ${t.verdict} (Page's test, Holm, p ${fixed(t.p, 3)}): ${values}`, "note"));
  }
  for (const [arm, selection, held] of group.held_out) {
    const text = `${arm}: ${signed(selection.mean)} on the text it was chosen by, ${signed(held.mean)} held out`;
    box.append(element("p", text, "note"));
  }
}

// Plots of runs

function along(run, points) {
  const perStep = run.tokens_per_step || (run.tokens && run.steps ? run.tokens / run.steps : null);
  const read = {steps: (p) => p[0], seconds: (p) => (known(p[1]) ? p[1] / 1000 : null),
    tokens: (p) => (known(perStep) ? p[0] * perStep : null)}[$("axis").value];
  return points.map(read);
}

function lines(runs, key, xOf, yOf) {
  const seen = new Set(), traces = [];
  for (const run of runs) {
    const points = (run[key] || []).filter((point) => Array.isArray(point));
    if (!points.some((point) => known(yOf(point)))) continue;
    const name = plain(run.arm);
    traces.push({x: xOf(run, points), y: points.map(yOf), mode: points.length > 1 ? "lines" : "markers", name,
      legendgroup: name, showlegend: !seen.has(name), line: line(run.arm), opacity: 0.85,
      hovertemplate: `${plain(run.run_id)}<br>%{x:,.4~g}: %{y:.4f}<extra></extra>`});
    seen.add(name);
  }
  return traces;
}

function curves(runs) {
  const metric = $("metric").value, titles = {steps: "step", seconds: "training seconds", tokens: "tokens trained"};
  const traces = lines(runs, metric, along, (point) => point[2]);
  const good = runs.filter((run) => ["ok", "running"].includes(run.state)); // the axis is theirs, if there are any
  const tail = (run) => (run[metric] || []).map((point) => point[2]).filter(known);
  const ends = (good.some((run) => tail(run).length) ? good : runs).flatMap((run) => {
    const values = tail(run);
    return values.slice(Math.floor(values.length / 10));
  });
  const low = Math.min(...ends), high = Math.max(...ends), pad = 0.06 * (high - low) || 0.1;
  draw("curves", traces, {height: 440, xaxis: {title: {text: titles[$("axis").value]}, rangemode: "tozero"},
    yaxis: {title: {text: metric === "curve" ? "validation bpb" : "training loss, nats a token"},
      range: [low - pad, high + pad]}});
}

function rates(runs) {
  draw("rates", lines(runs, "lr_trace", (_, points) => points.map((p) => p[0]), (p) => p[1]), {height: 330,
    xaxis: {title: {text: "progress of the run"}, range: [0, 1.02]},
    yaxis: {title: {text: "learning-rate scale"}, rangemode: "tozero"}});
}

function sizes(runs) {
  const first = new Map();
  for (const run of runs) if (run.groups && !first.has(`${run.wave} ${run.arm}`)) first.set(`${run.wave} ${run.arm}`, run);
  const shown = [...first.values()], label = (run) => plain($("wave").value ? run.arm : `${run.wave} ${run.arm}`);
  const names = [...new Set(shown.flatMap((run) => Object.keys(run.groups)))], y = shown.map(label);
  const bytes = (run, name) => (run.groups[name] ? run.groups[name].bytes ?? null : null);
  const bar = (name, x, color) => ({type: "bar", orientation: "h", y, x, name: plain(name), marker: {color},
    hovertemplate: "%{y}, %{fullData.name}: %{x:,} bytes<extra></extra>"});
  const traces = shown.length ? names.map((name, place) => bar(name, shown.map((run) => bytes(run, name)),
    COLOURS[place % COLOURS.length])) : [];
  if (shown.length) traces.push(bar("code", shown.map((run) => run.code_bytes), "#8c959f"));
  const most = Math.max(...shown.map((run) => run.total_bytes || 0), 0), near = most > 0.5 * DATA.limit;
  const limit = {type: "line", yref: "paper", y0: 0, y1: 1, x0: DATA.limit, x1: DATA.limit,
    line: {color: "#c4372c", width: 2, dash: "dash"}};
  draw("sizes", traces, {height: 150 + 24 * shown.length, barmode: "stack", bargap: 0.35, shapes: near ? [limit] : [],
    legend: {orientation: "h", y: 1, yanchor: "bottom"}, margin: {l: 64, r: 20, t: 50, b: 48},
    xaxis: {title: {text: `bytes, first run of each arm (limit ${whole(DATA.limit)})`}, separatethousands: true},
    yaxis: {type: "category", autorange: "reversed", ticks: ""}});
}

// Waves together

function intervals(name, color, points, offset) {
  const found = points.filter(([, value]) => value);
  const half = (value, side) => (known(value[side]) ? Math.abs(value[side] - value.mean) : 0);
  return {name, x: found.map(([, v]) => v.mean), y: found.map(([place]) => place + offset), mode: "markers",
    marker: {color, size: 8}, error_x: {type: "data", symmetric: false, color, thickness: 1.6, width: 4,
      array: found.map(([, v]) => half(v, "high")), arrayminus: found.map(([, v]) => half(v, "low"))},
    hovertemplate: "%{x:+.4f}<extra>" + name + "</extra>"};
}

function ablations() {
  const box = $("ablations");
  box.replaceChildren();
  const found = [...DATA.groups.filter((group) => group.ablation && inWave(group.wave)).map((group) => group.ablation),
    ...($("wave").value ? [] : DATA.across.ablations)];
  for (const one of found) {
    const plot = element("div");
    box.append(element("h3", one.title), plot);
    const places = one.lines.map((_, place) => place), zero = {type: "line", yref: "paper", y0: 0, y1: 1, x0: 0, x1: 0,
      line: {color: "#24292f", width: 1}};
    draw(plot, [intervals("alone", "#0969da", one.lines.map((l, i) => [i, l[1]]), -0.12),
      intervals("with all others there", "#cf6a00", one.lines.map((l, i) => [i, l[2]]), 0.12)],
    {height: 150 + 34 * places.length, shapes: [zero], legend: {orientation: "h", y: 1, yanchor: "bottom"},
      margin: {l: 64, r: 20, t: 40, b: 56}, xaxis: {title: {text: "bpb; left is a gain", standoff: 8}},
      yaxis: {tickvals: places, ticktext: one.lines.map((l) => plain(l[0])), range: [places.length - 0.5, -0.5],
        ticks: ""}});
    if (one.interaction) {
      const {mean, low, high} = one.interaction;
      const text = known(low) ? ` (95 % ${signed(low)} to ${signed(high)})` : "";
      box.append(element("p", `The whole less the sum of its parts: ${signed(mean)}${text}.`, "note"));
    }
  }
  if (!found.length) box.append(element("p", "No wave here has a whole and its parts.", "empty"));
}

function together() {
  const heads = [["wave"], ["regime", "number"], ["control bpb", "number"], ["best arm beyond noise"], ["its bpb", "number"]];
  const waves = DATA.across.steps.map(([wave, regime, control, best, bpb]) => [[wave], [regime, "number"],
    [fixed(control), "number"], [best || "none"], [fixed(bpb), "number"]]);
  $("progress").replaceChildren(...(waves.length ? [makeTable(heads, waves)] : []));
  const rows = DATA.across.ladders.map((one) => [[one.change], [one.parent], [one.rungs.map(([length, effect]) =>
    `${length} ${one.unit}: ${signed(effect.mean)}`).join("; ")], [one.slope ? signed(one.slope.mean) : "", "number"],
  [one.says, one.says === "sign flips" ? "worse" : ""]]);
  $("ladders").replaceChildren(...(rows.length ? [element("h3", "Effects at several lengths of run"),
    makeTable([["change"], ["made to"], ["effect"], ["slope a doubling", "number"], ["sign"]], rows)] : []));
}

function refresh() {
  const runs = chosen(), box = $("effects");
  remember();
  summaries();
  box.replaceChildren();
  DATA.groups.filter((group) => inWave(group.wave)).forEach((group) => effectsOf(group, box));
  if (!box.children.length) box.append(element("p", "No results yet.", "empty"));
  curves(runs);
  rates(runs);
  ablations();
  together();
  sizes(runs);
  runsTable(runs);
}

function start() {
  const values = (name) => [...new Set(DATA.runs.map((run) => String(run[name])))];
  fill("wave", DATA.waves.map((wave) => wave.name));
  for (const name of ["arm", "seed", "state"]) fill(name, values(name));
  const before = recall();
  for (const id of [...FILTERS, ...SWITCHES]) {
    if (before[id] !== undefined) $(id).value = before[id];
    if ($(id).selectedIndex === -1) $(id).selectedIndex = 0;
    $(id).addEventListener(id === "text" ? "input" : "change", refresh);
  }
  $("clear").onclick = () => { FILTERS.forEach((id) => { $(id).value = ""; }); refresh(); };
  $("written").textContent = `Written ${DATA.written}`
    + (DATA.watch ? `; this page reloads itself every ${Math.max(1, Math.round(DATA.watch))} s` : "");
  refresh();
  if (DATA.watch && before.top) window.scrollTo(0, before.top);
  window.addEventListener("pagehide", remember);
  document.body.dataset.fetched = performance.getEntriesByType("resource").length;
  document.body.dataset.drawn = "yes";
}

start();
