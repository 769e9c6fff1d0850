// openai-node while a stream breaks off: what it saw before, and the error it throws.

import OpenAI from "openai";

import { failure, key, origin, report } from "./pictures.mjs";

const client = new OpenAI({ baseURL: `${origin}/v1`, apiKey: key, maxRetries: 0 });
const events = [];
const error = await failure(async () => {
  const stream = await client.images.generate({
    model: "gpt-image-2",
    prompt: "a fox",
    stream: true,
    partial_images: 2,
  });
  for await (const event of stream) events.push(event.type);
});

report({ events, error });
