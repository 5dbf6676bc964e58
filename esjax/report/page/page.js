"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const PAGE = 50; // examples in the list at once
  const SHOWN = { displayModeBar: false, responsive: true }; // how plotly shows a plot
  let page = JSON.parse($("data").textContent);
  let texts = []; // of each example, lower case, for the search
  let messages = []; // the same of messages, which examples share
  let found = []; // numbers of the examples that the filters let through
  let first = 0; // the first one in the list

  function make(tag, props, ...children) {
    const node = document.createElement(tag);
    for (const [key, value] of Object.entries(props || {})) {
      if (value === null || value === undefined || value === false) continue;
      if (key === "class") node.className = value;
      else node.setAttribute(key, value === true ? "" : value);
    }
    for (const child of children.flat()) if (child !== null) node.append(child); // strings become text, never HTML
    return node;
  }

  function fill(node, ...children) {
    node.replaceChildren(...children.flat());
  }

  function table(rows, node) {
    const head = make("thead", null, make("tr", null, rows[0].map((x) => make("th", { scope: "col" }, x))));
    const body = rows.slice(1).map((row) =>
      make("tr", null, row.map((x, i) => make(i ? "td" : "th", { scope: i ? null : "row", dir: "auto" }, x))));
    const made = node || make("table");
    fill(made, head, make("tbody", null, body));
    return made;
  }

  function scrolling(rows, label) {
    return make("div", { class: "scroll", role: "region", "aria-label": label, tabindex: "0" }, table(rows));
  }

  function title(model) {
    const at = model.lastIndexOf("/") + 1;
    const name = model.slice(at).replace(/^m(\d+)$/, "M_$1");
    return at ? `${model.slice(0, at - 1)}: ${name}` : name;
  }

  function run(model) { return model.slice(0, model.lastIndexOf("/") + 1); }

  // --- theme --------------------------------------------------------------------------------------------------------

  function theme(chosen) {
    document.documentElement.dataset.theme = chosen;
    $("theme").textContent = chosen === "dark" ? "Light theme" : "Dark theme";
    try { localStorage.setItem("esjax-theme", chosen); } catch { /* a page in a file may keep nothing */ }
    for (const node of document.querySelectorAll(".plot.drawn")) Plotly.react(node, node.data, themed(node.layout), SHOWN);
  }

  function startingTheme() {
    try {
      const kept = localStorage.getItem("esjax-theme");
      if (kept === "dark" || kept === "light") return kept;
    } catch { /* as above */ }
    return matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  }

  function themed(layout) {
    const style = getComputedStyle(document.documentElement);
    const of = (name) => style.getPropertyValue(name).trim();
    const out = { ...layout, font: { ...layout.font, color: of("--text") }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", hoverlabel: { bgcolor: of("--panel"), font: { color: of("--text") } } };
    for (const key of Object.keys(layout))
      if (/^[xy]axis$/.test(key)) out[key] = { ...layout[key], gridcolor: of("--line"), zerolinecolor: of("--line") };
    return out;
  }

  // --- figures ------------------------------------------------------------------------------------------------------

  async function drawFigures() {
    const home = $("figures");
    const ids = new Set(page.figures.map((f) => f.id));
    for (const node of [...home.children]) if (!ids.has(node.id)) node.remove();
    for (const figure of page.figures) {
      let node = $(figure.id);
      if (!node) {
        node = make("section", { class: "figure", id: figure.id, "aria-labelledby": `${figure.id}-title` },
          make("h2", { id: `${figure.id}-title` }, figure.title), make("p", null, figure.text), make("div", { class: "plots" }),
          make("details", null, make("summary", null, "The numbers"), make("div")));
        home.append(node);
      }
      fill(node.querySelector("details > div"), scrolling(figure.rows, `Numbers of: ${figure.title}`));
    }
    for (const figure of page.figures) { // all places first: their widths hang on how many there are
      const plots = $(figure.id).querySelector(".plots");
      while (plots.children.length > figure.plots.length) plots.lastChild.remove();
      for (const { layout } of figure.plots.slice(plots.children.length))
        plots.append(make("div", { class: "plot", role: "img", style: `min-height: ${layout.height}px` }));
    }
    // Plotly stands behind this script: its three megabytes are read when the examples can be seen already.
    if (!window.Plotly) await new Promise((go) => addEventListener("load", go, { once: true }));
    for (const figure of page.figures) {
      const plots = $(figure.id).querySelector(".plots");
      for (const [number, { data, layout }] of figure.plots.entries()) {
        await new Promise((go) => setTimeout(go)); // between two of them the page answers
        const plot = plots.children[number];
        plot.setAttribute("aria-label", layout.title ? `${figure.title}: ${layout.title.text}` : `${figure.title}: ${figure.text}`);
        await Plotly.react(plot, data, themed(layout), SHOWN);
        plot.classList.add("drawn");
      }
    }
    document.body.dataset.drawn = "yes";
  }

  function sections() {
    const shown = [...document.querySelectorAll("main section:not([hidden])")];
    fill($("sections"), shown.map((s) => make("li", null, make("a", { href: `#${s.id}` }, s.querySelector("h2").textContent))));
  }

  // --- examples -----------------------------------------------------------------------------------------------------

  function prepare() {
    messages = page.messages.map(([, text]) => text.toLowerCase());
    texts = page.examples.map((e) => [e.id, e.emotion, e.problem, e.situation, e.reference, ...Object.values(e.replies),
      ...Object.values(e.inferred).flatMap((r) => Object.values(r)),
      ...e.rounds.flatMap((r) => [r.draft, r.refinement || "", r.outcome, ...Object.values(r.reflection || {})])].join("\n").toLowerCase());
    const distinct = (of) => [...new Set(page.examples.flatMap(of))].filter((x) => x).sort();
    options("by-emotion", distinct((e) => e.emotion), "any");
    options("by-problem", distinct((e) => e.problem), "any");
    options("by-round", distinct((e) => e.rounds.map((r) => r.round)), "any");
    options("by-outcome", distinct((e) => e.rounds.map((r) => r.outcome)), "any");
    options("by-metric", distinct((e) => Object.values(e.metrics).flatMap((m) => Object.keys(m))), "corpus");
    options("by-model", distinct((e) => Object.keys(e.metrics)), null);
  }

  function options(id, values, none) {
    const node = $(id);
    const before = node.value;
    fill(node, none === null ? [] : make("option", { value: "" }, none),
      values.map((v) => make("option", { value: v }, id === "by-model" ? title(v) : id === "by-metric" ? page.labels[v] || v : v.replaceAll("_", " "))));
    if (values.includes(before)) node.value = before;
  }

  function filter() {
    const wanted = Object.fromEntries(["emotion", "problem", "round", "outcome", "metric", "model", "order"].map((k) => [k, $(`by-${k}`).value]));
    const query = $("search").value.trim().toLowerCase();
    const said = new Set();
    if (query) messages.forEach((text, i) => { if (text.includes(query)) said.add(i); });
    found = [];
    page.examples.forEach((e, i) => {
      if (wanted.emotion && e.emotion !== wanted.emotion) return;
      if (wanted.problem && e.problem !== wanted.problem) return;
      const rounds = e.rounds.filter((r) => !wanted.round || r.round === wanted.round);
      if (wanted.round && !rounds.length) return;
      if (wanted.outcome && !rounds.some((r) => r.outcome === wanted.outcome)) return;
      if (query && !texts[i].includes(query) && !e.context.some((m) => said.has(m))) return;
      if (wanted.metric && value(i, wanted) === undefined) return;
      found.push(i);
    });
    if (wanted.metric) {
      const sign = wanted.order === "up" ? 1 : -1;
      found.sort((a, b) => sign * (value(a, wanted) - value(b, wanted)) || a - b);
    }
    first = 0;
    list();
  }

  function value(i, wanted) {
    return (page.examples[i].metrics[wanted.model] || {})[wanted.metric];
  }

  function list() {
    const current = chosen();
    $("count").textContent = `${found.length.toLocaleString("en")} of ${page.examples.length.toLocaleString("en")} examples`;
    fill($("list"), found.slice(first, first + PAGE).map((i) => {
      const e = page.examples[i];
      const last = e.context.length ? page.messages[e.context[e.context.length - 1]][1] : "";
      return make("li", null, make("a", { href: link(e.id), "aria-current": e.id === current ? "true" : null },
        e.id, make("span", { dir: "auto" }, last.slice(0, 120))));
    }));
    $("page").textContent = found.length ? `${(first + 1).toLocaleString("en")} to ${Math.min(first + PAGE, found.length).toLocaleString("en")}` : "none";
    $("before").disabled = first === 0;
    $("after").disabled = first + PAGE >= found.length;
  }

  function link(id) { return `#example=${encodeURIComponent(id)}`; }

  function chosen() {
    if (!location.hash.startsWith("#example=")) return null;
    try { return decodeURIComponent(location.hash.slice(9)); } catch { return null; }
  }

  function show() {
    const id = chosen();
    if (id === null && $("example").firstChild) return;
    const number = id === null ? found[0] : page.examples.findIndex((e) => e.id === id);
    if (number === undefined || number < 0) {
      fill($("example"), make("p", null, id === null ? "No example." : `There is no example ${id}.`));
      return;
    }
    const at = found.indexOf(number);
    if (at >= 0 && (at < first || at >= first + PAGE)) first = at - (at % PAGE);
    list();
    example(page.examples[number]);
    if (id !== null) $("example").scrollIntoView({ block: "nearest" });
  }

  function example(e) {
    const labels = [e.emotion && `emotion: ${e.emotion}`, e.problem && `problem: ${e.problem}`].filter((x) => x).join("; ");
    const parts = [make("h3", null, make("a", { href: link(e.id) }, e.id)), make("p", { class: "labels", dir: "auto" }, labels)];
    if (e.situation) parts.push(make("p", { class: "labels", dir: "auto" }, e.situation));
    const names = { user: "seeker", assistant: "supporter", system: "system message" };
    for (const number of e.context) {
      const [role, text] = page.messages[number];
      parts.push(bubble(role, names[role] || role, text));
    }
    if (e.reference) parts.push(make("h3", null, "The corpus' own reply"), bubble("assistant", "supporter", e.reference));
    const models = Object.keys(e.replies);
    if (models.length) {
      parts.push(make("h3", null, "Replies"), make("p", { class: "labels" }, "Marked: what differs from the model to the left."));
      parts.push(make("div", { class: "sides" }, models.map((m, i) => side(e, m, i && run(m) === run(models[i - 1]) ? e.replies[models[i - 1]] : null))));
    }
    for (const r of e.rounds) parts.push(...round(r));
    fill($("example"), parts);
  }

  function bubble(role, who, text) {
    return make("div", { class: `said ${role}`, dir: "auto" }, make("span", { class: "who" }, who), text);
  }

  function side(e, model, before) {
    const numbers = Object.entries(e.metrics[model] || {}).map(([k, v]) => `${page.labels[k] || k}: ${v}`);
    const inferred = e.inferred[model];
    return make("div", null, make("h4", null, title(model)),
      make("div", { class: "reply", dir: "auto" }, before === null ? e.replies[model] : marked(before, e.replies[model])),
      inferred ? reflection(inferred) : null,
      numbers.length ? make("details", null, make("summary", null, "Metrics"), make("ul", { class: "numbers" }, numbers.map((x) => make("li", null, x)))) : null);
  }

  function round(r) {
    const ended = r.outcome ? (r.outcome === "kept" ? "; trained on" : `; dropped: ${r.outcome.replaceAll("_", " ")}`) : "";
    const out = [make("h3", null, `${r.round.replace("round", "round ")}${ended}`)];
    if (r.reflection) out.push(reflection(r.reflection));
    const refined = r.refinement === undefined ? null : make("div", null, make("h4", null, "Refined (chosen)"),
      make("div", { class: "reply", dir: "auto" }, marked(r.draft, r.refinement)));
    out.push(make("div", { class: "sides" },
      make("div", null, make("h4", null, "Draft (rejected)"), make("div", { class: "reply", dir: "auto" }, r.draft)), refined));
    return out;
  }

  function reflection(fields) {
    return make("dl", null, Object.entries(fields).flatMap(([k, v]) => [make("dt", null, k.replaceAll("_", " ")), make("dd", { dir: "auto" }, v)]));
  }

  // What was taken out of a text and put into it, word by word: a longest common subsequence.
  function marked(before, after) {
    const a = before.match(/\s*\S+/g) || [], b = after.match(/\s*\S+/g) || [];
    if (a.length * b.length > 250000) return [after];
    const width = b.length + 1, longest = new Uint16Array((a.length + 1) * width);
    const same = (i, j) => a[i].trim() === b[j].trim();
    for (let i = a.length - 1; i >= 0; i--)
      for (let j = b.length - 1; j >= 0; j--)
        longest[i * width + j] = same(i, j) ? longest[(i + 1) * width + j + 1] + 1 : Math.max(longest[(i + 1) * width + j], longest[i * width + j + 1]);
    const out = [];
    const put = (tag, word) => {
      const last = out[out.length - 1];
      if (last && last.tag === tag) last.text += word;
      else out.push({ tag, text: word });
    };
    let i = 0, j = 0;
    while (i < a.length || j < b.length) {
      if (i < a.length && j < b.length && same(i, j)) { put("", b[j]); i++; j++; }
      else if (j >= b.length || (i < a.length && longest[(i + 1) * width + j] >= longest[i * width + j + 1])) put("del", a[i++]);
      else put("ins", b[j++]);
    }
    return out.map((x) => (x.tag ? make(x.tag, null, x.text) : x.text));
  }

  // --- conversations and facts --------------------------------------------------------------------------------------

  function conversations() {
    const talks = page.runs.flatMap((r) => r.talks);
    $("conversations").hidden = !talks.length;
    fill($("talks-list"), talks.map((t) => {
      const felt = t.steps.filter((s) => s.kind === "feeling" || s.kind === "answer").map((s) => s.value);
      const mark = t.steps.find((s) => s.kind === "grade");
      const names = { reply: "assistant", answer: "user" };
      const said = t.steps.filter((s) => s.text).map((s) => bubble(names[s.kind], s.kind === "reply" ? title(t.model) : `seeker, feels ${s.value} of 5`, s.text));
      return make("details", null,
        make("summary", null, `${title(t.model)} with ${t.id}: feeling ${felt.join(", ")}${mark ? `; mark ${mark.value}` : ""}`),
        t.opening ? bubble("user", "seeker", t.opening) : null, said);
    }));
  }

  function facts() {
    fill($("facts"), page.tables.map((t) => {
      const shown = scrolling(t.rows, t.title);
      return t.folded ? make("details", null, make("summary", null, t.title), shown) : make("div", null, make("h3", null, t.title), shown);
    }));
  }

  function draw() {
    const notes = page.notes;
    $("notes").hidden = !notes.length;
    $("notes").textContent = notes.join(" ");
    $("differences").hidden = page.differences.length < 2;
    if (page.differences.length > 1) table(page.differences, $("differences-table"));
    $("examples").hidden = !page.examples.length;
    prepare();
    filter();
    show();
    conversations();
    facts();
    const drawn = drawFigures();
    sections();
    return drawn;
  }

  // --- while the run goes on ----------------------------------------------------------------------------------------

  async function follow() {
    try {
      const answer = await fetch(`data?state=${encodeURIComponent(page.state)}`);
      if (answer.status === 200) {
        const shown = $("example").firstChild && chosen();
        page = await answer.json();
        if (!shown) fill($("example"));
        await draw();
      }
    } catch { /* the command has ended, or its machine sleeps: what is shown stays */ }
    setTimeout(follow, 2000);
  }

  $("theme").addEventListener("click", () => theme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
  $("filters").addEventListener("input", filter);
  $("filters").addEventListener("reset", () => setTimeout(filter));
  $("filters").addEventListener("submit", (event) => event.preventDefault());
  $("before").addEventListener("click", () => { first = Math.max(0, first - PAGE); list(); });
  $("after").addEventListener("click", () => { first += PAGE; list(); });
  addEventListener("hashchange", show);
  theme(startingTheme());
  draw().then(() => {
    if (document.body.dataset.live) setTimeout(follow, 2000);
  });
})();
