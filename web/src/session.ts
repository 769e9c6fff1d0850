// Who is at the keyboard.
import { signal } from "@preact/signals";
import { ApiError, call, type As, type Ask } from "./api";

export interface Session {
  key: string | null;
  admin: boolean;
  admin_enabled: boolean;
}

export const session = signal<Session | null>(null);
export const trouble = signal<ApiError | null>(null);
/** Whether the form for a key is open, beside a session or in place of one. */
export const entering = signal(false);

export async function readSession(): Promise<void> {
  session.value = await call<Session>("GET", "/ui/session");
}

export async function enter(key: string): Promise<void> {
  session.value = await call<Session>("POST", "/ui/session", { body: { key } });
  entering.value = false;
  trouble.value = null;
}

export async function leave(): Promise<void> {
  session.value = await call<Session>("DELETE", "/ui/session");
  trouble.value = null;
}

/** Call, and show what is refused; undefined then. A session that is over is left. */
export async function attempt<T>(
  method: string,
  path: string,
  ask: Ask & { as?: As } = {},
): Promise<T | undefined> {
  try {
    const answer = await call<T>(method, path, ask);
    return answer;
  } catch (error) {
    report(error);
    return undefined;
  }
}

const OVER = new Set(["missing_api_key", "key_disabled", "key_expired"]);

export function report(error: unknown): void {
  if (error instanceof DOMException && error.name === "AbortError") return;
  if (!(error instanceof ApiError)) throw error;
  // What was on its way when somebody logged out.
  if (OVER.has(error.code) && session.value && !session.value.key && !session.value.admin) return;
  trouble.value = error;
  if (error.status === 401 && OVER.has(error.code)) void readSession().catch(() => undefined);
}
