// Prompt on the left, what becomes of it on the right, what was before below.
import { useEffect } from "preact/hooks";
import { Code } from "./Code";
import { Form } from "./Form";
import { History } from "./History";
import { Result } from "./Result";
import { Route } from "./Route";
import { entering, report, session } from "./session";
import { refresh } from "./tasks";
import { TABS, tab } from "./tabs";
import { t } from "./words";

export function Playground() {
  const key = session.value?.key;
  // Whenever one comes back to it: others may have been at work with the same key.
  useEffect(() => {
    if (key) refresh().catch(report);
  }, [key]);
  if (!key) return <NeedsKey />;
  return (
    <>
      <h1 class="unseen">{t("nav.playground")}</h1>
      <div class="bench">
        <Form />
        <section class="card views">
          <Tabs />
          <div
            role="tabpanel"
            id={`panel-${tab.value}`}
            aria-labelledby={`tab-${tab.value}`}
            tabIndex={0}
          >
            {tab.value === "result" && <Result />}
            {tab.value === "route" && <Route />}
            {tab.value === "code" && <Code />}
          </div>
        </section>
      </div>
      <History />
    </>
  );
}

function NeedsKey() {
  return (
    <section class="card enter">
      <h1>{t("nav.playground")}</h1>
      <p>{t("session.needsKey")}</p>
      <button type="button" class="main" onClick={() => (entering.value = true)}>
        {t("session.addKey")}
      </button>
    </section>
  );
}

function Tabs() {
  const move = (event: KeyboardEvent): void => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const next = TABS[(TABS.indexOf(tab.value) + step + TABS.length) % TABS.length];
    if (!next) return;
    tab.value = next;
    document.getElementById(`tab-${next}`)?.focus();
  };
  return (
    <div class="tabs" role="tablist" aria-label={t("tabs.label")} onKeyDown={move}>
      {TABS.map((each) => (
        <button
          key={each}
          type="button"
          role="tab"
          id={`tab-${each}`}
          aria-selected={tab.value === each}
          aria-controls={tab.value === each ? `panel-${each}` : undefined}
          tabIndex={tab.value === each ? 0 : -1}
          onClick={() => (tab.value = each)}
        >
          {t(`tabs.${each}`)}
        </button>
      ))}
    </div>
  );
}
