// Markdown of a model's answer as elements. Every piece of it goes in as text, never as HTML: whatever an answer says, it
// is shown and not obeyed. What it knows: headings, paragraphs, lists, quotes, rules, tables, fenced code with a copy
// button, and within a line code, strong, emphasis and links to http and https.
"use strict";

const markdown = (() => {
  const make = (tag, ...children) => {
    const e = document.createElement(tag);
    e.append(...children);
    return e;
  };

  // The first of these that begins soonest counts. Nothing here looks back, so a line is read in one go.
  const spans = [
    [/(`+)([^`]|[^`][^]*?[^`])\1(?!`)/, (m) => make("code", m[2])],
    [/\*\*(?=\S)([^*]+)\*\*/, (m) => make("strong", ...inline(m[1]))],
    [/\*(?=\S)([^*\n]+)\*/, (m) => make("em", ...inline(m[1]))],
    [/\[([^\[\]]+)\]\((https?:\/\/[^\s()]+)\)/, (m) => link(m[2], m[1])],
    [/https?:\/\/[^\s<>"'`)\]]*[^\s<>"'`)\].,;:!?]/, (m) => link(m[0], m[0])],
  ];

  function link(href, text) {
    const a = make("a", text);
    a.href = href;
    a.rel = "noreferrer noopener";
    a.target = "_blank";
    return a;
  }

  function inline(text) {
    const out = [];
    while (text !== "") {
      let best = null;
      for (const [pattern, element] of spans) {
        const m = pattern.exec(text);
        if (m && (!best || m.index < best.m.index)) best = { m, element };
      }
      if (!best) break;
      if (best.m.index > 0) out.push(text.slice(0, best.m.index));
      out.push(best.element(best.m));
      text = text.slice(best.m.index + best.m[0].length);
    }
    if (text !== "") out.push(text);
    return out;
  }

  function codeBlock(language, text) {
    const copy = make("button", "Copy");
    copy.type = "button";
    copy.className = "copy";
    copy.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(text);
        copy.textContent = "Copied";
      } catch {
        copy.textContent = "Not allowed";
      }
      setTimeout(() => (copy.textContent = "Copy"), 1500);
    });
    const head = make("div", make("span", language), copy);
    head.className = "code-head";
    const block = make("div", head, make("pre", make("code", text)));
    block.className = "code";
    return block;
  }

  const item = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((c) => c.trim());
  const isRule = (line) => /^\s*([-*_])(\s*\1){2,}\s*$/.test(line);
  const isTable = (lines, i) =>
    lines[i].includes("|") && i + 1 < lines.length && lines[i + 1].includes("-") && /^[\s|:-]+$/.test(lines[i + 1]) &&
    lines[i + 1].includes("|");

  /// Items from line i on that stand at `indent` or deeper; [list, next line].
  function list(lines, i, indent) {
    const first = item.exec(lines[i]);
    const ordered = /\d/.test(first[2]);
    const out = document.createElement(ordered ? "ol" : "ul");
    if (ordered) out.start = parseInt(first[2], 10);
    while (i < lines.length) {
      const m = item.exec(lines[i]);
      if (m && m[1].length < indent) break;
      if (m && m[1].length > indent + 1 && out.lastChild) {
        const [inner, next] = list(lines, i, m[1].length);
        out.lastChild.append(inner);
        i = next;
      } else if (m) {
        if (/\d/.test(m[2]) !== ordered) break;
        out.append(make("li", ...inline(m[3])));
        ++i;
      } else if (/^\s{2,}\S/.test(lines[i])) {
        out.lastChild.append("\n", ...inline(lines[i].trim()));
        ++i;
      } else if (lines[i].trim() === "" && i + 1 < lines.length && item.test(lines[i + 1])) {
        ++i;
      } else {
        break;
      }
    }
    return [out, i];
  }

  function blocks(lines, depth) {
    const out = document.createDocumentFragment();
    for (let i = 0; i < lines.length; ) {
      const line = lines[i];
      const fence = /^\s*(`{3,}|~{3,})\s*([^`]*)$/.exec(line);
      const heading = /^(#{1,6})\s+(.*)$/.exec(line);
      if (fence) {
        const code = [];
        for (++i; i < lines.length && !lines[i].trim().startsWith(fence[1]); ++i) code.push(lines[i]);
        ++i;
        out.append(codeBlock(fence[2].trim(), code.join("\n")));
      } else if (line.trim() === "") {
        ++i;
      } else if (heading) {
        out.append(make("h" + Math.min(6, heading[1].length + 2), ...inline(heading[2])));
        ++i;
      } else if (isRule(line)) {
        out.append(make("hr"));
        ++i;
      } else if (line.startsWith(">") && depth < 5) {
        const quoted = [];
        for (; i < lines.length && lines[i].startsWith(">"); ++i) quoted.push(lines[i].replace(/^> ?/, ""));
        out.append(make("blockquote", blocks(quoted, depth + 1)));
      } else if (isTable(lines, i)) {
        const table = make("table", make("thead", make("tr", ...cells(line).map((c) => make("th", ...inline(c))))));
        const body = make("tbody");
        for (i += 2; i < lines.length && lines[i].includes("|"); ++i)
          body.append(make("tr", ...cells(lines[i]).map((c) => make("td", ...inline(c)))));
        table.append(body);
        const wide = make("div", table);
        wide.className = "wide";
        out.append(wide);
      } else if (item.test(line)) {
        const [made, next] = list(lines, i, item.exec(line)[1].length);
        out.append(made);
        i = next;
      } else {
        const text = [line];
        for (++i; i < lines.length && lines[i].trim() !== "" && !/^(\s*(`{3}|~{3})|#{1,6}\s|>)/.test(lines[i]) &&
                  !item.test(lines[i]) && !isRule(lines[i]) && !isTable(lines, i); ++i)
          text.push(lines[i]);
        out.append(make("p", ...inline(text.join("\n"))));
      }
    }
    return out;
  }

  return { render: (text) => blocks(text.split("\n"), 0) };
})();
