// The pictures that the scripts send, and what they tell of those that come.

import { readFileSync } from "node:fs";

const folder = process.env.IMAGEWAY_PICTURES;

export const origin = process.env.IMAGEWAY_URL;
export const key = process.env.IMAGEWAY_KEY;

export const file = (name) => readFileSync(`${folder}/${name}`);

// Prints the one JSON object that a script is run for.
export const report = (seen) => process.stdout.write(JSON.stringify(seen));

// What a failed call looks like to the program that made it.
export async function failure(call) {
  try {
    await call();
  } catch (error) {
    return {
      name: error.constructor.name,
      status: error.status ?? error.statusCode,
      code: error.code,
      type: error.type,
      param: error.param,
      message: error.message,
    };
  }
  return null;
}
