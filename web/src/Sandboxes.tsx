// A switch for each sandbox upstream, so that a failover can be watched.
import { signal } from "@preact/signals";
import { useEffect } from "preact/hooks";
import { call } from "./api";
import { Chips } from "./Form";
import { attempt, report } from "./session";
import { t } from "./words";

interface Sandbox {
  upstream: string;
  latency_ms: number;
  failure_rate: number;
  failure_kind: string;
}

const SLOW_MS = 8000;
const USUAL_MS = 300;
const WAYS = {
  works: { failure_rate: 0, latency_ms: USUAL_MS },
  fail: { failure_rate: 1, failure_kind: "bad_gateway", latency_ms: USUAL_MS },
  slow: { failure_rate: 0, latency_ms: SLOW_MS },
  refuse: { failure_rate: 1, failure_kind: "content_policy", latency_ms: USUAL_MS },
};
type Way = keyof typeof WAYS;

const sandboxes = signal<Sandbox[] | null>(null);

export function Sandboxes() {
  useEffect(() => {
    call<{ data: Sandbox[] }>("GET", "/admin/v1/sandbox", { as: "admin" })
      .then((found) => (sandboxes.value = found.data))
      .catch(report);
  }, []);
  const found = sandboxes.value;
  if (!found) return null;
  return (
    <section class="sandboxes" aria-labelledby="sandbox-title">
      <h2 id="sandbox-title">{t("sandbox.title")}</h2>
      <p class="fine">{found.length ? t("sandbox.how") : t("sandbox.none")}</p>
      {found.map((each) => (
        <Chips
          key={each.upstream}
          name={`way-${each.upstream}`}
          legend={t("sandbox.behaves", { upstream: each.upstream })}
          choices={Object.keys(WAYS)}
          value={wayOf(each)}
          pick={(way) => void turn(each.upstream, way as Way)}
          show={(way) => t(`sandbox.${way as Way}`)}
        />
      ))}
      {found.length > 0 && <p class="fine">{t("sandbox.hint")}</p>}
    </section>
  );
}

function wayOf(sandbox: Sandbox): Way {
  if (sandbox.failure_rate > 0) return sandbox.failure_kind === "content_policy" ? "refuse" : "fail";
  return sandbox.latency_ms >= SLOW_MS ? "slow" : "works";
}

async function turn(upstream: string, way: Way): Promise<void> {
  const changed = await attempt<Sandbox>("PATCH", `/admin/v1/sandbox/${upstream}`, {
    as: "admin",
    body: WAYS[way],
  });
  if (!changed) return;
  // What is well again is believed at once: the next task shows it.
  if (way === "works") {
    await attempt("POST", `/admin/v1/upstreams/${upstream}/reset`, { as: "admin", body: {} });
  }
  sandboxes.value = (sandboxes.value ?? []).map((s) => (s.upstream === upstream ? changed : s));
}
