// What this browser remembers: never a key, for the session's cookie holds that.
import { effect, signal, type Signal } from "@preact/signals";

const PREFIX = "imageway.";

export function kept<T>(name: string, first: T): Signal<T> {
  const found = signal<T>(read(name, first));
  effect(() => {
    const value = found.value;
    try {
      localStorage.setItem(PREFIX + name, JSON.stringify(value));
    } catch {
      // Full, or forbidden: it is forgotten with the page.
    }
  });
  return found;
}

function read<T>(name: string, first: T): T {
  try {
    const text = localStorage.getItem(PREFIX + name);
    return text === null ? first : (JSON.parse(text) as T);
  } catch {
    return first;
  }
}
