// The live view of a board: a table whose rows have buttons. All text is set as text, never as HTML.

/** Create an element with attributes and children. Attributes whose value is null are omitted. */
function make(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) if (value !== null) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

/** Return the front end's theme, light or dark, or the system's preferred theme if the front end declares no theme. */
function theme() {
  const { jpThemeLight, vscodeThemeKind, theme: marimo } = document.body.dataset;
  if (jpThemeLight) return jpThemeLight === "true" ? "light" : "dark";
  if (vscodeThemeKind) return vscodeThemeKind.endsWith("light") ? "light" : "dark";
  const declared = marimo ?? document.documentElement.getAttribute("theme"); // the latter is Colab's
  if (declared === "light" || declared === "dark") return declared;
  return matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
}

function render({ model, el }) {
  let board = null; // the last content from the kernel
  let asking = null; // the row and the action that the visible question is about
  const view = Math.random().toString(36).slice(2);
  let over = false; // whether the kernel has closed the board, or has ended
  const root = make("div", { class: "nq nq-board", role: "region" });
  const hider = make("style"); // hides the snapshot while this view is on the page
  const wide = make("div", { class: "nq-wide", role: "group", tabindex: "0" });
  const note = make("p", { role: "status" });
  const trouble = make("p", { class: "nq-trouble", role: "status" });
  root.append(hider, wide, note, trouble);

  const send = (message) => over || model.send(message);
  const button = (id, label, name, click, extra = {}) => {
    const made = make("button", { type: "button", class: "nq-press", "data-id": id, "aria-label": name, ...extra }, label);
    made.disabled = over;
    made.addEventListener("click", click);
    return made;
  };
  const named = (key, name) => board.rows.find((row) => row.key === key)?.actions.find((action) => action.name === name);
  const ask = (key, action) => {
    asking = action ? { key, action } : null;
    draw();
    root.querySelector(action ? "[data-no]" : `[data-id="${CSS.escape(`${key} 0`)}"]`)?.focus();
  };
  // Rows keep their elements: an element that is replaced between mouse press and release receives no click event.
  const rows = new Map();
  const fill = (row) => {
    const known = rows.get(row.key) ?? { line: make("tr", { "data-key": row.key }), cells: [], acts: make("td"), drawn: "", ...folded() };
    rows.set(row.key, known);
    row.cells.forEach(([text, tone], place) => {
      known.cells[place] ??= known.line.insertBefore(make("td", { "data-number": board.columns[place][1] ? "" : null, "data-column": board.columns[place][0] }), null);
      if (known.cells[place].textContent !== text) known.cells[place].textContent = text;
      known.cells[place].dataset.tone = tone;
    });
    const asked = asking?.key === row.key ? asking.action : null;
    const drawn = JSON.stringify([over, asked ?? row.actions.map(({ name, label }) => [name, label])]);
    if (drawn !== known.drawn) known.acts.replaceChildren(...(asked ? question(row.key, asked) : buttons(row)));
    known.drawn = drawn;
    known.acts.className = asked ? "nq-ask" : "nq-acts";
    if (row.actions.length && !known.acts.isConnected) known.line.append(known.acts);
    if (!row.detail) return [known.line];
    const [title, text] = row.detail;
    if (known.title.textContent !== title) known.title.textContent = title;
    if (known.text.textContent !== text) known.text.textContent = text;
    known.fold.firstChild.colSpan = board.columns.length + 1;
    return [known.line, known.fold];
  };
  /** Return the elements of a row's detail, which is hidden until its title is clicked. */
  const folded = () => {
    const title = make("summary");
    const text = make("pre");
    return { title, text, fold: make("tr", { class: "nq-fold" }, make("td", {}, make("details", {}, title, text))) };
  };
  const question = (key, action) => {
    const yes = () => {
      send({ type: "act", key, action: action.name, upto: action.upto });
      ask(key, null);
    };
    return [
      make("span", {}, action.question),
      button(`${key} yes`, action.label.replace("…", ""), action.question, yes, { "data-yes": "" }),
      button(`${key} no`, "No", "No", () => ask(key, null), { "data-no": "" }),
    ];
  };
  const buttons = (row) =>
    row.actions.map(({ name, label }, place) =>
      button(`${row.key} ${place}`, label, `${label} ${row.key}`, () => ask(row.key, named(row.key, name))),
    );
  let headed = ""; // the columns that are drawn
  const caption = make("caption");
  const head = make("tr");
  const body = make("tbody");
  const heading = make("b");
  const said = make("span");
  const summary = make("p", { class: "nq-summary" }, heading, " ", said);
  const bar = make("div", { class: "nq-shares", "aria-hidden": "true" });
  root.insertBefore(summary, wide);
  root.insertBefore(bar, wide);
  wide.append(make("table", {}, caption, make("thead", {}, head), body));
  const draw = () => {
    if (!board) return;
    for (const each of [root, wide]) each.setAttribute("aria-label", board.title);
    caption.textContent = board.title;
    heading.textContent = board.title;
    said.textContent = board.summary;
    summary.hidden = !board.summary;
    caption.hidden = !!board.summary;
    const shares = board.shares.map(([label, count]) => make("span", { "data-status": label, style: `flex: ${count}`, title: `${count.toLocaleString()} ${label}` }));
    if (bar.dataset.drawn !== JSON.stringify(board.shares)) bar.replaceChildren(...shares);
    bar.dataset.drawn = JSON.stringify(board.shares);
    head.parentElement.hidden = !board.rows.length && !!board.summary;
    const acts = board.rows.some((row) => row.actions.length);
    const names = [...board.columns, ...(acts ? [["actions", false]] : [])];
    if (headed !== JSON.stringify(names)) {
      headed = JSON.stringify(names);
      rows.clear();
      head.replaceChildren(...names.map(([name, number]) => make("th", { scope: "col", "data-number": number ? "" : null, "data-column": name }, name)));
    }
    for (const key of [...rows.keys()]) if (!board.rows.some((row) => row.key === key)) rows.delete(key);
    const lines = board.rows.flatMap(fill);
    if (!lines.length && board.empty) lines.push(make("tr", {}, make("td", { colspan: String(names.length) }, board.empty)));
    if (lines.length !== body.children.length || lines.some((each, place) => body.children[place] !== each)) body.replaceChildren(...lines);
    note.textContent = board.note;
    trouble.textContent = over ? "this table no longer changes" : board.trouble;
    hider.textContent = `#${board.snapshot}, .jp-OutputArea-child:has(> .jp-RenderedHTML > #${board.snapshot}) { display: none }`;
  };
  const hear = (message) => {
    if (message?.type === "over") return end();
    if (message?.type !== "board") return;
    board = message;
    if (asking && !named(asking.key, asking.action.name)) asking = null;
    draw();
  };
  const end = () => {
    over = true;
    asking = null;
    draw();
  };
  const hello = () => document.visibilityState === "visible" && send({ type: "hello", view });
  const leave = () => send({ type: "bye", why: "hidden", view });
  const escape = (event) => event.key === "Escape" && asking && ask(asking.key, null);
  const dress = () => {
    root.setAttribute("data-theme", theme());
    root.toggleAttribute("data-marimo", Boolean(document.body.dataset.theme));
  };
  const dresser = new MutationObserver(dress);
  dresser.observe(document.body, { attributes: true });
  dresser.observe(document.documentElement, { attributes: true, attributeFilter: ["theme"] });
  const kernel = model.widget_manager?.kernel;
  const status = (_, now) => ["restarting", "autorestarting", "dead", "terminating"].includes(now) && end();
  kernel?.statusChanged?.connect(status);
  model.on("msg:custom", hear);
  model.on("comm:close", end);
  model.on("comm_live_update", end);
  root.addEventListener("keydown", escape);
  document.addEventListener("visibilitychange", hello);
  addEventListener("pagehide", leave);
  const signs = setInterval(hello, 10000);
  const busy = setTimeout(() => {
    if (!board) note.textContent = "the kernel is busy: the table appears when it answers";
  }, 2000);
  dress();
  el.append(root);
  // A front end with shadow roots removes the styles that it added when the kernel closes the model or the element moves.
  if (el.getRootNode() instanceof ShadowRoot) root.prepend(make("style", {}, model.get("_css")));
  hello();
  return () => {
    clearInterval(signs);
    clearTimeout(busy);
    dresser.disconnect();
    document.removeEventListener("visibilitychange", hello);
    removeEventListener("pagehide", leave);
    kernel?.statusChanged?.disconnect(status);
    model.off("msg:custom", hear);
    model.off("comm:close", end);
    model.off("comm_live_update", end);
    send({ type: "bye", why: "removed", view });
  };
}

export default { render };
