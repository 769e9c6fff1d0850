// For a tenant: what there is to spend, and everything that was asked for and sent.
import { useSignal, type Signal } from "@preact/signals";
import { useEffect } from "preact/hooks";
import { call } from "./api";
import { attempt, entering, report, session } from "./session";
import { decimal, t, tOr } from "./words";

const PAGE_SIZE = 20;
const STATES = ["", "processing", "completed", "failed", "cancelled"];

interface Balance {
  remaining_credits: number;
  held_credits: number;
  used_credits: number;
}

interface Line {
  id: string;
  model: string;
  status: string;
  created_at: number;
  duration: number | null;
  result_count: number;
  credits_used: number | null;
}

interface Delivery {
  id: string;
  task_id: string | null;
  event: string;
  url: string;
  state: string;
  tries: number;
  last_status: number | null;
  last_error: string | null;
  created_at: string;
}

interface Listed<T> {
  data: T[];
  total: number;
}

export function Console() {
  if (!session.value?.key) {
    return (
      <section class="card enter">
        <h1>{t("nav.console")}</h1>
        <p>{t("session.needsKey")}</p>
        <button type="button" class="main" onClick={() => (entering.value = true)}>
          {t("session.addKey")}
        </button>
      </section>
    );
  }
  return (
    <>
      <Account />
      <Tasks />
      <Webhooks />
    </>
  );
}

function Account() {
  const found = useSignal<Balance | null>(null);
  useEffect(() => {
    call<{ data: { user: Balance } }>("GET", "/v1/credits")
      .then((answer) => (found.value = answer.data.user))
      .catch(report);
  }, []);
  const rows = [
    ["console.available", found.value?.remaining_credits],
    ["console.held", found.value?.held_credits],
    ["console.spent", found.value?.used_credits],
  ] as const;
  return (
    <section class="card">
      <h1>{t("console.balance")}</h1>
      <dl class="figures">
        {rows.map(([word, value]) => (
          <div key={word}>
            <dt>{t(word)}</dt>
            <dd class="num">
              {value === undefined ? "–" : <data value={value}>{decimal(value)}</data>}
            </dd>
          </div>
        ))}
      </dl>
    </section>
  );
}

/** A page of a list that grows at its head; read again when page or filter change. */
function usePage<T>(path: string): { found: Signal<Listed<T> | null>; page: Signal<number>; read: () => void } {
  const found = useSignal<Listed<T> | null>(null);
  const page = useSignal(1);
  const read = (): void => {
    const asked = `${path}page=${page.value}&page_size=${PAGE_SIZE}`;
    call<Listed<T>>("GET", asked)
      .then((answer) => (found.value = answer))
      .catch(report);
  };
  useEffect(read, [path, page.value]);
  return { found, page, read };
}

function Tasks() {
  const state = useSignal("");
  const { found, page } = usePage<Line>(`/v1/tasks?status=${state.value}&`);
  return (
    <section class="card" aria-labelledby="tasks-title">
      <div class="row">
        <h2 id="tasks-title">{t("console.tasks")}</h2>
        <span class="gap" />
        <label class="inline">
          {t("operate.state")}
          <select
            value={state.value}
            onChange={(event) => {
              page.value = 1;
              state.value = event.currentTarget.value;
            }}
          >
            {STATES.map((each) => (
              <option key={each} value={each}>
                {each ? tOr(`state.${each}`, each) : t("console.all")}
              </option>
            ))}
          </select>
        </label>
      </div>
      <Table
        heads={["console.task", "form.model", "operate.state", "console.begun", "console.took", "result.charged"]}
        rows={(found.value?.data ?? []).map((each) => [
          <a href={`#/t/${each.id}`} translate={false}>
            {each.id}
          </a>,
          <span translate={false}>{each.model}</span>,
          <span class={`state ${each.status}`}>{tOr(`state.${each.status}`, each.status)}</span>,
          <span class="num">{moment(each.created_at * 1000)}</span>,
          <span class="num">{each.duration === null ? "–" : t("console.seconds", { s: each.duration })}</span>,
          <span class="num">{each.credits_used === null ? "–" : decimal(each.credits_used)}</span>,
        ])}
      />
      <Pages page={page} total={found.value?.total ?? 0} label={t("console.tasks")} />
    </section>
  );
}

function Webhooks() {
  const { found, page, read } = usePage<Delivery>("/v1/webhooks/deliveries?");
  const resend = async (id: string): Promise<void> => {
    await attempt("POST", `/v1/webhooks/deliveries/${id}/redeliver`, { body: {} });
    read();
  };
  return (
    <section class="card" aria-labelledby="webhooks-title">
      <h2 id="webhooks-title">{t("console.webhooks")}</h2>
      <Table
        heads={["console.to", "operate.state", "console.tries", "console.answer", "console.begun", "operate.change"]}
        rows={(found.value?.data ?? []).map((each) => [
          <span translate={false}>{each.url}</span>,
          <span data-delivery={each.id}>{tOr(`delivery.${each.state}`, each.state)}</span>,
          <span class="num">{each.tries}</span>,
          <span lang="en" translate={false}>
            {each.last_status ?? each.last_error ?? "–"}
          </span>,
          <span class="num">{moment(Date.parse(each.created_at))}</span>,
          <button type="button" onClick={() => void resend(each.id)}>
            {t("console.resend")}
          </button>,
        ])}
      />
      <Pages page={page} total={found.value?.total ?? 0} label={t("console.webhooks")} />
    </section>
  );
}

type Head =
  | "console.task" | "console.begun" | "console.took" | "console.to" | "console.tries"
  | "console.answer" | "form.model" | "operate.state" | "operate.change" | "result.charged";

function Table({ heads, rows }: { heads: Head[]; rows: preact.ComponentChildren[][] }) {
  if (!rows.length) return <p class="empty">{t("console.nothing")}</p>;
  return (
    <div class="wide">
      <table class="log">
        <thead>
          <tr>
            {heads.map((head) => (
              <th scope="col" key={head}>
                {t(head)}
              </th>
            ))}
          </tr>
        </thead>
        <tbody>
          {rows.map((cells, row) => (
            <tr key={row}>
              {cells.map((cell, column) => (
                <td key={column}>{cell}</td>
              ))}
            </tr>
          ))}
        </tbody>
      </table>
    </div>
  );
}

function Pages({ page, total, label }: { page: Signal<number>; total: number; label: string }) {
  const last = Math.max(1, Math.ceil(total / PAGE_SIZE));
  if (last === 1) return null;
  return (
    <nav class="row pages" aria-label={t("console.pagesOf", { list: label })}>
      <button type="button" disabled={page.value <= 1} onClick={() => (page.value -= 1)}>
        {t("console.newer")}
      </button>
      <span class="fine num">{t("console.page", { page: page.value, last })}</span>
      <button type="button" disabled={page.value >= last} onClick={() => (page.value += 1)}>
        {t("console.older")}
      </button>
    </nav>
  );
}

/** The moment, so that it reads the same in both languages. */
function moment(ms: number): string {
  const two = (part: number): string => String(part).padStart(2, "0");
  const at = new Date(ms);
  const day = [at.getFullYear(), two(at.getMonth() + 1), two(at.getDate())].join("-");
  return `${day} ${[at.getHours(), at.getMinutes(), at.getSeconds()].map(two).join(":")}`;
}
