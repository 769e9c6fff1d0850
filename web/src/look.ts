// Light, dark, or as the system says.
import { effect } from "@preact/signals";
import { kept } from "./kept";

export type Theme = "system" | "light" | "dark";

export const theme = kept<Theme>("theme", "system");
effect(() => {
  const root = document.documentElement;
  if (theme.value === "system") delete root.dataset["theme"];
  else root.dataset["theme"] = theme.value;
});
