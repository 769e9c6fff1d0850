// The Vercel AI SDK's generateImage, with both of its providers that fit.

import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateImage } from "ai";

import { failure, file, key, origin, report } from "./pictures.mjs";

const account = { baseURL: `${origin}/v1`, apiKey: key };
const providers = {
  openai: createOpenAI(account),
  compatible: createOpenAICompatible({ name: "imageway", ...account }),
};

async function picturesOf(provider, more) {
  const { images, warnings } = await generateImage({
    model: provider.imageModel("gpt-image-2"),
    size: "1024x1024",
    maxRetries: 0,
    ...more,
  });
  return {
    warnings,
    pictures: images.map((image) => ({
      b64_json: image.base64,
      media_type: image.mediaType,
    })),
  };
}

async function everything(provider) {
  const images = [file("red.png"), file("green.webp")];
  return {
    plain: await picturesOf(provider, { prompt: "a fox" }),
    several: await picturesOf(provider, { prompt: "a fox", n: 2 }),
    one: await picturesOf(provider, {
      prompt: { text: "a fox", images: images.slice(0, 1) },
    }),
    masked: await picturesOf(provider, {
      prompt: { text: "a fox", images, mask: file("mask.png") },
    }),
    failure: await failure(() =>
      picturesOf(provider, { prompt: "a fox", size: "1000x1000" }),
    ),
  };
}

report({
  openai: await everything(providers.openai),
  compatible: await everything(providers.compatible),
});
