// The request as code that runs as it stands.
import type { Body } from "./draft";

export type Language = "curl" | "python" | "javascript";
export const LANGUAGES: Record<Language, string> = {
  curl: "curl",
  python: "Python",
  javascript: "JavaScript",
};
const WAIT_S = 300;
/** Fields that the OpenAI library has no argument for. */
const EXTRA = new Set(["resolution", "image_urls", "mask_url"]);

export function snippet(language: Language, body: Body, origin: string): string {
  const whole = { ...body, response_format: "url" };
  const url = `${origin}/v1`;
  // References make it a task, unless it is said that the answer is waited for.
  const waits = body.image_urls ? `wait=${WAIT_S}` : null;
  if (language === "curl") return curl(whole, url, waits);
  return language === "python" ? python(whole, url, waits) : javascript(whole, url, waits);
}

function curl(body: object, url: string, waits: string | null): string {
  const quoted = JSON.stringify(body, null, 2).replaceAll("'", `'\\''`);
  return [
    `curl -sS ${url}/images/generations \\`,
    `  -H "Authorization: Bearer $IMAGEWAY_KEY" \\`,
    `  -H "Content-Type: application/json" \\`,
    ...(waits ? [`  -H "Prefer: ${waits}" \\`] : []),
    `  -d '${quoted}'`,
  ].join("\n");
}

function python(body: object, url: string, waits: string | null): string {
  const fields = Object.entries(body);
  const plain = fields.filter(([name]) => !EXTRA.has(name));
  const extra = Object.fromEntries(fields.filter(([name]) => EXTRA.has(name)));
  return [
    "import os",
    "",
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${JSON.stringify(url)}, api_key=os.environ["IMAGEWAY_KEY"])`,
    "answer = client.images.generate(",
    ...plain.map(([name, value]) => `    ${name}=${literal(value)},`),
    ...(Object.keys(extra).length ? [`    extra_body=${literal(extra)},`] : []),
    ...(waits ? [`    extra_headers={"Prefer": "${waits}"},`] : []),
    ")",
    "for image in answer.data:",
    "    print(image.url)",
  ].join("\n");
}

/** JSON is Python too, as long as it holds only texts, numbers, lists and objects. */
function literal(value: unknown): string {
  return JSON.stringify(value);
}

function javascript(body: object, url: string, waits: string | null): string {
  const json = JSON.stringify(body, null, 2).replaceAll("\n", "\n  ");
  return [
    `const answer = await fetch("${url}/images/generations", {`,
    '  method: "POST",',
    "  headers: {",
    "    Authorization: `Bearer ${process.env.IMAGEWAY_KEY}`,",
    '    "Content-Type": "application/json",',
    ...(waits ? [`    Prefer: "${waits}",`] : []),
    "  },",
    `  body: JSON.stringify(${json}),`,
    "});",
    "const task = await answer.json();",
    "if (!answer.ok) throw new Error(task.error.message);",
    "for (const image of task.data) console.log(image.url);",
  ].join("\n");
}
