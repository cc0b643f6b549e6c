// Conversations, kept in this browser (IndexedDB, since documents are too long for localStorage). Where the browser keeps
// nothing (private windows), they last as long as the page.
"use strict";

const store = (() => {
  const held = new Map();
  let opened = null;

  function database() {
    opened ??= new Promise((resolve) => {
      try {
        const request = indexedDB.open("narrows", 1);
        request.onupgradeneeded = () => request.result.createObjectStore("chats", { keyPath: "id" });
        request.onsuccess = () => resolve(request.result);
        request.onerror = request.onblocked = () => resolve(null);
      } catch {
        resolve(null);
      }
    });
    return opened;
  }

  /// What `work` asks of the store of chats; `otherwise()` where there is none.
  async function chats(mode, work, otherwise) {
    const db = await database();
    if (!db) return otherwise();
    return new Promise((resolve, reject) => {
      const request = work(db.transaction("chats", mode).objectStore("chats"));
      request.onsuccess = () => resolve(request.result);
      request.onerror = () => reject(request.error);
    });
  }

  return {
    put: (chat) => chats("readwrite", (s) => s.put(chat), () => void held.set(chat.id, structuredClone(chat))),
    get: (id) => chats("readonly", (s) => s.get(id), () => held.get(id)),
    remove: (id) => chats("readwrite", (s) => s.delete(id), () => void held.delete(id)),
    /// The newest first.
    all: async () =>
      (await chats("readonly", (s) => s.getAll(), () => [...held.values()])).sort((a, b) => b.updated - a.updated),
  };
})();
