// For operators: how the upstreams are, and what can be done about it.
import { useSignal } from "@preact/signals";
import { useEffect } from "preact/hooks";
import { call } from "./api";
import { NeedsAdmin } from "./Route";
import { Sandboxes } from "./Sandboxes";
import { attempt, report, session } from "./session";
import { decimal, t, tOr } from "./words";

const AGAIN_MS = 2000;

interface Upstream {
  upstream: string;
  drained: boolean;
  slots: { used: number; limit: number };
  last_failure: { kind: string } | null;
  offers: {
    offer: string;
    operation: string;
    state: string;
    usual_ms: number | null;
    window: { good: number; bad: number };
  }[];
}

export function Operate() {
  return (
    <section class="card operate">
      <h1>{t("operate.title")}</h1>
      {session.value?.admin ? <Upstreams /> : <NeedsAdmin />}
    </section>
  );
}

function Upstreams() {
  const found = useSignal<Upstream[]>([]);
  const read = async (): Promise<void> => {
    if (document.hidden) return;
    found.value = (await call<{ data: Upstream[] }>("GET", "/admin/v1/upstreams", { as: "admin" })).data;
  };
  useEffect(() => {
    const look = () => void read().catch(report);
    look();
    const timer = setInterval(look, AGAIN_MS);
    return () => clearInterval(timer);
  }, []);
  const change = async (name: string, what: string): Promise<void> => {
    await attempt("POST", `/admin/v1/upstreams/${name}/${what}`, { as: "admin", body: {} });
    await read();
  };
  return (
    <>
      <div class="wide">
        <table>
          <thead>
            <tr>
              <th scope="col">{t("operate.upstream")}</th>
              <th scope="col">{t("operate.state")}</th>
              <th scope="col">{t("operate.busy")}</th>
              <th scope="col">{t("operate.usual")}</th>
              <th scope="col">{t("operate.window")}</th>
              <th scope="col">{t("operate.last")}</th>
              <th scope="col">{t("operate.change")}</th>
            </tr>
          </thead>
          <tbody>
            {found.value.map((each) => (
              <Row key={each.upstream} upstream={each} change={change} />
            ))}
          </tbody>
        </table>
      </div>
      <Sandboxes />
    </>
  );
}

interface RowProps {
  upstream: Upstream;
  change: (name: string, what: string) => Promise<void>;
}

const WORST = ["open", "half_open", "paused", "closed"];

function Row({ upstream, change }: RowProps) {
  const { upstream: name, drained, slots, offers } = upstream;
  const worst = WORST.find((state) => offers.some((each) => each.state === state)) ?? "closed";
  const usual = offers.map((each) => each.usual_ms).find((ms) => ms !== null);
  const sum = (key: "good" | "bad") => offers.reduce((all, each) => all + each.window[key], 0);
  const act = drained ? "enable" : "drain";
  return (
    <tr>
      <th scope="row" translate={false}>
        {name}
      </th>
      <td>
        <span class={`health ${drained ? "open" : worst}`}>
          {drained ? t("operate.drained") : tOr(`breaker.${worst}`, worst)}
        </span>
      </td>
      <td class="num">
        {slots.used} / {slots.limit}
      </td>
      <td class="num">{usual == null ? "–" : t("route.ms", { ms: decimal(usual, 0) })}</td>
      <td class="num">
        {sum("good")} / {sum("bad")}
      </td>
      <td>
        {upstream.last_failure ? (
          <span lang="en" translate={false}>
            {upstream.last_failure.kind}
          </span>
        ) : (
          t("operate.none")
        )}
      </td>
      <td class="acts">
        <button type="button" onClick={() => void change(name, act).catch(report)}>
          {t(`operate.${act}`)}
        </button>
        <button type="button" onClick={() => void change(name, "reset").catch(report)}>
          {t("operate.reset")}
        </button>
      </td>
    </tr>
  );
}
