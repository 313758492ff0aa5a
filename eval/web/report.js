"use strict";
// The report: one state (setting, prompt, seed, frame), and the parts of the page that show it.

const { settings, runs, dense, metrics, columns } = pageData;
const state = { run: pageData.chosen, rows: 0, sortBy: null, descending: true };
const chosenRun = () => runs[state.run];
const promptText = (prompt) => pageData.prompts[prompt];

const curves = metrics.map((metric) => new FrameCurve(metric, pageData.num_frames, (frame, passing) => {
  if (passing && player.playing) return;
  player.pause();
  player.seek(frame);
}));
byId("curves").replaceChildren(...curves.map((curve) => curve.root));
const densityMap = new DensityMap(byId("heat"));
const plot = new TradePlot(byId("plot"), settings, runs, (setting) => choose({ setting }));
const player = new Player(pageData.num_frames, pageData.fps, (frame) => {
  for (const curve of curves) curve.moveTo(frame);
});

/** Changes the chosen video; what is not named stays, as far as such a video exists. */
function choose(wish) {
  const now = chosenRun();
  const wanted = { setting: now.setting, prompt: now.prompt, seed: now.seed, ...wish };
  const score = (run) => ["setting", "prompt", "seed"].reduce(
    (sum, key) => sum + (run[key] === wanted[key]) * (key in wish ? 10 : 1), 0);
  state.run = runs.reduce((best, run, i) => (score(run) > score(runs[best]) ? i : best), 0);
  update();
}

function update() {
  const run = chosenRun();
  const setting = settings[run.setting];
  byId("lede").innerHTML = setting.lede;
  activateTerms(byId("lede"));
  showCards(setting);
  showPickers(run);
  const partner = dense.find((other) => other.prompt === run.prompt && other.seed === run.seed);
  player.load(partner.video, run.video, `Draft, ${setting.label}`);
  const siblings = runs.filter((other) => other !== run && other.prompt === run.prompt && other.seed === run.seed);
  metrics.forEach((metric, i) => curves[i].show(
    run.curves[metric.key] ?? [],
    siblings.map((other) => other.curves[metric.key] ?? []),
    run.worst_frames[metric.key] ?? null,
  ));
  byId("density-section").hidden = !run.density_map;
  if (run.density_map) densityMap.show(run.density_map);
  showPlot();
  showTable();
}

function showCards(setting) {
  byId("cards").replaceChildren(...pageData.cards.map((card) => {
    const value = setting.values[card.key];
    const worst = setting.worst[card.key];
    return make("div", { class: "card" },
      make("div", { class: "name" }, makeTerm(card.term, card.name)),
      make("div", { class: "value" }, value == null ? shown(value, card) : value.toFixed(card.digits),
        value == null ? null : make("small", {}, card.unit === "×" ? "×" : ` ${card.unit ?? ""}`)),
      worst ? make("div", { class: "worst" }, make("span", {}, `worst ${shown(worst.value, card)}`),
        make("button", { type: "button", class: "link", click: () => watch(worst), "aria-label": `Show the worst frame by ${card.name}` }, "show")) : null);
  }));
}

/** Goes to one frame of one video. */
function watch({ run, frame }) {
  state.run = run;
  update();
  player.pause();
  player.seek(frame);
  byId("watch").scrollIntoView({ block: "start" });
}

function showPickers(run) {
  const picker = (label, values, chosen, texts, key, wide) => make("label", { class: `field${wide ? " wide" : ""}` },
    make("span", {}, label),
    make("select", { "data-key": key, disabled: values.length < 2, change: (event) => choose({ [key]: values[Number(event.target.value)] }) },
      values.map((value, i) => make("option", { value: i, selected: value === chosen }, texts[i]))));
  const holder = byId("pickers");
  const focused = holder.contains(document.activeElement) ? document.activeElement.dataset.key : null;
  const distinct = (key) => [...new Set(runs.map((other) => other[key]))].sort((a, b) => a - b);
  const [settingIds, promptIds, seedIds] = ["setting", "prompt", "seed"].map(distinct);
  holder.replaceChildren(
    picker("Setting", settingIds, run.setting, settingIds.map((i) => settings[i].label), "setting"),
    picker("Prompt", promptIds, run.prompt, promptIds.map(promptText), "prompt", true),
    ...(seedIds.length > 1 ? [picker("Seed", seedIds, run.seed, seedIds.map((i) => String(pageData.seeds[i])), "seed")] : []),
  );
  if (focused) holder.querySelector(`[data-key="${focused}"]`).focus();
}

let plotMetric = 0;
makeChoices(byId("plot-metric"), "plot-metric", metrics.map((metric) => metric.name), 0, (i) => {
  plotMetric = i;
  showPlot();
});
function showPlot() {
  plot.show(metrics[plotMetric], chosenRun().setting);
}

// The table has a row for each setting, or for each video.
makeChoices(byId("table-rows"), "rows", ["By setting", "Every video"], 0, (i) => {
  state.rows = i;
  showTable();
});
byId("table-rows").closest(".table-head").hidden = runs.length === settings.length;

function showTable() {
  const table = byId("table");
  const focused = table.contains(document.activeElement) ? document.activeElement.dataset.key : null;
  const rows = state.rows === 0
    ? settings.map((setting, i) => ({ name: setting.label, values: setting.values, chosen: i === chosenRun().setting, pick: () => choose({ setting: i }) }))
      .filter((row, i) => settings[i].num_runs > 0)
    : runs.map((run, i) => ({
      name: `${settings[run.setting].label} · ${promptText(run.prompt)} · seed ${pageData.seeds[run.seed]}`,
      values: run.values, chosen: i === state.run, pick: () => { state.run = i; update(); },
    }));
  const best = Object.fromEntries(columns.filter((column) => column.better).map((column) => {
    const values = rows.map((row) => rank(row.values[column.key], column)).filter((value) => value !== undefined);
    const value = column.better === "higher" ? Math.max(...values) : Math.min(...values);
    // as it is shown: equal figures are equally good
    return [column.key, shown(Number.isFinite(value) ? value : null, column)];
  }));
  const differ = new Set(columns.map((item) => item.key).filter((key) => new Set(rows.map((row) => row.values[key])).size > 1));
  const column = columns.find((candidate) => candidate.key === state.sortBy);
  if (state.sortBy === "name") rows.sort((a, b) => a.name.localeCompare(b.name, undefined, { numeric: true }));
  if (column) rows.sort((a, b) => (rank(a.values[column.key], column) ?? -Infinity) - (rank(b.values[column.key], column) ?? -Infinity));
  if (state.sortBy && state.descending) rows.reverse();
  const heading = (key, name, unit, arrow, description) => make("th", { scope: "col", "aria-sort": state.sortBy === key ? (state.descending ? "descending" : "ascending") : null },
    make("button", { type: "button", "data-key": key, title: description, click: () => sortTable(key) }, name,
      unit || arrow ? make("span", { class: "unit" }, [unit, arrow].filter(Boolean).join(" ")) : null));
  table.replaceChildren(
    make("caption", { class: "visually-hidden" }, "Speed and quality of every setting; column headings sort"),
    make("thead", {}, make("tr", {}, heading("name", state.rows === 0 ? "Setting" : "Video"),
      columns.map((item) => heading(item.key, item.name, item.unit === "×" ? "" : item.unit, { higher: "↑", lower: "↓" }[item.better],
        pageData.glossary[item.term]?.text)))),
    make("tbody", {}, rows.map((row) => make("tr", { class: row.chosen ? "chosen" : null, click: row.pick },
      make("th", { scope: "row" }, make("button", { type: "button", "data-key": `row ${row.name}`, title: row.name, "aria-pressed": String(row.chosen) }, row.name)),
      columns.map((item) => {
        const value = row.values[item.key];
        const isBest = item.better && differ.has(item.key) && shown(value, item) === best[item.key];
        return make("td", { class: isBest ? "best" : null }, shown(value, { ...item, unit: item.unit === "×" ? "×" : "" }));
      })))));
  if (focused) [...table.querySelectorAll("button")].find((button) => button.dataset.key === focused)?.focus();
}

// A PSNR that JSON cannot hold is infinite: the frames are identical.
function rank(value, column) {
  return value === null && column.key.startsWith("psnr") ? Infinity : value ?? undefined;
}

function sortTable(key) {
  const column = columns.find((candidate) => candidate.key === key);
  if (state.sortBy === key) state.descending = !state.descending;
  else Object.assign(state, { sortBy: key, descending: key !== "name" && column.better !== "lower" });
  showTable();
}

for (const [id, list] of [["facts", pageData.facts], ["versions", pageData.versions]]) {
  byId(id).replaceChildren(...list.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))));
}

update();
