// The page of all questions: check boxes choose chapters and levels, and the choice stands in the address,
// as #chapter=00,03&level=design. Nothing checked in a group means all of it.
(() => {
  const form = document.querySelector("form.filter");
  if (!form) return;
  const boxes = [...form.querySelectorAll("input")];
  const all = [...document.querySelectorAll("details.asked")];

  const chosen = (name) => boxes.filter((box) => box.name === name && box.checked).map((box) => box.value);

  function show() {
    const wanted = { chapter: chosen("chapter"), level: chosen("level") };
    const fits = (one) =>
      Object.entries(wanted).every(([name, values]) => !values.length || values.includes(one.dataset[name]));
    for (const one of all) one.hidden = !fits(one);
    for (const section of document.querySelectorAll("article section"))
      section.hidden = !section.querySelector("details.asked:not([hidden])");
    form.querySelector("output").textContent = `${all.filter((one) => !one.hidden).length} of ${all.length} questions`;
    return Object.entries(wanted).filter(([, values]) => values.length);
  }

  function read() {
    const target = location.hash.includes("=") ? null : document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (target) {
      if (!target.closest("section[hidden]")) return;
      for (const box of boxes) box.checked = false; // it is not among what was chosen: show all, and go there
      show();
      target.scrollIntoView();
      return;
    }
    const said = new URLSearchParams(location.hash.slice(1));
    for (const box of boxes) box.checked = (said.get(box.name) ?? "").split(",").includes(box.value);
    show();
  }

  function write() {
    const hash = show().map(([name, values]) => `${name}=${values.join(",")}`).join("&");
    history.replaceState(null, "", hash ? `#${hash}` : location.pathname + location.search);
  }

  form.addEventListener("change", write);
  form.addEventListener("reset", () => setTimeout(write)); // after the boxes are cleared
  form.addEventListener("submit", (event) => event.preventDefault());
  addEventListener("hashchange", read);
  form.hidden = false;
  read();
})();
