// Where a key is entered, once.
import { useSignal } from "@preact/signals";
import { ApiError } from "./api";
import { Refusal } from "./Refusal";
import { enter, entering, report, session } from "./session";
import { t } from "./words";

export function Enter() {
  const key = useSignal("");
  const refused = useSignal<ApiError | null>(null);
  const busy = useSignal(false);
  const begun = session.value?.key || session.value?.admin;
  const submit = async (event: Event): Promise<void> => {
    event.preventDefault();
    busy.value = true;
    refused.value = null;
    try {
      await enter(key.value);
      document.getElementById("main")?.focus(); // the button that had it is gone
    } catch (error) {
      if (error instanceof ApiError) refused.value = error;
      else report(error);
    } finally {
      busy.value = false;
    }
  };
  return (
    <section class="enter card">
      <h1>{t("session.title")}</h1>
      <p>{t("session.why")}</p>
      <form onSubmit={(event) => void submit(event)}>
        <label for="key">{t("session.key")}</label>
        <input
          id="key"
          type="password"
          autocomplete="off"
          spellcheck={false}
          required
          value={key.value}
          onInput={(event) => (key.value = event.currentTarget.value)}
        />
        <div class="row">
          <button type="submit" class="main" disabled={busy.value}>
            {t("session.begin")}
          </button>
          {begun && (
            <button type="button" onClick={() => (entering.value = false)}>
              {t("mask.cancel")}
            </button>
          )}
        </div>
      </form>
      {refused.value && <Refusal error={refused.value} />}
      <p class="fine">{t("session.where")}</p>
    </section>
  );
}
