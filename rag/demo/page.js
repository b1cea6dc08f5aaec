(() => {
  const $ = (id) => document.getElementById(id);
  const models = JSON.parse($("data").textContent);
  const fields = [...document.querySelectorAll(".settings input")];
  const percent = (share) => `${(100 * share).toFixed(1)}%`;
  let asked = new AbortController();

  // --- What is shown of one model ---

  const panels = models.map((model) => {
    const section = $("models").appendChild(element("section"));
    if (models.length > 1) section.append(element("h2", model.path));
    const panel = { model };
    for (const [name, tag, className] of [
      ["answer", "p", "answer"], ["facts", "p", "facts muted"], ["tokens", "div", "tokens"], ["passages", "div"],
      ["weights", "details", "plain"],
    ]) panel[name] = section.appendChild(element(tag, undefined, className));
    panel.answer.setAttribute("aria-live", "polite");
    clear(panel);
    return panel;
  });

  function clear(panel) {
    for (const name of ["answer", "facts", "tokens", "passages", "weights"]) panel[name].replaceChildren();
    panel.answer.className = "answer";
    panel.facts.className = "facts muted";
    panel.weights.hidden = true;
    panel.shares = [];
  }

  function say(panel, text, isPartial) {
    panel.answer.textContent = text;
    panel.answer.className = isPartial ? "answer partial" : "answer";
  }

  function fail(panel, message) {
    clear(panel);
    panel.facts.textContent = message;
    panel.facts.className = "facts wrong";
  }

  function share(name, className) {
    const shown = element("span", `${name} `, "share");
    const bar = shown.appendChild(element("span", undefined, `bar ${className}`)).appendChild(element("i"));
    const number = shown.appendChild(element("output"));
    return { shown, set: (value) => { bar.style.width = percent(value); number.textContent = percent(value); } };
  }

  function showFound(panel, found) {
    panel.found = found;
    panel.shares = [];
    panel.passages.replaceChildren(...found.titles.map((title, n) => {
      const passage = element("div", undefined, "passage");
      const line = passage.appendChild(element("div"));
      const prior = share("prior", ""), posterior = share("posterior", "posterior");
      posterior.shown.hidden = true;
      prior.set(found.priors[n]);
      line.append(
        element("span", n + 1), element("strong", title || "(no title)"),
        element("span", `score ${found.scores[n].toFixed(2)}`), prior.shown, posterior.shown,
      );
      panel.shares.push({ posterior, text: passage.appendChild(element("p", found.texts[n])) });
      return passage;
    }));
    panel.facts.textContent = found.titles.length
      ? `${found.titles.length} passages in ${found.seconds.toFixed(2)} s`
      : "no passage was found";
  }

  function showPosteriors(panel, values) {
    if (!values) return;  // a Fusion-in-Decoder has none
    panel.shares.forEach(({ posterior }, n) => { posterior.shown.hidden = false; posterior.set(values[n]); });
  }

  function showAnswer(panel, answer) {
    say(panel, answer.answer || "(an empty answer)", false);
    const probability = answer.probability < 0.001 ? "below 0.1%" : percent(answer.probability);
    panel.facts.textContent = `p(y|x) ${probability}, ${answer.seconds.toFixed(2)} s`;
    showPosteriors(panel, answer.posteriors);
    panel.shares.forEach(({ text }, n) => mark(text, panel.found.texts[n], answer.answer));
    if (answer.tokens && panel.shares.length) showTokens(panel, answer);
  }

  // The answer where it stands in a passage, whatever its letters' case.
  function mark(node, text, answer) {
    if (!answer) return;
    const word = answer.replace(/[.*+?^${}()|[\]\\\/]/g, "\\$&");
    const parts = text.split(new RegExp(`(?<![\\p{L}\\p{N}])(${word})(?![\\p{L}\\p{N}])`, "giu"));
    node.replaceChildren(...parts.map((part, n) => element(n % 2 ? "mark" : "span", part)));
  }

  // RAG-Token: each token draws a passage of its own.
  function showTokens(panel, answer) {
    const buttons = answer.tokens.map((token, n) => {
      const button = element("button", token);
      button.type = "button";
      const point = () => {
        showPosteriors(panel, answer.token_posteriors[n]);
        buttons.forEach((other) => other.setAttribute("aria-pressed", String(other === button)));
      };
      button.addEventListener("mouseenter", point);
      button.addEventListener("focus", point);
      button.addEventListener("blur", () => leave());
      return button;
    });
    const leave = () => {
      showPosteriors(panel, answer.posteriors);
      buttons.forEach((button) => button.setAttribute("aria-pressed", "false"));
    };
    panel.tokens.replaceChildren(...buttons);
    panel.tokens.onmouseleave = leave;
    leave();
    showWeights(panel, answer);
  }

  function showWeights(panel, answer) {
    const table = element("table");
    const head = table.appendChild(element("thead")).appendChild(element("tr"));
    head.append(element("th"), ...answer.tokens.map((token) => element("th", token, "token")));
    const body = table.appendChild(element("tbody"));
    panel.found.titles.forEach((title, n) => {
      const row = body.appendChild(element("tr"));
      row.append(element("th", `${n + 1} ${title}`), ...answer.token_posteriors.map((shares) => {
        const cell = element("td", percent(shares[n]), "weight");
        cell.style.setProperty("--share", percent(shares[n]));
        return cell;
      }));
    });
    const scroll = element("div", undefined, "scroll");
    scroll.append(table);
    panel.weights.replaceChildren(element("summary", "Each passage's part in each token"), scroll);
    panel.weights.hidden = false;
    panel.weights.open = true;
  }

  // --- Asking ---

  function show(panel, line) {
    if (line.error !== undefined) fail(panel, line.error);
    if (line.found) showFound(panel, line.found);
    if (line.partial) say(panel, line.partial, true);
    if (line.answer) showAnswer(panel, line.answer);
  }

  async function request(path, panel, content, signal) {
    const headers = { "Content-Type": "application/json" };
    const response = await fetch(path, { method: "POST", headers, body: JSON.stringify(content), signal });
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let text = "", last = {};
    const take = (line) => { last = JSON.parse(line); show(panel, last); };
    for (let piece = await reader.read(); !piece.done; piece = await reader.read()) {
      const lines = (text + piece.value).split("\n");
      text = lines.pop();
      lines.forEach(take);
    }
    if (text) take(text);
    if (path === "/ask" && !last.answer && last.error === undefined) throw new Error("it ended before its end");
  }

  // A new question ends the search for the last one.
  function start(path) {
    if (!$("form").reportValidity()) return;
    asked.abort();
    asked = new AbortController();
    const { signal } = asked;
    const address = new URLSearchParams({ q: $("question").value });
    for (const field of fields) if (field.value !== field.defaultValue) address.set(field.id, field.value);
    if (path === "/search") address.set("passages", "only");
    history.replaceState(null, "", `/?${address}${location.hash}`);
    panels.forEach((panel, number) => {
      clear(panel);
      if (path === "/ask") say(panel, "…", true);
      const content = { question: $("question").value, model: number };
      for (const field of fields) if (field.id in panel.model.settings) content[field.id] = Number(field.value);
      request(path, panel, content, signal).catch((error) => {
        if (!signal.aborted) fail(panel, `no answer: ${error.message}; is demo_rag.py still running?`);
      });
    });
  }

  $("form").addEventListener("submit", (event) => { event.preventDefault(); start("/ask"); });
  $("search").addEventListener("click", () => start("/search"));

  // What the address asks: /?q=where+is+oslo&n_docs=3, or with &passages=only
  const wanted = new URLSearchParams(location.search);
  for (const field of fields) if (wanted.has(field.id)) field.value = wanted.get(field.id);
  if (wanted.get("q")) {
    $("question").value = wanted.get("q");
    start(wanted.get("passages") === "only" ? "/search" : "/ask");
  }
})();
