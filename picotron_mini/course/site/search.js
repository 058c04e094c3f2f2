// The index of the search is most of a page's bytes, and the theme asks for it on every page. Here that request waits
// until somebody opens the search, or comes with a query. It runs before the theme's script.
(() => {
  const { open, send } = XMLHttpRequest.prototype;
  const waiting = [];
  let wanted = new URLSearchParams(location.search).has("q");
  XMLHttpRequest.prototype.open = function (method, url, ...rest) {
    this.isIndex = String(url).endsWith("search/search_index.json");
    return open.call(this, method, url, ...rest);
  };
  XMLHttpRequest.prototype.send = function (...body) {
    if (this.isIndex && !wanted) waiting.push(() => send.apply(this, body));
    else send.apply(this, body);
  };
  const start = (event) => {
    if (!event.target.matches?.("[name=query], #__search")) return;
    wanted = true;
    for (const request of waiting.splice(0)) request();
  };
  document.addEventListener("focusin", start);
  document.addEventListener("change", start); // the button on a narrow screen ticks a hidden box
})();
