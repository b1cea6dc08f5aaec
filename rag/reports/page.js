(() => {
  const $ = (id) => document.getElementById(id);
  const state = new URLSearchParams(location.hash.slice(1));

  const data = $("data");
  if (!data) return;
  const table = JSON.parse(data.textContent);
  const runs = table.runs;
  const rows = [...Array(table.shown).keys()];
  const PAGE = 50;
  let limit = PAGE;

  const lower = rows.map((n) => [
    table.questions ? table.questions[n] : "", table.right ? table.right[n] : "", ...runs.map((run) => run.answers[n]),
  ].join("\n").toLowerCase());
  const isRight = (run, n) => run.em ? run.em[n] === "1" : null;
  const KINDS = {
    all: () => true,
    right: (n, run) => isRight(run, n) === true,
    wrong: (n, run) => isRight(run, n) === false,
    missed: (n, run) => isRight(run, n) === false && run.first && run.first[n] > 0,
    unfound: (n, run) => run.first && run.first[n] === 0,
    disagree: (n) => new Set(runs.filter((run) => run.em).map((run) => run.em[n])).size > 1,
  };
  const score = (run, n) => run.f1 ? run.f1[n] : run.em ? Number(run.em[n]) : 0;
  const ORDERS = {
    number: () => (a, b) => a - b,
    lowest: (run) => (a, b) => score(run, a) - score(run, b) || a - b,
    highest: (run) => (a, b) => score(run, b) - score(run, a) || a - b,
  };

  function numberCell(n) {
    const cell = element("td", undefined, "n");
    const details = document.querySelector(`details.question[data-number="${n + 1}"]`);
    if (!details) { cell.textContent = n + 1; return cell; }
    const link = cell.appendChild(element("a", n + 1));
    link.href = "#questions";
    link.title = "with its passages";
    link.addEventListener("click", (event) => {
      event.preventDefault();
      details.open = true;
      details.scrollIntoView({ block: "center" });
    });
    return cell;
  }

  function answerCell(run, n) {
    const right = isRight(run, n);
    const cell = element("td", run.answers[n], right === null ? "" : right ? "right" : "wrong");
    const more = [];
    if (run.f1 && !right) more.push(`F1 ${run.f1[n]}`);
    if (run.first) more.push(run.first[n] ? `passage ${run.first[n]}` : "in no passage");
    if (more.length) cell.append(element("br"), element("small", more.join(" · ")));
    return cell;
  }

  function draw() {
    const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const run = runs[Number($("run").value)] || runs[0];
    const fits = KINDS[$("kind").value];
    const found = rows.filter((n) => words.every((word) => lower[n].includes(word)) && fits(n, run));
    found.sort(ORDERS[$("order").value](run));
    $("rows").replaceChildren(...found.slice(0, limit).map((n) => {
      const row = element("tr");
      row.append(numberCell(n), element("td", table.questions ? table.questions[n] : `Question ${n + 1}`));
      if (table.right) row.append(element("td", table.right[n]));
      row.append(...runs.map((each) => answerCell(each, n)));
      return row;
    }));
    $("count").textContent = `${found.length.toLocaleString("en")} of ${rows.length.toLocaleString("en")}`;
    $("more").hidden = found.length <= limit;
  }

  // What the address asks for: #q=river&kind=wrong&run=1&order=lowest
  $("search").value = state.get("q") || "";
  for (const id of ["kind", "run", "order"]) {
    const wanted = state.get(id);
    if ([...$(id).options].some((option) => option.value === wanted && !option.disabled)) $(id).value = wanted;
  }
  for (const id of ["search", "kind", "run", "order"]) {
    $(id).addEventListener("input", () => { limit = PAGE; draw(); });
  }
  $("more").addEventListener("click", () => { limit += 10 * PAGE; draw(); });
  draw();
})();
