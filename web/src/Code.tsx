// The request of the form as code.
import { signal, useSignal } from "@preact/signals";
import { body } from "./draft";
import { Chips } from "./Form";
import { LANGUAGES, snippet, type Language } from "./snippets";
import { t } from "./words";

const language = signal<Language>("curl");
const COPIED_MS = 1500;

export function Code() {
  const copied = useSignal(false);
  const text = snippet(language.value, body.value, location.origin);
  const copy = async (): Promise<void> => {
    await navigator.clipboard.writeText(text);
    copied.value = true;
    setTimeout(() => (copied.value = false), COPIED_MS);
  };
  return (
    <div class="code">
      <div class="row">
        <Chips
          name="language"
          legend={t("code.language")}
          choices={Object.keys(LANGUAGES)}
          value={language.value}
          pick={(value) => (language.value = value as Language)}
          show={(value) => <span translate={false}>{LANGUAGES[value as Language]}</span>}
        />
        <span class="gap" />
        {/* Without TLS, browsers let no page write to the clipboard, but on this machine. */}
        {window.isSecureContext && (
          <button type="button" onClick={() => void copy()}>
            {copied.value ? t("code.copied") : t("code.copy")}
          </button>
        )}
      </div>
      <pre tabIndex={0} translate={false}>
        <code data-language={language.value}>{text}</code>
      </pre>
      <p class="fine">{t("code.key")}</p>
    </div>
  );
}
