// The frame: header, session, and the page that the address names.
import { signal, useSignalEffect } from "@preact/signals";
import { useEffect } from "preact/hooks";
import { Console } from "./Console";
import { readModels, watchPrice } from "./draft";
import { theme, type Theme } from "./look";
import { Operate } from "./Operate";
import { Playground } from "./Playground";
import { entering, leave, readSession, report, session, trouble } from "./session";
import { Enter } from "./Enter";
import { open, readOpen, tasks, watchTasks } from "./tasks";
import { Refusal } from "./Refusal";
import { lang, t, type Lang } from "./words";

type Place = "playground" | "console" | "operate";
const PLACES: Place[] = ["console", "operate"];
const place = signal<Place>("playground");

function readAddress(): void {
  const hash = location.hash;
  const named = PLACES.find((each) => hash === `#/${each}`);
  place.value = named ?? "playground";
  const task = /^#\/t\/([\w-]+)$/.exec(hash);
  if (task?.[1]) open.value = task[1];
}

readAddress();
addEventListener("hashchange", readAddress);

export function App() {
  useEffect(() => {
    readSession().catch(report);
    const stops = [watchPrice(), watchTasks()];
    return () => stops.forEach((stop) => stop());
  }, []);
  const key = session.value?.key ?? null;
  useEffect(() => {
    if (key === null) {
      tasks.value = null;
      return;
    }
    readModels().catch(report);
  }, [key]);
  useSignalEffect(() => {
    readOpen().catch(report);
  });
  useSignalEffect(() => {
    document.title = `imageway · ${t(`nav.${place.value}`)}`;
  });
  return (
    <>
      <a class="skip" href="#main" onClick={skip}>
        {t("nav.skip")}
      </a>
      <Header />
      <main id="main" tabIndex={-1}>
        {trouble.value && <Refusal error={trouble.value} dismiss={() => (trouble.value = null)} />}
        <Inside />
      </main>
    </>
  );
}

function skip(event: Event): void {
  event.preventDefault();
  document.getElementById("main")?.focus();
}

function Inside() {
  const found = session.value;
  if (!found) return null;
  if (entering.value || !(found.key || found.admin)) return <Enter />;
  if (place.value === "operate") return <Operate />;
  if (place.value === "console") return <Console />;
  return <Playground />;
}

function Header() {
  const found = session.value;
  return (
    <header class="top">
      <a class="brand" href="#/" translate={false}>
        <svg viewBox="0 0 32 32" width="24" height="24" aria-hidden="true">
          <path d="M4 23h7c5 0 3-14 9-14h8M4 9h7c2.500 0 3.500 2 4 4.500" />
        </svg>
        imageway
      </a>
      <nav aria-label={t("nav.label")}>
        <NavLink to="playground" hash="#/" />
        <NavLink to="console" hash="#/console" />
        <NavLink to="operate" hash="#/operate" />
      </nav>
      <div class="who">
        {found?.key && (
          <span class="chip">
            {t("session.asKey")} <code translate={false}>{found.key}</code>
          </span>
        )}
        {found?.admin && <span class="chip">{t("session.asAdmin")}</span>}
        {(found?.key || found?.admin) && (
          <button type="button" class="quiet" onClick={() => void leave().catch(report)}>
            {t("session.end")}
          </button>
        )}
        <Choice
          label={t("lang.label")}
          value={lang.value}
          choices={{ en: "English", ja: "日本語" }}
          pick={(value) => (lang.value = value as Lang)}
          own
        />
        <Choice
          label={t("theme.label")}
          value={theme.value}
          choices={{
            system: t("theme.system"),
            light: t("theme.light"),
            dark: t("theme.dark"),
          }}
          pick={(value) => (theme.value = value as Theme)}
        />
      </div>
    </header>
  );
}

function NavLink({ to, hash }: { to: Place; hash: string }) {
  const here = place.value === to;
  return (
    <a href={hash} aria-current={here ? "page" : undefined}>
      {t(`nav.${to}`)}
    </a>
  );
}

interface ChoiceProps {
  label: string;
  value: string;
  choices: Record<string, string>;
  pick: (value: string) => void;
  /** Whether each choice is written in its own language. */
  own?: boolean;
}

function Choice({ label, value, choices, pick, own = false }: ChoiceProps) {
  return (
    <select aria-label={label} value={value} onChange={(e) => pick(e.currentTarget.value)}>
      {Object.entries(choices).map(([name, text]) => (
        <option key={name} value={name} {...(own ? { lang: name, translate: false } : {})}>
          {text}
        </option>
      ))}
    </select>
  );
}
