// Which way the open task went, and why; for whoever has the admin key.
import { useSignal, useSignalEffect } from "@preact/signals";
import { call } from "./api";
import { models } from "./draft";
import { Sandboxes } from "./Sandboxes";
import { entering, report, session } from "./session";
import { current, type Task } from "./tasks";
import { decimal, t, tOr } from "./words";

interface Offer {
  offer: string;
  cost_usd: string | null;
  breaker: string;
  eligible: boolean;
  reason: string | null;
}

interface Attempt {
  seq: number;
  upstream: string;
  state: string;
  kind: string | null;
  upstream_status: number | null;
  detail: string | null;
  duration_ms: number | null;
}

interface Routed extends Task {
  route: Offer[] | null;
  attempts: Attempt[];
}

export function Route() {
  if (!session.value?.admin) return <NeedsAdmin />;
  return (
    <>
      <Sandboxes />
      <Way />
    </>
  );
}

export function NeedsAdmin() {
  const enabled = session.value?.admin_enabled;
  return (
    <div class="empty">
      <p>{enabled ? t("session.needsAdmin") : t("session.adminOff")}</p>
      {enabled && (
        <button type="button" onClick={() => (entering.value = true)}>
          {t("session.addAdmin")}
        </button>
      )}
    </div>
  );
}

function Way() {
  const routed = useSignal<Routed | null>(null);
  useSignalEffect(() => {
    // Read again each time that the task itself was.
    const task = current.value;
    if (!task) {
      routed.value = null;
      return;
    }
    call<Routed>("GET", `/v1/tasks/${task.id}`, { as: "admin" })
      .then((found) => {
        if (current.value?.id === found.id) routed.value = found;
      })
      .catch(report);
  });
  const found = routed.value;
  if (!found) return <p class="empty">{t("route.noTask")}</p>;
  return (
    <div class="way" data-routed={found.id} data-attempts={found.attempts.length}>
      <Failover attempts={found.attempts} />
      <h2>{t("route.attempts")}</h2>
      <ol class="attempts">
        {found.attempts.map((each) => (
          <Try key={each.seq} attempt={each} />
        ))}
      </ol>
      <Offers offers={found.route ?? []} />
      <Tokens task={found} />
    </div>
  );
}

function Failover({ attempts }: { attempts: Attempt[] }) {
  const served = attempts.find((each) => each.state === "done")?.upstream;
  const failed = attempts.filter((each) => each.state === "failed").map((each) => each.upstream);
  if (!served || !failed.length) return null;
  return (
    <p class="failover" role="status">
      {t("route.failover", { failed: failed.join(", "), served })}
    </p>
  );
}

function Try({ attempt }: { attempt: Attempt }) {
  const { seq, upstream, state, kind, upstream_status: status, detail } = attempt;
  const why = [kind, status === null ? null : `HTTP ${status}`, detail].filter(Boolean).join(" · ");
  return (
    <li class={state}>
      <strong translate={false}>{upstream}</strong>
      <span>
        <span class="unseen">{t("route.attempt", { number: seq })}: </span>
        {tOr(`outcome.${state}`, state)}
      </span>
      {attempt.duration_ms !== null && (
        <span class="num">{t("route.ms", { ms: decimal(attempt.duration_ms, 0) })}</span>
      )}
      {why && (
        <span class="fine" lang="en" translate={false}>
          {why}
        </span>
      )}
    </li>
  );
}

function Offers({ offers }: { offers: Offer[] }) {
  let place = 0;
  return (
    <>
      <h2>{t("route.offers")}</h2>
      {offers.length === 0 ? (
        <p class="fine">{t("route.none")}</p>
      ) : (
        <div class="wide">
          <table>
            <thead>
              <tr>
                <th scope="col">{t("route.offer")}</th>
                <th scope="col">{t("route.cost")}</th>
                <th scope="col">{t("route.health")}</th>
                <th scope="col">{t("route.choice")}</th>
              </tr>
            </thead>
            <tbody>
              {offers.map((each) => (
                <tr key={each.offer}>
                  <th scope="row" translate={false}>
                    {each.offer}
                  </th>
                  <td class="num">{each.cost_usd === null ? "–" : `$${each.cost_usd}`}</td>
                  <td>
                    <span class={`health ${each.breaker}`}>
                      {tOr(`breaker.${each.breaker}`, each.breaker)}
                    </span>
                  </td>
                  <td>
                    {each.eligible ? (
                      t("route.chosen", { number: (place += 1) })
                    ) : (
                      <span lang="en" translate={false}>
                        {each.reason}
                      </span>
                    )}
                  </td>
                </tr>
              ))}
            </tbody>
          </table>
        </div>
      )}
    </>
  );
}

function Tokens({ task }: { task: Task }) {
  const { usage } = task;
  const details = usage.input_tokens_details;
  if (!details || !usage.cost) return null;
  const card = models.value.find((each) => each.id === task.model)?.pricing ?? {};
  const rows = [
    { name: t("route.text"), tokens: details.text_tokens, price: card["text_input"] },
    { name: t("route.image"), tokens: details.image_tokens, price: card["image_input"] },
    { name: t("route.output"), tokens: usage.output_tokens ?? 0, price: card["image_output"] },
  ];
  return (
    <>
      <h2>{t("route.tokens")}</h2>
      <div class="wide">
        <table>
          <thead>
            <tr>
              <th scope="col">{t("route.class")}</th>
              <th scope="col">{t("route.count")}</th>
              <th scope="col">{t("route.price")}</th>
            </tr>
          </thead>
          <tbody>
            {rows.map((each) => (
              <tr key={each.name}>
                <th scope="row">{each.name}</th>
                <td class="num">{decimal(each.tokens)}</td>
                <td class="num">{each.price}</td>
              </tr>
            ))}
            {details.cached_tokens !== undefined && (
              <tr>
                <th scope="row">{t("route.cached")}</th>
                <td class="num">{decimal(details.cached_tokens)}</td>
                <td class="num">{card["image_cached_input"]}</td>
              </tr>
            )}
          </tbody>
        </table>
      </div>
      <p class="num">
        {t("route.total", { credits: decimal(usage.cost.credits, 9), usd: decimal(usage.cost.usd, 9) })}
      </p>
      {usage.estimated && <p class="fine">{t("route.estimated")}</p>}
    </>
  );
}
