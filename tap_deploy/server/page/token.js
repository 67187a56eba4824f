/** Asks for the bearer token of the server, which stays in this page's memory. */

/** Returns a promise of the token; null if the user has none. `wrong`: the last one was refused. */
export function askToken(dialog, wrong) {
  const form = dialog.querySelector("form");
  const field = dialog.querySelector("input");
  dialog.querySelector("[role=alert]").hidden = !wrong;
  field.value = "";
  dialog.showModal();
  return new Promise((resolve) => {
    const done = new AbortController();
    const settle = (token) => {
      done.abort();
      dialog.close();
      resolve(token);
    };
    const options = { signal: done.signal };
    form.addEventListener(
      "submit",
      (event) => {
        event.preventDefault();
        settle(field.value.trim());
      },
      options,
    );
    dialog.querySelector("[value=cancel]").addEventListener("click", () => settle(null), options);
    dialog.addEventListener("cancel", () => settle(null), options);
  });
}
