// The search of pages that are opened as files; offline.py says why. It runs before the theme's script.
if (location.protocol === "file:") {
  const from = new URL("../search/worker.js", document.currentScript.src).href;
  document.write(`<script src="${from.replaceAll('"', "%22")}"></script>`); // here, and before what follows
  window.Worker = class extends Worker {
    constructor() {
      super(URL.createObjectURL(new Blob([__searchWorker], { type: "text/javascript" })));
    }
  };
}
