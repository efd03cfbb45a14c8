// Runs inside a copy of the page, behind its own scripts: looks, points, clicks, and writes down.
(async () => {
  const by = id => document.getElementById(id);
  const root = document.documentElement;
  const pause = ms => new Promise(done => setTimeout(done, ms));
  const drawn = async scheme => { while (root.dataset.drawn !== scheme) await pause(20); };
  const cells = name => [...document.querySelectorAll(`[data-figure="${name}"] .cells_marks path`)];
  const names = () => [...by("rows").tBodies[0].rows].map(row => row.cells[0].textContent);
  const chart = () => getComputedStyle(document.querySelector("[data-figure] svg.marks")).backgroundColor;
  const looks = () => ({ page: getComputedStyle(document.body).backgroundColor, chart: chart() });
  const choose = (id, value) => { by(id).value = value; by(id).dispatchEvent(new Event("change")); };
  const heading = text => [...by("rows").tHead.querySelectorAll("th")].find(cell => cell.textContent === text);
  async function point(cell) {
    cell.scrollIntoView({ block: "center" });
    const box = cell.getBoundingClientRect();
    const where = { bubbles: true, clientX: box.x + box.width / 2, clientY: box.y + box.height / 2 };
    for (const kind of ["pointerover", "mouseover", "pointermove", "mousemove"]) {
      cell.dispatchEvent(new PointerEvent(kind, where));
    }
    await pause(50);
    const tip = document.querySelector(".vg-tooltip");
    const { left, right } = tip.getBoundingClientRect();
    if (left < 0 || right > innerWidth) findings.errors.push(`tooltip from ${left} to ${right}`);
    return tip.innerText;
  }
  try {
    await drawn("light");
    findings.light = looks();
    const places = [...document.querySelectorAll("[data-figure]")].map(place => place.dataset.figure);
    findings.cells = Object.fromEntries(places.map(name => [name, cells(name).length]));
    findings.drawings = document.querySelectorAll("[data-figure] svg.marks").length;
    findings.dashed = cells("cosine-1").filter(cell => cell.getAttribute("stroke") === "#888").length;
    findings.hostile_tip = await point(cells("cosine-1")[0]);
    findings.marks = document.querySelectorAll("mark").length;  // no name of a stranger is markup
    const order = JSON.parse(by("figures").textContent).specs["cosine-1"].data.values;
    const name = JSON.parse(by("report").textContent).pairs[0].tensors[9].name;
    findings.tip = await point(cells("cosine-1")[order.findIndex(cell => cell.tensor === name)]);
    findings.levels = {};
    for (const level of ["modules", "kinds", "layers", "tensors"]) {
      choose("level", level);
      findings.levels[level] = names().length;
    }
    findings.sorts = [];
    for (const way of ["rising", "falling"]) {
      heading("cosine").querySelector("button").click();
      const box = by("rows").parentElement;
      box.scrollTop = 1e6;
      box.dispatchEvent(new Event("scroll"));  // the browser's own comes with a frame: not always here
      findings[way] = names();
      findings.sorts.push(heading("cosine").ariaSort);
    }
    by("filter").value = "Layers.1.MLP";
    by("filter").dispatchEvent(new Event("input"));
    await pause(300);
    findings.filtered = names();
    choose("source", 1);
    findings.norm_columns = [...by("rows").tHead.querySelectorAll("th")].map(cell => cell.textContent);
    // A table or a chart may scroll inside its own box; nothing else may reach past the window.
    findings.overflow = [...document.querySelectorAll("main *")]
      .filter(part => part.getBoundingClientRect().right > innerWidth + 1 && !part.closest(".wide, .chart"))
      .map(part => part.outerHTML.slice(0, 80));
    findings.page_width = root.scrollWidth;
    findings.window_width = innerWidth;
    by("scheme").click();
    await drawn("dark");
    findings.dark = looks();
    dispatchEvent(new Event("beforeprint"));
    for (let i = 0; i < 1e5 && root.dataset.drawn !== "light"; i++) await null;  // no task runs before printing
    findings.printed = chart();
    findings.requests = performance.getEntriesByType("resource").map(entry => entry.name);
    findings.images = document.images.length;
    findings.marks += document.querySelectorAll("mark").length;
  } catch (error) {
    findings.errors.push(`driver: ${error.stack}`);
  }
  const note = document.createElement("pre");
  note.id = "findings";
  note.textContent = JSON.stringify(findings);
  document.body.append(note);
})();
