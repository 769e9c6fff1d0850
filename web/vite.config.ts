// Builds the pages into the gateway's package, with a packed twin of every file.
import { readdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { brotliCompressSync, constants, gzipSync } from "node:zlib";
import { defineConfig, type Plugin } from "vite";

const OUT = "../gateway/pages";
const PACKED = /\.(js|css|html|svg)$/;
const PACKED_MIN_BYTES = 512;

const packed: Plugin = {
  name: "packed-twins",
  apply: "build",
  closeBundle() {
    const out = join(import.meta.dirname, OUT);
    for (const name of readdirSync(out, { recursive: true, encoding: "utf8" })) {
      if (!PACKED.test(name)) continue;
      const plain = readFileSync(join(out, name));
      if (plain.length < PACKED_MIN_BYTES) continue;
      const brotli = { params: { [constants.BROTLI_PARAM_QUALITY]: 11 } };
      writeFileSync(join(out, `${name}.br`), brotliCompressSync(plain, brotli));
      writeFileSync(join(out, `${name}.gz`), gzipSync(plain, { level: 9 }));
    }
  },
};

export default defineConfig({
  plugins: [packed],
  build: {
    outDir: OUT,
    emptyOutDir: true,
    target: "es2022",
    // Nothing inline: the pages' security policy allows files of our own only.
    assetsInlineLimit: 0,
    modulePreload: { polyfill: false },
  },
});
