// The gateway's own API, with the session's cookie in place of a key.

export type As = "key" | "admin";

/** A refusal, or a network that failed (status 0, code "network"). */
export class ApiError extends Error {
  constructor(
    message: string,
    readonly status: number,
    readonly code: string,
    readonly param: string | null = null,
    readonly requestId: string | null = null,
  ) {
    super(message);
  }
}

export interface Ask {
  as?: As;
  body?: unknown;
  headers?: Record<string, string>;
  signal?: AbortSignal;
}

export async function call<T>(method: string, path: string, ask: Ask = {}): Promise<T> {
  const headers: Record<string, string> = { "x-imageway-session": ask.as ?? "key", ...ask.headers };
  const init: RequestInit = { method, headers, credentials: "same-origin" };
  if (ask.body !== undefined) {
    headers["content-type"] = "application/json";
    init.body = JSON.stringify(ask.body);
  }
  if (ask.signal) init.signal = ask.signal;
  let answer: Response;
  let text: string;
  try {
    answer = await fetch(path, init);
    text = await answer.text();
  } catch (cause) {
    if (cause instanceof DOMException && cause.name === "AbortError") throw cause;
    throw unreachable();
  }
  if (!answer.ok) throw refusal(answer.status, text);
  return JSON.parse(text) as T;
}

const UPLOAD_PATH = "/api/v1/files/upload/stream";

export interface Uploaded {
  file_id: string;
  file_url: string;
}

/** Upload a file; `progress` hears shares from 0 to 1. */
export function upload(
  file: Blob,
  name: string,
  progress: (share: number) => void,
  signal?: AbortSignal,
): Promise<Uploaded> {
  // Only XMLHttpRequest tells how much of a body is out.
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    const form = new FormData();
    form.append("file", file, name);
    request.open("POST", UPLOAD_PATH);
    request.setRequestHeader("x-imageway-session", "key");
    request.upload.onprogress = (event) => {
      if (event.lengthComputable) progress(event.loaded / event.total);
    };
    request.onload = () => {
      if (request.status !== 200) reject(refusal(request.status, request.responseText));
      else resolve((JSON.parse(request.responseText) as { data: Uploaded }).data);
    };
    request.onerror = () => reject(unreachable());
    request.onabort = () => reject(new DOMException("aborted", "AbortError"));
    signal?.addEventListener("abort", () => request.abort());
    request.send(form);
  });
}

function unreachable(): ApiError {
  return new ApiError("", 0, "network");
}

function refusal(status: number, text: string): ApiError {
  try {
    const { error } = JSON.parse(text) as {
      error: { message: string; code: string; param: string | null; request_id: string };
    };
    return new ApiError(error.message, status, error.code, error.param, error.request_id);
  } catch {
    return new ApiError("", status, "network");
  }
}

/** A link to one of our files, as a path: whatever name the gateway goes by, it is here. */
export function here(url: string): string {
  const parsed = new URL(url, location.href);
  return parsed.pathname + parsed.search;
}

/** Something nobody else has; also where the page came without TLS. */
export function unique(): string {
  const bytes = crypto.getRandomValues(new Uint8Array(18));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}
