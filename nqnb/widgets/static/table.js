// @ts-check
/**
 * The live table in the browser. The kernel stores, sorts and filters the rows. This module draws the one page of rows
 * that the kernel sends. It updates rows in place: a row keeps its elements while it is shown, so that the focus, the
 * selection and expanded rows persist. All data from a queue is set as `textContent` or an attribute, never as markup.
 *
 * @typedef {{id: string, name: string, queue: string, status: string, attempt: string, submitted: ?number,
 *   started: ?number, ended: ?number, due: ?number, worker: string, share: ?number, words: string, payload: string,
 *   error: string, fields: Record<string, string>, stopping: ?number, pressed: ?number, refused: string, late: string, silent: ?number, requeued: string, requeuing: boolean, requeueable: boolean, unqueued: string,
 *   overtaken: boolean}} Row
 *   times are Unix seconds of the kernel's clock; silent is the time of the last heartbeat of the task's worker, if the
 *   worker is silent
 * @typedef {[string, string, "text"|"number"|"choice"|"status"|"", 0|1|2, string[]]} Offer  a column: its key, its
 *   heading, the kind of its filter, whether it is hidden, shown by default or chosen by the caller, and the choices
 * @typedef {{key: string, name: string, kind: string, shown: number, choices: string[]}} Column
 * @typedef {{name: string, kind: "facts"|"error"|"data"|"log", text: string}} Part
 * @typedef {{id: string, error: string, where: string, count: number, left: number}} Kind  failed tasks with the same
 *   reason; left is the number of those that can be requeued
 * @typedef {{type: "rows", rows: Row[], details: Record<string, Part[]>, counts: Record<string, number>, total: number,
 *   matching: number, open: number, page: number, pages: number, size: number, search: string, statuses: string[],
 *   columns: Offer[], filters: Record<string, string>, sort: string, down: boolean, queues: boolean, behind: boolean,
 *   failure: string, kinds: Kind[], all_kinds: number, ungrouped: number, requeueable: boolean, requeues: boolean, unserved: string[], ended: string[], heard: Record<string, number>,
 *   title: string, state: "loading"|"live"|"lost"|"frozen", since: number, rate: ?number, left: ?number, now: number,
 *   loaded: boolean, all: boolean, snapshot: string, polled: boolean}} Rows  all is whether the table is not limited to listed tasks, snapshot is the id of the element with the snapshot of the
 *   table, and polled is whether the message answers a poll
 */

const STATUSES = ["pending", "scheduled", "processing", "completed", "failed", "cancelled", "deleted"];
/** The meanings of states whose names are not self-explanatory. */
const MEANINGS = {
  scheduled: "waiting for its start time or its next retry",
  cancelled: "cancelled after it had started, or while waiting for a retry",
  deleted: "cancelled before it started",
};
/** The minimum width and the usual width, in pixels, of columns whose cells have a fixed structure. */
const WIDTHS = {
  id: [88, 118], queue: [70, 70], status: [116, 116], attempt: [68, 68], age: [72, 76], run: [76, 76], worker: [80, 80],
  progress: [110, 110], payload: [110, 110], error: [110, 110], result: [90, 90], source: [90, 90], group: [80, 80],
};
/** The columns whose cells exist in each row, even if they are not shown. */
const DRAWN = new Set(["id", "queue", "status", "attempt", "age", "run", "worker", "progress", "payload"]);
/** The columns that are omitted first, in this order, if others would be cut. A narrow table omits further columns. */
const OMITTED_FIRST = ["source", "group", "attempt", "queue", "worker", "age"];
const OMITTED_LAST = ["payload", "result", "error", "progress", "run"];
const COMFORTABLE_WIDTH = 160;
const COMFORTABLE_ERROR_WIDTH = 280;
const MOST_ID_WIDTH = 240;
const LEAST_WIDTH = 40;
/** The kinds of filters that are typed: a short example, and a description. */
const HINTS = { number: ["> 100", "a number or a range, such as > 100 or 10..20"], text: ["contains…", "text, or = and the exact text"] };
/** The layouts of tables, if the browser refuses to store them. */
const LAYOUTS = new Map();
/** The values of the fields that the kernel omits from a row because they are empty. */
const EMPTY_ROW = {
  queue: "", attempt: "", submitted: null, started: null, ended: null, due: null, worker: "", share: null, words: "", payload: "",
  error: "", fields: {}, stopping: null, pressed: null, refused: "", late: "", silent: null, requeued: "", requeuing: false, requeueable: false, unqueued: "", overtaken: false,
};
const SIZES = [10, 20, 50, 100];
const POINTER_HOLD_MS = 4000; // how long a resting pointer over the rows keeps their order fixed
const KERNEL_ANSWER_SECONDS = 2; // after this time without an answer, the table shows that the kernel is busy
// The time without a message after which a visible table asks the kernel for the rows: if the last answer had news, if the
// front end has delivered only answers so far, and otherwise. A poll that is not answered is sent again after the last time.
const POLL_SECONDS = { news: 1, answers: 10, idle: 60 };
const COPY_SECONDS = 4; // how long the kernel may take to return a copy: the browser permits it shortly after a key or click
const EXPORT_SECONDS = 120; // how long the kernel may take to return a part of a file
const COUNT_SECONDS = 30; // how long the kernel may take to count the tasks that "Cancel all" would cancel
const NOTE_MS = 8000; // how long a note about a copy or a file is shown
/** The columns whose short text is copied as it is shown. The kernel returns the complete values of the others. */
const SHORT = ["status", "attempt", "age", "run", "progress"];
const MAC = /Mac|iPhone|iPad/.test(navigator.platform);
/** The keys of the table, and what they do. */
const KEYS = [
  [["↑", "↓", "Home", "End"], "move between rows"],
  [["←", "→"], "move between the cells of a row"],
  [["Page Up", "Page Down"], "turn the page"],
  [["Enter"], "show or hide the details of the row"],
  [["Space"], "select the row"],
  [["Delete"], "cancel the selected tasks or the task of the row, after asking for confirmation"],
  [["r"], "requeue the failed task of the row, after asking for confirmation"],
  [[MAC ? "⌘ C" : "Ctrl C"], "copy the row or the cell"],
  [["/"], "search"],
  [["Escape"], "leave the search, a filter, the details or a question"],
  [["?"], "show or hide this list"],
];

/** Create an element with properties and children; strings become text. */
function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element && !name.includes("-")) element[name] = value;
    else element.setAttribute(name, value);
  }
  // For elements that can be focused: otherwise JupyterLab handles plain keys as commands, and "d d" deletes the cell.
  if (["BUTTON", "INPUT", "SELECT", "PRE", "TR"].includes(element.tagName)) element.setAttribute("data-lm-suppress-shortcuts", "");
  element.append(...children);
  return element;
}

function put(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

function mark(element, name, value) {
  if (value === null || value === false) element.removeAttribute(name);
  else if (element.getAttribute(name) !== String(value)) element.setAttribute(name, String(value));
}

const number = (value) => value.toLocaleString("en-US");
/** Return the parts of a message by which the kernel's answer to a poll is compared with the message before. */
const content = ({ rows, counts, state }) => JSON.stringify([rows, counts, state]);
const two = (value) => String(value).padStart(2, "0");

/** Format a duration with a nearly constant width. */
export function span(seconds) {
  seconds = Math.max(0, seconds);
  const whole = Math.floor(seconds);
  if (seconds < 60) return `${(Math.floor(seconds * 10) / 10).toFixed(1)} s`;
  if (seconds < 3600) return `${Math.floor(whole / 60)} m ${two(whole % 60)} s`;
  if (seconds < 86400) return `${Math.floor(whole / 3600)} h ${two(Math.floor(whole / 60) % 60)} m`;
  return `${Math.floor(whole / 86400)} d ${Math.floor(whole / 3600) % 24} h`;
}

/** Format a duration without tenths of a second. */
const about = (seconds) => (seconds < 60 ? `${Math.round(seconds)} s` : span(seconds));
/** Format an approximate duration in one unit. */
const roughly = (seconds) => (seconds < 60 ? about(seconds) : about(seconds).split(" ").slice(0, 2).join(" "));

/** Format a rate, in the unit that results in one to three digits. */
export function speed(rate) {
  const [value, unit] = rate >= 1 ? [rate, "s"] : rate * 60 >= 1 ? [rate * 60, "min"] : [rate * 3600, "h"];
  return `${value >= 10 ? number(Math.round(value)) : Number(value.toFixed(1))} tasks/${unit}`;
}

/** Format a share in percent: 100 only for a share of 1. */
const percent = (share) => `${Math.min(Math.round(share * 100), share < 1 ? 99 : 100)} %`;

/** Return the theme, light or dark, that the front end declares or, failing that, the system prefers. */
function theme() {
  const { jpThemeLight, vscodeThemeKind, theme: marimo } = document.body.dataset;
  if (jpThemeLight) return jpThemeLight === "true" ? "light" : "dark";
  if (vscodeThemeKind) return vscodeThemeKind.endsWith("light") ? "light" : "dark";
  const declared = marimo ?? document.documentElement.getAttribute("theme"); // the latter is Colab's
  if (declared === "light" || declared === "dark") return declared;
  return matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
}

/** Return the element with the focus, which may be in the same shadow root as a node. */
const focused = (node) => /** @type {any} */ (node.getRootNode()).activeElement ?? null;

/** Return a button that copies a task's row, or a part of its details, which is the text below the button if `what` is empty. */
const copyButton = (what, text) => make("button", { type: "button", className: "nq-small", "data-act": "copy-text", "data-what": what }, text);

/** The rows of one task: the row itself, the reason for a refused cancel, and the details. */
class Task {
  constructor(id) {
    this.id = id;
    /** @type {Row} */ this.row = /** @type {any} */ (null);
    this.cells = {};
    /** @type {Column[]} */ this.columns = [];
    for (const name of DRAWN) this.cells[name] = make("td", { className: `nq-${name}` });
    this.opener = make("button", { type: "button", className: "nq-opener", "data-act": "open" });
    this.box = make("input", { type: "checkbox", "data-act": "select" });
    this.code = make("code", {});
    this.copy = make("button", { type: "button", className: "nq-copy", "data-act": "copy" }, this.code);
    this.label = make("span", { className: "nq-label" });
    this.extra = make("span", { className: "nq-extra" });
    this.bar = make("i");
    this.track = make("span", { className: "nq-bar", role: "progressbar", "aria-valuemin": 0, "aria-valuemax": 100 }, this.bar);
    this.share = make("span", { className: "nq-share" });
    this.words = make("span", { className: "nq-words" });
    this.fault = make("span", { className: "nq-fault" });
    this.payload = make("code", {});
    this.button = make("button", { type: "button", className: "nq-button nq-cancel", "data-act": "cancel" });
    this.again = make("button", { type: "button", className: "nq-button nq-again", "data-act": "requeue", hidden: true });
    this.cells.id.append(this.copy);
    this.cells.status.append(make("span", { className: "nq-dot" }), this.label, this.extra);
    this.cells.progress.append(this.track, this.share, this.words, this.fault);
    this.cells.payload.append(this.payload);
    this.act = make("td", { className: "nq-act" }, this.button, this.again);
    this.select = make("td", { className: "nq-select" }, this.opener, this.box);
    this.line = make("tr", { className: "nq-row", tabIndex: -1 }, this.select, this.act);
    this.body = make("tbody", { "data-id": id }, this.line);
    this.controls = [this.opener, this.box, this.copy, this.button, this.again];
    this.why = this.more = this.reason = null;
  }

  /** Show these columns, in this order. */
  arrange(/** @type {Column[]} */ columns) {
    if (columns === this.columns) return;
    this.columns = columns;
    for (const { key, kind } of columns) {
      this.cells[key] ??= make("td", { className: "nq-field", "data-column": key });
      mark(this.cells[key], "data-kind", kind);
    }
    this.line.replaceChildren(this.select, ...columns.map(({ key }) => this.cells[key]), this.act);
    for (const each of [this.why, this.more]) if (each) each.firstChild.colSpan = columns.length + 2;
    this.hasBar = columns.some(({ key }) => key === "progress");
    this.hasFault = columns.some(({ key }) => key === "error");
    if (this.row) this.fields();
  }

  /** Draw the cells of fields. */
  fields() {
    for (const { key } of this.columns) {
      if (DRAWN.has(key)) continue;
      put(this.cells[key], this.row.fields[key] ?? "");
      mark(this.cells[key], "title", this.row.fields[key] || null);
    }
  }

  /** Draw the parts that change only with a message. */
  draw(row, { selected, opened, details, visible }) {
    this.row = row;
    this.arrange(visible);
    this.fields();
    const columns = visible.length + 2;
    mark(this.body, "data-status", row.status);
    put(this.code, row.name);
    mark(this.copy, "title", `${row.name} · click to copy`);
    mark(this.copy, "aria-label", `Copy the id ${row.name}`);
    mark(this.opener, "aria-label", `Details of ${row.name}`);
    mark(this.opener, "aria-expanded", opened);
    mark(this.box, "aria-label", `Select ${row.name}`);
    this.box.checked = selected;
    mark(this.line, "aria-selected", selected);
    put(this.cells.queue, row.queue);
    put(this.cells.attempt, row.attempt === "0" ? "–" : row.attempt);
    put(this.cells.worker, row.worker || "–");
    mark(this.cells.worker, "title", row.worker || null);
    put(this.payload, row.payload);
    mark(this.cells.payload, "title", row.payload || null);
    const fault = this.hasFault ? "" : row.error;
    put(this.fault, fault);
    const known = row.share !== null && !fault;
    this.track.hidden = !known;
    if (known) {
      this.bar.style.width = `${(row.share * 100).toFixed(1)}%`;
      mark(this.track, "aria-valuenow", Math.round(row.share * 100));
      mark(this.track, "aria-label", `Progress of ${row.name}`);
    }
    put(this.share, known ? percent(row.share) : "");
    put(this.words, row.words);
    mark(this.cells.progress, "title", fault || row.words || null);
    const problem = row.refused ? `Not cancelled: ${row.refused}` : row.unqueued ? `Not requeued: ${row.unqueued}` : "";
    this.explain(problem || row.late, columns, !problem);
    this.open(opened, details, columns);
  }

  /**
   * Update the age, the run time and the duration of a cancel.
   *
   * @param {number} now
   * @param {{at: number, pressed: ?number, heard: boolean, lost: ?number, over: boolean, requeues: boolean}} known  at is the time at which the
   *   row was last current, heard is whether the kernel has received the press, lost is when the connection was lost
   */
  tick(now, { at, pressed, heard, lost, over, requeues }) {
    const row = this.row;
    const open = ["pending", "scheduled", "processing"].includes(row.status);
    const asked = open ? (row.pressed ?? pressed ?? (row.stopping || null)) : null;
    const unsent = lost !== null && asked !== null && row.stopping === null;
    const cancelling = open && !unsent && (asked !== null || row.stopping !== null);
    const taken = asked === null ? null : Math.max(0, now - asked);
    const silent = row.silent !== null && row.status === "processing" && !cancelling;
    put(this.cells.age, row.submitted === null ? "–" : about(Math.max(0, at - row.submitted)));
    const end = row.ended ?? (row.status === "processing" ? at : null);
    put(this.cells.run, row.started === null || end === null ? "–" : span(end - row.started));
    const wait = row.due === null ? 0 : row.due - at;
    mark(this.body, "data-cancelling", cancelling || unsent ? "" : null);
    mark(this.body, "data-silent", silent ? "" : null);
    let label = row.status;
    if (cancelling) label = taken === null ? "cancelling…" : `cancelling… ${taken < 10 ? span(taken) : about(taken)}`;
    else if (row.status === "scheduled" && wait <= 0) label = "pending";
    else if (silent) label = `worker silent for ${roughly(at - (row.silent ?? at))}`;
    put(this.label, label);
    let extra = "";
    if (!cancelling && row.status === "scheduled" && wait > 0)
      extra = ` · ${/^[01]\b/.test(row.attempt) ? "in" : "retry in"} ${roughly(wait)}`;
    else if (!this.hasBar && !cancelling && !silent && row.status === "processing" && row.share !== null)
      extra = ` ${percent(row.share)}`;
    else if (row.requeued) extra = ` · requeued as ${row.requeued}`;
    else if (row.overtaken) extra = " · cancel came too late";
    else if (row.error && open === false && !this.hasBar && !this.hasFault) extra = ` · ${row.error}`;
    put(this.extra, extra);
    const meaning = MEANINGS[row.status] ?? "";
    const full = extra || silent ? label + extra : "";
    mark(this.cells.status, "title", [full, meaning && `${row.status}: ${meaning}`].filter(Boolean).join("; ") || null);
    if (!open && this.button.contains(focused(this.button))) this.line.focus({ preventScroll: true });
    mark(this.body, "data-open", open ? "" : null);
    mark(this.button, "aria-disabled", cancelling || unsent || over ? "true" : null);
    let text = "Cancel";
    if (cancelling) text = row.status === "processing" && taken !== null && taken > 1 ? "still running" : "";
    if (cancelling && row.silent !== null) text = "worker silent";
    if (cancelling && !heard && taken !== null && taken > KERNEL_ANSWER_SECONDS) text = "kernel busy…";
    if (unsent) text = asked >= (lost ?? 0) ? "not sent yet" : "unconfirmed";
    put(this.button, text);
    mark(this.button, "title", unsent ? "the connection to the server is lost" : null);
    mark(this.button, "aria-label", `${text || "cancelling"} ${row.name}`);
    const again = requeues && (row.requeueable || row.requeuing);
    if (this.again.hidden === again && this.again.contains(focused(this.again))) this.line.focus({ preventScroll: true });
    this.again.hidden = !again;
    mark(this.body, "data-again", again ? "" : null);
    mark(this.again, "aria-disabled", row.requeuing || over || lost !== null ? "true" : null);
    put(this.again, row.requeuing ? "requeuing…" : "Requeue…");
    mark(this.again, "aria-label", `${row.requeuing ? "requeuing" : "Requeue"} ${row.name}`);
    this.box.disabled = !open || over;
    return open && !cancelling && !unsent && !over;
  }

  explain(text, columns, calm = false) {
    if (!text) {
      this.why?.remove();
      this.why = null;
    } else if (!this.why) {
      this.reason = make("span", { className: "nq-reason" });
      const close = make("button", { type: "button", className: "nq-plain", "data-act": "dismiss", "aria-label": "Dismiss" }, "×");
      this.why = make("tr", { className: "nq-why" }, make("td", { colSpan: columns }, this.reason, close));
      this.line.after(this.why);
    }
    if (this.why) mark(this.why, "data-calm", calm ? "" : null);
    if (text) put(this.reason, text);
  }

  open(opened, parts, columns) {
    if (!opened) {
      this.more?.remove();
      this.more = null;
      return;
    }
    if (!this.more) {
      this.inner = make("div", { className: "nq-parts", role: "region", "aria-label": `Details of ${this.row.name}` });
      const copies = [["row", "row"], ["json", "row as JSON"]].map(([what, text]) => copyButton(what, text));
      const tools = make("div", { className: "nq-copies" }, "Copy", ...copies);
      this.more = make("tr", { className: "nq-more" }, make("td", { colSpan: columns }, this.inner, tools));
      this.body.append(this.more);
      this.parts = "";
    }
    if (!parts) put(this.inner, "…");
    else this.fill(parts);
  }

  fill(parts) {
    const shape = parts.map((part) => part.kind).join();
    if (shape !== this.parts) {
      this.parts = shape;
      this.inner.replaceChildren(
        ...parts.map(({ kind }) => {
          const text = kind === "facts" ? make("div", { className: "nq-list" }) : make("pre", { tabIndex: 0 });
          return make("section", { className: `nq-${kind}` }, make("h4", {}, make("span"), copyButton("", "Copy")), text);
        }),
      );
    }
    parts.forEach((part, position) => {
      const [head, text] = this.inner.children[position].children;
      const what = part.name.split(" ")[0];
      put(head.firstChild, part.name);
      mark(head.lastChild, "data-what", part.kind === "facts" ? "" : what === "error" ? "traceback" : what);
      mark(head.lastChild, "aria-label", `Copy the ${what}`);
      if (part.kind !== "facts") {
        put(text, part.text);
        mark(text, "aria-label", part.name);
      } else if (text.dataset.text !== part.text) {
        text.dataset.text = part.text;
        text.replaceChildren(
          ...part.text.split("\n").map((line) => {
            const colon = line.indexOf(": ");
            return make("span", {}, make("b", {}, line.slice(0, colon)), " ", make("bdi", {}, line.slice(colon + 2)));
          }),
        );
      }
    });
  }
}

function render({ model, el }) {
  const view = Math.random().toString(36).slice(2);
  let sent = 0; // the number of the last message to the kernel
  let lookNumber = 0; // the number of the last message that changed the search, filter, order or page
  let holdNumber = 0; // the number of the last message that fixed or released the order
  let clockOffset = 0; // seconds by which the kernel's clock is ahead of the page's clock
  let receivedAt = Date.now(); // when the last message from the kernel arrived
  let polledAt = receivedAt; // when the last poll was sent; 0 if the poll was answered
  let pollSeconds = POLL_SECONDS.answers;
  let over = false; // whether the kernel has closed the table, or has ended
  let overAt = 0; // when that was, or when the table was frozen, by the kernel's clock
  let restarted = false; // whether the kernel has restarted
  /** @type {?Rows} */ let last = null;
  let current = ""; // the id of the row that the Tab key reaches
  let offered = /** @type {Column[]} */ ([]); // the columns that the kernel offers
  let wanted = /** @type {Column[]} */ ([]); // the columns that the user and the kernel have chosen
  let visible = /** @type {Column[]} */ ([]); // the columns that are shown: the others do not fit
  let layout = /** @type {?{order: string[], shown: Record<string, boolean>, widths: Record<string, number>}} */ (null);
  let askedColumns = ""; // the keys of the columns that the kernel was asked for
  const needs = /** @type {Map<string, number>} */ (new Map()); // the widths of the contents, in pixels
  const tasks = /** @type {Map<string, Task>} */ (new Map());
  const selected = new Set();
  const opened = new Set();
  const details = new Map();
  const pressed = /** @type {Map<string, {at: number, n: number}>} */ (new Map());
  const look = { search: "", statuses: /** @type {string[]} */ ([]), failure: "", filters: /** @type {Record<string, string>} */ ({}), sort: "activity", down: false, page: 0, size: 20 };

  const root = make("div", { className: "nq", role: "region", tabIndex: -1, "data-lm-suppress-shortcuts": "" });
  const title = make("span", { className: "nq-title" });
  const state = make("span", { className: "nq-state" });
  const chips = make("div", { className: "nq-chips", role: "group", "aria-label": "Filter by status" });
  let typed = 0; // the timer of a search that was typed but not sent yet
  let filtering = 0; // the timer of a filter that was typed but not sent yet
  let unsent = /** @type {?{control: HTMLElement, apply: () => void}} */ (null); // that filter
  let countedAt = 0; // when the kernel was asked to count the tasks to cancel; 0 if it has answered
  const search = make("input", {
    type: "search", placeholder: "id, payload, error…", "aria-label": "Search tasks", spellcheck: false,
  });
  const chip = (name) => {
    const count = make("b", {}, "0");
    const button = make("button", { type: "button", className: "nq-chip", "data-act": "filter", "data-status": name });
    button.append(...(name ? [make("span", { className: "nq-dot" })] : []), name || "all", count);
    const meaning = MEANINGS[name] ? ` (${MEANINGS[name]})` : "";
    if (name) button.title = `show only ${name} tasks${meaning}; Shift-click to add them to the filter`;
    chips.append(button);
    return { button, count };
  };
  const counts = new Map(["", ...STATUSES].map((name) => [name, chip(name)]));
  const all = make("input", { type: "checkbox", "data-act": "select-all", "aria-label": "Select all open tasks on this page" });
  const headings = /** @type {Map<string, HTMLElement>} */ (new Map());
  const filters = /** @type {Map<string, any>} */ (new Map()); // the control of each column's filter
  const choose_all = make("th", { className: "nq-select", scope: "col" }, all);
  const acts = make("th", { className: "nq-act", scope: "col", "aria-label": "Actions" });
  const head = make("tr", {}, choose_all, acts);
  const filterLine = make("tr", { className: "nq-filters", hidden: true });
  const table = make("table", { role: "grid", "aria-label": "Tasks", "aria-multiselectable": "true" }, make("thead", {}, head, filterLine));
  const filterButton = make("button", { type: "button", className: "nq-button", "data-act": "filters", "aria-expanded": false }, "filter");
  filterButton.title = "filter by the values of columns";
  const menuButton = make("button", { type: "button", className: "nq-button", "data-act": "menu", "aria-expanded": false }, "columns");
  menuButton.title = "choose, move and reset columns";
  const menu = make("div", { className: "nq-menu", role: "group", "aria-label": "Columns", hidden: true });
  const active = make("div", { className: "nq-active", role: "group", "aria-label": "Active filters", hidden: true });
  const kindsButton = make("button", { type: "button", className: "nq-button nq-kinds-opener", "data-act": "kinds", "aria-expanded": false });
  const chosenKind = make("button", { type: "button", className: "nq-chip", "data-act": "kind", "data-kind": "", hidden: true });
  const kindList = make("ul", { className: "nq-kind-list", "aria-label": "Kinds of failures", hidden: true });
  const kinds = make("div", { className: "nq-kinds", role: "group", "aria-label": "Failures", hidden: true }, make("div", { className: "nq-kinds-line" }, kindsButton, chosenKind), kindList);
  const scroller = make("div", { className: "nq-scroll" }, table);
  const emptyText = make("span", {});
  const showAll = make("button", { type: "button", className: "nq-button", "data-act": "show-all" }, "Show all");
  const empty = make("div", { className: "nq-empty" }, emptyText, showAll);
  const some = make("button", { type: "button", className: "nq-button nq-cancel", "data-act": "cancel-selected" });
  const every = make("button", { type: "button", className: "nq-button nq-cancel", "data-act": "ask-all" });
  every.title = "cancel every matching task that has not ended, on all pages";
  const again = make("button", { type: "button", className: "nq-button nq-again", "data-act": "ask-requeue", hidden: true }, "Requeue failed…");
  again.title = "requeue the matching failed tasks on all pages, after asking for confirmation";
  const question = make("span", {});
  const preview = make("ul", { className: "nq-preview", hidden: true });
  const yes = make("button", { type: "button", className: "nq-button nq-sure", "data-act": "cancel-all" });
  const no = make("button", { type: "button", className: "nq-button", "data-act": "keep-all" });
  const confirm = make("span", { className: "nq-confirm", role: "group", "aria-label": "Confirm", hidden: true }, question, preview, yes, no);
  let example = ""; // the kind of failures whose example is shown when its rows arrive
  /** The visible question: its action, its tasks (null for the tasks that the kernel counted for message n), and the element to focus afterwards. */
  let asked = { requeue: false, ids: /** @type {?string[]} */ (null), n: 0, from: /** @type {?Element} */ (null) };
  const pace = make("span", { className: "nq-pace" });
  const where = make("span", { className: "nq-where" });
  const sizes = make("select", { "data-act": "size", "aria-label": "Rows per page" });
  sizes.append(...SIZES.map((size) => make("option", { value: String(size) }, `${size} rows`)));
  const back = make("button", { type: "button", className: "nq-plain", "data-act": "back", "aria-label": "Previous page" }, "‹");
  const next = make("button", { type: "button", className: "nq-plain", "data-act": "next", "aria-label": "Next page" }, "›");
  const help = make("button", { type: "button", className: "nq-plain", "data-act": "keys", "aria-expanded": "false", "aria-label": "Keys", title: "keys" }, "?");
  const keyList = make("dl", { className: "nq-keys", hidden: true });
  keyList.append(...KEYS.map(([names, does]) => make("div", {}, make("dt", {}, ...names.map((name) => make("kbd", {}, name))), make("dd", {}, does))));
  const files = ["csv", "parquet"].map((format) => {
    const name = format === "csv" ? "CSV" : "Parquet";
    return make("button", { type: "button", className: "nq-small", "data-act": "export", "data-format": format, "aria-label": `Export as ${name}` }, name);
  });
  const exports = make("span", { className: "nq-exports", role: "group", "aria-label": "Export", title: "download the tasks of all pages that match the filter and the search" }, "Export", ...files);
  let exporting = false;
  const note = make("div", { className: "nq-note", hidden: true }); // says what was copied or exported, or why not
  let noted = 0; // the timer that hides the note
  const clip = make("textarea", { className: "nq-clip", readOnly: true, hidden: true, "aria-label": "Text to copy" });
  clip.setAttribute("data-lm-suppress-shortcuts", "");
  const voice = make("div", { className: "nq-voice", role: "status", "aria-live": "polite" });
  const hider = make("style", { className: "nq-hider" }); // hides the snapshot while this view is on the page; a saved notebook shows the snapshot
  root.append(
    make("header", {}, make("span", { className: "nq-head" }, make("span", { className: "nq-live" }), title, state), chips,
      make("span", { className: "nq-find" }, search, filterButton, menuButton)),
    menu, active, kinds, scroller, empty,
    make("footer", {}, some, every, again, confirm, pace, make("span", { className: "nq-pages" }, where, sizes, back, next), exports, help),
    note, clip, keyList, voice, hider,
  );

  const kernelNow = () => Date.now() / 1000 + clockOffset;
  const fixed = () => over || last?.state === "frozen"; // whether the tasks no longer change
  const onlyFailed = () => look.statuses.join() === "failed";
  const say = (text) => put(voice, text);
  const send = (message) => {
    try {
      if (!over) model.send({ ...message, view, n: ++sent });
    } catch {
      closed(); // Jupyter refuses to send to a kernel that has ended.
    }
    return sent;
  };
  const answers = /** @type {Map<number, {resolve: Function, reject: Function}>} */ (new Map());
  /** Send a request to the kernel, and return its answer. */
  const request = (message, seconds) =>
    new Promise((resolve, reject) => {
      if (over) return reject(new Error("the kernel has ended"));
      const n = send(message);
      answers.set(n, { resolve, reject });
      setTimeout(() => answers.delete(n) && reject(new Error("the kernel is busy. Try again when it is idle")), seconds * 1000);
    });
  const answered = ({ n, problem, ...rest }) => {
    const found = answers.get(n);
    answers.delete(n);
    problem ? found?.reject(new Error(problem)) : found?.resolve({ n, ...rest });
  };
  const ask = (changes, then = {}) => {
    Object.assign(look, { page: 0 }, changes);
    if (!onlyFailed()) look.failure = "";
    lookNumber = send({ type: "look", ...look, ...then });
    controls();
  };

  /** Draw the header and the footer as the user has set them, even if the kernel has not answered yet. */
  function controls() {
    for (const [name, { button }] of counts)
      mark(button, "aria-pressed", name ? look.statuses.includes(name) : look.statuses.length === 0);
    for (const [key, heading] of headings) {
      mark(heading, "aria-sort", key !== look.sort ? null : look.down ? "descending" : "ascending");
      mark(heading, "data-filtered", look.filters[key] || (key === "status" && look.statuses.length) ? "" : null);
    }
    drawFilters();
    drawKinds();
    if (focused(root) !== search && !typed) search.value = look.search;
    sizes.value = String(look.size);
    put(some, `Cancel selected (${number(selected.size)})`);
    mark(some, "aria-disabled", selected.size === 0 || fixed() ? "true" : null);
    for (const each of files) mark(each, "aria-disabled", exporting || over || !last?.loaded || !last.matching ? "true" : null);
  }

  /** Return where the layout is stored: the layout belongs to this notebook and to tables with this title. */
  function layoutKey() {
    const manager = /** @type {any} */ (model).widget_manager;
    const path = manager?.context?.path ?? manager?._context?.path ?? location.pathname;
    return `nqnb.columns:${path}:${last?.title ?? ""}`;
  }

  /** Return the layout that was stored, or an empty layout. The stored text may have been changed by other programs. */
  function stored() {
    let found = LAYOUTS.get(layoutKey());
    try {
      found = localStorage.getItem(layoutKey()) ?? found;
    } catch {} // The browser refuses access to the storage.
    let { order = [], shown = {}, widths = {} } = /** @type {any} */ ({});
    try {
      ({ order = [], shown = {}, widths = {} } = JSON.parse(found ?? "{}"));
    } catch {} // It is not a layout.
    const pairs = (value, kind) => Object.fromEntries(Object.entries(value ?? {}).filter(([, each]) => typeof each === kind));
    return {
      order: Array.isArray(order) ? order.filter((each) => typeof each === "string") : [],
      shown: /** @type {Record<string, boolean>} */ (pairs(shown, "boolean")),
      widths: /** @type {Record<string, number>} */ (pairs(widths, "number")),
    };
  }

  function remember() {
    const text = JSON.stringify(layout);
    LAYOUTS.set(layoutKey(), text);
    try {
      localStorage.setItem(layoutKey(), text);
    } catch {} // The layout lasts as long as the page.
  }

  /** Return all columns in the user's order. A column that is new follows the column that precedes it by default. */
  function ordered() {
    const known = new Map(offered.map((column) => [column.key, column]));
    const keys = (layout?.order ?? []).filter((key) => known.has(key));
    offered.forEach(({ key }, at) => {
      if (!keys.includes(key)) keys.splice(at ? keys.indexOf(offered[at - 1].key) + 1 : 0, 0, key);
    });
    return keys.map((key) => /** @type {Column} */ (known.get(key)));
  }

  const brush = /** @type {CanvasRenderingContext2D} */ (document.createElement("canvas").getContext("2d"));
  function textWidth(/** @type {HTMLElement} */ like, text) {
    const { fontWeight, fontSize, fontFamily } = getComputedStyle(like);
    brush.font = `${fontWeight} ${fontSize} ${fontFamily}`;
    return brush.measureText(text).width;
  }

  /** Measure the longest text of each column. The widths of columns only grow, so that the columns do not move often. */
  function measureContents() {
    let grown = false;
    for (const { key } of visible) {
      const button = /** @type {HTMLElement} */ (headings.get(key)?.firstChild);
      let need = textWidth(button, button.textContent + (look.sort === key ? " ↑" : "")) + 22;
      let longest = "";
      let like = null;
      for (const task of tasks.values()) {
        const cell = task.cells[key];
        const text = cell?.textContent ?? "";
        if (text.length > longest.length) [longest, like] = [text, key === "id" || key === "payload" ? cell.querySelector("code") : cell];
      }
      const marks = key === "status" ? 18 : key === "progress" ? (last?.rows.some((row) => row.share !== null && !row.error) ? 104 : 0) : 0;
      if (like) need = Math.max(need, textWidth(like, longest) + 20 + marks);
      need = Math.min(Math.ceil(need / 8) * 8, key === "status" ? 260 : key === "id" ? MOST_ID_WIDTH : 640);
      if (need > (needs.get(key) ?? 0)) {
        needs.set(key, need);
        grown = true;
      }
    }
    if (grown) arrange();
  }

  /** Select the columns that fit, draw their headings, and set their widths. */
  function arrange() {
    const width = root.clientWidth;
    if (!width || !layout) return;
    const own = layout;
    wanted = ordered().filter(({ key, shown }) => own.shown[key] ?? shown > 0);
    const narrow = width < 600;
    const room = width - (narrow ? 49 + 96 : 56 + 110);
    const need = ({ key }) => needs.get(key) ?? 60;
    const least = (column) => {
      const fixed = own.widths[column.key] ?? (column.key === "status" ? undefined : WIDTHS[column.key]?.[0]);
      return fixed ?? (column.key === "status" ? Math.max(116, Math.min(150, need(column))) : Math.max(56, Math.min(110, need(column))));
    };
    const total = (columns, of) => columns.reduce((sum, each) => sum + of(each), 0);
    // The width with which little of the contents is cut.
    const comfortable = (column) => {
      const fixed = own.widths[column.key] ?? (WIDTHS[column.key] && !["status", "worker"].includes(column.key) && !OMITTED_LAST.includes(column.key));
      const most = ["progress", "error"].includes(column.key) ? COMFORTABLE_ERROR_WIDTH : COMFORTABLE_WIDTH;
      return fixed ? least(column) : Math.max(least(column), Math.min(most, need(column)));
    };
    let fitting = wanted;
    const omit = (keys, of) => {
      for (const key of keys) {
        if (total(fitting, of) <= room) return;
        fitting = fitting.filter((column) => column.key !== key || column.shown === 2 || own.shown[key]);
      }
    };
    omit(OMITTED_FIRST, comfortable);
    omit([...wanted.map(({ key }) => key).filter((key) => !WIDTHS[key]).reverse(), ...OMITTED_LAST], least);
    const widths = new Map(fitting.map((column) => [column, least(column)]));
    const share = (among, limit) => {
      let left = room - total(fitting, (column) => widths.get(column));
      let hungry = among.filter((column) => limit(column) > widths.get(column));
      while (left > 0.5 && hungry.length) {
        const each = left / hungry.length;
        for (const column of hungry) {
          const more = Math.min(each, limit(column) - widths.get(column));
          widths.set(column, widths.get(column) + more);
          left -= more;
        }
        hungry = hungry.filter((column) => limit(column) - widths.get(column) > 0.5);
      }
    };
    const free = fitting.filter(({ key }) => !own.widths[key]);
    const growing = free.filter(({ key, kind }) => !WIDTHS[key] ? kind === "text" : ["payload", "error", "result", "progress"].includes(key));
    share(free.filter(({ key }) => key === "status"), need);
    share(free, (column) => Math.max(WIDTHS[column.key]?.[1] ?? 0, column.key === "id" ? 0 : need(column)));
    share(free.filter(({ key }) => key === "id"), need);
    share(growing.length ? growing : free.slice(-1), () => Infinity);
    const sum = total(fitting, (column) => widths.get(column));
    table.style.width = sum > room + 1 ? `${Math.round(sum + width - room)}px` : "";
    const shape = (columns) => JSON.stringify(columns.map(({ key, kind }) => [key, kind]));
    if (shape(fitting) !== shape(visible)) {
      visible = fitting;
      head.replaceChildren(choose_all, ...visible.map(heading), acts);
      drawFilterLine();
      for (const task of tasks.values()) task.arrange(visible);
      if (!menu.hidden) drawMenu();
    }
    for (const [column, px] of widths) {
      const each = heading(column);
      each.style.width = `${Math.floor(px)}px`;
    }
    const keys = wanted.filter(({ shown }) => !shown).map(({ key }) => key);
    const layoutKeys = wanted.map(({ key }) => key); // for exports, which contain the columns that do not fit, too
    if (JSON.stringify([keys, layoutKeys]) !== askedColumns) {
      askedColumns = JSON.stringify([keys, layoutKeys]);
      send({ type: "columns", keys, layout: layoutKeys });
    }
  }

  /** Return the heading of a column. */
  function heading({ key, name, kind }) {
    let found = headings.get(key);
    if (!found) {
      const button = make("button", { type: "button", "data-act": "sort", "data-sort": key });
      const grip = make("span", { className: "nq-grip", "aria-hidden": "true" });
      found = make("th", { className: DRAWN.has(key) ? `nq-${key}` : "nq-field", scope: "col", "data-key": key }, button, grip);
      headings.set(key, found);
    }
    if (key === "progress" && last) {
      const faults = last.rows.some((row) => row.error);
      const bars = last.rows.some((row) => (row.share !== null && !row.error) || row.words);
      name = !faults ? "progress" : bars ? "progress, error" : "error";
    }
    put(found.firstChild, name);
    mark(found, "title", name);
    mark(found, "data-kind", kind);
    return found;
  }

  /** Return the control for the filter of a column, or null if the column has no filter. */
  function filterOf({ key, name, kind, choices }) {
    let found = filters.get(key);
    if (!kind) return null;
    if (found?.dataset.kind !== kind) {
      const known = { "data-key": key, "data-kind": kind, "data-act": "filter-by", "aria-label": `Filter: ${name}` };
      found = HINTS[kind]
        ? make("input", { ...known, type: "text", placeholder: HINTS[kind][0], title: HINTS[kind][1], spellcheck: false, autocomplete: "off" })
        : make("select", known);
      filters.set(key, found);
    }
    if (!HINTS[kind]) {
      const values = kind === "status" ? STATUSES : choices;
      if (found.dataset.values !== values.join("\n")) {
        found.dataset.values = values.join("\n");
        found.replaceChildren(...["", ...values].map((value) => make("option", { value: value && kind === "choice" ? `=${value}` : value }, value || "all")));
      }
    }
    return found;
  }

  function drawFilterLine() {
    const cells = visible.map((column) => make("td", {}, ...[filterOf(column) ?? []].flat()));
    if (filterLine.hidden) filterLine.replaceChildren();
    else filterLine.replaceChildren(make("td", {}), ...cells, make("td", { className: "nq-act" }));
    drawFilters();
  }

  /** Draw the filters as the user has set them. */
  function drawFilters() {
    for (const [key, control] of filters) {
      if (filtering || control.getRootNode().activeElement === control) continue;
      control.value = control.dataset.kind === "status" ? (look.statuses.length === 1 ? look.statuses[0] : "") : (look.filters[key] ?? "");
    }
    const set = Object.entries(look.filters);
    put(filterButton, set.length ? `filter (${set.length})` : "filter");
    mark(filterButton, "aria-pressed", set.length ? "true" : null);
    active.hidden = set.length === 0;
    const shape = JSON.stringify(set);
    if (active.dataset.shape === shape) return;
    active.dataset.shape = shape;
    const names = new Map(offered.map(({ key, name }) => [key, name]));
    active.replaceChildren(
      ...set.map(([key, text]) => {
        const words = `${names.get(key) ?? key}: ${text.replace(/^=/, "")}`;
        return make("button", { type: "button", className: "nq-chip", "data-act": "unfilter", "data-key": key, "aria-label": `Remove the filter ${words}` },
          make("bdi", {}, words), " ×");
      }),
      make("button", { type: "button", className: "nq-plain nq-all", "data-act": "show-all" }, "show all"),
    );
  }

  /** Draw the kinds of failures, if only failed tasks are shown. All tasks in one kind failed for the same reason. */
  function drawKinds() {
    const found = onlyFailed() ? (last?.kinds ?? []) : [];
    const focus = /** @type {?HTMLElement} */ (focused(root));
    kinds.hidden = found.length === 0;
    if (kinds.hidden) return;
    const { all_kinds: all = 0, ungrouped = 0, requeues = false } = last ?? {};
    put(kindsButton, `${number(all)} kind${all === 1 ? "" : "s"} of failure${ungrouped ? ` (${number(ungrouped)} tasks not grouped yet)` : ""}`);
    const shape = JSON.stringify([found, all, requeues, look.failure]);
    if (kindList.dataset.shape === shape) return;
    kindList.dataset.shape = shape;
    const chosen = found.find(({ id }) => id === look.failure);
    chosenKind.hidden = !chosen;
    chosenKind.replaceChildren(make("bdi", {}, chosen?.error ?? ""), " ×");
    mark(chosenKind, "aria-label", chosen ? `Show all kinds, not only ${chosen.error}` : null);
    kindList.replaceChildren(
      ...found.map(({ id, error, where, count, left }) => {
        const place = where ? [make("span", {}, make("bdi", {}, where))] : [];
        const show = make("button", { type: "button", className: "nq-kind", "data-act": "kind", "data-kind": id, "aria-pressed": id === look.failure,
          "aria-label": `${tasksOf(count)}: ${error}${where && `, ${where}`}`, title: [error, where].filter(Boolean).join("\n") },
          make("b", {}, number(count)), make("bdi", {}, error), ...place);
        const requeue = make("button", { type: "button", className: "nq-button nq-again", "data-act": "requeue-kind", "data-kind": id, "aria-label": `Requeue ${tasksOf(left)}: ${error}` },
          `Requeue ${number(left)}…`);
        const trace = make("button", { type: "button", className: "nq-button", "data-act": "example", "data-kind": id, "aria-label": `Traceback of one task: ${error}` }, "Traceback");
        return make("li", {}, show, make("span", { className: "nq-kind-acts" }, trace, ...(requeues && left ? [requeue] : [])));
      }),
      ...(all > found.length ? [make("li", { className: "nq-note" }, `and ${number(all - found.length)} more; nq.failures() returns all kinds`)] : []),
    );
    if (focus && !focus.isConnected) {
      const { act = "", kind = "" } = focus.dataset;
      const same = /** @type {?HTMLElement} */ (kindList.querySelector(`[data-act="${act}"][data-kind="${CSS.escape(kind)}"]`));
      (same ?? kindsButton).focus({ preventScroll: true });
    }
  }

  /** Expand the first task of the kind whose traceback the user has asked for, once its row is there. */
  function showExample() {
    const task = tasks.get(table.tBodies[0]?.dataset.id ?? "");
    if (!example || look.failure !== example || !task) return;
    example = "";
    if (!opened.has(task.id)) toggle(task.id);
    task.opener.focus();
  }

  function showKinds(on) {
    kindList.hidden = !on;
    mark(kindsButton, "aria-expanded", on ? "true" : "false");
  }

  function drawMenu() {
    const focus = /** @type {?HTMLElement} */ (menu.querySelector(":focus"));
    const columns = ordered();
    menu.replaceChildren(
      ...columns.map(({ key, name, shown }, at) => {
        const box = make("input", { type: "checkbox", "data-act": "pick", "data-key": key });
        const move = (act, label, text, off) =>
          make("button", { type: "button", className: "nq-plain", "data-act": act, "data-key": key, "aria-label": `Move ${name} ${label}`, ...(off ? { "aria-disabled": "true" } : {}) }, text);
        // A column that does not fit is neither on nor off. A click shows the column, and the table scrolls.
        const omitted = wanted.some((each) => each.key === key) && !visible.some((each) => each.key === key);
        box.checked = !omitted && (layout?.shown[key] ?? shown > 0);
        box.indeterminate = omitted;
        const hint = omitted ? { title: "does not fit; click to show it" } : {};
        return make("span", { className: "nq-pick", ...hint }, make("label", {}, box, make("bdi", {}, name)),
          move("earlier", "to the left", "‹", at === 0), move("later", "to the right", "›", at === columns.length - 1));
      }),
      make("button", { type: "button", className: "nq-button", "data-act": "reset" }, "Reset"),
    );
    const { act = "", key = "" } = focus?.dataset ?? {};
    if (focus) /** @type {?HTMLElement} */ (menu.querySelector(`[data-act="${act}"]${key && `[data-key="${CSS.escape(key)}"]`}`))?.focus();
  }

  /** Apply a change of the layout, and remember the layout. */
  function relayout(change) {
    if (!layout) return;
    change(layout);
    remember();
    arrange();
    if (!menu.hidden) drawMenu();
    controls();
    tick();
  }

  /** Move a column to the place before another column, or to the end. */
  function moveColumn(key, before) {
    const keys = ordered().map((column) => column.key).filter((each) => each !== key);
    const at = before === null ? -1 : keys.indexOf(before);
    keys.splice(at < 0 ? keys.length : at, 0, key);
    relayout((own) => (own.order = keys));
    say(`${offered.find((column) => column.key === key)?.name} moved`);
  }

  /** Set the width of a column to the width of its contents. */
  function fitColumn(key) {
    const found = headings.get(key);
    if (!found) return;
    const range = document.createRange();
    let width = /** @type {HTMLElement} */ (found.firstChild).getBoundingClientRect().width + 14;
    for (const task of tasks.values()) {
      range.selectNodeContents(task.cells[key]);
      width = Math.max(width, range.getBoundingClientRect().width);
    }
    relayout((own) => (own.widths[key] = Math.min(900, Math.ceil(width) + 18)));
  }

  // Drag the edge of a heading to resize its column, and the heading itself to move the column.
  let drag = /** @type {?{key: string, heading: HTMLElement, grip: ?HTMLElement, x: number, width: number, moved: boolean}} */ (null);
  function dropPlace(x) {
    const boxes = visible.map(({ key }) => ({ key, box: /** @type {HTMLElement} */ (headings.get(key)).getBoundingClientRect() }));
    return boxes.find(({ box }) => x < box.left + box.width / 2)?.key ?? null;
  }
  function grab(event) {
    const found = event.target.closest("th[data-key]");
    const grip = event.target.closest(".nq-grip");
    if (!found || event.button !== 0 || (event.pointerType === "touch" && !grip)) return;
    drag = { key: found.dataset.key, heading: found, grip, x: event.clientX, width: found.getBoundingClientRect().width, moved: false };
    grip?.setPointerCapture(event.pointerId);
    if (grip) event.preventDefault();
  }
  function dragTo(event) {
    if (!event.buttons) return void (drag = null); // the button was released outside the headings
    if (!drag || !layout) return;
    const by = event.clientX - drag.x;
    if (!drag.moved && Math.abs(by) < 5) return;
    drag.moved = true;
    if (drag.grip) {
      layout.widths[drag.key] = Math.max(LEAST_WIDTH, Math.round(drag.width + by));
      return arrange();
    }
    // The captured pointer ends the click, which would otherwise sort the table.
    if (!drag.heading.hasPointerCapture(event.pointerId)) drag.heading.setPointerCapture(event.pointerId);
    mark(drag.heading, "data-dragged", "");
    const before = dropPlace(event.clientX);
    for (const [key, each] of headings) mark(each, "data-drop", key === before ? "" : null);
    mark(acts, "data-drop", before === null ? "" : null);
  }
  function drop(event) {
    const done = drag;
    drag = null;
    for (const each of [...headings.values(), acts]) for (const name of ["data-drop", "data-dragged"]) mark(each, name, null);
    if (!done?.moved || event.type === "pointercancel") return;
    if (done.grip) return relayout(() => {});
    const before = dropPlace(event.clientX);
    if (before !== done.key) {
      const last = visible[visible.length - 1].key;
      const keys = ordered().map((column) => column.key);
      moveColumn(done.key, before ?? keys[keys.indexOf(last) + 1] ?? null);
    }
  }

  /** Draw the rows of the last message in place. */
  function rows(message, keepOrder) {
    const shown = keepOrder ? message.rows.filter((row) => tasks.has(row.id)) : message.rows;
    const active = focused(root);
    const focus = /** @type {?HTMLElement} */ (root.contains(active) ? active : null);
    if (!keepOrder) {
      const stay = new Set(shown.map((row) => row.id));
      for (const [id, task] of tasks)
        if (!stay.has(id)) {
          task.body.remove();
          tasks.delete(id);
        }
    }
    let place = table.tHead.nextSibling;
    let index = message.page * message.size + 1; // the heading is row 1
    mark(table, "aria-rowcount", message.matching + 1);
    for (const row of shown) {
      let task = tasks.get(row.id);
      if (!task) tasks.set(row.id, (task = new Task(row.id)));
      const mine = pressed.get(row.id);
      if (mine && (message.heard[view] ?? 0) >= mine.n) pressed.delete(row.id);
      task.draw(row, { selected: selected.has(row.id), opened: opened.has(row.id), details: details.get(row.id), visible });
      if (keepOrder) continue;
      mark(task.line, "aria-rowindex", ++index);
      // Remove a row that moved down, so that the rows below do not move and do not lose the focus.
      if (place && place !== task.body && place.nextSibling === task.body) {
        const moved = place;
        place = task.body;
        moved.remove();
      }
      if (place === task.body) place = place.nextSibling;
      else table.insertBefore(task.body, place);
    }
    if (!tasks.has(current)) current = shown[0]?.id ?? "";
    reach();
    // If the row with the focus is removed, focus another row: otherwise the next key goes to the notebook.
    const stays = focus && root.contains(focus) ? focus : (tasks.get(current)?.line ?? root);
    if (focus && stays !== focused(root)) stays.focus({ preventScroll: true });
  }

  /** Make the Tab key reach the controls of only one row; the arrow keys move between rows. */
  function reach() {
    for (const [id, task] of tasks) {
      const tab = id === current ? 0 : -1;
      if (task.line.tabIndex !== tab || task.opener.tabIndex !== tab)
        for (const each of [task.line, ...task.controls]) each.tabIndex = tab;
    }
  }

  function tick() {
    const now = fixed() ? overAt : kernelNow();
    const lost = last?.state === "lost" ? last.since : null;
    const at = Math.min(now, lost ?? now);
    const heard = last?.heard[view] ?? 0;
    let choosable = 0;
    let chosen = 0;
    for (const [id, task] of tasks) {
      const press = pressed.get(id);
      if (task.tick(now, { at, pressed: press?.at ?? null, heard: !press || heard >= press.n, lost, over: fixed(), requeues: last?.requeues ?? false })) {
        choosable += 1;
        if (selected.has(id)) chosen += 1;
      }
    }
    const open = last?.open ?? 0;
    const busy = countedAt > 0 && Date.now() - countedAt > KERNEL_ANSWER_SECONDS * 1000;
    put(every, busy ? "kernel busy…" : `Cancel all (${number(open)})`);
    mark(every, "aria-disabled", open === 0 || countedAt || fixed() ? "true" : null);
    again.hidden = !confirm.hidden || !last?.requeues || !last.requeueable;
    for (const each of [again, ...kindList.querySelectorAll(".nq-again")]) mark(each, "aria-disabled", countedAt || fixed() || lost !== null || !confirm.hidden ? "true" : null);
    all.disabled = choosable === 0;
    all.checked = choosable > 0 && chosen === choosable;
    all.indeterminate = chosen > 0 && chosen < choosable;
    let text = "";
    if (restarted) text = "kernel restarted: run the cell again";
    else if (over) text = "disconnected; the rows no longer change";
    else if (!last && Date.now() - receivedAt > KERNEL_ANSWER_SECONDS * 1000) text = "the kernel is busy: the rows appear when it answers";
    else if (!last || last.state === "loading") text = last?.total ? `loading… ${number(last.total)}${last.all ? " so far; older and ended tasks are still being counted" : ""}` : "loading…";
    else if (last.state === "frozen") text = last.open ? "frozen; the rows no longer change" : "";
    else if (last.state === "lost") text = `connection lost ${about(now - last.since)} ago; the rows show the state at that time`;
    const idle = text === "" && last !== null && last.unserved.length > 0;
    if (idle) text = `no worker is serving ${last?.unserved.map((queue) => `"${queue}"`).join(", ")}; pending tasks wait`;
    mark(root, "data-idle", idle ? "" : null);
    put(state, text);
    mark(root, "data-state", over ? "over" : (last?.state ?? "loading"));
    const fresh = last?.rate && last.state === "live" && Date.now() - receivedAt < 15_000;
    const left = fresh && last?.left ? `about ${about(last.left)} left` : "";
    put(pace, fresh ? [speed(last?.rate), left].filter(Boolean).join(" · ") : "");
  }

  /** @param {Rows} message */
  function show(message) {
    message.rows = message.rows.map((row) => ({ ...EMPTY_ROW, ...row }));
    const heard = message.heard[view] ?? 0;
    const before = last;
    if (!message.polled) pollSeconds = POLL_SECONDS.idle;
    else if (before && content(before) !== content(message)) pollSeconds = POLL_SECONDS.news;
    else pollSeconds = Math.max(pollSeconds, POLL_SECONDS.answers);
    over = restarted = false;
    last = message;
    receivedAt = Date.now();
    polledAt = 0;
    if (message.state === "frozen") overAt = message.since;
    clockOffset = message.now - receivedAt / 1000;
    put(title, message.title);
    put(hider, `#${message.snapshot}, .jp-OutputArea-child:has(> .jp-RenderedHTML > #${message.snapshot}) { display: none }`);
    mark(root, "aria-label", `Tasks: ${message.title}`);
    for (const [name, { button, count }] of counts) {
      const value = name ? message.counts[name] : STATUSES.reduce((sum, each) => sum + message.counts[each], 0);
      put(count, number(value));
      mark(button, "aria-label", `${name || "all"}, ${number(value)}`);
      button.hidden = ["scheduled", "deleted"].includes(name) && !value && !look.statuses.includes(name);
    }
    if (heard >= lookNumber) {
      const { search, statuses, failure, filters, sort, down, page, size } = message;
      Object.assign(look, { search: look.search.trim().toLowerCase() === search ? look.search : search, statuses, failure, filters, sort, down, page, size });
    }
    for (const id of message.ended) selected.delete(id);
    for (const [id, parts] of Object.entries(message.details)) details.set(id, parts);
    offered = message.columns.map(([key, name, kind, shown, choices]) => ({ key, name, kind, shown, choices }));
    layout ??= stored();
    if (heard >= lookNumber && (before?.heard[view] ?? 0) < lookNumber) needs.clear();
    arrange();
    if (heard >= lookNumber || !before) rows(message, pointing() && heard < holdNumber && before !== null);
    if (heard >= lookNumber) showExample();
    for (const id of details.keys()) if (!opened.has(id)) details.delete(id);
    const start = message.page * message.size;
    put(where, message.matching ? `${number(start + 1)} – ${number(start + message.rows.length)} of ${number(message.matching)}` : "0");
    mark(where, "title", message.behind ? "the order stays fixed while you point at the rows" : null);
    mark(where, "data-held", message.behind ? "" : null);
    mark(back, "aria-disabled", message.page === 0 ? "true" : null);
    mark(next, "aria-disabled", message.page >= message.pages - 1 ? "true" : null);
    const none = message.rows.length === 0;
    empty.hidden = !none;
    showAll.hidden = !message.total;
    put(emptyText, !none ? "" : message.total ? "No task matches." : message.state === "loading" ? "Loading…" : message.loaded ? "No tasks yet." : "Not loaded.");
    if (before && before.state !== message.state) say(message.state === "lost" ? "Connection lost" : message.state === "live" ? "Connected" : "");
    else if (before && heard >= lookNumber && (before.heard[view] ?? 0) < lookNumber) say(`${number(message.matching)} tasks match`);
    for (const row of message.rows) if (row.late && !before?.rows.some((old) => old.id === row.id && old.late)) say(`${row.name} ${row.late}`);
    for (const row of message.rows) if (row.refused && !before?.rows.some((old) => old.id === row.id && old.refused)) say(`Not cancelled: ${row.refused}`);
    for (const row of message.rows) if (row.unqueued && !before?.rows.some((old) => old.id === row.id && old.unqueued)) say(`Not requeued: ${row.unqueued}`);
    controls();
    tick();
    measureContents();
    if (!filterLine.hidden) offered.filter(({ key }) => filters.has(key)).forEach(filterOf); // the choices may have changed
  }

  function press(ids) {
    const at = kernelNow();
    const open = ids.filter((id) => !pressed.has(id));
    if (fixed() || open.length === 0) return;
    const n = send({ type: "cancel", ids: open });
    for (const id of open) {
      pressed.set(id, { at, n });
      const task = tasks.get(id);
      if (task) task.explain("", 1);
    }
    if (last?.state === "lost") say("Not sent yet: the connection is lost");
    else say(open.length === 1 ? `Cancelling ${tasks.get(open[0])?.row.name ?? ""}` : `Cancelling ${number(open.length)} tasks`);
    tick();
  }

  function choose(ids, on) {
    for (const id of ids) on ? selected.add(id) : selected.delete(id);
    for (const id of ids) {
      const task = tasks.get(id);
      if (task) task.box.checked = on;
      if (task) mark(task.line, "aria-selected", on);
    }
    send({ type: "select", ids: [...selected] });
    controls();
    tick();
  }

  function toggle(id) {
    const task = tasks.get(id);
    if (!task) return;
    opened.has(id) ? opened.delete(id) : opened.add(id);
    mark(task.opener, "aria-expanded", opened.has(id));
    task.open(opened.has(id), details.get(id), visible.length + 2);
    send({ type: "open", ids: [...opened] });
  }

  /** Show a note below the rows. */
  function tell(text, last = true) {
    clearTimeout(noted);
    put(note, text);
    note.hidden = !text;
    if (last) say(text);
    if (last) noted = setTimeout(() => (note.hidden = true), NOTE_MS);
  }

  /** Copy text, which may be on its way from the kernel. If the browser refuses, show the text for the user to copy. */
  async function copy(what, coming) {
    const from = /** @type {?HTMLElement} */ (focused(root));
    try {
      // The promise is passed on, because a browser may refuse to copy text that arrives after the click.
      const blob = coming.then((text) => new Blob([text], { type: "text/plain" }));
      blob.catch(() => {});
      await navigator.clipboard.write([new ClipboardItem({ "text/plain": blob })]);
    } catch {
      try {
        clip.value = await coming;
      } catch (error) {
        return tell(`Not copied: ${/** @type {Error} */ (error).message}`);
      }
      clip.hidden = false;
      clip.select();
      if (!document.execCommand("copy")) return tell(`The browser does not allow a page to copy. Press ${MAC ? "⌘" : "Ctrl"} C to copy the text below, then Escape.`, false);
      clip.hidden = true;
      from?.focus({ preventScroll: true });
    }
    tell(`Copied the ${what}`);
  }

  async function copyId(task) {
    await copy("id", Promise.resolve(task.id));
    mark(task.copy, "data-copied", "");
    setTimeout(() => mark(task.copy, "data-copied", null), 1200);
  }

  const fetched = (task, what) => request({ type: "copy", id: task.id, what }, COPY_SECONDS).then(({ text }) => text);

  function copyText(task, button) {
    const what = button.dataset.what;
    if (what) return copy({ row: "row", json: "row as JSON" }[what] ?? what, fetched(task, what));
    const section = button.closest("section");
    const lines = [...section.querySelectorAll(".nq-list > span")].map((each) => [...each.children].map((part) => part.textContent).join(": "));
    return copy("text", Promise.resolve(lines.join("\n")));
  }

  function copyCell(task, cell) {
    const name = Object.keys(task.cells).find((each) => task.cells[each] === cell) ?? "";
    return copy("cell", SHORT.includes(name) ? Promise.resolve(cell.textContent.trim()) : fetched(task, name));
  }

  async function save(format) {
    const parts = [];
    exporting = true;
    controls();
    try {
      let found = { parts: 1, name: "", text: "" };
      tell("Exporting…", false);
      for (let part = 0; part < found.parts; part++) {
        found = await request({ type: "export", format, part }, EXPORT_SECONDS);
        parts.push(found.buffers[0]);
        tell(`Exporting… ${percent(parts.length / found.parts)}`, false);
      }
      const url = URL.createObjectURL(new Blob(parts));
      make("a", { href: url, download: found.name }).click();
      setTimeout(() => URL.revokeObjectURL(url), 60_000);
      tell(found.text);
    } catch (error) {
      tell(`Not exported: ${/** @type {Error} */ (error).message}`);
    }
    exporting = false;
    send({ type: "exported" }); // until then, the kernel does not freeze the table
    controls();
  }

  function askToConfirm(what, about, { requeue = false, ids = null, n = 0, focus = true, examples = /** @type {string[]} */ ([]) }) {
    asked = { requeue, ids, n, from: focused(root) };
    const verb = requeue ? "Requeue" : "Cancel";
    put(question, `${verb} ${about}?`);
    put(yes, `${verb} ${what}`);
    mark(yes, "data-requeue", requeue ? "" : null);
    put(no, requeue ? "Not now" : "Keep them");
    preview.replaceChildren(...examples.map((text) => make("li", {}, make("bdi", {}, text))));
    preview.hidden = !examples.length;
    confirm.hidden = false;
    some.hidden = every.hidden = again.hidden = true;
    focus ? no.focus() : say(question.textContent);
  }

  const tasksOf = (count) => `${number(count)} task${count === 1 ? "" : "s"}`;

  /** Ask whether to cancel the tasks with the given ids. */
  function askAbout(ids) {
    const count = ids.length;
    const absent = ids.filter((id) => !tasks.has(id)).length;
    const named = count === 1 ? (tasks.get(ids[0])?.row.name ?? ids[0]) : `${number(count)} selected tasks`;
    const note = !absent ? "" : count === 1 ? " (not on this page)" : ` (${number(absent)} not on this page)`;
    askToConfirm(tasksOf(count), named + note, { ids });
  }

  /** Ask whether to requeue one failed task. */
  function askToRequeue(task) {
    askToConfirm("1 task", task.row.name, { requeue: true, ids: [task.id] });
  }

  /** Let the kernel count the matching tasks, because it may still have to apply a filter, and ask what to do with them. */
  async function askAboutAll(requeue = false) {
    const from = focused(root);
    countedAt = Date.now();
    const counted = request({ type: "ask_all", action: requeue ? "requeue_all" : "cancel_all" }, COUNT_SECONDS);
    tick();
    try {
      const { n, count, examples } = await counted;
      // If the user has changed the filter or opened another question since, the count answers nothing.
      if (n < lookNumber || !confirm.hidden) return;
      const more = count - examples.length;
      const listed = more > 0 ? [...examples, `and ${number(more)} more`] : examples;
      if (count) askToConfirm(tasksOf(count), `${tasksOf(count)}, on all pages`, { requeue, n, focus: focused(root) === from, examples: listed });
      else tell(requeue ? "No matching task can be requeued" : "No matching task is open");
    } catch (error) {
      tell(`Not ${requeue ? "requeued" : "cancelled"}: ${/** @type {Error} */ (error).message}`);
    } finally {
      countedAt = 0;
      tick();
    }
  }

  function answer() {
    const { requeue, ids, from } = asked;
    confirm.hidden = true;
    some.hidden = every.hidden = false;
    tick();
    const back = /** @type {HTMLElement} */ (from && root.contains(from) ? from : ids ? (tasks.get(current)?.line ?? root) : requeue ? again : every);
    (back.checkVisibility?.() === false ? root : back).focus({ preventScroll: true });
  }

  function showKeys(on) {
    keyList.hidden = !on;
    mark(help, "aria-expanded", on ? "true" : "false");
    if (on) keyList.scrollIntoView({ block: "nearest" });
    if (on) say(KEYS.map(([names, does]) => `${names.join(", ")}: ${does}`).join("; "));
  }

  function act(event) {
    const target = /** @type {HTMLElement} */ (event.target);
    const control = /** @type {?HTMLElement} */ (target.closest("[data-act]"));
    const id = /** @type {?HTMLElement} */ (target.closest("tbody"))?.dataset.id ?? "";
    const task = tasks.get(id);
    if (control?.getAttribute("aria-disabled") === "true") return;
    unsent?.apply();
    if (typed) searchNow();
    switch (control?.dataset.act) {
      case "cancel": return press([id]);
      case "copy": return task && copyId(task);
      case "copy-text": return task && copyText(task, control);
      case "export": return save(control.dataset.format);
      case "open": return toggle(id);
      case "select": return choose([id], /** @type {HTMLInputElement} */ (control).checked);
      case "dismiss":
        task?.explain("", 1);
        task?.line.focus({ preventScroll: true });
        return send({ type: "dismiss", id });
      case "select-all":
        return choose([...tasks].filter(([, each]) => !each.box.disabled && each.button.getAttribute("aria-disabled") === null).map(([id]) => id), all.checked);
      case "cancel-selected": {
        const ids = [...selected];
        choose(ids, false);
        return press(ids);
      }
      case "ask-all": return askAboutAll();
      case "ask-requeue": return askAboutAll(true);
      case "requeue": return task && askToRequeue(task);
      case "cancel-all":
        answer();
        if (asked.requeue) {
          if (asked.ids) send({ type: "requeue", ids: asked.ids });
          else send({ type: "requeue_all", asked: asked.n });
          return say("Requeuing");
        }
        if (asked.ids) return choose(asked.ids, false), press(asked.ids);
        send({ type: "cancel_all", asked: asked.n });
        return say("Cancelling all counted tasks");
      case "keep-all": return answer();
      case "keys": return showKeys(keyList.hidden);
      case "filter": {
        const name = control.dataset.status;
        const have = look.statuses;
        const add = event.shiftKey || event.ctrlKey || event.metaKey;
        if (!name) return ask({ statuses: [] });
        if (have.includes(name)) return ask({ statuses: add ? have.filter((each) => each !== name) : have.length > 1 ? [name] : [] });
        return ask({ statuses: add ? [...have, name] : [name] });
      }
      case "filters": {
        filterLine.hidden = !filterLine.hidden;
        mark(filterButton, "aria-expanded", !filterLine.hidden);
        drawFilterLine();
        if (!filterLine.hidden) /** @type {?HTMLElement} */ (filterLine.querySelector("input, select"))?.focus({ preventScroll: true });
        return;
      }
      case "unfilter": {
        const { [control.dataset.key ?? ""]: _, ...others } = look.filters;
        filterButton.focus({ preventScroll: true });
        return ask({ filters: others });
      }
      case "show-all":
        search.value = "";
        filterButton.focus({ preventScroll: true });
        return ask({ filters: {}, statuses: [], search: "" });
      case "kinds": return showKinds(kindList.hidden);
      case "kind":
        if (control === chosenKind) kindsButton.focus({ preventScroll: true });
        return ask({ failure: look.failure === control.dataset.kind ? "" : control.dataset.kind });
      case "example":
        example = control.dataset.kind ?? "";
        return look.failure === example ? showExample() : ask({ failure: example });
      case "requeue-kind":
        if (look.failure !== control.dataset.kind) ask({ failure: control.dataset.kind });
        return askAboutAll(true);
      case "menu":
        menu.hidden = !menu.hidden;
        mark(menuButton, "aria-expanded", !menu.hidden);
        return menu.hidden || drawMenu();
      case "pick": {
        const box = /** @type {HTMLInputElement} */ (control);
        if (!box.checked && wanted.length === 1 && wanted[0].key === box.dataset.key) box.checked = true;
        else relayout((own) => (own.shown[box.dataset.key ?? ""] = box.checked));
        return;
      }
      case "earlier":
      case "later": {
        const key = control.dataset.key ?? "";
        const keys = ordered().map((column) => column.key);
        const to = keys.indexOf(key) + (control.dataset.act === "later" ? 2 : -1);
        return moveColumn(key, keys[to] ?? null);
      }
      case "reset":
        needs.clear();
        return relayout((own) => Object.assign(own, { order: [], shown: {}, widths: {} }));
      case "sort": {
        const sort = control.dataset.sort;
        if (look.sort !== sort) return ask({ sort, down: false });
        return ask(look.down ? { sort: "activity", down: false } : { down: true });
      }
      case "back": return ask({ page: look.page - 1 });
      case "next": return ask({ page: look.page + 1 });
    }
    // A click anywhere else in a row expands the row, unless the click ends the selection of text.
    if (!control && task && target.closest(".nq-row") && !String(getSelection())) toggle(id);
  }

  function keys(event) {
    const target = /** @type {HTMLElement} */ (event.target);
    if (event.altKey || event.ctrlKey || event.metaKey) {
      const task = tasks.get(target.closest("tbody")?.dataset.id ?? "");
      if (event.key !== "c" || event.altKey || !task || String(getSelection()) || !target.matches(".nq-row, .nq-row > td")) return;
      event.preventDefault();
      return target === task.line ? copy("row", fetched(task, "row")) : copyCell(task, target);
    }
    event.stopPropagation();
    if (event.key !== "Escape" && target.matches("select, textarea, input:not([type=checkbox])")) return;
    const ids = [...table.tBodies].map((each) => each.dataset.id ?? "");
    const at = ids.indexOf(/** @type {?HTMLElement} */ (target.closest("tbody"))?.dataset.id ?? "");
    const task = tasks.get(ids[at]);
    const cell = /** @type {?HTMLTableCellElement} */ (target.closest(".nq-row > td"));
    const move = (to) => {
      if (to && to !== task?.line) to.tabIndex = -1;
      to?.focus();
    };
    if (event.key === "Escape") {
      if (!confirm.hidden) answer();
      else if (target === search || target === clip || target.closest("thead, .nq-menu")) (tasks.get(current)?.line ?? root).focus();
      else if (target.closest(".nq-kinds") && !kindList.hidden) showKinds(false), kindsButton.focus({ preventScroll: true });
      else if (!keyList.hidden) showKeys(false);
      else if (cell === target) move(task?.line);
      else if (task && opened.has(task.id)) toggle(task.id), task.line.focus({ preventScroll: true });
      else return;
    } else if (event.key === "/") search.focus(), search.select();
    else if (event.key === "?") showKeys(keyList.hidden);
    else if (["Delete", "Backspace"].includes(event.key)) {
      const ids = selected.size ? [...selected] : task && !task.box.disabled && !pressed.has(task.id) ? [task.id] : [];
      if (ids.length && confirm.hidden && !fixed()) askAbout(ids);
    } else if (event.key === "r" && !event.ctrlKey && !event.metaKey && !event.altKey && !target.closest("pre")) {
      if (!task || task.again.hidden || task.again.getAttribute("aria-disabled") || !confirm.hidden || fixed()) return;
      askToRequeue(task);
    } else if (!task || target.closest("pre")) return;
    else if (["ArrowDown", "ArrowUp", "Home", "End"].includes(event.key)) {
      const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: ids.length - 1 }[event.key];
      const line = tasks.get(ids[Math.max(0, Math.min(to, ids.length - 1))])?.line;
      move(cell === target ? line?.cells[cell.cellIndex] : line);
    } else if (["PageDown", "PageUp"].includes(event.key)) {
      const page = look.page + (event.key === "PageDown" ? 1 : -1);
      if (page >= 0 && page < (last?.pages ?? 1)) ask({ page });
      else move(tasks.get(ids[page < 0 ? 0 : ids.length - 1])?.line);
    } else if (["ArrowRight", "ArrowLeft"].includes(event.key)) {
      const cells = [...task.line.cells].slice(1, -1).filter((each) => each.offsetWidth > 0);
      const to = (cell ? cells.indexOf(cell) : -1) + (event.key === "ArrowRight" ? 1 : -1);
      move(to < 0 ? task.line : cells[Math.min(to, cells.length - 1)]);
    } else if (target !== task.line && target !== cell) return;
    else if (event.key === "Enter") toggle(task.id);
    else if (event.key === " ") {
      if (!task.box.disabled) choose([task.id], !selected.has(task.id));
    } else return;
    event.preventDefault();
  }

  // The order of the rows stays fixed while the user is pointing at them, or while a row has the focus.
  let over_rows = false;
  let by_keys = false;
  let resting = 0;
  const pointing = () => over_rows || by_keys;
  function point(rows, keys) {
    const before = pointing();
    [over_rows, by_keys] = [rows, keys];
    if (pointing() !== before) holdNumber = send({ type: "hold", on: pointing() });
  }
  function pointer(event) {
    clearTimeout(resting);
    const rows = event.type !== "pointerleave" && event.pointerType !== "touch" && event.target.closest("tbody") !== null;
    point(rows, by_keys);
    if (rows) resting = setTimeout(() => point(false, by_keys), POINTER_HOLD_MS);
  }
  function focus(event) {
    const target = /** @type {HTMLElement} */ (event.target);
    const body = /** @type {?HTMLElement} */ (event.type === "focusin" ? target.closest("tbody") : null);
    if (body) {
      current = body.dataset.id ?? "";
      reach();
    }
    point(over_rows, body !== null && target.matches(":focus-visible"));
  }

  const searchNow = () => {
    clearTimeout(typed);
    typed = 0;
    if (search.value !== look.search) ask({ search: search.value });
  };
  const type = () => {
    clearTimeout(typed);
    typed = setTimeout(searchNow, 150);
  };
  const filterBy = (event) => {
    const control = event.target.closest("[data-act=filter-by]");
    if (!control) return;
    const { key, kind } = control.dataset;
    const { value } = control;
    const text = value.trim();
    const apply = () => {
      clearTimeout(filtering);
      filtering = 0;
      unsent = null;
      if (kind === "status") return ask({ statuses: value ? [value] : [] });
      const { [key]: _, ...others } = look.filters;
      ask({ filters: text ? { ...others, [key]: text } : others });
    };
    if (unsent && unsent.control !== control) unsent.apply();
    clearTimeout(filtering);
    if (control.tagName === "SELECT") return apply();
    unsent = { control, apply };
    filtering = setTimeout(apply, 150);
  };
  filterLine.addEventListener("input", filterBy);
  head.addEventListener("pointerdown", grab);
  head.addEventListener("pointermove", dragTo);
  head.addEventListener("pointerup", drop);
  head.addEventListener("pointercancel", drop);
  head.addEventListener("dblclick", (event) => {
    const grip = /** @type {HTMLElement} */ (event.target).closest(".nq-grip");
    if (grip) fitColumn(/** @type {HTMLElement} */ (grip.closest("th")).dataset.key);
  });
  root.addEventListener("click", act);
  root.addEventListener("keydown", keys);
  root.addEventListener("focusin", focus);
  root.addEventListener("focusout", focus);
  table.addEventListener("pointermove", pointer);
  table.addEventListener("pointerleave", pointer);
  search.addEventListener("input", type);
  clip.addEventListener("blur", () => clip.hidden || (clip.hidden = note.hidden = true));
  sizes.addEventListener("change", () => ask({ size: Number(sizes.value) }));

  const dress = () => {
    mark(root, "data-theme", theme());
    mark(root, "data-marimo", document.body.dataset.theme ? "" : null);
  };
  const dresser = new MutationObserver(dress);
  dresser.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-light", "data-vscode-theme-kind", "data-theme", "class"] });
  dresser.observe(document.documentElement, { attributes: true, attributeFilter: ["theme"] });
  const system = matchMedia("(prefers-color-scheme: dark)");
  system.addEventListener("change", dress);
  dress();
  const measure = new ResizeObserver(() => requestAnimationFrame(() => {
    arrange();
    tick();
  }));
  measure.observe(root);

  const hear = (message, buffers) => {
    if (message?.type === "answer" && message.view === view) answered({ ...message, buffers });
    if (message?.type === "rows") show(message);
    if (message?.type === "over") end(); // the table is about to be replaced: draw nothing, and send no goodbye
    if (message?.type === "closed") closed(); // marimo sends no event
  };
  const end = () => {
    if (!over) overAt = kernelNow();
    over = true;
    for (const n of [...answers.keys()]) answered({ n, problem: "the kernel has ended" });
  };
  const closed = () => {
    end();
    controls();
    tick();
  };
  // A new kernel does not know the table. Jupyter's manager sends this event, maybe several times, when the user restarts
  // the kernel. The kernel's status also shows that the kernel died and was restarted.
  const turned = () => {
    restarted = true;
    closed();
  };
  const kernel = /** @type {any} */ (model).widget_manager?.kernel;
  const status = (_, now) => {
    if (now === "restarting" || now === "autorestarting") turned();
    else if (now === "dead" || now === "terminating") closed();
  };
  kernel?.statusChanged?.connect(status);
  const leave = () => send({ type: "bye", why: "hidden" });
  const arrive = (event) => {
    if (!event.persisted) return;
    send({ type: "hello" });
    askedColumns = "";
    arrange();
  };
  model.on("msg:custom", hear);
  model.on("comm:close", closed);
  model.on("comm_live_update", turned);
  addEventListener("pagehide", leave);
  addEventListener("pageshow", arrive);
  const slow = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const poll = () => {
    const now = Date.now();
    if (now - receivedAt < pollSeconds * 1000 || now - polledAt < POLL_SECONDS.idle * 1000 || fixed()) return;
    polledAt = now;
    send({ type: "poll" });
  };
  const visit = () => {
    if (document.visibilityState !== "visible") return;
    tick();
    poll();
  };
  const ticking = setInterval(visit, slow ? 1000 : 200);

  controls();
  tick();
  el.append(root);
  // A front end with shadow roots removes the styles that it added when the kernel closes the model or the element moves.
  if (el.getRootNode() instanceof ShadowRoot) root.prepend(make("style", {}, model.get("_css")));
  send({ type: "hello" });

  return () => {
    clearInterval(ticking);
    clearTimeout(typed);
    clearTimeout(filtering);
    clearTimeout(resting);
    clearTimeout(noted);
    dresser.disconnect();
    measure.disconnect();
    system.removeEventListener("change", dress);
    removeEventListener("pagehide", leave);
    removeEventListener("pageshow", arrive);
    model.off("msg:custom", hear);
    model.off("comm:close", closed);
    model.off("comm_live_update", turned);
    kernel?.statusChanged?.disconnect(status);
    send({ type: "bye", why: "removed" });
  };
}

export default { render };
