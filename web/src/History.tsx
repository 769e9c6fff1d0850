// The last twenty, as the server has them.
import { here } from "./api";
import { State } from "./Result";
import { asked, HISTORY_MAX, open, show, tasks, type Task } from "./tasks";
import { t } from "./words";

const MINUTE_S = 60;
const HOUR_S = 3600;
const DAY_S = 86_400;

export function History() {
  const listed = tasks.value?.slice(0, HISTORY_MAX);
  const count = (...states: string[]) => (listed ?? []).filter((e) => states.includes(e.status)).length;
  return (
    <section class="card history" aria-labelledby="history-title">
      <div class="row">
        <h2 id="history-title">{t("history.title")}</h2>
        <p class="fine num">
          {t("history.counts", {
            running: count("pending", "processing"),
            completed: count("completed"),
          })}
        </p>
      </div>
      {listed?.length === 0 && <p class="empty">{t("history.none")}</p>}
      <ul>
        {listed?.map((task) => (
          <Entry key={task.id} task={task} />
        ))}
      </ul>
    </section>
  );
}

function Entry({ task }: { task: Task }) {
  const text = asked.value[task.id]?.body.prompt;
  const picture = task.results?.[0];
  const choose = (): void => {
    show(task.id);
    document.querySelector(".views")?.scrollIntoView({ block: "nearest" });
  };
  return (
    <li class={open.value === task.id ? "open" : undefined} data-task={task.id}>
      <button type="button" aria-pressed={open.value === task.id} onClick={choose}>
        <span class="thumb">
          {picture && <img src={here(picture)} alt="" loading="lazy" decoding="async" />}
        </span>
        <span class="words">
          <span class="prompt" translate={false}>
            {text ?? task.model}
          </span>
          <span class="fine">
            <State task={task} /> <span class="num">{when(task.created)}</span>
          </span>
        </span>
      </button>
    </li>
  );
}

function when(created: number): string {
  const age = Math.max(0, Date.now() / 1000 - created);
  if (age < MINUTE_S) return t("history.now");
  if (age < HOUR_S) return t("history.when", { minutes: Math.floor(age / MINUTE_S) });
  if (age < DAY_S) return t("history.hours", { hours: Math.floor(age / HOUR_S) });
  return t("history.days", { days: Math.floor(age / DAY_S) });
}
