"use strict";

// Everything that comes from a model goes into the page by textContent alone.

const POLL_SECONDS = 5;
const PALETTE = ["#1f77d0", "#d9660a", "#2a9d5c", "#b04fb5", "#c9a227", "#17a2b8", "#e0457b", "#7a6f5d", "#5b5fc7", "#6b8e23"];
const GATE = { a: "agree", c: "conflict", n: "neutral", u: "undecided" };

const AREA = { stackgroup: "one", line: { width: 0.5 } };
const CLASSES = ["agree", "neutral", "undecided", "conflict"];
const gateLines = (suffix) => CLASSES.map((name) => [name + suffix, name, { ...AREA, color: name }]);
// [title, what to see, [[series, name, style]…], layout]
const DETAILS = [
  ["Gate, all tokens", "Share of response tokens where teacher and verifier agree or not, or the teacher is neutral. "
    + "Undecided, and treated as conflict: the verifier says nothing, in groups of one outcome or by the method.",
    gateLines(""), { yaxis: { range: [0, 1], tickformat: ".0%" } }],
  ["Gate by strength", "The same as shares of the sum of |delta|: most tokens have a tiny one.",
    gateLines("_by_delta"), { yaxis: { range: [0, 1], tickformat: ".0%" } }],
  ["Gate, right responses", "Agree: the teacher wants the token up in a response that is right.",
    gateLines("_right"), { yaxis: { range: [0, 1], tickformat: ".0%" } }],
  ["Gate, wrong responses", "Agree: the teacher wants the token down in a response that is wrong.",
    gateLines("_wrong"), { yaxis: { range: [0, 1], tickformat: ".0%" } }],
  ["Strength of the teacher's preference", "Mean |delta| in nats, by the gate's verdict.",
    CLASSES.map((name) => [`abs_delta_${name}`, name, { color: name }]), {}],
  ["Teacher rollouts", "Weight by the schedule, share of the teacher's rollouts that were approved, prompts without any.",
    [["teacher_weight", "weight"], ["teacher_approval", "approval"], ["teacher_shortfall", "shortfall"]],
    { yaxis: { rangemode: "tozero" } }],
  ["Distance to teacher and start", "Reverse KL in nats a token: to the teacher it should fall, to the reference not explode.",
    [["reverse_kl", "to the teacher"], ["reference_kl", "to the reference"]], {}],
  ["Log-prob gap of trainer and engine", "|s - b| in nats. High: stale weights, another temperature, or low precision.",
    [["logprob_gap", "mean"], ["logprob_gap_p95", "95th percentile"], ["logprob_gap_max", "largest"]],
    { yaxis: { type: "log", exponentformat: "power" } }],
  ["Seconds of each stage", "Stacked: the sum is the time of a step.", "stages", {}],
  ["Memory", "MiB in use by the first rank after the step.", [["memory_mib", "memory"]], { yaxis: { rangemode: "tozero" } }],
  ["Loss and gradient norm", "The norm is that before clipping.", [["loss", "loss"], ["grad_norm", "gradient norm"]], {}],
  ["Entropy", "Nats a token; near 0 the student has stopped exploring.", [["entropy", "entropy"]],
    { yaxis: { rangemode: "tozero" } }],
  ["Responses", "Tokens of a response.", [["response_length", "mean"], ["response_length_max", "longest"]],
    { yaxis: { rangemode: "tozero" } }],
  ["Shares of responses", "Cut off at the limit; left out by filters; groups of one outcome, where the gate has nothing to read.",
    [["truncated", "truncated"], ["filtered", "left out"], ["uniform_groups", "uniform groups"]],
    { yaxis: { range: [0, 1], tickformat: ".0%" } }],
  ["Speed", "Response tokens a second of the whole step.", [["tokens_per_second", "tokens/s"]], { yaxis: { rangemode: "tozero" } }],
];

const page = { data: null, seen: "", run: 0, step: null, response: 0, token: 0, place: -1, shown: [], pointer: {} };
const at = (id) => document.getElementById(id);

function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const percent = (value) => (value === null ? "–" : `${(100 * value).toFixed(1)} %`);

// ---- data ---------------------------------------------------------------------------------------------------

async function unpacked(bytes) {
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
}

async function poll() {
  try {
    const answer = await fetch(`data?seen=${page.seen}`);
    if (answer.status === 200) {
      page.data = await unpacked(await answer.arrayBuffer());
      page.seen = answer.headers.get("X-State");
      render();
    }
    say(answer.ok ? "" : await answer.text());
  } catch (error) {
    say(`The server does not answer (${error.message}); this is what it said last.`);
  }
  setTimeout(poll, 1000 * POLL_SECONDS);
}

function say(text) {
  at("trouble").textContent = text;
  at("trouble").hidden = !text;
}

// ---- charts -------------------------------------------------------------------------------------------------

function figure(parent, key, title, caption, traces, layout) {
  let plot = document.getElementById(key);
  if (!plot) {
    const box = element("figure");
    plot = element("div", undefined, "plot");
    plot.id = key;
    box.append(element("h3"), plot, element("figcaption", caption));
    parent.append(box);
  }
  plot.parentElement.querySelector("h3").textContent = title;
  plot.setAttribute("role", "img");
  plot.setAttribute("aria-label", `${title}. ${caption}`);
  const axis = { gridcolor: colour("line"), zerolinecolor: colour("line") };
  const whole = {
    margin: { l: 55, r: 10, t: 28, b: 35 },
    paper_bgcolor: colour("paper"),
    plot_bgcolor: colour("paper"),
    font: { color: colour("ink"), size: 12 },
    hovermode: "x unified",
    hoverlabel: { namelength: -1, bgcolor: colour("panel"), bordercolor: colour("line") },
    legend: { orientation: "h", y: -0.18 },
    showlegend: traces.filter((trace) => trace.showlegend !== false).length > 1,
    uirevision: key,
    ...layout,
    xaxis: { title: { text: "step", standoff: 2 }, ...axis, ...layout.xaxis },
    yaxis: { ...axis, ...layout.yaxis },
  };
  Plotly.react(plot, traces, whole, {
    displaylogo: false, responsive: true, modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
  });
}

function translucent(hex, alpha) {
  const number = parseInt(hex.slice(1), 16);
  return `rgba(${number >> 16}, ${(number >> 8) & 255}, ${number & 255}, ${alpha})`;
}

// Rows of [step, mean, low, high, runs] as a line and its band.
function band(points, group, hue, style) {
  const column = (index) => points.map((point) => point[index]);
  const key = `${group.members[0]}/${style.kind}`;
  const ofRuns = ([, , , , runs]) => (group.members.length > 1 ? `, ${runs} of ${group.members.length} runs` : "");
  const edge = { x: column(0), mode: "lines", line: { width: 0 }, hoverinfo: "skip", showlegend: false, legendgroup: key };
  return [
    { ...edge, y: column(2) },
    { ...edge, y: column(3), fill: "tonexty", fillcolor: translucent(hue, 0.15) },
    {
      x: column(0), y: column(1), name: `${group.name}, ${style.kind}`, legendgroup: key, mode: "lines+markers",
      line: { color: hue, dash: style.dash }, marker: { color: hue, size: 6, symbol: style.symbol },
      customdata: points.map((point) => [point[2], point[3], ofRuns(point)]),
      hovertemplate: "%{y:.1%} (%{customdata[0]:.1%} to %{customdata[1]:.1%}%{customdata[2]})",
    },
  ];
}

function renderLearning() {
  const traces = [];
  page.data.groups.forEach((group, index) => {
    const hue = PALETTE[index % PALETTE.length];
    if (group.heldout.length) traces.push(...band(group.heldout, group, hue, { kind: "held-out", dash: "solid", symbol: "circle" }));
    if (group.training.length) traces.push(...band(group.training, group, hue, { kind: "training", dash: "dot", symbol: "x-thin" }));
    if (group.teacher !== null) {
      const steps = [...group.heldout, ...group.training].map((point) => point[0]);
      traces.push({
        x: [Math.min(...steps), Math.max(...steps)], y: [group.teacher, group.teacher], name: `${group.name}, teacher`, mode: "lines",
        line: { color: hue, dash: "dash", width: 1 }, hovertemplate: "%{y:.1%}",
      });
    }
  });
  figure(at("learning"), "chart-learning", "Pass rate",
    "Held-out: 95 % interval over runs and problems. Training: means of some steps at a time, interval over runs and those steps.",
    traces, { yaxis: { tickformat: ".0%", rangemode: "tozero" } });
}

function renderAcross() {
  const name = at("measure").value;
  const groupOf = (run) => page.data.groups.findIndex((group) => group.members.includes(run));
  const traces = page.data.runs.map((run, index) => ({
    x: run.series.step || [], y: run.series[name] || [], name: run.name, mode: "lines", hovertemplate: "%{y:.4~g}",
    line: { color: PALETTE[groupOf(index) % PALETTE.length], width: 1.5 },
  }));
  figure(at("across"), "chart-across", name, "Every run, in its group's colour.", traces, {});
}

function renderDetails() {
  const run = page.data.runs[page.run];
  const steps = run.series.step || [];
  for (const [title, caption, lines, layout] of DETAILS) {
    const wanted = lines === "stages"
      ? Object.keys(run.series).filter((name) => name.startsWith("seconds/")).map((name) => [name, name.slice(8), AREA])
      : lines;
    const traces = wanted.filter(([series]) => (run.series[series] || []).some((value) => value !== null))
      .map(([series, name, style = {}]) => ({
        x: steps, y: run.series[series], name, mode: "lines", hovertemplate: "%{y:.4~g}", ...style,
        ...(style.color && {
          line: { color: colour(style.color), ...style.line },
          ...(style.stackgroup && { fillcolor: translucent(colour(style.color), 0.55) }),
        }),
      }));
    if (title.startsWith("Log-prob gap") && run.gap_limit !== null && steps.length) {
      traces.push({
        x: [steps[0], steps[steps.length - 1]], y: [run.gap_limit, run.gap_limit], name: "alarm of the mean", mode: "lines",
        line: { color: colour("conflict"), dash: "dash" }, hovertemplate: "%{y:.3~g}",
      });
    }
    figure(at("details"), `chart-${title}`, title, caption, traces, layout);
  }
}

// ---- runs ---------------------------------------------------------------------------------------------------

function renderRuns() {
  const table = at("runs");
  table.replaceChildren();
  const head = table.createTHead().insertRow();
  const columns = ["run", "method", "learning rate", "seed", "steps", "state", "held-out before", "after", "time", "student", "teacher"];
  for (const name of columns) head.append(element("th", name));
  const body = table.createTBody();
  for (const run of page.data.runs) {
    const row = body.insertRow();
    const cells = [
      run.name, run.method ?? "–", run.learning_rate ?? "–", run.seed ?? "–", run.steps ? `${run.step} of ${run.steps}` : run.step,
      run.ended ? "finished" : "not at its end", percent(run.before ?? null), percent(run.after ?? null),
      `${(run.seconds / 60).toFixed(1)} min`, run.student ?? "–", run.teacher ?? "–",
    ];
    for (const cell of cells) row.append(element("td", cell));
  }
  at("alarms").replaceChildren(...page.data.runs.flatMap((run) =>
    run.alarms.map((alarm) => element("li", `${run.name}: ${alarm}`))));
}

function fill(select, entries, chosen) {
  select.replaceChildren(...entries.map(([value, text]) => {
    const option = element("option", text);
    option.value = value;
    return option;
  }));
  const known = entries.some(([value]) => String(value) === String(chosen));
  if (entries.length) select.value = known ? chosen : entries[0][0];
}

// ---- token viewer -------------------------------------------------------------------------------------------

const mean = (values) => (values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : 0);

// Without a teacher, the student's own.
const surprise = (sample) => -mean(sample.tokens.teacher || sample.tokens.student);
// What was left out of training has no verdicts.
const verdicts = (sample) => [...(sample.tokens.gate || "")];
const conflictShare = (sample) => mean(verdicts(sample).map((letter) => (letter === "c" ? 1 : 0)));

function renderSteps() {
  const samples = page.data.runs[page.run].samples;
  at("viewer").hidden = !samples.length;
  at("nothing").hidden = Boolean(samples.length);
  at("nothing").textContent = page.data.runs[page.run].samples_left_out
    ? "The responses of this run are too long for a page of so many runs: give fewer."
    : "This run kept no responses: logging.samples_every says at which steps it does.";
  if (!samples.length) return;
  const steps = [...new Set(samples.map((sample) => sample.step))];
  fill(at("step"), steps.map((step) => [step, step]), page.step ?? steps[steps.length - 1]);
  page.step = Number(at("step").value);
  renderResponses();
}

function renderResponses() {
  const outcome = at("outcome").value;
  const order = { surprise, conflict: conflictShare }[at("sort").value];
  page.shown = page.data.runs[page.run].samples.filter((sample) => sample.step === page.step)
    .filter((sample) => outcome === "all" || String(sample.outcome) === outcome);
  if (order) page.shown.sort((one, other) => order(other) - order(one));
  const entries = page.shown.map((sample, index) => [index, [
    sample.outcome ? "right" : sample.reason, `${sample.tokens.text.length} tokens`, `surprise ${surprise(sample).toFixed(3)}`,
    sample.trained ? `conflict ${percent(conflictShare(sample))}` : "left out of training",
    visible(sample.tokens.text.join("").slice(0, 120)).replaceAll("\n", " "),
  ].join("  ·  ")]);
  page.response = Math.min(page.response, Math.max(0, page.shown.length - 1));
  fill(at("responses"), entries, page.response);
  renderResponse();
}

// Control characters, and those that turn or hide text, as something to see.
function visible(text) {
  return text.replace(/(?![\n\t])[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]/gu,
    (character) => `⟨U+${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`)
    .replaceAll("\n", "⏎\n").replaceAll("\t", "⇥\t");
}

function renderResponse() {
  const sample = page.shown[page.response];
  at("prompt").textContent = sample ? visible(sample.prompt) : "No response of this step has this outcome.";
  at("response-title").textContent = sample
    ? `Response: ${sample.outcome ? "right" : sample.reason}; it answers ${visible(sample.extracted ?? "nothing")}, `
      + `asked for was ${visible(sample.answer)}; o = ${sample.outcome_advantage ?? "–"}${sample.trained ? "" : "; left out of training"}`
    : "Response";
  at("tokens").replaceChildren();
  if (!sample) return chooseToken(null);
  const { text, delta, gate } = sample.tokens;
  at("tokens").append(...text.map((piece, index) => {
    const token = element("span", visible(piece), gate ? `token ${GATE[gate[index]]}` : "token");
    if (!piece) token.append(element("span", "·", "stand-in"));
    // Half as strong at |delta| = 1 nat as it can get.
    const strength = delta ? Math.abs(delta[index]) : 0;
    token.style.setProperty("--strength", `${(70 * strength) / (1 + strength)}%`);
    token.dataset.index = index;
    token.id = `token-${index}`;
    token.setAttribute("role", "option");
    return token;
  }));
  chooseToken(Math.min(page.token, text.length - 1));
}

const number = (values, index) => (values ? values[index].toFixed(4) : "–");

function chooseToken(index) {
  const box = at("tokens");
  for (const before of box.querySelectorAll(".chosen")) {
    before.classList.remove("chosen");
    before.removeAttribute("aria-selected");
  }
  box.removeAttribute("aria-activedescendant");
  at("token").replaceChildren();
  if (index === null || index < 0) return;
  Object.assign(page, { token: index, place: -1 });
  const chosen = box.children[index];
  chosen.classList.add("chosen");
  chosen.setAttribute("aria-selected", "true");
  box.setAttribute("aria-activedescendant", chosen.id);
  const { tokens } = page.shown[page.response];
  const rows = [
    ["token", visible(tokens.text[index]) || "part of a character"], ["gate", tokens.gate ? GATE[tokens.gate[index]] : "–"],
    ["s student", number(tokens.student, index)], ["q teacher", number(tokens.teacher, index)],
    ["r reference", number(tokens.reference, index)], ["b rollout", number(tokens.behaviour, index)],
    ["delta = q − s", number(tokens.delta, index)], ["A advantage", number(tokens.advantage, index)],
    ["rank under the teacher", tokens.rank ? tokens.rank[index] : "–"], ["position", `${index + 1} of ${tokens.text.length}`],
  ];
  at("token").append(...rows.map(([name, value]) => {
    const row = element("div");
    row.append(element("dt", name), element("dd", value));
    return row;
  }));
}

// The greatest |delta|, then, as long as nothing else is chosen, the one after it.
function chooseNextGreatest() {
  const delta = page.shown[page.response].tokens.delta || [0];
  const order = delta.map((_, index) => index).sort((one, other) => Math.abs(delta[other]) - Math.abs(delta[one]));
  const place = (page.place + 1) % order.length;
  chooseToken(order[place]);
  page.place = place;
}

function onTokenKey(event) {
  const count = at("tokens").children.length;
  const moves = {
    ArrowRight: page.token + 1, ArrowDown: page.token + 1, ArrowLeft: page.token - 1, ArrowUp: page.token - 1,
    Home: 0, End: count - 1, n: null,
  };
  if (!count || !(event.key in moves) || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  if (event.key === "n") chooseNextGreatest();
  else chooseToken(Math.max(0, Math.min(count - 1, moves[event.key])));
  at("tokens").querySelector(".chosen").scrollIntoView({ block: "nearest" });
}

// ---- the whole ----------------------------------------------------------------------------------------------

function render() {
  const { runs, made } = page.data;
  at("made").textContent = `${document.body.dataset.live ? "following, last change" : "made"} ${new Date(made).toLocaleString()}`;
  page.run = Math.min(page.run, runs.length - 1);
  fill(at("run"), runs.map((run, index) => [index, run.name]), page.run);
  const measures = [...new Set(runs.flatMap((run) => Object.keys(run.series)))].filter((name) => name !== "step").sort();
  fill(at("measure"), measures.map((name) => [name, name]), at("measure").value || "reverse_kl");
  renderRuns();
  renderCharts();
  renderSteps();
}

function renderCharts() {
  renderLearning();
  renderAcross();
  renderDetails();
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  if (page.data) renderCharts();
}

function listen() {
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  setTheme(dark.matches ? "dark" : "light");
  dark.addEventListener("change", () => setTheme(dark.matches ? "dark" : "light"));
  at("theme").addEventListener("click", () => setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
  at("measure").addEventListener("change", renderAcross);
  at("run").addEventListener("change", (event) => {
    Object.assign(page, { run: Number(event.target.value), step: null, response: 0, token: 0 });
    renderDetails();
    renderSteps();
  });
  at("step").addEventListener("change", (event) => {
    Object.assign(page, { step: Number(event.target.value), response: 0, token: 0 });
    renderResponses();
  });
  for (const id of ["outcome", "sort"]) {
    at(id).addEventListener("change", () => {
      Object.assign(page, { response: 0, token: 0 });
      renderResponses();
    });
  }
  at("responses").addEventListener("change", (event) => {
    Object.assign(page, { response: Number(event.target.value), token: 0 });
    renderResponse();
  });
  at("tokens").addEventListener("keydown", onTokenKey);
  at("tokens").addEventListener("pointermove", (event) => {
    const token = event.target.closest("[data-index]");
    // Text that scrolls under a resting pointer chooses nothing.
    const moved = event.clientX !== page.pointer.x || event.clientY !== page.pointer.y;
    page.pointer = { x: event.clientX, y: event.clientY };
    if (token && moved && Number(token.dataset.index) !== page.token) chooseToken(Number(token.dataset.index));
  });
}

async function main() {
  listen();
  page.data = await unpacked(Uint8Array.from(atob(at("data").textContent), (character) => character.charCodeAt(0)));
  render();
  document.body.dataset.ready = "yes";
  page.seen = document.body.dataset.live;
  if (page.seen) setTimeout(poll, 1000 * POLL_SECONDS);
}

main();
