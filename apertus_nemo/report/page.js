"use strict";
// Draws the curves of the report with plotly.js, and answers to pointer and keyboard alike. Nothing of a record is ever
// handed to plotly as text (it reads some HTML): runs are called by their letters.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const charts = [...document.querySelectorAll(".chart")];
  const slider = document.getElementById("step");
  const dashes = ["solid", "dash", "dot", "dashdot", "longdash", "longdashdot"];
  const strokes = ["", "7 4", "2 3", "8 3 2 3", "12 4", "12 3 2 3"];
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const shown = new Set(data.runs.map((run) => run.label));
  const all = [data.first, data.last];
  let range = [...all];
  let logarithmic = false;
  let marked = true;
  const ends = data.runs.map((run) => run.curves.loss.steps.at(-1)).filter((step) => step !== undefined);
  let at = ends.length ? Math.min(...ends) : data.last; // the last step that all have

  data.runs.forEach((run, index) => {
    for (const element of document.querySelectorAll(`[data-run="${run.label}"]`)) {
      element.style.setProperty("--mine", `var(--s${index % 8})`);
      const line = element.querySelector("line");
      if (line) line.setAttribute("stroke-dasharray", strokes[index % strokes.length]);
    }
  });

  // -- what is drawn

  // Marks stand on an axis of their own, from 0 to 1: a trace for each run and kind, behind which there is no other text
  // than these words and numbers.
  const kinds = {
    attempt: { says: (number, step) => `attempt ${number} begins with step ${step}`, symbol: "triangle-down", dash: "6px,4px", colour: "--bad" },
    stage: { says: (number, step) => `stage ${number} begins with step ${step}`, symbol: "square", dash: "2px,3px", colour: "--s3" },
    checkpoint: { says: (_, step) => `checkpoint after step ${step}`, symbol: "triangle-up", dash: null, colour: "--quiet" },
  };
  const marking = data.runs.flatMap((run, index) => Object.keys(kinds).flatMap((kind) => {
    const mine = run.marks.filter((mark) => mark[0] === kind);
    return mine.length ? [{ run, index, kind, steps: mine.map((mark) => mark[1]), numbers: mine.map((mark) => mark[2]) }] : [];
  }));
  const allMarks = [...new Set(data.runs.flatMap((run) => run.marks.map((mark) => mark[1])))].sort((a, b) => a - b);

  function markTraces() {
    return marking.map(({ run, index, kind, steps, numbers }) => {
      const { says, symbol, dash, colour } = kinds[kind];
      const color = css(data.runs.length > 1 ? `--s${index % 8}` : colour);
      const row = 0.035 + 0.05 * (index % 6); // signs of several runs at one step stand above each other
      const line = dash !== null; // across the plot, with its sign at the top; else the sign alone, at the bottom
      const spread = (values, none) => (line ? values.flatMap((value) => [value, value, none]) : values);
      return {
        x: spread(steps, null),
        y: line ? steps.flatMap(() => [1 - row, 0, null]) : steps.map(() => row),
        yaxis: "y2",
        name: data.runs.length > 1 ? run.label : kind,
        type: "scatter",
        mode: line ? "lines+markers" : "markers",
        visible: marked && shown.has(run.label),
        cliponaxis: false,
        line: { color, width: 1.5, dash: dash ?? "solid" },
        marker: { color, symbol, size: line ? steps.flatMap(() => [9, 0, 0]) : 9, line: { width: 0 }, opacity: 1 },
        hovertemplate: spread(steps.map((step, i) => says(numbers[i], step.toLocaleString("en")) + (data.runs.length > 1 ? "" : "<extra></extra>")), ""),
      };
    });
  }

  function traces(name) {
    return data.runs.map((run, index) => ({
      x: run.curves[name].steps,
      y: run.curves[name].values,
      name: run.label,
      type: "scatter",
      mode: run.curves[name].steps.length === 1 ? "markers" : "lines",
      visible: shown.has(run.label),
      // The first run is the widest, so that one that lies on it is seen to lie on it.
      line: { color: css(`--s${index % 8}`), dash: dashes[index % dashes.length], width: data.runs.length > 1 && !index ? 4 : 2 },
      hovertemplate: data.runs.length > 1 ? "%{y:.6~g}" : "%{y:.6~g}<extra></extra>",
    })).concat(markTraces());
  }

  function span() {
    const margin = Math.max((range[1] - range[0]) * 0.02, 0.5);
    return [range[0] - margin, range[1] + margin];
  }

  function layout(name, width, height) {
    const axis = {
      gridcolor: css("--grid"), linecolor: css("--line"), zeroline: false, automargin: true,
      tickfont: { color: css("--quiet") }, fixedrange: false,
    };
    return {
      width, height, autosize: !width, showlegend: false, dragmode: "zoom", hovermode: "x unified",
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: css("--ink") },
      margin: { l: 48, r: 12, t: 10, b: 34 },
      hoverlabel: { bgcolor: css("--card"), bordercolor: css("--line"), font: { color: css("--ink") } },
      xaxis: { ...axis, range: span(), title: { text: "step", font: { color: css("--quiet") }, standoff: 4 }, tickformat: ",d", unifiedhovertitle: { text: "step %{x:,d}" } },
      yaxis: {
        ...axis, fixedrange: true, exponentformat: "power",
        type: logarithmic && (name === "loss" || name === "grad_norm") ? "log" : "linear",
        ...(name === "tokens_per_second" ? { rangemode: "tozero", exponentformat: "none", tickformat: ",~r" } : {}),
        ...(name === "learning_rate" ? { rangemode: "tozero" } : {}),
      },
      yaxis2: { overlaying: "y", range: [0, 1], fixedrange: true, visible: false },
    };
  }

  const settings = { displayModeBar: false, responsive: true, doubleClick: false, showTips: false, scrollZoom: false };

  function draw(width, height) {
    for (const chart of charts) Plotly.react(chart, traces(chart.dataset.curve), layout(chart.dataset.curve, width, height), settings);
  }

  // -- the steps shown

  function show(from, to) {
    const width = Math.max(Math.min(to - from, all[1] - all[0]), Math.min(4, all[1] - all[0]));
    const begin = Math.min(Math.max(from, all[0]), all[1] - width);
    range = [begin, begin + width];
    for (const chart of charts) Plotly.relayout(chart, { "xaxis.range": span(), "yaxis.autorange": true });
  }

  const actions = {
    in: () => { const middle = Math.min(Math.max(at, range[0]), range[1]), part = (range[1] - range[0]) / 4; show(middle - part, middle + part); },
    out: () => { const middle = (range[0] + range[1]) / 2, part = range[1] - range[0]; show(middle - part, middle + part); },
    left: () => { const part = (range[1] - range[0]) / 2; show(range[0] - part, range[1] - part); },
    right: () => { const part = (range[1] - range[0]) / 2; show(range[0] + part, range[1] + part); },
    all: () => show(...all),
    before: () => { const step = allMarks.findLast((mark) => mark < at); if (step !== undefined) go(step); },
    after: () => { const step = allMarks.find((mark) => mark > at); if (step !== undefined) go(step); },
    marks: (button) => {
      marked = !marked;
      button.setAttribute("aria-pressed", String(marked));
      draw();
    },
    log: (button) => {
      logarithmic = !logarithmic;
      button.setAttribute("aria-pressed", String(logarithmic));
      draw();
    },
  };
  for (const button of document.querySelectorAll("button[data-do]")) {
    button.addEventListener("click", () => actions[button.dataset.do](button));
  }
  for (const button of document.querySelectorAll("button.series")) {
    button.addEventListener("click", () => {
      const label = button.dataset.run, on = !shown.has(label);
      if (on) shown.add(label); else shown.delete(label);
      button.setAttribute("aria-pressed", String(on));
      draw();
      read(at);
    });
  }

  // -- the values at one step

  const nearest = (steps, step) => {
    let low = 0, high = steps.length - 1;
    while (low < high) { const middle = (low + high) >> 1; if (steps[middle] < step) low = middle + 1; else high = middle; }
    return low > 0 && step - steps[low - 1] <= steps[low] - step ? low - 1 : low;
  };

  function read(step) {
    at = step;
    slider.value = String(step);
    slider.setAttribute("aria-valuetext", `step ${step}`);
    document.getElementById("at").textContent = step.toLocaleString("en");
    const said = data.runs.filter((run) => shown.has(run.label)).flatMap((run) => run.marks.filter((mark) => mark[1] === step)
      .map((mark) => (data.runs.length > 1 ? `${run.label}: ` : "") + mark[3]));
    document.getElementById("marked").textContent = said.length ? ` · ${said.join(" · ")}` : "";
    const body = document.querySelector(".readout tbody");
    body.replaceChildren();
    for (const run of data.runs) {
      if (!shown.has(run.label)) continue;
      const row = body.insertRow(), head = document.createElement("th");
      head.scope = "row";
      head.textContent = data.runs.length > 1 ? run.label : "this run";
      row.append(head);
      for (const name of data.names) {
        const curve = run.curves[name], cell = row.insertCell(), index = nearest(curve.steps, step);
        // Beside a kept step there is a value near; beyond the end of the curve there is none.
        const there = curve.steps.length > 0 && Math.abs(curve.steps[index] - step) <= Math.max(curve.stretch - 1, 0);
        const value = there ? curve.values[index] : 0;
        cell.textContent = !there ? "–" : name === "tokens_per_second"
          ? value.toLocaleString("en", { maximumFractionDigits: 1, minimumFractionDigits: 1 })
          : String(Number(value.toPrecision(9)));
        if (there && curve.steps[index] !== step) {
          const where = document.createElement("span");
          where.className = "quiet";
          where.textContent = ` at ${curve.steps[index].toLocaleString("en")}`;
          cell.append(where);
        }
      }
    }
  }

  function go(step) {
    if (step < range[0] || step > range[1]) show(step - (range[1] - range[0]) / 2, step + (range[1] - range[0]) / 2);
    read(step);
    for (const chart of charts) {
      const there = data.runs.some((run) => shown.has(run.label) && run.curves[chart.dataset.curve].steps.length);
      if (there) Plotly.Fx.hover(chart, { xval: step, yval: 0 });
    }
  }
  slider.addEventListener("input", () => go(Number(slider.value)));

  // -- begin

  if (charts.length) {
    slider.min = String(data.first);
    slider.max = String(data.last);
    document.querySelector(".tools").hidden = false;
    document.querySelector(".readout").hidden = false;
    draw();
    document.getElementById("js-plotly-tester")?.setAttribute("aria-hidden", "true"); // plotly measures texts with it
    read(at);
    for (const chart of charts) {
      chart.on("plotly_hover", (event) => { if (event.event) read(Math.round(event.points[0].x)); });
      chart.on("plotly_doubleclick", () => show(...all));
      chart.on("plotly_relayout", (change) => {
        const from = change["xaxis.range[0]"], to = change["xaxis.range[1]"];
        if (typeof from === "number" && typeof to === "number") show(Math.max(from, all[0]), Math.min(to, all[1]));
      });
    }
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => draw());
  }

  // Paper is light, as wide as it is, and shows what is folded.
  let folded = [];
  addEventListener("beforeprint", () => {
    document.documentElement.classList.add("printing");
    folded = [...document.querySelectorAll("details:not([open])")];
    for (const details of folded) details.open = true;
    draw(318, 196);
  });
  addEventListener("afterprint", () => {
    document.documentElement.classList.remove("printing");
    for (const details of folded) details.open = false;
    draw();
  });
})();
