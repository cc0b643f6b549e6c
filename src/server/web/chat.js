// The chat page: one conversation over the server's own API. Nothing is loaded from elsewhere, and all text that
// comes from files or models goes in as text, never as HTML.
"use strict";

const at = (id) => document.getElementById(id);
const state = { messages: [], document: null, slot: null, abort: null, props: {} };

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

function addMessage(role, text, note) {
  at("hint").hidden = true;
  const p = document.createElement("p");
  p.className = "message " + role;
  if (note) {
    const span = document.createElement("span");
    span.className = "note";
    span.textContent = note;
    p.append(span);
  }
  const body = document.createElement("span");
  body.textContent = text;
  p.append(body);
  at("messages").append(p);
  p.scrollIntoView({ block: "end" });
  return body;
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
  at("save-button").disabled = busy || state.slot === null || !state.props.can_save_sessions;
}

async function ask(question) {
  const first = state.messages.length === 0;
  const content = first && state.document ? state.document.text + "\n\n" + question : question;
  state.messages.push({ role: "user", content });
  addMessage("user", question, first && state.document ? "about " + state.document.name : "");
  const answer = addMessage("assistant", "");
  let text = "";
  state.abort = new AbortController();
  setBusy(true);
  showError("");
  showProgress({ prompt_tokens: 0, processed_tokens: 0, cached_tokens: 0, seconds: 0 });
  try {
    const response = await fetch("/v1/chat/completions", {
      method: "POST",
      headers: headers(),
      signal: state.abort.signal,
      body: JSON.stringify({
        messages: state.messages,
        stream: true,
        return_progress: true,
        temperature: Number(at("temperature").value),
        max_tokens: Number(at("max-tokens").value) || undefined,
        narrows: { kv: at("profile").value },
      }),
    });
    if (!response.ok) {
      const reply = await response.json().catch(() => ({}));
      if (response.status === 401) at("key-label").hidden = false;
      throw new Error(reply.error ? reply.error.message : "HTTP " + response.status);
    }
    await readEvents(response, (event) => {
      if (event.error) throw new Error(event.error.message);
      if (event.narrows && event.narrows.progress) return showProgress(event.narrows.progress);
      const choice = event.choices[0];
      if (choice && choice.delta.content) {
        showProgress(null);
        text += choice.delta.content;
        answer.textContent = text;
        at("messages").scrollTop = at("messages").scrollHeight;
      }
      if (event.narrows) {
        state.slot = event.narrows.slot;
        showStats(event.narrows);
      }
    });
  } catch (error) {
    if (error.name !== "AbortError") showError(error.message);
    if (text === "") {  // as if it had not been asked
      state.messages.pop();
      answer.parentElement.remove();
    }
  } finally {
    if (text !== "") state.messages.push({ role: "assistant", content: text });
    state.abort = null;
    showProgress(null);
    setBusy(false);
  }
}

function setDocument(name, text) {
  state.document = name === null ? null : { name, text };
  at("document-name").textContent = name === null ? "none" : name + ", " + (text.length / 1000).toFixed(1) + " thousand characters";
  at("clear-document").hidden = name === null;
  if (name !== null && state.messages.length > 0) newChat(true);
}

async function readFile(file) {
  try {
    setDocument(file.name, new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer()));
    showError("");
  } catch {
    showError(file.name + " is not a text in UTF-8");
  }
}

function newChat(keepDocument) {
  state.messages = [];
  state.slot = null;
  for (const p of document.querySelectorAll(".message")) p.remove();
  at("hint").hidden = false;
  if (!keepDocument) setDocument(null);
  showError("");
  setBusy(false);
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
    const item = document.createElement("li");
    const name = document.createElement("span");
    name.textContent = session.filename + " (" + megabytes(session.bytes) + ")";
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = "Restore";
    button.addEventListener("click", () => restoreSession(session.filename));
    item.append(name, button);
    list.append(item);
  }
}

async function saveSession(name) {
  try {
    const reply = await post("/slots/" + state.slot + "?action=save", { filename: name });
    localStorage.setItem("narrows-session-" + name, JSON.stringify({ messages: state.messages, document: state.document && state.document.name }));
    at("session-text").textContent =
      reply.n_saved + " tokens saved in " + reply.timings.save_ms.toFixed(0) + " ms, " + megabytes(reply.n_written);
    showError("");
    await listSessions();
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
    newChat(false);
    const words = JSON.parse(localStorage.getItem("narrows-session-" + name) || "null");
    if (words) {
      state.messages = words.messages;
      for (const m of words.messages) {
        const long = m.role === "user" && m.content.length > 1000;
        addMessage(m.role, long ? m.content.slice(-300) : m.content, long ? "…the document, and the question" : "");
      }
    }
    state.slot = empty.id;
    showStats({ ...reply, cache_tokens: reply.n_restored });
    at("session-text").textContent =
      reply.n_restored + " tokens restored in " + reply.timings.restore_ms.toFixed(0) + " ms" +
      (words ? "" : "; the words of that conversation are in another browser");
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
at("new").addEventListener("click", () => newChat(false));
at("file").addEventListener("change", () => at("file").files[0] && readFile(at("file").files[0]));
at("clear-document").addEventListener("click", () => setDocument(null));
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
    if (kind === "drop" && event.dataTransfer.files[0]) readFile(event.dataTransfer.files[0]);
  });
}
setBusy(false);
connect();
