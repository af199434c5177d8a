// Folded parts open where a link leads into them, and on paper.
function openFolds(element) {
  for (let fold = element?.closest("details"); fold; fold = fold.parentElement.closest("details")) fold.open = true;
}

function openTarget() {
  const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (target?.closest("details:not([open])")) {
    openFolds(target);
    target.scrollIntoView();
  }
}

addEventListener("hashchange", openTarget);
addEventListener("DOMContentLoaded", openTarget);
addEventListener("beforeprint", () => {
  for (const fold of document.querySelectorAll("article details:not([open])")) {
    fold.open = true;
    fold.dataset.forPrint = "";
  }
});
addEventListener("afterprint", () => {
  for (const fold of document.querySelectorAll("details[data-for-print]")) {
    fold.open = false;
    delete fold.dataset.forPrint;
  }
});
