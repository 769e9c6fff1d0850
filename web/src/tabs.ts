// Which view of the task is open.
import { signal } from "@preact/signals";

export const TABS = ["result", "route", "code"] as const;
export type Tab = (typeof TABS)[number];
export const tab = signal<Tab>("result");
