// The page's words in two languages; every text on it comes from here.
import { effect } from "@preact/signals";
import { kept } from "./kept";
import { en, type Word } from "./words/en";
import { ja } from "./words/ja";

export type Lang = "en" | "ja";
const WORDS: Record<Lang, Record<Word, string>> = { en, ja };

export const lang = kept<Lang>("lang", navigator.language.startsWith("ja") ? "ja" : "en");
effect(() => {
  document.documentElement.lang = lang.value;
});

export function t(word: Word, put: Record<string, string | number> = {}): string {
  const text = WORDS[lang.value][word];
  return text.replace(/\{(\w+)\}/g, (_, name: string) => String(put[name] ?? ""));
}

export function isWord(text: string): text is Word {
  return text in en;
}

/** A word that is put together; what is not in the list is shown as it is. */
export function tOr(word: string, otherwise: string): string {
  return isWord(word) ? t(word) : otherwise;
}

/** A number with at most so many digits behind the point, in full. */
export function decimal(value: number, digits = 6): string {
  return new Intl.NumberFormat("en-US", { maximumFractionDigits: digits }).format(value);
}
