"use strict";

function element(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

// Light or dark: the system's, until the switch is pressed (or #theme=dark is in the address).
(() => {
  const root = document.documentElement;
  const isDark = () => root.dataset.theme
    ? root.dataset.theme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
  const wanted = new URLSearchParams(location.hash.slice(1)).get("theme");
  if (["light", "dark"].includes(wanted)) root.dataset.theme = wanted;
  document.getElementById("theme").addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; });
})();
