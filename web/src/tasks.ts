// The tasks of the last hours, as the server has them.
import { computed, effect, signal } from "@preact/signals";
import { call, unique, type ApiError } from "./api";
import { type Body, type Reference } from "./draft";
import { kept } from "./kept";
import { attempt, report, session } from "./session";

export const HISTORY_MAX = 20;
const POLL_MS = 400;
const POLL_LATER_MS = 1500;
const POLL_LATER_AFTER_MS = 8000;
const HIDDEN_MS = 5000;
const BODIES_MAX = 40;

export interface Usage {
  input_tokens?: number;
  output_tokens?: number;
  input_tokens_details?: { text_tokens: number; image_tokens: number; cached_tokens?: number };
  estimated?: boolean;
  credits_reserved: number;
  credits_used?: number;
  cost?: { credits: number; usd: number };
}

export interface Task {
  id: string;
  created: number;
  model: string;
  status: "pending" | "processing" | "completed" | "failed" | "cancelled";
  progress: number;
  task_info: { can_cancel: boolean };
  size?: string;
  quality?: string;
  output_format?: string;
  usage: Usage;
  results?: string[];
  error?: { code: string; message: string };
}

interface Line {
  id: string;
  status: string;
}

/** What was asked for, kept here by task: the server keeps no prompts. */
export const asked = kept<Record<string, { body: Body; pictures: Reference[] }>>("asked", {});
export const tasks = signal<Task[] | null>(null);
export const open = signal<string | null>(null);
export const sending = signal(false);
export const balance = signal<number | null>(null);
export const current = computed(() => tasks.value?.find((each) => each.id === open.value) ?? null);
export const running = computed(() => (tasks.value ?? []).filter(isRunning));

export function isRunning(task: Task): boolean {
  return task.status === "pending" || task.status === "processing";
}

export async function refresh(): Promise<void> {
  const query = `?page_size=${HISTORY_MAX}`;
  const listed = await attempt<{ data: Line[] }>("GET", `/v1/tasks${query}`);
  if (!listed) return;
  const ids = listed.data.map((each) => each.id);
  if (open.value && !ids.includes(open.value)) ids.push(open.value);
  await read(ids, true);
  void readBalance();
}

let sought = "";

/** Read the open task, if it is older than what is listed. */
export async function readOpen(): Promise<void> {
  const id = open.value;
  if (!id || !tasks.value || current.value || id === sought) return;
  sought = id; // once: it may be another tenant's, or not there any more
  await read([id]);
}

async function read(ids: string[], all = false): Promise<void> {
  if (!ids.length) {
    if (all) tasks.value = [];
    return;
  }
  const body = { task_ids: ids };
  const found = await call<{ data: Task[] }>("POST", "/v1/tasks/batch", { body });
  const fresh = new Map(found.data.map((each) => [each.id, each]));
  const others = all ? [] : (tasks.value ?? []).filter((each) => !fresh.has(each.id));
  tasks.value = [...fresh.values(), ...others].sort(
    (a, b) => b.created - a.created || (a.id < b.id ? 1 : -1),
  );
}

export async function readBalance(): Promise<void> {
  const found = await attempt<{ data: { user: { remaining_credits: number } } }>("GET", "/v1/credits");
  balance.value = found?.data.user.remaining_credits ?? null;
}

/** Have a task made. The same key is never bought twice, whatever the network does. */
export async function generate(body: Body, pictures: Reference[]): Promise<void> {
  sending.value = true;
  const headers = { prefer: "respond-async", "idempotency-key": `ui-${unique()}` };
  try {
    const task = await attempt<Task>("POST", "/v1/images/generations", { body, headers });
    if (!task) return;
    const newest = Object.entries(asked.value).slice(-BODIES_MAX + 1);
    asked.value = { ...Object.fromEntries(newest), [task.id]: { body, pictures } };
    tasks.value = [task, ...(tasks.value ?? [])];
    show(task.id);
    void readBalance();
  } finally {
    sending.value = false;
  }
}

export async function cancel(id: string): Promise<void> {
  await attempt("POST", `/v1/tasks/${id}/cancel`);
  await read([id]).catch(report);
  void readBalance();
}

export function show(id: string | null): void {
  history.replaceState(null, "", id ? `#/t/${id}` : "#/");
  open.value = id;
}

/** Ask for what is under way until it is over. */
export function watchTasks(): () => void {
  let timer = 0;
  let since = 0;
  let watched = "";
  const look = async (): Promise<void> => {
    const ids = running.value.map((each) => each.id);
    const failed = await read(ids).then(
      () => null,
      (error: ApiError) => error,
    );
    if (failed && failed.status !== 0) report(failed);
    else if (running.value.length) again();
    if (running.value.length < ids.length) void readBalance();
  };
  const again = (): void => {
    clearTimeout(timer);
    const late = Date.now() - since > POLL_LATER_AFTER_MS;
    const wait = document.hidden ? HIDDEN_MS : late ? POLL_LATER_MS : POLL_MS;
    timer = window.setTimeout(() => void look(), wait);
  };
  return effect(() => {
    const ids = running.value.map((each) => each.id).join();
    if (ids === watched || !session.value?.key) return;
    watched = ids;
    since = Date.now();
    if (ids) again();
  });
}
