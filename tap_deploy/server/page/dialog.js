/** Dialogs: what the user has chosen in one. */

/** Closes the dialog on any of its buttons; returns the button's value, "cancel" on Escape. */
export function choiceIn(dialog) {
  return new Promise((resolve) => {
    let choice = "cancel";
    const choose = (event) => {
      const button = event.target.closest("button");
      if (!button) return;
      choice = button.value;
      dialog.close();
    };
    dialog.addEventListener("click", choose);
    dialog.addEventListener(
      "close",
      () => {
        dialog.removeEventListener("click", choose);
        resolve(choice);
      },
      { once: true },
    );
  });
}
