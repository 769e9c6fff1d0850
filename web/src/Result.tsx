// The open task: how far it is, its pictures, and what can be done with it.
import { useSignal } from "@preact/signals";
import { useEffect, useRef } from "preact/hooks";
import { here } from "./api";
import { load, type Body } from "./draft";
import { Refusal } from "./Refusal";
import { asked, cancel, current, generate, isRunning, type Task } from "./tasks";
import { decimal, t } from "./words";

export function Result() {
  const task = current.value;
  if (!task) return <p class="empty">{t("result.none")}</p>;
  const pictures = (task.results ?? []).map(here);
  return (
    <div class="result" data-task={task.id} data-state={task.status}>
      <div class="row" aria-live="polite">
        <State task={task} />
        <code class="fine" translate={false}>
          {task.id}
        </code>
      </div>
      {isRunning(task) && <Waiting task={task} />}
      {task.error && <Refusal error={task.error} />}
      {task.status === "completed" && pictures.length === 0 && <p>{t("result.expired")}</p>}
      <Pictures pictures={pictures} task={task} />
      <Facts task={task} />
      <Actions task={task} pictures={pictures} />
    </div>
  );
}

export function State({ task }: { task: Task }) {
  return <span class={`state ${task.status}`}>{t(`state.${task.status}`)}</span>;
}

function Waiting({ task }: { task: Task }) {
  return <progress max={100} value={task.progress} aria-label={t("result.progress")} />;
}

function Pictures({ pictures, task }: { pictures: string[]; task: Task }) {
  const zoomed = useSignal<number | null>(null);
  const name = (index: number) => t("result.image", { number: index + 1, count: pictures.length });
  const found = zoomed.value === null ? undefined : pictures[zoomed.value];
  return (
    <>
      <ul class={pictures.length > 1 ? "pictures many" : "pictures"}>
        {pictures.map((url, index) => (
          <li key={url}>
            <button
              type="button"
              class="frame"
              aria-label={t("result.zoom", { number: index + 1 })}
              onClick={() => (zoomed.value = index)}
            >
              <img src={url} alt={name(index)} decoding="async" />
            </button>
            <a href={`${url}&download=1`} download={fileName(task, index)}>
              {t("result.download")}
            </a>
          </li>
        ))}
      </ul>
      {found && zoomed.value !== null && (
        <Zoom url={found} name={name(zoomed.value)} close={() => (zoomed.value = null)} />
      )}
    </>
  );
}

function Zoom({ url, name, close }: { url: string; name: string; close: () => void }) {
  const dialog = useRef<HTMLDialogElement>(null);
  useEffect(() => dialog.current?.showModal(), []);
  return (
    <dialog ref={dialog} class="zoom" aria-label={name} onClose={close}>
      <button type="button" onClick={close}>
        {t("result.close")}
      </button>
      <img src={url} alt={name} />
    </dialog>
  );
}

function Facts({ task }: { task: Task }) {
  const { usage } = task;
  const charged = usage.credits_used;
  return (
    <dl class="facts">
      {task.size && (
        <>
          <dt>{t("result.size")}</dt>
          <dd class="num">{task.size.replace("x", " × ")}</dd>
        </>
      )}
      {task.quality && (
        <>
          <dt>{t("result.quality")}</dt>
          <dd>{t(`form.quality.${task.quality as "low"}`)}</dd>
        </>
      )}
      <dt>{charged === undefined ? t("result.held") : t("result.charged")}</dt>
      <dd class="num">
        {decimal(charged ?? usage.credits_reserved)} {t("price.credits")}
        {usage.cost && ` · $${decimal(usage.cost.usd)}`}
      </dd>
    </dl>
  );
}

function Actions({ task, pictures }: { task: Task; pictures: string[] }) {
  const known = asked.value[task.id];
  const vary = (): void => {
    load(known?.body ?? like(task), known?.pictures ?? []);
    document.getElementById("prompt")?.focus();
  };
  return (
    <>
      <div class="row">
        {task.task_info.can_cancel && (
          <button type="button" onClick={() => void cancel(task.id)}>
            {t("result.cancel")}
          </button>
        )}
        <button type="button" onClick={vary}>
          {t("result.vary")}
        </button>
        {known && (
          <button type="button" onClick={() => void generate(known.body, known.pictures)}>
            {t("result.rerun")}
          </button>
        )}
        {pictures.length > 1 && (
          <button type="button" onClick={() => downloadAll(task, pictures)}>
            {t("result.downloadAll")}
          </button>
        )}
      </div>
      {!known && <p class="fine">{t("result.noPrompt")}</p>}
      {pictures.length > 0 && <p class="fine">{t("result.links")}</p>}
    </>
  );
}

function like(task: Task): Body {
  const body: Body = { model: task.model, prompt: "" };
  if (task.size) body.size = task.size;
  if (task.quality) body.quality = task.quality;
  if (task.output_format) body.output_format = task.output_format;
  return body;
}

function fileName(task: Task, index: number): string {
  return `${task.id}-${index}.${task.output_format === "jpeg" ? "jpg" : (task.output_format ?? "png")}`;
}

function downloadAll(task: Task, pictures: string[]): void {
  pictures.forEach((url, index) => {
    const link = document.createElement("a");
    link.href = `${url}&download=1`;
    link.download = fileName(task, index);
    link.click();
  });
}
