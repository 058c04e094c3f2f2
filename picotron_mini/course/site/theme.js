// What the theme's own script leaves out for those who use a keyboard or a screen reader.
(() => {
  const mend = () => {
    // Each "copy" button comes in a <nav>: dozens of landmarks without a name.
    for (const nav of document.querySelectorAll("nav.md-code__nav:not([role])")) nav.setAttribute("role", "none");
    // What is too wide for the screen scrolls by itself, and must be reached to be scrolled.
    for (const box of document.querySelectorAll("pre > code, .md-typeset__scrollwrap, div.formula, div.output, p:has(> img)")) {
      if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
      else box.removeAttribute("tabindex");
    }
  };
  // On a narrow screen the menu and the search open by a <label>, which the keyboard passes over: make it a button.
  for (const [id, name] of [["__drawer", "Menu"], ["__search", "Search"]]) {
    const toggle = document.getElementById(id);
    for (const label of document.querySelectorAll(`label.md-header__button[for=${id}]`)) {
      const button = document.createElement("button");
      button.className = label.className;
      button.setAttribute("for", id); // what the theme's style sheet shows and hides it by
      button.ariaLabel = name;
      button.append(...label.childNodes);
      button.addEventListener("click", () => {
        toggle.click();
        if (id === "__search") document.querySelector(".md-search__input").focus();
      });
      label.replaceWith(button);
    }
  }
  // Without a font for formulas some browsers neither lower nor raise what should be: see on one index.
  const math = document.querySelector("msub, msubsup")?.closest("math");
  if (math) {
    const line = math.closest("p, li, td, div").appendChild(document.createElement("span"));
    line.innerHTML = "<math><msub><mi>x</mi><mi>x</mi></msub></math>";
    const [base, index] = [...line.querySelectorAll("mi")].map((one) => one.getBoundingClientRect());
    document.documentElement.classList.toggle("flat-scripts", index.bottom < base.bottom + 1);
    line.remove();
  }
  new MutationObserver(mend).observe(document.body, { childList: true, subtree: true });
  for (const event of ["load", "resize", "toggle"]) addEventListener(event, mend, true); // "toggle": an answer unfolds
})();
