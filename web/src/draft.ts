// The request that is being written, and its price.
import { batch, computed, effect, signal } from "@preact/signals";
import { ApiError, call, here, upload } from "./api";
import { report, session } from "./session";
import { t } from "./words";

export const RATIOS = [
  "1:1", "4:3", "3:4", "3:2", "2:3", "16:9", "9:16", "21:9", "9:21",
  "5:4", "4:5", "2:1", "1:2", "3:1", "1:3",
];
export const TIERS = ["1K", "2K", "4K"];
export const FORMATS = ["png", "jpeg", "webp"];
export const REFERENCES_MAX = 16;
const FILE_MAX_BYTES = 50 * 1024 * 1024;
const PRICE_AFTER_MS = 120;

export interface Model {
  id: string;
  status: string;
  pricing: Record<string, number | string>;
  limits: { n: number; reference_images: number; qualities: string[]; default_quality: string };
}

export interface Body {
  model: string;
  prompt: string;
  size?: string;
  resolution?: string;
  quality?: string;
  n?: number;
  output_format?: string;
  image_urls?: string[];
  mask_url?: string;
}

export interface Reference {
  id: string;
  name: string;
  url: string;
  share: number;
  state: "uploading" | "ready" | "failed";
  fileId: string | null;
}

export interface Quote {
  credits: number;
  usd: number;
}

export interface Estimate {
  size: string;
  low: Quote;
  high: Quote;
}

export const models = signal<Model[]>([]);
export const model = signal("gpt-image-2");
export const prompt = signal("");
/** "auto", "custom", or a ratio. */
export const ratio = signal("auto");
export const tier = signal("1K");
export const width = signal("1024");
export const height = signal("1024");
export const quality = signal("medium");
export const count = signal(1);
export const format = signal("png");
export const references = signal<Reference[]>([]);
export const mask = signal<string | null>(null);

export const chosen = computed(() => models.value.find((each) => each.id === model.value));
export const hasTier = computed(() => ratio.value !== "auto" && ratio.value !== "custom");
export const uploading = computed(() => references.value.some((r) => r.state === "uploading"));

/** The request as it is sent, priced and shown as code: one object for all three. */
export const body = computed<Body>(() => {
  const made: Body = { model: model.value, prompt: prompt.value };
  made.size = ratio.value === "custom" ? `${width.value}x${height.value}` : ratio.value;
  if (hasTier.value) made.resolution = tier.value;
  made.quality = quality.value;
  made.n = count.value;
  made.output_format = format.value;
  const files = references.value.flatMap((each) => each.fileId ?? []);
  if (files.length) made.image_urls = files;
  if (files.length && mask.value) made.mask_url = mask.value;
  return made;
});

export const estimate = signal<Estimate | null>(null);
export const pricing = signal(false);
/** What is wrong with the request as it stands; the API says so. */
export const wrong = signal<ApiError | null>(null);

/** Ask for the price of every change of the request, once it has settled. */
export function watchPrice(): () => void {
  let timer = 0;
  let asked = new AbortController();
  return effect(() => {
    const wanted = body.value;
    if (!session.value?.key) return;
    pricing.value = true;
    clearTimeout(timer);
    asked.abort();
    const mine = (asked = new AbortController());
    timer = window.setTimeout(() => void price(wanted, mine.signal), PRICE_AFTER_MS);
  });
}

async function price(wanted: Body, signal: AbortSignal): Promise<void> {
  try {
    const found = await call<Estimate>("POST", "/v1/estimate", { body: wanted, signal });
    batch(() => {
      estimate.value = found;
      wrong.value = null;
      pricing.value = false;
    });
  } catch (error) {
    if (signal.aborted) return;
    batch(() => {
      estimate.value = null;
      pricing.value = false;
      if (error instanceof ApiError && error.status === 400) wrong.value = error;
    });
    if (!(error instanceof ApiError) || error.status !== 400) report(error);
  }
}

export async function readModels(): Promise<void> {
  const { data } = await call<{ data: Model[] }>("GET", "/v1/models");
  models.value = data.filter((each) => each.status === "available" || each.status === "deprecated");
  if (!chosen.value && models.value[0]) model.value = models.value[0].id;
}

export function choose(id: string): void {
  batch(() => {
    model.value = id;
    const limits = chosen.value?.limits;
    if (!limits) return;
    if (!limits.qualities.includes(quality.value)) quality.value = limits.default_quality;
    count.value = Math.min(count.value, limits.n);
  });
}

/** Take a request over, to change it. */
export function load(from: Body, pictures: Reference[]): void {
  batch(() => {
    model.value = from.model;
    prompt.value = from.prompt;
    const pixels = /^(\d+)x(\d+)$/.exec(from.size ?? "auto");
    ratio.value = pixels ? "custom" : (from.size ?? "auto");
    if (pixels) {
      width.value = pixels[1] ?? "";
      height.value = pixels[2] ?? "";
    }
    tier.value = from.resolution ?? "1K";
    quality.value = from.quality ?? "medium";
    count.value = from.n ?? 1;
    format.value = from.output_format ?? "png";
    references.value = pictures;
    mask.value = from.mask_url ?? null;
  });
}

/** Take files in, as far as they may be; returns what is to be said of the rest. */
export async function addFiles(files: Iterable<File>): Promise<string[]> {
  const refused: string[] = [];
  for (const file of files) {
    const why = await refusal(file);
    if (why) refused.push(why);
    else void send(file);
  }
  return refused;
}

async function refusal(file: File): Promise<string | null> {
  const name = file.name;
  const max = chosen.value?.limits.reference_images ?? REFERENCES_MAX;
  if (references.value.length >= max) return t("refs.tooMany", { max, name });
  if (file.size > FILE_MAX_BYTES) return t("refs.tooLarge", { name });
  const head = new Uint8Array(await file.slice(0, 12).arrayBuffer());
  return isPicture(head) ? null : t("refs.wrongType", { name });
}

function isPicture(head: Uint8Array): boolean {
  const text = String.fromCharCode(...head);
  return (
    text.startsWith("\x89PNG\r\n") ||
    text.startsWith("\xff\xd8\xff") ||
    (text.startsWith("RIFF") && text.slice(8) === "WEBP")
  );
}

let numbered = 0;

async function send(file: File): Promise<void> {
  const id = `ref-${(numbered += 1)}`;
  const url = URL.createObjectURL(file);
  const made: Reference = { id, name: file.name, url, share: 0, state: "uploading", fileId: null };
  references.value = [...references.value, made];
  try {
    const done = await upload(file, file.name, (share) => change(id, { share }));
    change(id, { state: "ready", share: 1, fileId: done.file_id, url: here(done.file_url) });
  } catch (error) {
    change(id, { state: "failed" });
    report(error);
  } finally {
    URL.revokeObjectURL(url);
  }
}

function change(id: string, to: Partial<Reference>): void {
  references.value = references.value.map((r) => (r.id === id ? { ...r, ...to } : r));
}

export function remove(id: string): void {
  batch(() => {
    if (references.value[0]?.id === id) mask.value = null;
    references.value = references.value.filter((each) => each.id !== id);
  });
}
