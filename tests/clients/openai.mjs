// openai-node, as an app uses it: pictures, edits, streams and errors.

import OpenAI, { toFile } from "openai";

import { failure, file, key, origin, report } from "./pictures.mjs";

const client = new OpenAI({ baseURL: `${origin}/v1`, apiKey: key, maxRetries: 0 });
const fox = { model: "gpt-image-2", prompt: "a fox", size: "1024x1024" };

const red = () => toFile(file("red.png"), "red.png", { type: "image/png" });
const green = () => toFile(file("green.webp"), "green.webp", { type: "image/webp" });
const mask = () => toFile(file("mask.png"), "mask.png", { type: "image/png" });

async function all(stream) {
  const events = [];
  for await (const event of stream) events.push(event);
  return events;
}

report({
  inside: await client.images.generate(fox),
  link: await client.images.generate({ ...fox, response_format: "url" }),
  one: await client.images.edit({ ...fox, image: await red() }),
  several: await client.images.edit({
    ...fox,
    image: [await red(), await green()],
    mask: await mask(),
    n: 2,
    output_format: "jpeg",
  }),
  generated: await all(
    await client.images.generate({ ...fox, stream: true, partial_images: 2 }),
  ),
  edited: await all(
    await client.images.edit({
      ...fox,
      image: await red(),
      stream: true,
      partial_images: 3,
    }),
  ),
  failures: {
    size: await failure(() => client.images.generate({ ...fox, size: "17:3" })),
    stream: await failure(() =>
      client.images.generate({ ...fox, model: "gpt-image-9", stream: true }),
    ),
    key: await failure(() =>
      client.withOptions({ apiKey: "sk-wrong" }).images.generate(fox),
    ),
    mask: await failure(async () =>
      client.images.edit({ ...fox, image: await red(), mask: await green() }),
    ),
  },
});
