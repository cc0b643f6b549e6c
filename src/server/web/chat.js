// The chat page: conversations over the server's own API. Nothing is loaded from elsewhere, and all text that comes from
// files or models goes in as text, never as HTML (markdown.js makes elements of it).
"use strict";

const at = (id) => document.getElementById(id);
/// files: of the next question, {name, text}. messages: {role, content (what the server gets), shown, note, thoughts, cut}.
const state = { id: null, messages: [], files: [], slot: null, abort: null, props: {}, editing: null };

function headers() {
  const h = { "Content-Type": "application/json" };
  const key = at("key").value || sessionStorage.getItem("narrows-key") || "";
  if (key) h.Authorization = "Bearer " + key;
  return h;
}

function showError(text) {
  at("error").textContent = text || "";
  at("error").hidden = !text;
}

/// The reply as JSON; throws with the server's own sentence.
async function call(path, options = {}) {
  const response = await fetch(path, { ...options, headers: headers() });
  const reply = await response.json().catch(() => ({}));
  if (response.status === 401) at("key-label").hidden = false;
  if (!response.ok) throw new Error(reply.error ? reply.error.message : "HTTP " + response.status);
  return reply;
}

const post = (path, body) => call(path, { method: "POST", body: JSON.stringify(body) });

function megabytes(bytes) {
  return bytes >= 1e8 ? (bytes / 1e6).toFixed(0) + " MB" : (bytes / 1e6).toFixed(1) + " MB";
}

function element(tag, properties, ...children) {
  const e = Object.assign(document.createElement(tag), properties);
  e.append(...children);
  return e;
}

function action(name, run) {
  const button = element("button", { type: "button" }, name);
  button.addEventListener("click", run);
  return button;
}

// --- messages

const atEnd = () => at("messages").scrollHeight - at("messages").scrollTop - at("messages").clientHeight < 60;
const toEnd = () => (at("messages").scrollTop = at("messages").scrollHeight);

/// Fills a message's element anew. While it is `written` it has no buttons yet.
function fill(box, message, written) {
  const body = element("div", { className: "body" });
  const parts = [];
  if (message.note) parts.push(element("span", { className: "note" }, message.note));
  if (message.thoughts) {
    const open = box.querySelector("details") ? box.querySelector("details").open : false;
    parts.push(element("details", { open }, element("summary", { className: "muted" }, "Thinking"),
                       element("div", { className: "thoughts" }, message.thoughts)));
  }
  if (message.role === "user") body.textContent = message.shown;
  else body.append(markdown.render(message.content));
  parts.push(body);
  const index = state.messages.indexOf(message), last = index === state.messages.length - 1;
  if (!written && message.cut) {
    const cut = element("p", { className: "cut" }, message.cut + " ");
    if (last) cut.append(action("Go on", () => answer(message)));
    parts.push(cut);
  }
  if (!written) {
    const tools = element("div", { className: "tools" });
    if (message.role === "user") tools.append(action("Edit", () => edit(message)));
    else {
      tools.append(action("Copy", () => navigator.clipboard.writeText(message.content)));
      if (last) tools.append(action("Again", () => regenerate()));
    }
    parts.push(tools);
  }
  box.replaceChildren(...parts);
}

function addMessage(message, written) {
  at("hint").hidden = true;
  const box = element("article", { className: "message " + message.role });
  box.setAttribute("aria-label", message.role === "user" ? "Question" : "Answer");
  at("messages").append(box);
  fill(box, message, written);
  return box;
}

function showMessages() {
  for (const box of document.querySelectorAll(".message")) box.remove();
  at("hint").hidden = state.messages.length > 0;
  for (const message of state.messages) addMessage(message);
  toEnd();
}

function showStats(s) {
  const most = Math.max(s.cache_bytes_f16, s.cache_bytes, 1);
  at("bar-f16").style.width = (100 * s.cache_bytes_f16) / most + "%";
  at("bar-kv").style.width = (100 * s.cache_bytes) / most + "%";
  at("bytes-f16").textContent = megabytes(s.cache_bytes_f16);
  at("bytes-kv").textContent = megabytes(s.cache_bytes);
  at("kv-name").textContent = s.kv;
  at("compression").textContent = (s.cache_bytes_f16 / Math.max(1, s.cache_bytes)).toFixed(1);
  at("tokens").textContent = s.cache_tokens;
  if (s.cached_tokens !== undefined) at("cached").textContent = s.cached_tokens;
  if (s.prefill_tok_s) at("prefill-speed").textContent = s.prefill_tok_s.toFixed(0);
  if (s.decode_tok_s) at("decode-speed").textContent = s.decode_tok_s.toFixed(1);
}

function showProgress(p) {
  at("progress").hidden = !p;
  if (!p) return;
  at("bar").value = p.prompt_tokens ? p.processed_tokens / p.prompt_tokens : 0;
  const speed = p.seconds > 0 ? (p.processed_tokens - p.cached_tokens) / p.seconds : 0;
  at("progress-text").textContent =
    p.processed_tokens + " of " + p.prompt_tokens + " tokens read" +
    (p.cached_tokens ? ", " + p.cached_tokens + " from the cache" : "") + (speed ? ", " + speed.toFixed(0) + " a second" : "");
}

// --- questions and answers

/// Calls `take` with the JSON of every event of a stream of server-sent events.
async function readEvents(response, take) {
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  while (true) {
    const { done, value } = await reader.read();
    if (done) return;
    rest += decoder.decode(value, { stream: true });
    let end;
    while ((end = rest.indexOf("\n\n")) >= 0) {
      const block = rest.slice(0, end);
      rest = rest.slice(end + 2);
      for (const line of block.split("\n")) {
        if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
        take(JSON.parse(line.slice(6)));
      }
    }
  }
}

function setBusy(busy) {
  at("send").disabled = busy;
  at("stop").disabled = !busy;
  at("new").disabled = busy;
  at("messages").classList.toggle("busy", busy);
  at("save-button").disabled = busy || state.slot === null || !state.props.can_save_sessions;
  for (const button of document.querySelectorAll(".tools button, .cut button, #chats button")) button.disabled = busy;
}

function requestBody(messages) {
  const body = {
    messages: messages.map(({ role, content }) => ({ role, content })),
    stream: true,
    return_progress: true,
    max_tokens: Number(at("max-tokens").value) || undefined,
    narrows: { kv: at("profile").value },
  };
  for (const name of ["temperature", "top_k", "top_p", "min_p", "repeat_penalty", "seed"])
    if (at(name).value !== "") body[name] = Number(at(name).value);
  const system = at("system").value.trim();
  if (system !== "") body.messages.unshift({ role: "system", content: system });
  return JSON.stringify(body);
}

/// Draws an answer that grows, no more often than drawing takes time.
function painter(box, message) {
  let timer = null, spent = 0;
  const draw = () => {
    timer = null;
    const follow = atEnd(), begin = performance.now();
    fill(box, message, true);
    if (follow) toEnd();
    spent = performance.now() - begin;
  };
  return {
    soon: () => (timer ??= setTimeout(draw, Math.max(30, 8 * spent))),
    stop: () => clearTimeout(timer),
  };
}

/// The answer to the conversation as it stands, or more of its last one. True if some of it came.
async function answer(going) {
  const message = going || { role: "assistant", content: "" };
  const before = message.content.length + (message.thoughts || "").length;
  message.cut = "";
  const sent = requestBody(state.messages);
  if (!going) state.messages.push(message);
  const boxes = document.querySelectorAll(".message");
  const box = going ? boxes[boxes.length - 1] : addMessage(message, true);
  const paint = painter(box, message);
  let ended = "";
  toEnd();
  state.abort = new AbortController();
  setBusy(true);
  showError("");
  at("status").textContent = "answering …";
  showProgress({ prompt_tokens: 0, processed_tokens: 0, cached_tokens: 0, seconds: 0 });
  try {
    const response = await fetch("/v1/chat/completions", { method: "POST", headers: headers(), signal: state.abort.signal, body: sent });
    if (!response.ok) {
      const reply = await response.json().catch(() => ({}));
      if (response.status === 401) at("key-label").hidden = false;
      throw new Error(reply.error ? reply.error.message : "HTTP " + response.status);
    }
    await readEvents(response, (event) => {
      if (event.error) throw new Error(event.error.message);
      if (event.narrows && event.narrows.progress) return showProgress(event.narrows.progress);
      const choice = event.choices[0];
      if (choice && (choice.delta.content || choice.delta.reasoning_content)) {
        showProgress(null);
        message.content += choice.delta.content || "";
        if (choice.delta.reasoning_content) message.thoughts = (message.thoughts || "") + choice.delta.reasoning_content;
        paint.soon();
      }
      if (choice && choice.finish_reason) ended = choice.finish_reason;
      if (event.narrows) {
        state.slot = event.narrows.slot;
        showStats(event.narrows);
      }
    });
    if (ended === "") message.cut = "The connection ended before the answer did.";
    if (ended === "length") message.cut = "Cut off: it has as many tokens as one answer may have, or the context is full.";
  } catch (error) {
    message.cut = error.name === "AbortError" ? "Stopped." : "Broken off: " + error.message;
    if (error.name !== "AbortError") showError(error.message);
  }
  paint.stop();
  const came = message.content.length + (message.thoughts || "").length > before;
  if (!came && !going && ended === "") {
    state.messages.pop();
    box.remove();
  }
  state.abort = null;
  showProgress(null);
  const follow = atEnd();
  document.querySelectorAll(".message").forEach((b, i) => fill(b, state.messages[i]));
  if (follow) toEnd();
  setBusy(false);
  at("status").textContent = came ? "answer complete" : "";
  if (came) await keep();
  return came || ended !== "";
}

async function ask(question) {
  if (state.editing !== null) {
    state.messages.length = state.editing;
    showMessages();
  }
  const files = state.files;
  const texts = files.map((f) => (files.length > 1 ? f.name + ":\n\n" : "") + f.text + "\n\n");
  const message = { role: "user", content: texts.join("") + question, shown: question,
                    note: files.length > 0 ? "about " + files.map((f) => f.name).join(", ") : "" };
  const undone = state.editing !== null ? state.undone : null;
  endEditing();
  state.messages.push(message);
  addMessage(message);
  setFiles([]);
  if (await answer()) return;
  // Refused, or stopped before a word of it: as if it had not been asked.
  state.messages.pop();
  if (undone) state.messages = undone;
  showMessages();
  setFiles(files);
  if (at("question").value === "") at("question").value = question;
}

function edit(message) {
  state.editing = state.messages.indexOf(message);
  state.undone = state.messages.slice();
  at("question").value = message.shown;
  const documents = message.content.slice(0, message.content.length - message.shown.length);
  setFiles(documents ? [{ name: message.note.replace("about ", ""), text: documents.slice(0, -2) }] : []);
  at("editing").hidden = false;
  at("question").focus();
}

function endEditing() {
  state.editing = null;
  at("editing").hidden = true;
}

async function regenerate() {
  const old = state.messages.pop();
  showMessages();
  if (await answer()) return;
  state.messages.push(old);
  showMessages();
}

// --- documents

function setFiles(files) {
  state.files = files;
  at("document-name").replaceChildren(...files.map((file) => element("li", {},
    element("span", {}, file.name + ", " + (file.text.length / 1000).toFixed(1) + " thousand characters"),
    action("Remove", () => setFiles(state.files.filter((f) => f !== file))))));
  at("clear-document").hidden = files.length < 2;
}

async function readFiles(files) {
  showError("");
  const read = [], refused = [];
  for (const file of files) {
    const bytes = new Uint8Array(await file.arrayBuffer());
    try {
      if (String.fromCharCode(...bytes.slice(0, 5)) === "%PDF-") throw new Error("is a PDF; make text of it first (pdftotext does)");
      let text = "";
      try {
        text = new TextDecoder("utf-8", { fatal: true }).decode(bytes);
      } catch {
        throw new Error("is not a text in UTF-8");
      }
      read.push({ name: file.name, text });
    } catch (error) {
      refused.push(file.name + " " + error.message);
    }
  }
  setFiles([...state.files, ...read]);
  if (refused.length > 0) showError(refused.join("; "));
}

// --- conversations, in this browser

async function keep() {
  state.id ??= Date.now().toString(36) + Math.random().toString(36).slice(2, 8);
  history.replaceState(null, "", "#" + state.id);
  const title = (state.messages[0].shown || "").slice(0, 80);
  try {
    await store.put({ id: state.id, title, updated: Date.now(), messages: state.messages, system: at("system").value });
    await listChats();
  } catch (error) {
    showError("this browser could not keep the conversation: " + error);
  }
}

async function listChats() {
  const chats = await store.all();
  at("chats").replaceChildren(...chats.map((chat) => {
    const open = action(chat.title || "(empty)", () => openChat(chat.id));
    open.className = "open";
    open.title = new Date(chat.updated).toLocaleString();
    if (chat.id === state.id) open.setAttribute("aria-current", "true");
    const remove = action("Delete", async () => {
      await store.remove(chat.id);
      if (chat.id === state.id) newChat();
      await listChats();
    });
    remove.setAttribute("aria-label", "Delete " + chat.title);
    return element("li", {}, open, remove);
  }));
  if (chats.length === 0) at("chats").append(element("li", { className: "muted" }, "none yet"));
}

async function openChat(id) {
  const chat = await store.get(id);
  if (!chat) return;
  newChat();
  state.id = chat.id;
  state.messages = chat.messages;
  at("system").value = chat.system || "";
  history.replaceState(null, "", "#" + id);
  showMessages();
  showPanel(false);
  await listChats();
}

function newChat() {
  state.id = null;
  state.messages = [];
  state.slot = null;
  history.replaceState(null, "", location.pathname);
  endEditing();
  setFiles([]);
  showMessages();
  showError("");
  at("status").textContent = "";
  setBusy(false);
}

function showPanel(open) {
  at("panel").classList.toggle("open", open);
  at("panel-button").setAttribute("aria-expanded", String(open));
  at("panel-button").textContent = open ? "Close" : "Panel";
}

// --- sessions: the cache is a file of the server, the words of the conversation stay in this browser

async function listSessions() {
  const list = at("sessions");
  if (!state.props.can_save_sessions) {
    at("session-text").textContent = "Start the server with --session-dir to save sessions.";
    return;
  }
  const reply = await call("/sessions");
  list.replaceChildren();
  for (const session of reply.data) {
    list.append(element("li", {}, element("span", {}, session.filename + " (" + megabytes(session.bytes) + ")"),
                        action("Restore", () => restoreSession(session.filename))));
  }
}

async function saveSession(name) {
  try {
    const reply = await post("/slots/" + state.slot + "?action=save", { filename: name });
    localStorage.setItem("narrows-session-" + name, state.id);
    showError("");
    await listSessions();
    at("session-text").textContent =
      reply.n_saved + " tokens saved in " + reply.timings.save_ms.toFixed(0) + " ms, " + megabytes(reply.n_written);
  } catch (error) {
    showError(error.message);
  }
}

async function restoreSession(name) {
  try {
    const slots = await call("/slots");
    const idle = slots.filter((slot) => slot.state === "idle");
    if (idle.length === 0) throw new Error("all slots are at work; try again when one is idle");
    const empty = idle.find((slot) => slot.cache_tokens === 0) || idle[0];
    const reply = await post("/slots/" + empty.id + "?action=restore", { filename: name });
    const id = localStorage.getItem("narrows-session-" + name);
    const words = id ? await store.get(id) : null;
    if (words) await openChat(id);
    else newChat();
    state.slot = empty.id;
    showStats({ ...reply, cache_tokens: reply.n_restored });
    at("session-text").textContent =
      reply.n_restored + " tokens restored in " + reply.timings.restore_ms.toFixed(0) + " ms" +
      (words ? "" : "; the words of that conversation are not in this browser");
    setBusy(false);
  } catch (error) {
    showError(error.message);
  }
}

// --- start

async function connect() {
  try {
    state.props = await call("/props");
    at("about").textContent = state.props.model + ", contexts to " + state.props.n_ctx + " tokens, " + state.props.total_slots + " slots";
    for (const name of new Set([state.props.kv.name, ...state.props.kv_profiles])) {
      const option = document.createElement("option");
      option.textContent = name;
      at("profile").append(option);
    }
    await listSessions();
    if (state.messages.length === 0 && location.hash.length > 1) await openChat(location.hash.slice(1));
    showError("");
  } catch (error) {
    at("about").textContent = "not connected";
    showError(error.message);
  }
}

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = at("question").value.trim();
  if (question === "" || state.abort) return;
  at("question").value = "";
  ask(question);
});
at("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    at("ask").requestSubmit();
  }
});
at("stop").addEventListener("click", () => state.abort && state.abort.abort());
at("new").addEventListener("click", async () => {
  newChat();
  await listChats();
  at("question").focus();
});
at("file").addEventListener("change", async () => {
  await readFiles(at("file").files);
  at("file").value = "";
});
at("clear-document").addEventListener("click", () => setFiles([]));
at("edit-cancel").addEventListener("click", () => {
  at("question").value = "";
  setFiles([]);
  endEditing();
});
at("panel-button").addEventListener("click", () => showPanel(!at("panel").classList.contains("open")));
document.addEventListener("keydown", (event) => event.key === "Escape" && showPanel(false));
at("key").addEventListener("change", () => {
  sessionStorage.setItem("narrows-key", at("key").value);
  at("profile").replaceChildren();
  connect();
});
at("save").addEventListener("submit", (event) => {
  event.preventDefault();
  if (at("session-name").value) saveSession(at("session-name").value);
});
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    document.body.classList.toggle("dragging", kind === "dragover");
    if (kind === "drop" && event.dataTransfer.files.length > 0) readFiles(event.dataTransfer.files);
  });
}
setBusy(false);
listChats();
connect();
